//! `concertina bench all`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use clap::Args;
use concertina::device::Device;
use concertina::engine::bench::TimedRuns;
use concertina::eval::kernels::{KernelPlan, Roof, cases};
use concertina::report::{CeilingsReport, DeviceReport, KernelsReport, Origin};
use serde::Serialize;

use super::super::args::Global;
use super::super::failure::usage;
use super::super::output::Output;
use super::device;
use super::kernels::{self, SizesArg, refused};
use super::record::Record;

/// Everything that a record of this device consists of, written to files
///
/// Ceilings, then every kernel: what `bench device` and `bench kernels` measure, one after the other. Figures are written as they
/// come, so that a run which is cut leaves those that it had. Below DIR, in a folder named after the device, the files
/// `<date>-<commit>` end in .csv (figures), .device.json, .kernels.json and .svg (rooflines).
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina bench all --record benches/record
  concertina bench all --record out --commit 1a2b3c4 --seconds 3")]
pub(super) struct AllArgs {
    /// Folder of records
    #[arg(long, value_name = "DIR")]
    record: PathBuf,

    /// The commit that this program was built from, where neither its build nor git can tell
    #[arg(long, value_name = "COMMIT")]
    commit: Option<String>,

    /// How large cases are; by default `full`, and `small` on processors that pretend to be a GPU
    #[arg(long, value_enum, value_name = "SIZES")]
    sizes: Option<SizesArg>,

    /// Time of one kernel and case; those that take longer are still measured 5 times
    #[arg(long, value_name = "SECONDS", value_parser = kernels::seconds)]
    seconds: Option<f64>,
}

/// Times that each ceiling is measured.
const REPEATS: usize = 20;

/// What `--json` gets.
#[derive(Serialize)]
struct AllReport {
    kind: &'static str,
    device: CeilingsReport,
    kernels: KernelsReport,
}

/// Measures everything.
pub(super) fn run(args: &AllArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let origin = Origin::now(args.commit.as_deref()).map_err(usage)?;
    let device = Device::open(&global.adapter()?)?;
    let record = Record::open(&args.record, &device.summary().name, origin)?;
    let ceilings = device::measure(&device, false, REPEATS, &output)?;
    let mut written = vec![record.beside("device.json", &json(&ceilings)?)?];
    let roof = Roof {
        read_bytes_per_s: ceilings.ceilings.read_bytes_per_s.median,
        copy_bytes_per_s: ceilings.ceilings.copy_bytes_per_s.median,
        flop_per_s: ceilings.ceilings.flop_per_s.median,
    };
    let mut plan = KernelPlan::of(&device);
    plan.sizes = args.sizes.map_or(plan.sizes, Into::into);
    plan.protocol.seconds = args.seconds.unwrap_or(plan.protocol.seconds);
    output.text(&"\n")?;
    let tuned = global.tuned(&device)?;
    plan.tuning = Arc::clone(&tuned.tuning);
    let device_report = DeviceReport::new(&device, Some(TimedRuns::new(&device)?.clock())).tuned_by(&tuned.source);
    let report = kernels::measure((&device, device_report), &plan, roof, &cases(plan.sizes), &output, Some(&record))?;
    output.text(&format!("\n{report}"))?;
    written.push(record.figures(&report)?);
    written.push(record.beside("kernels.json", &json(&report)?)?);
    written.push(record.beside("svg", report.svg().as_bytes())?);
    output.text(&format!(
        "\nwritten: {}\n",
        written.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
    ))?;
    let code = refused(&report);
    output.json(&AllReport { kind: "bench all", device: ceilings, kernels: report })?;
    Ok(code)
}

fn json(report: &impl Serialize) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(report).context("the report can not be written as JSON")?;
    text.push(b'\n');
    Ok(text)
}
