//! `concertina eval kl`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, anyhow};
use clap::{Args, ValueEnum};
use concertina::compression::Compression;
use concertina::device::Device;
use concertina::eval::kl::{self, Progress};
use concertina::geometry::Bytes;
use concertina::report::{DeviceReport, KlReport, Program};

use super::args::{CacheArgs, CalibrateArg, DEFAULT_CHUNK, Global, ModelArg, budget, small_count, token_count};
use super::kl_job::Job;
use super::load::{Model, calibrate, engine, read_text};
use super::output::{Output, OutputFile};
use super::progress;
use super::resume::{ResumeArg, Resumed, fingerprint};

/// What compressions cost: next-token distributions over a compressed cache against those over the full one
///
/// Each cache reads the same prefix; then the same tail is fed token by token, all caches in one batch. At every
/// position of the tail the distribution over the next token is compared with that over the full cache: KL is in nats,
/// 0 where they agree. nll is how well the text itself is predicted, lower is better. This is what compression costs;
/// the kernels' own error is far below and is what `verify` checks.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina eval kl --model model.gguf --text essay.txt
  concertina eval kl --model model.gguf --text essay.txt --compress int8 kivi4 k:kivi2,v:rot4 --seal when-full
  concertina eval kl --model model.gguf --text book.txt --windows 4 --json kl.json --svg kl.svg --resume kl.jsonl
  concertina eval kl --model model.gguf --text essay.txt --prefix 512 --tail 64 --page-size 128")]
pub(super) struct KlArgs {
    #[command(flatten)]
    model: ModelArg,

    /// The text, UTF-8
    #[arg(long, value_name = "FILE")]
    text: PathBuf,

    /// Tokens of the prefix
    #[arg(long, value_name = "TOKENS", default_value = "1024", value_parser = token_count)]
    pub(super) prefix: u32,

    /// Tokens that are fed after it, at each of which distributions are compared
    #[arg(long, value_name = "TOKENS", default_value = "256", value_parser = token_count)]
    pub(super) tail: u32,

    /// Windows of prefix and tail to use, from the beginning of the text
    #[arg(long, value_name = "N", default_value = "1", value_parser = small_count)]
    windows: u32,

    /// When the prefix is compressed
    #[arg(long, value_enum, value_name = "WHEN", default_value = "after-prefix")]
    pub(super) seal: Seal,

    /// Compressions to measure, each as for `run`; every example of `concertina codecs` where not given
    #[arg(long, value_name = "METHODS", num_args = 1..)]
    pub(super) compress: Vec<Compression>,

    /// Device bytes for all caches, tables, scratch and staging; as much as they need where not given
    #[arg(long, value_name = "SIZE", value_parser = budget)]
    kv_budget: Option<Bytes>,

    /// Rows of one step over the prefix
    #[arg(long, value_name = "ROWS", default_value_t = DEFAULT_CHUNK, value_parser = small_count)]
    pub(super) chunk: u32,

    /// Draw mean KL against bytes per token into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,

    #[command(flatten)]
    resume: ResumeArg,

    #[command(flatten)]
    pub(super) cache: CacheArgs,

    #[command(flatten)]
    pub(super) calibration: CalibrateArg,
}

/// When the prefix is compressed.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Seal {
    /// Read over a full cache, then sealed: what the cache alone costs
    AfterPrefix,
    /// Sealed page by page, as in a session: the prefix reads what is sealed
    WhenFull,
}

/// Measures KL.
pub(super) fn run(args: &KlArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let svg = args.svg.as_deref().map(|path| OutputFile::open("the plot", path)).transpose()?;
    let request = global.adapter()?;
    let text = read_text("the text", &args.text)?;
    let path = args.text.display();
    let model = Model::open(&args.model.model)?;
    let job = Job::new(args, &model)?;
    let tokens = model.tokenizer.encode(&text, false)?;
    let windows =
        job.settings.windows(&tokens, args.windows as usize).map_err(|sentence| anyhow!("'{path}': {sentence}"))?;
    if windows.len() < args.windows as usize {
        let (n, all) = (windows.len(), args.windows);
        eprintln!("'{path}' has {n} of the {all} windows");
    }
    let settings = serde_json::json!({
        "measure": "eval kl",
        "model": model.identity()?,
        "text": fingerprint(text.as_bytes()),
        "window": job.settings,
        "compress": job.names(),
        "page_tokens": job.page.page_size,
        "chunk_tokens": job.chunk,
        "head_scores": args.cache.head_scores_fingerprint()?,
        "calibrate": args.calibration.fingerprint()?,
    });
    let mut resumed = Resumed::open(&args.resume, &settings)?;
    let device = Device::open(&request)?;
    let tuned = global.tuned(&device)?;
    let weights = model.weights()?;
    let config = job.engine_config(&device, &weights, args.kv_budget)?;
    let named = |error| job.name_budget(&config, error);
    let (mut engine, mut caches) =
        engine(&device, &weights, &config, &tuned).map_err(|error| match error.downcast() {
            Ok(error) => named(error),
            Err(error) => error,
        })?;
    drop(weights);
    calibrate(&mut engine, &mut caches, &model, &config, args.calibration.calibrate.as_deref())?;
    let device_report = DeviceReport::new(&device, None).tuned_by(&tuned.source);
    let model_report = model.report(Some(engine.weight_bytes()));
    output.text(&format!("device  {device_report}\nmodel   {model_report}\n\n"))?;

    let started = Instant::now();
    let bar = progress::work("measuring", 1);
    let per_window = job.steps_of_window();
    let mut done = 0;
    let mut measured = Vec::with_capacity(windows.len());
    for (index, window) in windows.iter().enumerate() {
        let total = per_window * windows.len();
        let mut advance = |n: usize| {
            done += n;
            let (rows, of) = job.rows(Progress { done, total });
            bar.set_length(of);
            bar.set_position(rows);
        };
        if let Some(sums) = resumed.unit(index)? {
            advance(per_window);
            bar.reset_eta();
            measured.push(sums);
            continue;
        }
        let (compressions, chunk) = (&job.compressions, job.chunk as usize);
        let result = kl::window(&mut engine, &mut caches, compressions, window, &job.settings, chunk, &mut advance);
        if result.is_err() {
            bar.finish_and_clear();
        }
        let sums = result.map_err(named)?;
        resumed.add(index, &sums)?;
        measured.push(sums);
    }
    bar.finish_and_clear();
    let report = KlReport {
        program: Program::THIS,
        device: device_report,
        model: model_report,
        text: path.to_string(),
        text_tokens: tokens.len(),
        settings: job.settings,
        windows: windows.len(),
        page_tokens: job.page.page_size,
        chunk_tokens: job.chunk,
        kv_budget_bytes: config.budget,
        results: job.rows_of(kl::results(&job.compressions, &measured)),
        elapsed_s: started.elapsed().as_secs_f64(),
    };
    output.text(&report)?;
    if let Some(svg) = svg {
        svg.write(report.plot().svg().as_bytes())?;
    }
    output.json(&report)?;
    Ok(ExitCode::SUCCESS)
}
