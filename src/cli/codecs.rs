//! `concertina codecs`.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use concertina::geometry::PageGeometry;
use concertina::report::CodecsReport;

use super::args::{CacheArgs, Global};
use super::load::Model;
use super::output::Output;

/// Channels of a head where no model says so: those of most models.
const HEAD_DIM: u32 = 128;

/// List the codecs that --compress knows, and what each costs
///
/// A codec turns a full page of keys and values into fewer bytes. Bits per element count everything that a page holds:
/// codes, scales, minima and masks. With a model, so do its bytes per token, over all layers and KV heads; without one,
/// heads of 128 channels are assumed. Needs no GPU and reads no weights.
///
/// Rows without numbers say how codecs of a kind are written, with letters for what can be chosen; the rows below are
/// examples. Keys and values can differ: k:CODEC,v:CODEC.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina codecs
  concertina codecs --model model.gguf --page-size 128
  concertina codecs --json - | jq '.codecs[] | [.codec, .effective_bits]'
  concertina eval kl --model model.gguf --text essay.txt --compress int8 kivi4 k:kivi2,v:rot4")]
pub(super) struct CodecsArgs {
    /// GGUF file or Hugging Face repository, as for `run`, to count bytes for
    #[arg(long, value_name = "PATH|owner/name")]
    model: Option<String>,

    #[command(flatten)]
    cache: CacheArgs,
}

/// Lists codecs.
pub(super) fn run(args: &CodecsArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let model = args.model.as_deref().map(Model::open).transpose()?;
    let model = model.as_ref().map(|model| (model.geometry(), model.report(None)));
    let head_dim = model.as_ref().map_or(HEAD_DIM, |(geometry, _)| geometry.heads.head_dim);
    let report = CodecsReport::new(PageGeometry { page_size: args.cache.page_size, head_dim }, model);
    output.text(&report)?;
    output.json(&report)?;
    Ok(ExitCode::SUCCESS)
}
