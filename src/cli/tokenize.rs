//! `concertina tokenize`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use concertina::compression::Compression;
use concertina::report::{Program, TokenReport, TokenizeReport};
use concertina::theory::predict::kv_bytes;

use super::args::{Global, ModelArg};
use super::load::{Model, read_text};
use super::output::Output;

/// Show the tokens of a text, and what so many cost in KV bytes
///
/// Needs no GPU and reads no weights. A marker such as `<|im_end|>` in the text is ordinary text, as it is in documents
/// and questions, unless --special makes it the control token.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina tokenize --model model.gguf 'Hello, world'
  concertina tokenize --model model.gguf --file book.txt --json - | jq .count_tokens
  concertina tokenize --model model.gguf --special '<|im_start|>user'")]
pub(super) struct TokenizeArgs {
    #[command(flatten)]
    model: ModelArg,

    /// The text
    #[arg(required_unless_present = "file", conflicts_with = "file", allow_hyphen_values = true)]
    text: Option<String>,

    /// Read the text from this file
    #[arg(long, value_name = "PATH")]
    file: Option<PathBuf>,

    /// Read markers of control tokens in the text as those tokens
    #[arg(long)]
    special: bool,
}

/// Tokenises a text.
pub(super) fn run(args: &TokenizeArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let text = match (&args.text, &args.file) {
        (_, Some(path)) => read_text("the text", path)?,
        (text, None) => text.clone().unwrap_or_default(),
    };
    let model = Model::open(&args.model.model)?;
    let tokenizer = &model.tokenizer;
    let tokens: Vec<TokenReport> = tokenizer
        .encode(&text, args.special)?
        .into_iter()
        .map(|id| {
            let marker = tokenizer.marker_text(id);
            let piece = marker.map_or_else(|| tokenizer.decode(&[id]), str::to_owned);
            TokenReport { id, piece, marker: marker.is_some() }
        })
        .collect();
    let count = tokens.len();
    let report = TokenizeReport {
        program: Program::THIS,
        model: model.report(None),
        tokens,
        count_tokens: count,
        kv_bytes: kv_bytes(model.geometry(), &Compression::default(), count as u64),
    };
    output.text(&report)?;
    output.json(&report)?;
    Ok(ExitCode::SUCCESS)
}
