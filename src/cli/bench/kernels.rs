//! `concertina bench kernels`.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow};
use clap::{Args, ValueEnum};
use concertina::device::Device;
use concertina::engine::bench::TimedRuns;
use concertina::eval::kernels::{self, Candidates, Case, KernelPlan, Roof, Sizes, cases};
use concertina::report::{Comparison, DeviceReport, KernelsReport, Origin, Program, RecordFigure, kernel_line};

use super::super::args::Global;
use super::super::failure::usage;
use super::super::output::{Output, OutputFile};
use super::super::progress;
use super::record::Record;

/// Single kernels against what the device gives at best
///
/// Each kernel runs by itself over inputs that no cache of the device still holds, timed by the device after a warm-up, and is
/// compared with the ceilings of reading and of arithmetic, which are measured first. Results are compared with f64 before and
/// after: where they are wrong there is no figure, and the exit code is not 0.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina bench kernels --list
  concertina bench kernels --only decode/16x32k/g4 --json kernels.json
  concertina bench kernels --only kivi4 int8 --candidates --seconds 3
  concertina bench kernels --record benches/record --svg roofline.svg
  concertina bench kernels --compare benches/record/a-gpu/2026-01-31-1a2b3c4.csv --tolerance 0.05")]
pub(super) struct KernelsArgs {
    /// Measure the cases whose names contain one of these texts
    #[arg(long, value_name = "TEXT", num_args = 1..)]
    only: Vec<String>,

    /// Name the cases and measure nothing
    #[arg(long)]
    list: bool,

    /// How large cases are; by default `full`, and `small` on processors that pretend to be a GPU
    #[arg(long, value_enum, value_name = "SIZES")]
    sizes: Option<SizesArg>,

    /// Measure every variant of a kernel rather than the one that the program uses
    #[arg(long)]
    candidates: bool,

    /// Time of one kernel and case; those that take longer are still measured 5 times
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    seconds: Option<f64>,

    /// Leave pages in the order in which the pool gave them; they are shuffled otherwise
    #[arg(long)]
    in_order: bool,

    /// Write the figures to DIR/<device>/<date>-<commit>.csv, each as soon as it is there
    #[arg(long, value_name = "DIR")]
    record: Option<PathBuf>,

    /// The commit that this program was built from, for a record, where neither its build nor git can tell
    #[arg(long, value_name = "COMMIT")]
    commit: Option<String>,

    /// Show the figures beside those of a record, and fail where one reaches less of its ceiling
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,

    /// How much less of its ceiling a figure may reach than that of the record, as a part of it
    #[arg(long, value_name = "PART", default_value_t = 0.1, value_parser = part, requires = "compare")]
    tolerance: f64,

    /// Draw a roofline of each kernel
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum SizesArg {
    /// Contexts of 4K to 128K tokens, 64K to 512K in all.
    Full,
    /// A few thousand tokens.
    Small,
}

pub(in super::super) fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("'{text}' is not a number of seconds"))?;
    if seconds > 0.0 && seconds <= 3600.0 { Ok(seconds) } else { Err(format!("{text} is not between 0 and 3600")) }
}

fn part(text: &str) -> Result<f64, String> {
    let part: f64 = text.parse().map_err(|_| format!("'{text}' is not a number"))?;
    if (0.0..1.0).contains(&part) { Ok(part) } else { Err(format!("{text} is not from 0 to below 1")) }
}

/// Measures kernels.
pub(super) fn run(args: &KernelsArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    if args.list {
        for case in args.cases(args.sizes.map_or(Sizes::Full, Into::into))? {
            output.text(&format!("{}\n", case.name()))?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    // What can be refused is refused before anything is measured.
    let then = args.compare.as_ref().map(read_record).transpose()?;
    let origin = match args.record.is_some() || then.is_some() {
        true => Some(Origin::now(args.commit.as_deref()).map_err(usage)?),
        false => None,
    };
    let svg = args.svg.as_deref().map(|path| OutputFile::open("the rooflines", path)).transpose()?;
    let device = Device::open(&global.adapter()?)?;
    let record = match (&args.record, &origin) {
        (Some(dir), Some(origin)) => Some(Record::open(dir, &device.summary().name, origin.clone())?),
        _ => None,
    };
    let mut plan = KernelPlan::of(&device);
    plan.sizes = args.sizes.map_or(plan.sizes, Into::into);
    plan.protocol.seconds = args.seconds.unwrap_or(plan.protocol.seconds);
    plan.settings.in_order = args.in_order;
    let tuned = global.tuned(&device)?;
    plan.tuning = Arc::clone(&tuned.tuning);
    plan.candidates = if args.candidates { Candidates::All } else { Candidates::Chosen };
    let cases = args.cases(plan.sizes)?;
    let spinner = progress::spinner("measuring the device's ceilings");
    let roof = Roof::measure(&device);
    spinner.finish_and_clear();
    let device_report = DeviceReport::new(&device, Some(TimedRuns::new(&device)?.clock())).tuned_by(&tuned.source);
    let report = measure((&device, device_report), &plan, roof?, &cases, &output, record.as_ref())?;
    output.text(&format!("\n{report}"))?;
    if let Some(record) = &record {
        output.text(&format!("\nwritten: {}\n", record.figures(&report)?.display()))?;
    }
    if let Some(svg) = svg {
        svg.write(report.svg().as_bytes())?;
    }
    let mut code = refused(&report);
    if let (Some(then), Some(origin)) = (then, &origin) {
        let compared = Comparison::new(then, &report.record(origin), args.tolerance).map_err(|e| anyhow!(e))?;
        output.text(&format!("\n{compared}"))?;
        if compared.worse() > 0 {
            eprintln!("error: {} figures are worse than the record allows", compared.worse());
            code = ExitCode::FAILURE;
        }
    }
    output.json(&report)?;
    Ok(code)
}

fn read_record(path: &PathBuf) -> Result<Vec<RecordFigure>> {
    let text = fs::read_to_string(path).with_context(|| format!("can not read the record '{}'", path.display()))?;
    RecordFigure::read(&text).map_err(|e| anyhow!("'{}' is not a record of figures: {e}", path.display()))
}

/// The exit code for a report: not 0 where a kernel has no figure.
pub(super) fn refused(report: &KernelsReport) -> ExitCode {
    let (without, all) = (report.without_figure(), report.rows.len());
    if without == 0 {
        return ExitCode::SUCCESS;
    }
    eprintln!("error: {without} of {all} kernels have no figure, because their results are wrong or they do not run");
    ExitCode::FAILURE
}

/// Measures cases, showing and recording each row as soon as it is there.
pub(super) fn measure(
    (device, device_report): (&Device, DeviceReport),
    plan: &KernelPlan,
    roof: Roof,
    cases: &[Case],
    output: &Output,
    record: Option<&Record>,
) -> Result<KernelsReport> {
    let started = Instant::now();
    let mut report = KernelsReport {
        kind: "bench kernels",
        program: Program::THIS,
        device: device_report,
        sizes: plan.sizes,
        in_order: plan.settings.in_order,
        roof,
        rows: Vec::new(),
        elapsed_s: 0.0,
    };
    let (read, flop) = (roof.read_bytes_per_s * 1e-9, roof.flop_per_s * 1e-9);
    output.text(&format!("device  {}\nread    {read:.1} GB/s\nFLOP    {flop:.0} GFLOP/s\n\n", report.device))?;
    let bar = progress::counter("kernels", cases.len() as u64);
    let mut shown = Ok(());
    let measured = kernels::measure(device, plan, roof, cases, &mut |row| {
        bar.set_message(row.case.clone());
        bar.set_position(cases.iter().take_while(|case| case.name() != row.case).count() as u64 + 1);
        let line = kernel_line(&row);
        report.rows.push(row);
        let now = bar.suspend(|| output.text(&line)).and_then(|()| match record {
            Some(record) => record.figures(&report).map(|_| ()),
            None => Ok(()),
        });
        if shown.is_ok() {
            shown = now;
        }
    });
    bar.finish_and_clear();
    measured?;
    shown?;
    report.elapsed_s = started.elapsed().as_secs_f64();
    Ok(report)
}

impl KernelsArgs {
    /// The cases that are asked for.
    fn cases(&self, sizes: Sizes) -> Result<Vec<Case>> {
        let mut all = cases(sizes);
        let named = |case: &Case, part: &String| case.name().contains(part.as_str());
        if let Some(part) = self.only.iter().find(|part| !all.iter().any(|case| named(case, part))) {
            return Err(usage(format!("no case is named '{part}'; see `concertina bench kernels --list`")));
        }
        all.retain(|case| self.only.is_empty() || self.only.iter().any(|part| named(case, part)));
        Ok(all)
    }
}

impl From<SizesArg> for Sizes {
    fn from(sizes: SizesArg) -> Self {
        match sizes {
            SizesArg::Full => Self::Full,
            SizesArg::Small => Self::Small,
        }
    }
}
