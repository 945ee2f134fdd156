//! `concertina policies`.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use concertina::report::PoliciesReport;

use super::args::Global;
use super::output::Output;

/// List the methods that --compress knows besides codecs
///
/// Besides the bytes of a page, a cache can shrink in three dimensions: layers that share a cache, KV heads that keep little,
/// and tokens that leave. The list has every method with its parameters, their defaults, and the paper it comes from.
/// Letters stand for what can be chosen. `concertina codecs` lists the rest. Needs no GPU and no model.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina policies
  concertina policies --json - | jq '.policies[] | [.dimension, .syntax, .source]'")]
pub(super) struct PoliciesArgs {}

/// Lists policies.
pub(super) fn run(global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let report = PoliciesReport::new();
    output.text(&report)?;
    output.json(&report)?;
    Ok(ExitCode::SUCCESS)
}
