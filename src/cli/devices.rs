//! `concertina devices`.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use concertina::device::{DeviceError, default_adapter, list_adapters};
use concertina::report::{DevicesReport, Program};

use super::args::Global;
use super::output::Output;

/// List the adapters that could be used
///
/// Shows each adapter with its index for `--device`, the tier that its features allow, and the limits that decide how
/// large caches can be. Fails when there is none.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina devices
  concertina devices --backend vulkan
  concertina devices --json - | jq '.adapters[].name'")]
pub(super) struct DevicesArgs {}

/// Lists adapters.
pub(super) fn run(global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let backend = global.backend();
    let adapters = list_adapters(backend.as_deref())?;
    let Some(default) = default_adapter(adapters.iter()) else {
        let backends = backend.unwrap_or_else(|| "vulkan, metal, dx12".to_owned());
        return Err(DeviceError::NoAdapter { backends }.into());
    };
    let default_adapter = adapters[default].name.clone();
    let report = DevicesReport { program: Program::THIS, adapters, default_adapter };
    output.text(&report)?;
    output.json(&report)?;
    Ok(ExitCode::SUCCESS)
}
