//! `concertina eval perplexity`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, anyhow};
use clap::Args;
use concertina::compression::Compression;
use concertina::device::Device;
use concertina::engine::EngineConfig;
use concertina::eval::perplexity::{self, Perplexity};
use concertina::geometry::Bytes;
use concertina::reference::transformer::ReferenceModel;
use concertina::report::{DeviceReport, PerplexityReport, PerplexityRow, Program};

use super::args::{CacheArgs, CalibrateArg, DEFAULT_CHUNK, Global, ModelArg, budget, chooses, token_count};
use super::failure::usage;
use super::load::{Model, calibrate, context_for, engine, read_text};
use super::output::Output;
use super::progress;
use super::resume::{ResumeArg, Resumed, fingerprint};

/// Perplexity of a text in windows
///
/// The text is cut into windows of equal length, each read from its own start. The first half of a window is the
/// document, behind which tokens are evicted where a compression does; the tokens of the second half are predicted:
/// perplexity is exp of their mean negative log-likelihood (nll), so lower is better.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina eval perplexity --model model.gguf --text essay.txt --window 256 --max-windows 8
  concertina eval perplexity --model model.gguf --text essay.txt --compress full kivi4 kivi2 h2o:0.25
  concertina eval perplexity --model model.gguf --text essay.txt --reference --json perplexity.json")]
pub(super) struct PerplexityArgs {
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

    /// Also run the CPU reference over a full cache in f64, which is slow
    #[arg(long)]
    reference: bool,

    /// Device bytes for the cache, tables, scratch and staging; weights are apart
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = budget)]
    kv_budget: Bytes,

    #[command(flatten)]
    cache: CacheArgs,

    /// Compressions to measure, each as for `run`
    #[arg(long, value_name = "METHODS", num_args = 1.., default_value = "full")]
    compress: Vec<Compression>,

    #[command(flatten)]
    resume: ResumeArg,

    #[command(flatten)]
    calibration: CalibrateArg,
}

/// Measures perplexity.
pub(super) fn run(args: &PerplexityArgs, global: &Global) -> Result<ExitCode> {
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
    for compression in &args.compress {
        if compression.layer.skip_from(model.geometry().num_layers).map_err(usage)?.is_some() {
            let skipping = compression.short();
            return Err(usage(format!("{skipping}: rows of a prompt that skip layers predict nothing; use eval kl")));
        }
    }
    let tokens = model.tokenizer.encode(&text, false)?;
    let path = args.text.display();
    let windows = perplexity::windows(&tokens, args.window as usize, args.max_windows)
        .map_err(|sentence| anyhow!("'{path}': {sentence}"))?;
    let codecs = args.cache.codecs(&args.compress, model.geometry())?;
    let evictions = args.cache.evictions(&args.compress, &model, 1)?;
    let settings = serde_json::json!({
        "measure": "eval perplexity",
        "model": model.identity()?,
        "text": fingerprint(text.as_bytes()),
        "window_tokens": args.window,
        "compress": args.compress.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "page_tokens": args.cache.page_size,
        "head_scores": args.cache.head_scores_fingerprint()?,
        "calibrate": args.calibration.fingerprint()?,
    });
    let mut resumed = Resumed::open(&args.resume, &settings)?;
    let device = Device::open(&request)?;
    let tuned = global.tuned(&device)?;
    let weights = model.weights()?;
    let chunk = DEFAULT_CHUNK.min(args.window);
    let text_of_bases = args.calibration.calibrate.as_deref();
    let config = EngineConfig {
        budget: args.kv_budget,
        max_rows: chunk,
        max_sessions: 1,
        // Logits of every row are read back.
        max_logit_rows: chunk,
        context_length: context_for(args.window, text_of_bases, longest),
        page_size: args.cache.page_size,
        codecs,
        chooses: chooses(&args.compress),
        evictions,
        swap_chunk: Bytes::ZERO,
        max_arena: None,
    };
    let (mut engine, mut caches) = engine(&device, &weights, &config, &tuned)?;
    calibrate(&mut engine, &mut caches, &model, &config, text_of_bases)?;
    let device_report = DeviceReport::new(&device, None).tuned_by(&tuned.source);
    let model_report = model.report(Some(engine.weight_bytes()));
    output.text(&format!("device  {device_report}\nmodel   {model_report}\n\n"))?;

    let started = Instant::now();
    let n_caches = args.compress.len();
    let bar = progress::work("windows", (windows.len() * n_caches) as u64);
    let mut nll: Vec<Vec<f64>> = vec![Vec::new(); n_caches];
    // A unit is a window over all caches, so that more windows can follow.
    for (index, window) in windows.iter().enumerate() {
        if let Some(kept) = resumed.unit::<Vec<f64>>(index)? {
            nll.iter_mut().zip(kept).for_each(|(nll, kept)| nll.push(kept));
            bar.inc(n_caches as u64);
            bar.reset_eta();
            continue;
        }
        for (compression, nll) in args.compress.iter().zip(&mut nll) {
            bar.set_message(compression.short());
            let of_window = perplexity::window_on_engine(&mut engine, &mut caches, compression, window, chunk as usize);
            if of_window.is_err() {
                bar.finish_and_clear();
            }
            nll.push(of_window?);
            bar.inc(1);
        }
        resumed.add(index, &nll.iter().filter_map(|nll| nll.last()).collect::<Vec<_>>())?;
    }
    bar.finish_and_clear();
    let elapsed_s = started.elapsed().as_secs_f64();
    let reference = args.reference.then(|| {
        let spinner = progress::spinner("the same on the CPU in f64");
        let result = perplexity::on_reference(&ReferenceModel::new(&weights), &windows);
        spinner.finish_and_clear();
        result
    });
    let row = |(compression, nll): (&Compression, Vec<f64>)| PerplexityRow {
        compression: compression.to_string(),
        measured: Perplexity::new(args.window as usize, nll),
    };
    let report = PerplexityReport {
        program: Program::THIS,
        device: device_report,
        model: model_report,
        text: path.to_string(),
        text_tokens: tokens.len(),
        results: args.compress.iter().zip(nll).map(row).collect(),
        reference,
        elapsed_s,
    };
    output.text(&report)?;
    output.json(&report)?;
    Ok(ExitCode::SUCCESS)
}
