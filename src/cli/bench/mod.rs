//! `concertina bench`.

mod all;
mod device;
mod kernels;
mod metrics;
mod record;
mod step;
mod switch;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand};
use concertina::geometry::ModelGeometry;

use super::args::Global;
use super::failure::usage;
pub(super) use kernels::seconds;

/// Measure speed on this device
///
/// Every figure is that of a run whose results were checked, after a warm-up. `device` is what the hardware gives at best;
/// `kernels` what single kernels make of it; `step` how decode steps of a model come near to reading
/// alone; `metrics` what a session costs, in the four ways that its context makes it cost; `switch` one of them in detail; `all`
/// what a record of this device consists of.
/// `concertina report` puts what they write beside what the theory predicts.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina bench device --json device.json
  concertina bench kernels --only decode
  concertina bench step --model model.gguf --batch 1 64 --compress full kivi4
  concertina bench metrics --model model.gguf --context 1024 4096 --compress full kivi4 --json metrics.json
  concertina bench switch --model model.gguf --tokens 8192 --compress full kivi4 h2o:0.25")]
pub(super) struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Clone, Debug, Subcommand)]
enum What {
    All(all::AllArgs),
    Device(device::DeviceArgs),
    Kernels(kernels::KernelsArgs),
    Metrics(metrics::MetricsArgs),
    Step(step::StepArgs),
    Switch(switch::SwitchArgs),
}

/// Measures.
pub(super) fn run(args: &BenchArgs, global: &Global) -> Result<ExitCode> {
    match &args.what {
        What::All(args) => all::run(args, global),
        What::Device(args) => device::run(args, global),
        What::Kernels(args) => kernels::run(args, global),
        What::Metrics(args) => metrics::run(args, global),
        What::Step(args) => step::run(args, global),
        What::Switch(args) => switch::run(args, global),
    }
}

/// The context of an engine in which the longest of these and `room` tokens that are decoded fit.
fn context_length(contexts: &[u32], room: usize, geometry: &ModelGeometry) -> Result<u32> {
    let room = u32::try_from(room).unwrap_or(u32::MAX);
    let longest = contexts.iter().copied().max().unwrap_or(0);
    let (wanted, trained) = (longest.saturating_add(room), geometry.context_length);
    if wanted > trained {
        return Err(usage(format!(
            "--context {longest} and {room} tokens to decode are more than the model's context of {trained}; give at \
             most --context {}",
            trained.saturating_sub(room)
        )));
    }
    Ok(wanted)
}
