//! `concertina eval`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, anyhow};
use clap::{Args, Subcommand};
use concertina::device::Device;
use concertina::engine::EngineConfig;
use concertina::eval::perplexity;
use concertina::geometry::Bytes;
use concertina::reference::transformer::ReferenceModel;
use concertina::report::{DeviceReport, PerplexityReport, Program};

use super::args::{
    CacheArgs, CalibrateArg, CompressArg, DEFAULT_CHUNK, Global, ModelArg, budget, chooses, token_count,
};
use super::failure::usage;
use super::kl::{self, KlArgs};
use super::load::{Model, calibrate, context_for, engine, read_text};
use super::needle::{self, NeedleArgs};
use super::output::Output;
use super::progress;

/// Measure how well a model predicts a text, and what compression costs
///
/// `perplexity` is for one cache: run it with and without compression, or on different devices. `kl` compares many
/// compressions with the full cache in one run, `needle` asks all of them for a sentence of a long document.
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

/// Perplexity of a text in windows
///
/// The text is cut into windows of equal length, each read from its own start. The first half of a window gives
/// context, the tokens of the second half are predicted: perplexity is exp of their mean negative log-likelihood
/// (nll), so lower is better.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina eval perplexity --model model.gguf --text essay.txt --window 256 --max-windows 8
  concertina eval perplexity --model model.gguf --text essay.txt --reference --json perplexity.json")]
struct PerplexityArgs {
    #[command(flatten)]
    model: ModelArg,

    /// The text, UTF-8
    #[arg(long, value_name = "FILE")]
    text: PathBuf,

    /// Tokens of a window
    #[arg(long, value_name = "TOKENS", default_value = "256", value_parser = token_count)]
    window: u32,

    /// Windows to use, from the beginning of the text
    #[arg(long, value_name = "N", default_value_t = 8)]
    max_windows: usize,

    /// Also run the CPU reference in f64, which is slow, and print the difference
    #[arg(long)]
    reference: bool,

    /// Device bytes for the cache, tables, scratch and staging; weights are apart
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = budget)]
    kv_budget: Bytes,

    #[command(flatten)]
    cache: CacheArgs,

    #[command(flatten)]
    compression: CompressArg,

    #[command(flatten)]
    calibration: CalibrateArg,
}

/// Evaluates.
pub(super) fn run(args: &EvalArgs, global: &Global) -> Result<ExitCode> {
    match &args.measure {
        Measure::Perplexity(args) => run_perplexity(args, global),
        Measure::Kl(args) => kl::run(args, global),
        Measure::Needle(args) => needle::run(args, global),
    }
}

fn run_perplexity(args: &PerplexityArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let request = global.adapter()?;
    if args.window < 4 || args.max_windows == 0 {
        let (window, max) = (args.window, args.max_windows);
        return Err(usage(format!("{max} windows of {window} tokens are too few; use at least 1 window of 4 tokens")));
    }
    let text = read_text("the text", &args.text)?;
    let model = Model::open(&args.model.model)?;
    let longest = model.geometry().context_length;
    if args.window > longest {
        let window = args.window;
        return Err(usage(format!("--window {window} is longer than the model's context of {longest} tokens")));
    }
    let tokens = model.tokenizer.encode(&text, false)?;
    let path = args.text.display();
    let windows = perplexity::windows(&tokens, args.window as usize, args.max_windows)
        .map_err(|sentence| anyhow!("'{path}': {sentence}"))?;
    let compression = &args.compression.compress;
    let codecs = args.cache.codecs(std::slice::from_ref(compression), model.geometry())?;
    let device = Device::open(&request)?;
    let weights = model.weights()?;
    let chunk = DEFAULT_CHUNK.min(args.window);
    let config = EngineConfig {
        budget: args.kv_budget,
        max_rows: chunk,
        max_sessions: 1,
        // Logits of every row are read back.
        max_logit_rows: chunk,
        context_length: context_for(args.window, args.calibration.calibrate.as_deref(), longest),
        page_size: args.cache.page_size,
        codecs,
        chooses: chooses(std::slice::from_ref(compression)),
        evictions: args.cache.evictions(std::slice::from_ref(compression), &model, 1)?,
        max_arena: None,
    };
    let (mut engine, mut caches) = engine(&device, &weights, &config)?;
    let text_of_bases = args.calibration.calibrate.as_deref();
    calibrate(&mut engine, &mut caches, &model, &config, text_of_bases)?;
    let device_report = DeviceReport::new(&device, None);
    let model_report = model.report(Some(engine.weight_bytes()));
    output.text(&format!("device  {device_report}\nmodel   {model_report}\n\n"))?;

    let started = Instant::now();
    let bar = progress::counter("windows", windows.len() as u64);
    let result =
        perplexity::on_engine(&mut engine, &mut caches, compression, &windows, chunk as usize, &mut |_, nll| {
            bar.set_message(format!("nll {nll:.4}"));
            bar.inc(1);
        });
    bar.finish_and_clear();
    let on_engine = result?;
    let elapsed_s = started.elapsed().as_secs_f64();
    let reference = args.reference.then(|| {
        let spinner = progress::spinner("the same on the CPU in f64");
        let result = perplexity::on_reference(&ReferenceModel::new(&weights), &windows);
        spinner.finish_and_clear();
        result
    });
    let report = PerplexityReport {
        program: Program::THIS,
        device: device_report,
        model: model_report,
        compression: compression.to_string(),
        text: path.to_string(),
        text_tokens: tokens.len(),
        relative_difference: reference.as_ref().map(|r| (on_engine.perplexity - r.perplexity).abs() / r.perplexity),
        engine: on_engine,
        reference,
        elapsed_s,
    };
    output.text(&report)?;
    output.json(&report)?;
    Ok(ExitCode::SUCCESS)
}
