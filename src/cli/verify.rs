//! `concertina verify`.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, anyhow};
use clap::Args;
use concertina::device::Device;
use concertina::eval::verify::{self, Check, Extent};
use concertina::report::{DeviceReport, Program, VerifyReport};

use super::args::Global;
use super::output::Output;
use super::progress;

/// Check every kernel on this device against the CPU
///
/// Runs each kernel on random data, over the shapes that models have, and compares every number with the same
/// computation in f64. An error is shown as a fraction of the bound that the arithmetic allows; above 1 the check has
/// failed, and so has the command. A driver that computes wrongly is found here.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina verify --quick
  concertina verify --device 1 --json verify.json")]
pub(super) struct VerifyArgs {
    /// Two shapes and short contexts only: seconds instead of minutes
    #[arg(long)]
    quick: bool,
}

/// Most failed checks that the final message names.
const NAMED_MAX: usize = 5;

/// Verifies kernels.
pub(super) fn run(args: &VerifyArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let device = Device::open(&global.adapter()?)?;
    let device_report = DeviceReport::new(&device, None);
    output.text(&format!("device  {device_report}\n\n"))?;
    let extent = if args.quick { Extent::Quick } else { Extent::Full };
    let started = Instant::now();
    let bar = progress::counter("checks", verify::count(device.tier(), extent) as u64);
    let result = verify::run(&device, extent, &mut |check: &Check| {
        bar.set_message(format!("{} {}", check.kernel, check.case));
        bar.inc(1);
    });
    bar.finish_and_clear();
    let checks = result?;
    let report = VerifyReport {
        program: Program::THIS,
        device: device_report,
        extent: if args.quick { "quick" } else { "full" },
        passed: !checks.is_empty() && checks.iter().all(Check::passed),
        checks,
        elapsed_s: started.elapsed().as_secs_f64(),
    };
    output.text(&report)?;
    output.json(&report)?;
    if report.passed {
        return Ok(ExitCode::SUCCESS);
    }
    let failed: Vec<_> = report.failed().map(|check| format!("{} ({})", check.kernel, check.case)).collect();
    let more = if failed.len() > NAMED_MAX { format!(" and {} more", failed.len() - NAMED_MAX) } else { String::new() };
    let named = failed[..failed.len().min(NAMED_MAX)].join(", ");
    Err(anyhow!("{} of {} checks failed: {named}{more}", failed.len(), report.checks.len()))
}
