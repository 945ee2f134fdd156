//! `concertina bench step`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use concertina::compression::Compression;
use concertina::device::Device;
use concertina::engine::EngineConfig;
use concertina::engine::ceilings::{Ceiling, Ceilings};
use concertina::eval::ceilings;
use concertina::eval::kernels::ceiling_sizes;
use concertina::eval::spread::WARM_UP;
use concertina::eval::step::{self, Load, Settings};
use concertina::geometry::Bytes;
use concertina::report::{DeviceReport, Program, StepReport};

use super::super::args::{CacheArgs, DEFAULT_CHUNK, Global, budget, chooses, small_count, token_count};
use super::super::failure::usage;
use super::super::load::{Model, engine, read_text};
use super::super::output::Output;
use super::super::progress;
use super::context_length;

/// Decode steps of a model end to end: tokens per second, where the time goes, and how near it comes to reading alone
///
/// Sessions read different parts of a text and then decode together. A step is timed from having its tokens to having the next;
/// beside it stand its time on the device, that of planning and recording on the host, and the floor: weights read once and
/// the caches, at the rate at which this device reads memory, measured first. One session is repeated without company, and its
/// logits have to be the same bit by bit.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina bench step --model model.gguf
  concertina bench step --model model.gguf --batch 1 64 --context 1024 --compress full kivi4 --kv-budget 4GiB
  concertina bench step --model model.gguf --batch 16 --context 512 2048 --json step.json")]
pub(super) struct StepArgs {
    /// GGUF file or Hugging Face repository (owner/name)
    #[arg(long, value_name = "PATH|owner/name")]
    model: String,

    /// Sessions that decode together
    #[arg(long, value_name = "N", num_args = 1.., default_value = "1", value_parser = small_count)]
    batch: Vec<u32>,

    /// Tokens of each session's context
    #[arg(long, value_name = "TOKENS", num_args = 1.., default_value = "1024", value_parser = token_count)]
    context: Vec<u32>,

    /// Compressions of the cache, each as for `run`
    #[arg(long, value_name = "METHODS", num_args = 1.., default_value = "full")]
    compress: Vec<Compression>,

    /// A text that contexts are made of, again and again where it is shorter; one is built in
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,

    /// Steps that are measured
    #[arg(long, value_name = "N", default_value = "32", value_parser = small_count)]
    steps: u32,

    /// Rows of one prompt step
    #[arg(long, value_name = "ROWS", default_value_t = DEFAULT_CHUNK, value_parser = small_count)]
    chunk: u32,

    /// Device bytes for caches, tables, scratch and staging
    #[arg(long, value_name = "SIZE", default_value = "512MiB", value_parser = budget)]
    kv_budget: Bytes,

    #[command(flatten)]
    cache: CacheArgs,
}

/// What contexts are made of where nothing else is given.
const TEXT: &str = include_str!("../../../ARCHITECTURE.md");
/// Times that the ceiling is measured.
const REPEATS: usize = 20;

/// Measures decode steps.
pub(super) fn run(args: &StepArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let request = global.adapter()?;
    let model = Model::open(&args.model)?;
    let text = match &args.text {
        Some(path) => model.raw(&read_text("the text", path)?)?,
        None => model.raw(TEXT)?,
    };
    if text.is_empty() {
        return Err(usage("the text has no token; give --text a file with words in it"));
    }
    let config = args.engine_config(&model)?;
    let weights = model.weights()?;
    let device = Device::open(&request)?;
    let tuned = global.tuned(&device)?;
    let spinner = progress::spinner("measuring how fast the device reads");
    let read = Ceilings::new(&device, ceiling_sizes(&device))
        .and_then(|mut made| ceilings::ceiling(&mut made, Ceiling::Read, WARM_UP, REPEATS));
    spinner.finish_and_clear();
    let (chunk, steps) = (args.chunk as usize, args.steps as usize);
    let settings = Settings { chunk, steps, warm_up: WARM_UP, read_bytes_per_s: read?.value.median };
    let (mut engine, mut caches) = engine(&device, &weights, &config, &tuned)?;
    drop(weights);
    let report = model.report(Some(engine.weight_bytes()));
    let device_report = DeviceReport::new(&device, Some(engine.clock())).tuned_by(&tuned.source);
    output.text(&format!("device  {device_report}\nmodel   {report}\n\n"))?;
    let started = Instant::now();
    let loads = args.loads(&text);
    let bar = progress::counter("loads", loads.len() as u64);
    let mut rows = Vec::new();
    for load in &loads {
        bar.set_message(format!("{} x {} tokens, {}", load.batch, load.context, load.compression.short()));
        let row = step::measure(&mut engine, &mut caches, load, &settings);
        if row.is_err() {
            bar.finish_and_clear();
        }
        rows.push(row?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let report = StepReport {
        kind: "bench step",
        program: Program::THIS,
        device: device_report,
        model: report,
        kv_budget_bytes: args.kv_budget,
        page_tokens: args.cache.page_size,
        steps,
        read_bytes_per_s: settings.read_bytes_per_s,
        rows,
        elapsed_s: started.elapsed().as_secs_f64(),
    };
    output.text(&report)?;
    output.json(&report)?;
    let (without, all) = (report.without_figures(), report.rows.len());
    if without > 0 {
        eprintln!("error: {without} of {all} loads have no figures; what is said of each is above");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

impl StepArgs {
    fn loads<'a>(&'a self, text: &'a [u32]) -> Vec<Load<'a>> {
        let of = |context: u32, batch: u32| {
            let (batch, context) = (batch as usize, context as usize);
            self.compress.iter().map(move |compression| Load { batch, context, compression, text })
        };
        let batches = |context: u32| self.batch.iter().flat_map(move |batch| of(context, *batch));
        self.context.iter().flat_map(|context| batches(*context)).collect()
    }

    fn engine_config(&self, model: &Model) -> Result<EngineConfig> {
        let geometry = model.geometry();
        let settings = Settings { chunk: 0, steps: self.steps as usize, warm_up: WARM_UP, read_bytes_per_s: 0.0 };
        let max_sessions = self.batch.iter().copied().max().unwrap_or(1);
        Ok(EngineConfig {
            budget: self.kv_budget,
            max_rows: self.chunk.max(max_sessions),
            max_sessions,
            // One more than tokens need: logits are read back to be checked.
            max_logit_rows: max_sessions + 1,
            context_length: context_length(&self.context, settings.room(), geometry)?,
            page_size: self.cache.page_size,
            codecs: self.cache.codecs(&self.compress, geometry)?,
            chooses: chooses(&self.compress),
            // All are observed at once, since all have their room before any reads.
            evictions: self.cache.evictions(&self.compress, model, max_sessions)?,
            swap_chunk: Bytes::ZERO,
            max_arena: None,
        })
    }
}
