//! `concertina presets`.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use concertina::report::PresetsReport;

use super::args::Global;
use super::output::Output;
use super::theory_args::PresetsArg;

/// List the models and GPUs that have names
///
/// Commands that compute with the theory take them by name. The list has what the theory needs of each: of a model its layers,
/// parameters and the bytes that a token leaves in its cache; of a GPU its memory, what it computes and moves at its peak, and
/// the critical intensity, at which computing takes as long as reading. Every line has its source. Needs no GPU and no model.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina presets
  concertina presets --presets my.toml
  concertina presets --json - | jq '.gpus[] | [.name, .critical_intensity, .source]'

A file for --presets:
  [[gpu]]
  name = \"mine\"
  gpu = \"My GPU\"
  memory_bytes = 24_000_000_000
  flops_per_s = 120e12
  memory_bytes_per_s = 960e9
  link_bytes_per_s = 31.5e9      # each way; or unified = true
  source = \"its data sheet\"")]
pub(super) struct PresetsArgs {
    #[command(flatten)]
    presets: PresetsArg,
}

/// Lists presets.
pub(super) fn run(args: &PresetsArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let report = PresetsReport::new(&args.presets.load()?);
    output.text(&report)?;
    output.json(&report)?;
    Ok(ExitCode::SUCCESS)
}
