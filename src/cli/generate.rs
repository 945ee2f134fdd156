//! `concertina generate`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, anyhow};
use clap::Args;
use concertina::device::Device;
use concertina::engine::{Engine, EngineConfig};
use concertina::geometry::Bytes;
use concertina::report::{DeviceReport, GenerateReport, Meter, Program, finish_name};
use concertina::schedule::{Request, Scheduler, SessionId, SubmitError};

use super::args::{self, CacheArgs, CalibrateArg, CompressArg, Global, ModelArg, SamplingArgs, chooses};
use super::failure::INTERRUPTED;
use super::interrupt;
use super::load::{self, Model};
use super::output::Output;
use super::progress;

/// Answer one prompt, as the words come
///
/// The text goes to the standard output and nothing else does; times follow on the standard error.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina generate --model model.gguf --prompt 'Write a haiku about rivers.'
  concertina generate --model model.gguf --raw --prompt 'Once upon a time' --temperature 0.8 --top-p 0.95 --seed 7
  concertina generate --model model.gguf --file question.txt --max-new 200 > answer.txt
  concertina generate --model model.gguf --file book.txt --compress kivi4")]
pub(super) struct GenerateArgs {
    #[command(flatten)]
    model: ModelArg,

    /// The prompt
    #[arg(long, value_name = "TEXT", required_unless_present = "file", conflicts_with = "file")]
    #[arg(allow_hyphen_values = true)]
    prompt: Option<String>,

    /// Read the prompt from this file
    #[arg(long, value_name = "PATH")]
    file: Option<PathBuf>,

    /// Continue the prompt as it is, without the model's chat template
    #[arg(long)]
    raw: bool,

    /// Tokens to produce at most
    #[arg(long, value_name = "TOKENS", default_value = "64", value_parser = args::token_count)]
    max_new: u32,

    /// Device bytes for the cache, tables, scratch and staging; weights are apart
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = args::budget)]
    kv_budget: Bytes,

    #[command(flatten)]
    cache: CacheArgs,

    #[command(flatten)]
    compression: CompressArg,

    #[command(flatten)]
    calibration: CalibrateArg,

    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Generates text.
pub(super) fn run(args: &GenerateArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let adapter = global.adapter()?;
    let sampling = args.sampling.sampling()?;
    let text = match (&args.prompt, &args.file) {
        (_, Some(path)) => load::read_text("the prompt", path)?,
        (prompt, None) => prompt.clone().unwrap_or_default(),
    };
    let model = Model::open(&args.model.model)?;
    let prompt = if args.raw { model.raw(&text)? } else { model.chat(&text)? };
    let compression = args.compression.compress.clone();
    let config = engine_config(args, prompt.len(), &model)?;
    let device = Device::open(&adapter)?;
    let tuned = global.tuned(&device)?;
    let weights = model.weights()?;
    let (mut engine, mut caches) = load::engine(&device, &weights, &config, &tuned)?;
    drop(weights);
    load::calibrate(&mut engine, &mut caches, &model, &config, args.calibration.calibrate.as_deref())?;

    let mut scheduler = Scheduler::new(load::schedule_config(&config), caches);
    let prompt_tokens = prompt.len();
    let stop = model.tokenizer.eos_ids().to_vec();
    let request = Request { sampling, stop, compression, ..Request::new(prompt, args.max_new) };
    let mut meter = Meter::default();
    meter.session(&scheduler, &request);
    let id = scheduler.submit(request)?;
    interrupt::install()?;
    let text = stream(&model, &mut engine, &mut scheduler, &mut meter, id, &output)?;

    let session = scheduler.session(id).expect("a submitted session is known");
    let metrics = meter.metrics(&scheduler);
    let report = GenerateReport {
        program: Program::THIS,
        device: DeviceReport::new(&device, Some(engine.clock())).tuned_by(&tuned.source),
        model: model.report(Some(engine.weight_bytes())),
        compression: args.compression.compress.to_string(),
        sampling,
        prompt_tokens,
        new_tokens: session.produced.len(),
        text,
        first_token_s: session.times.first_token.map(|t| t.as_secs_f64()),
        prefill: metrics.prefill,
        decode: metrics.decode,
        ended_by: finish_name(session.phase),
        pool: scheduler.report(),
    };
    eprint!("{report}");
    output.json(&report)?;
    Ok(if interrupt::requested() { INTERRUPTED.into() } else { ExitCode::SUCCESS })
}

/// An engine for just this context, so that scratch does not grow with contexts that are not used.
fn engine_config(args: &GenerateArgs, prompt: usize, model: &Model) -> Result<EngineConfig> {
    let longest = model.geometry().context_length;
    let compressions = std::slice::from_ref(&args.compression.compress);
    let (prompt, max_new) = (prompt as u64, args.max_new);
    let context_length = u32::try_from(prompt + u64::from(max_new)).ok().filter(|n| *n <= longest);
    let Some(context_length) = context_length else {
        return Err(SubmitError::TooLong { prompt, max_new: max_new.into(), context_length: longest }.into());
    };
    let context_length = load::context_for(context_length, args.calibration.calibrate.as_deref(), longest);
    if prompt == 0 {
        return Err(anyhow!("the prompt has 0 tokens; give some text"));
    }
    Ok(EngineConfig {
        budget: args.kv_budget,
        max_rows: args::DEFAULT_CHUNK,
        max_sessions: 1,
        max_logit_rows: 1,
        context_length,
        page_size: args.cache.page_size,
        codecs: args.cache.codecs(compressions, model.geometry())?,
        chooses: chooses(compressions),
        evictions: args.cache.evictions(compressions, model, 1)?,
        swap_chunk: Bytes::ZERO,
        max_arena: None,
    })
}

/// Steps until the session ends, printing text as soon as it is complete; all of the text.
fn stream(
    model: &Model,
    engine: &mut Engine<'_>,
    scheduler: &mut Scheduler,
    meter: &mut Meter,
    id: SessionId,
    output: &Output,
) -> Result<String> {
    let length = scheduler.session(id).map_or(0, |session| session.request.prompt.len() as u64);
    let bar = progress::counter("prompt", length);
    let mut decoder = model.tokenizer.decode_stream();
    let mut text = String::new();
    while !scheduler.is_idle() && !interrupt::requested() {
        let step = scheduler.step(engine)?;
        if step.prefill_rows + step.decode_rows == 0 && step.shortage.is_none() {
            return Err(anyhow!("the session can not take a step: a defect"));
        }
        meter.step(scheduler, &step, engine.last_step().device);
        bar.inc(u64::from(step.prefill_rows));
        for (_, token) in &step.produced {
            // The bar and the text share the terminal.
            bar.finish_and_clear();
            let piece = decoder.push(*token);
            output.text(&piece)?;
            text.push_str(&piece);
        }
    }
    bar.finish_and_clear();
    scheduler.cancel(id)?;
    let rest = decoder.finish() + "\n";
    output.text(&rest)?;
    text.push_str(rest.trim_end_matches('\n'));
    Ok(text)
}
