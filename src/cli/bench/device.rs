//! `concertina bench device`.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use concertina::device::Device;
use concertina::engine::ceilings::{Ceiling, CeilingSizes, Ceilings};
use concertina::eval::ceilings;
use concertina::eval::kernels::ceiling_sizes;
use concertina::eval::spread::WARM_UP;
use concertina::report::{CeilingFigures, CeilingsReport, DeviceReport, Program};

use super::super::args::{Global, small_count};
use super::super::output::Output;
use super::super::progress;

/// What this device gives at best: memory, link, arithmetic, and the start of a kernel
///
/// The ceilings that predictions are made of. Memory is read and copied by kernels that do nothing else, FLOP/s are those of the
/// kernel that prompts run through, and every result is checked: a figure whose output is wrong is refused.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina bench device
  concertina bench device --device 1 --repeats 50 --json device.json")]
pub(super) struct DeviceArgs {
    /// Times that each is measured
    #[arg(long, value_name = "N", default_value = "20", value_parser = small_count)]
    repeats: u32,

    /// Little work and hardly a warm-up: to see that it runs, not how fast
    #[arg(long)]
    quick: bool,
}

/// Warm-up of `--quick`.
const HARDLY: Duration = Duration::from_millis(10);

/// Measures the ceilings.
pub(super) fn run(args: &DeviceArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let device = Device::open(&global.adapter()?)?;
    let report = measure(&device, args.quick, args.repeats as usize, &output)?;
    output.json(&report)?;
    Ok(ExitCode::SUCCESS)
}

/// Measures the ceilings of a device and shows them.
pub(super) fn measure(device: &Device, quick: bool, repeats: usize, output: &Output) -> Result<CeilingsReport> {
    let sizes = if quick { CeilingSizes::QUICK } else { ceiling_sizes(device) };
    let warm_up = if quick { HARDLY } else { WARM_UP };
    let started = Instant::now();
    let spinner = progress::spinner("preparing the device");
    let made = Ceilings::new(device, sizes);
    spinner.finish_and_clear();
    let mut made = made?;
    let device_report = DeviceReport::new(device, Some(made.clock()));
    output.text(&format!("device  {device_report}\n\n"))?;
    let bar = progress::counter("ceilings", Ceiling::ALL.len() as u64);
    let mut each = |ceiling: Ceiling| {
        bar.set_message(format!("{ceiling:?}").to_lowercase());
        let measured = ceilings::ceiling(&mut made, ceiling, warm_up, repeats);
        bar.inc(1);
        measured
    };
    let measured: Result<Vec<_>, _> = Ceiling::ALL.into_iter().map(&mut each).collect();
    bar.finish_and_clear();
    let report = CeilingsReport {
        kind: "bench device",
        program: Program::THIS,
        device: device_report,
        quick,
        sizes: made.sizes(),
        ceilings: CeilingFigures::new(&measured?),
        elapsed_s: started.elapsed().as_secs_f64(),
    };
    output.text(&report)?;
    Ok(report)
}
