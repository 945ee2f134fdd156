//! `concertina calibrate`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, anyhow};
use clap::{Args, Subcommand, ValueEnum};
use concertina::compression::head::HeadScores;
use concertina::device::Device;
use concertina::engine::{EngineConfig, EvictionConfig};
use concertina::eval::heads::{self, CopyTask, HeadScore, HeadSettings};
use concertina::geometry::Bytes;
use concertina::kernels::registry::DEFAULT_PAGE_SIZE;
use concertina::model::Tokenizer;
use concertina::report::{DeviceReport, HeadsReport, Program};

use super::args::{DEFAULT_CHUNK, Global, ModelArg, budget, small_count};
use super::failure::usage;
use super::load::{Model, engine, read_text};
use super::output::{Output, OutputFile};
use super::progress;

/// Prose where no text is given.
pub(super) const PROSE: &str = include_str!("../../tests/golden/essay.txt");

/// Measure on a model what compressions choose by
///
/// `heads` finds the KV heads that look things up over the whole context: what `head=duo` and `head=prune` choose by.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina calibrate heads --model model.gguf --out heads.tsv
  concertina eval kl --model model.gguf --text book.txt --compress duo:0.5 --head-scores heads.tsv")]
pub(super) struct CalibrateArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Clone, Debug, Subcommand)]
enum What {
    Heads(HeadsArgs),
}

/// Score every KV head by how much it looks things up far back
///
/// The model reads random tokens twice, and keys planted in prose with questions about them. Heads that attend to what
/// followed the same token before, or to the key that an answer copies, need the whole cache; the others mostly read first
/// and recent tokens. The result is a file for --head-scores: a line per layer, a number per KV head.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina calibrate heads --model model.gguf --out heads.tsv
  concertina calibrate heads --model model.gguf --text book.txt --by reach --json heads.json")]
struct HeadsArgs {
    #[command(flatten)]
    model: ModelArg,

    /// Write the scores to this file; to the standard output where not given
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,

    /// Prose that keys are planted in, UTF-8; a short essay is built in
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,

    /// What scores a head
    #[arg(long, value_enum, value_name = "SCORE", default_value = "both")]
    by: By,

    /// Tokens of prose that keys are planted in
    #[arg(long, value_name = "TOKENS", default_value = "1024", value_parser = small_count)]
    prose: u32,

    /// Random tokens that are read twice
    #[arg(long, value_name = "TOKENS", default_value = "256", value_parser = small_count)]
    random: u32,

    /// Seed of random tokens and keys
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// Device bytes for the cache, tables, scratch and staging; weights are apart
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = budget)]
    kv_budget: Bytes,
}

/// What scores a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum By {
    /// How much it finds again: the larger of induction and copy
    Retrieval,
    /// How much of its attention to prose lies beyond first and recent tokens
    Reach,
    /// The sum of both
    Both,
}

impl From<By> for HeadScore {
    fn from(by: By) -> Self {
        match by {
            By::Retrieval => Self::Retrieval,
            By::Reach => Self::Reach,
            By::Both => Self::Both,
        }
    }
}

/// Calibrates.
pub(super) fn run(args: &CalibrateArgs, global: &Global) -> Result<ExitCode> {
    match &args.what {
        What::Heads(args) => run_heads(args, global),
    }
}

/// Tokens that stand for words: no markers, no parts of characters, nothing but letters around a space.
fn words(tokenizer: &Tokenizer) -> Vec<u32> {
    let is_word = |id: &u32| {
        let piece = tokenizer.decode(&[*id]);
        let word = piece.strip_prefix(' ').unwrap_or(&piece);
        tokenizer.marker_text(*id).is_none() && word.chars().count() > 1 && word.chars().all(char::is_alphabetic)
    };
    (0..tokenizer.vocab_size()).filter(is_word).collect()
}

fn run_heads(args: &HeadsArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let out = args.out.as_deref().map(|path| OutputFile::open("the head scores", path)).transpose()?;
    let request = global.adapter()?;
    let prose = match &args.text {
        Some(path) => read_text("the text", path)?,
        None => PROSE.to_owned(),
    };
    let model = Model::open(&args.model.model)?;
    let vocabulary = words(&model.tokenizer);
    if vocabulary.is_empty() {
        return Err(anyhow!("the vocabulary of '{}' has no words to draw from", model.name()));
    }
    let settings =
        HeadSettings { seed: args.seed, random_tokens: args.random as usize, rows: 64, sink: 64, recent: 256 };
    let encode = |text: &str| model.tokenizer.encode(text, false);
    let task = CopyTask::new(&encode, &encode(&prose)?, args.prose as usize, args.seed)?;
    let longest = model.geometry().context_length;
    let n_tokens = task.tokens.len().max(2 * settings.random_tokens);
    let context = u32::try_from(n_tokens).ok().filter(|n| *n <= longest).ok_or_else(|| {
        usage(format!(
            "{n_tokens} tokens are more than the model's context of {longest}; give less --prose or --random"
        ))
    })?;
    let device = Device::open(&request)?;
    let tuned = global.tuned(&device)?;
    let weights = model.weights()?;
    let config = EngineConfig {
        budget: args.kv_budget,
        max_rows: DEFAULT_CHUNK,
        max_sessions: 1,
        max_logit_rows: 1,
        context_length: context,
        page_size: DEFAULT_PAGE_SIZE,
        codecs: Vec::new(),
        chooses: false,
        evictions: Some(EvictionConfig { slots: 1, ..EvictionConfig::default() }),
        swap_chunk: Bytes::ZERO,
        max_arena: None,
    };
    let (mut engine, mut caches) = engine(&device, &weights, &config, &tuned)?;
    drop(weights);
    let started = Instant::now();
    let bar = progress::work("reading", heads::work(&task, &settings) as u64);
    let result =
        heads::measure(&mut engine, &mut caches, &vocabulary, &task, &settings, DEFAULT_CHUNK as usize, &mut |n| {
            bar.inc(n as u64);
        });
    bar.finish_and_clear();
    let measured = result?;
    let by = HeadScore::from(args.by);
    let report = HeadsReport {
        program: Program::THIS,
        device: DeviceReport::new(&device, None).tuned_by(&tuned.source),
        model: model.report(Some(engine.weight_bytes())),
        text: args.text.as_ref().map(|path| path.display().to_string()),
        settings,
        scores: measured.scores(by),
        measured,
        by: by.name().to_owned(),
        elapsed_s: started.elapsed().as_secs_f64(),
    };
    let file = file(args, &model, &report);
    match out {
        Some(out) => {
            out.write(file.as_bytes())?;
            output.text(&report)?;
        }
        None => output.text(&file)?,
    }
    output.json(&report)?;
    Ok(ExitCode::SUCCESS)
}

/// The file that `--head-scores` reads, with the command that made it.
fn file(args: &HeadsArgs, model: &Model, report: &HeadsReport) -> String {
    let geometry = model.geometry();
    #[expect(clippy::cast_possible_truncation, reason = "four decimals are more than the measurement is good for")]
    let scores = report.scores.iter().map(|score| ((score * 1e4).round() / 1e4) as f32).collect();
    let scores = HeadScores {
        num_layers: geometry.num_layers,
        num_kv_heads: geometry.heads.num_kv_heads,
        scores,
        model: Some(model.name()),
        kind: Some(report.by.clone()),
    };
    let by = args.by.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
    let HeadsArgs { prose, random, seed, .. } = args;
    let text = if args.text.is_some() { " --text FILE" } else { "" };
    let command = format!("concertina calibrate heads --by {by} --prose {prose} --random {random} --seed {seed}{text}");
    format!("# {command}\n{scores}")
}
