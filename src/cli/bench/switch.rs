//! `concertina bench switch`.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use concertina::compression::Compression;
use concertina::device::Device;
use concertina::engine::EngineConfig;
use concertina::eval::switch;
use concertina::geometry::Bytes;
use concertina::report::{DeviceReport, Program, SwitchReport, SwitchRow};

use super::super::args::{CacheArgs, DEFAULT_CHUNK, Global, ModelArg, budget, chooses, small_count, token_count};
use super::super::failure::usage;
use super::super::load::{Model, engine};
use super::super::output::Output;
use super::super::progress;

/// A context switch: a cache leaves for the host and comes back
///
/// Alone, and beside the decode rows of other sessions: the part of it that takes no time there is hidden. Its speed is
/// compared with plain copies of as many bytes through mapped buffers.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina bench switch --model model.gguf --tokens 8192 --compress full kivi4
  concertina bench switch --model model.gguf --tokens 2048 --decoding 16 --swap-chunk 16MiB --json switch.json")]
pub(super) struct SwitchArgs {
    #[command(flatten)]
    model: ModelArg,

    /// Tokens of the cache
    #[arg(long, value_name = "TOKENS", default_value = "2048", value_parser = token_count)]
    tokens: u32,

    /// Sessions that decode beside it
    #[arg(long, value_name = "N", default_value = "8", value_parser = small_count)]
    decoding: u32,

    /// Bytes that a step moves each way
    #[arg(long, value_name = "SIZE", default_value = "4MiB", value_parser = budget)]
    swap_chunk: Bytes,

    /// Times that each is measured
    #[arg(long, value_name = "N", default_value = "9", value_parser = small_count)]
    repeats: u32,

    /// Device bytes for caches, tables, scratch and staging
    #[arg(long, value_name = "SIZE", default_value = "512MiB", value_parser = budget)]
    kv_budget: Bytes,

    /// Compressions of the cache, each as for `run`
    #[arg(long, value_name = "METHODS", num_args = 1.., default_value = "full")]
    compress: Vec<Compression>,

    #[command(flatten)]
    cache: CacheArgs,
}

/// Measures context switches.
pub(super) fn run(args: &SwitchArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let request = global.adapter()?;
    let model = Model::open(&args.model.model)?;
    let (tokens, longest) = (args.tokens, model.geometry().context_length);
    if tokens > longest {
        return Err(usage(format!("--tokens {tokens} are more than the model's context of {longest}")));
    }
    let device = Device::open(&request)?;
    let tuned = global.tuned(&device)?;
    let weights = model.weights()?;
    let max_sessions = args.decoding + 1;
    let chunk = DEFAULT_CHUNK.max(max_sessions);
    let config = EngineConfig {
        budget: args.kv_budget,
        max_rows: chunk,
        max_sessions,
        max_logit_rows: max_sessions,
        context_length: longest,
        page_size: args.cache.page_size,
        codecs: args.cache.codecs(&args.compress, model.geometry())?,
        chooses: chooses(&args.compress),
        evictions: args.cache.evictions(&args.compress, &model, 1)?,
        swap_chunk: args.swap_chunk,
        max_arena: None,
    };
    let (mut engine, mut caches) = engine(&device, &weights, &config, &tuned)?;
    let device_report = DeviceReport::new(&device, None).tuned_by(&tuned.source);
    let model_report = model.report(Some(engine.weight_bytes()));
    output.text(&format!("device  {device_report}\nmodel   {model_report}\n\n"))?;
    let vocab = model.geometry().vocab_size;
    // Any tokens will do: what moves is bytes.
    let text: Vec<u32> = (0..tokens).map(|i| i.wrapping_mul(2_654_435_761) % vocab).collect();
    let bar = progress::counter("switches", args.compress.len() as u64);
    let mut results = Vec::new();
    for compression in &args.compress {
        bar.set_message(compression.short());
        let repeats = args.repeats as usize;
        let prompt = (&text[..], chunk as usize);
        let measured = switch::measure(&mut engine, &mut caches, compression, prompt, args.decoding, repeats);
        if measured.is_err() {
            bar.finish_and_clear();
        }
        results.push(SwitchRow::new(measured?));
        bar.inc(1);
    }
    bar.finish_and_clear();
    let report = SwitchReport {
        program: Program::THIS,
        device: device_report,
        model: model_report,
        tokens: tokens as usize,
        decoding: args.decoding,
        chunk_bytes: args.swap_chunk,
        repeats: args.repeats as usize,
        results,
    };
    output.text(&report)?;
    output.json(&report)?;
    Ok(ExitCode::SUCCESS)
}
