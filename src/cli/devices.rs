//! `concertina devices`.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use concertina::device::{AdapterSummary, DeviceError, Tier, default_adapter, list_adapters};
use concertina::eval::tune::{EntryKey, Found, TuningFile, file_of_user};
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
    let file = file_of_user();
    let tunings = match &file {
        Some(path) => TuningFile::read(path)?,
        None => None,
    };
    let tuned = tunings.as_ref().zip(file.as_deref());
    let tuned_tiers = adapters.iter().map(|adapter| tuned_tiers(adapter, tuned)).collect::<Result<_>>()?;
    let tuning_file = file.as_ref().map(|path| path.display().to_string());
    let report = DevicesReport { program: Program::THIS, adapters, default_adapter, tuning_file, tuned_tiers };
    output.text(&report)?;
    output.json(&report)?;
    Ok(ExitCode::SUCCESS)
}

/// The tiers in which a file has a tuning for an adapter.
fn tuned_tiers(adapter: &AdapterSummary, file: Option<(&TuningFile, &Path)>) -> Result<Vec<String>> {
    let Some((file, path)) = file else { return Ok(Vec::new()) };
    let mut tiers = Vec::new();
    for tier in [Tier::Portable, Tier::Subgroup, Tier::Cooperative] {
        if let Found::Entry(_) = file.find(&EntryKey::of_adapter(adapter, tier), path)? {
            tiers.push(tier.to_string());
        }
    }
    Ok(tiers)
}
