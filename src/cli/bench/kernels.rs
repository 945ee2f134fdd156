//! `concertina bench kernels`.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::{Args, ValueEnum};
use concertina::device::Device;
use concertina::engine::bench::{BenchSettings, TimedRuns};
use concertina::engine::ceilings::{Ceiling, CeilingSizes, Ceilings};
use concertina::eval::ceilings;
use concertina::eval::kernels::{Candidates, Case, KernelBench, Protocol, Roof, Sizes, cases};
use concertina::eval::spread::WARM_UP;
use concertina::geometry::Bytes;
use concertina::report::{DeviceReport, KernelsReport, Program, kernel_line};

use super::super::args::Global;
use super::super::failure::usage;
use super::super::output::Output;
use super::super::progress;

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
  concertina bench kernels --only kivi4 int8 --candidates --seconds 3")]
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
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum SizesArg {
    /// Contexts of 4K to 128K tokens, 64K to 512K in all.
    Full,
    /// A few thousand tokens.
    Small,
}

/// Bytes that runs take turns over on a GPU: five times the largest cache of one that we know, 50 MB.
const COLD: Bytes = Bytes(250_000_000);
/// Times that each ceiling is measured.
const CEILING_REPEATS: usize = 20;

fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("'{text}' is not a number of seconds"))?;
    if seconds > 0.0 && seconds <= 3600.0 { Ok(seconds) } else { Err(format!("{text} is not between 0 and 3600")) }
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
    let device = Device::open(&global.adapter()?)?;
    let report = measure(args, &device, &output)?;
    let without = report.without_figure();
    output.text(&format!("\n{report}"))?;
    output.json(&report)?;
    if without > 0 {
        let all = report.rows.len();
        eprintln!(
            "error: {without} of {all} kernels have no figure, because their results are wrong or they do not run"
        );
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// Measures what the arguments name, showing each row as soon as it is there.
fn measure(args: &KernelsArgs, device: &Device, output: &Output) -> Result<KernelsReport> {
    let started = Instant::now();
    let software = device.summary().kind == "cpu";
    let by_kind = if software { Sizes::Small } else { Sizes::Full };
    let sizes = args.sizes.map_or(by_kind, Into::into);
    let cases = args.cases(sizes)?;
    let runs = TimedRuns::new(device)?;
    let device_report = DeviceReport::new(device, Some(runs.clock()));
    output.text(&format!("device  {device_report}\n"))?;
    let roof = roof(device, software)?;
    let (read, flop) = (roof.read_bytes_per_s * 1e-9, roof.flop_per_s * 1e-9);
    output.text(&format!("read    {read:.1} GB/s\nFLOP    {flop:.0} GFLOP/s\n\n"))?;
    let mut protocol = if software { Protocol::SOFTWARE } else { Protocol::FULL };
    protocol.seconds = args.seconds.unwrap_or(protocol.seconds);
    // A processor's caches are no larger than what one case reads there, and its memory may be small.
    let cold = if software { Bytes::ZERO } else { COLD };
    let settings = BenchSettings { cold, in_order: args.in_order, max_arena: None };
    let mut bench = KernelBench::new(runs, settings, protocol, roof);
    let candidates = if args.candidates { Candidates::All } else { Candidates::Chosen };
    let bar = progress::counter("kernels", cases.len() as u64);
    let mut rows = Vec::new();
    for case in &cases {
        bar.set_message(case.name());
        let mut shown = Ok(());
        let measured = bench.case(case, candidates, &mut |row| {
            let line = kernel_line(&row);
            shown = bar.suspend(|| output.text(&line));
            rows.push(row);
        });
        if measured.is_err() || shown.is_err() {
            bar.finish_and_clear();
        }
        measured?;
        shown?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(KernelsReport {
        kind: "bench kernels",
        program: Program::THIS,
        device: device_report,
        sizes,
        in_order: args.in_order,
        roof,
        rows,
        elapsed_s: started.elapsed().as_secs_f64(),
    })
}

/// The ceilings that kernels are compared with.
fn roof(device: &Device, software: bool) -> Result<Roof> {
    let spinner = progress::spinner("measuring the device's ceilings");
    let sizes = if software { CeilingSizes::SOFTWARE } else { CeilingSizes::FULL };
    let measured = Ceilings::new(device, sizes).and_then(|mut made| {
        let mut of = |ceiling| ceilings::ceiling(&mut made, ceiling, WARM_UP, CEILING_REPEATS);
        Ok([of(Ceiling::Read)?, of(Ceiling::Flop)?])
    });
    spinner.finish_and_clear();
    let [read, flop] = measured?.map(|measured| measured.value.median);
    Ok(Roof { read_bytes_per_s: read, flop_per_s: flop })
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
