//! `concertina eval`.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand};

use super::args::Global;
use super::kl::{self, KlArgs};
use super::needle::{self, NeedleArgs};
use super::perplexity::{self, PerplexityArgs};

/// Measure how well a model predicts a text, and what compression costs
///
/// `perplexity` is how well a text is predicted, `kl` compares what is predicted with what the full cache says, and
/// `needle` asks for a sentence of a long document; each over as many compressions as are given.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina eval perplexity --model model.gguf --text essay.txt
  concertina eval perplexity --model model.gguf --text essay.txt --window 512 --reference
  concertina eval kl --model model.gguf --text essay.txt --compress int8 kivi4 rot3 --svg kl.svg
  concertina eval needle --model model.gguf --compress duo:0.5 snapkv:0.25 --lengths 512,2048")]
pub(super) struct EvalArgs {
    #[command(subcommand)]
    measure: Measure,
}

#[derive(Clone, Debug, Subcommand)]
enum Measure {
    Perplexity(PerplexityArgs),
    Kl(KlArgs),
    Needle(NeedleArgs),
}

/// Evaluates.
pub(super) fn run(args: &EvalArgs, global: &Global) -> Result<ExitCode> {
    match &args.measure {
        Measure::Perplexity(args) => perplexity::run(args, global),
        Measure::Kl(args) => kl::run(args, global),
        Measure::Needle(args) => needle::run(args, global),
    }
}
