//! `concertina bench metrics`.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use concertina::compression::Compression;
use concertina::compression::head::HeadPattern;
use concertina::device::Device;
use concertina::engine::{Engine, EngineConfig, EvictionConfig};
use concertina::eval::metrics::{self, SessionMetrics, Settings};
use concertina::eval::spread::WARM_UP;
use concertina::geometry::{Bytes, ModelGeometry};
use concertina::report::{DeviceReport, MetricsReport, ModelReport, Program, Scaled};
use concertina::schedule::Caches;
use concertina::theory::model::Decoder;
use concertina::theory::presets::ModelPreset;
use concertina::weights::Weights;
use rand::SeedableRng as _;
use rand_chacha::ChaCha8Rng;

use super::super::args::{CacheArgs, DEFAULT_CHUNK, Global, budget, chooses, small_count, swap_chunk, token_count};
use super::super::failure::usage;
use super::super::load::{Model, engine};
use super::super::output::Output;
use super::super::progress;
use super::super::theory_args::PresetsArg;
use super::context_length;

/// What a session costs, in four ways: how many fit, and how long its prompt, its tokens and its context switch take
///
/// One session for each context and compression, alone on the device: bytes of its cache and how many such sessions the budget
/// admits; the prompt, in chunks, to the first token, compression of the document included; a token at that context; its cache to
/// the host and back. A model is a GGUF file, or a preset of which as many layers as wanted run with random weights.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina bench metrics --model model.gguf
  concertina bench metrics --model model.gguf --context 256 1024 --compress full int8 kivi4 token=snapkv:0.25 --batch 8
  concertina bench metrics --model yi-6b --layers 2 --context 4096 --kv-budget 2GiB --json metrics.json")]
pub(super) struct MetricsArgs {
    /// GGUF file, Hugging Face repository (owner/name), or a preset of `concertina presets`, of random weights
    #[arg(long, value_name = "PATH|owner/name|PRESET")]
    model: String,

    #[command(flatten)]
    presets: PresetsArg,

    /// Layers of a preset that run; as many as 4 GiB of weights hold where not given. Figures are scaled to all
    #[arg(long, value_name = "N", value_parser = small_count)]
    layers: Option<u32>,

    /// Tokens of the context
    #[arg(long, value_name = "TOKENS", num_args = 1.., default_value = "1024", value_parser = token_count)]
    context: Vec<u32>,

    /// Compressions of the cache, each as for `run`
    #[arg(long, value_name = "METHODS", num_args = 1.., default_value = "full")]
    compress: Vec<Compression>,

    /// Decode so many sessions together as well
    #[arg(long, value_name = "N", default_value = "1", value_parser = small_count)]
    batch: u32,

    /// Prompts and switches that are measured; four times as many tokens
    #[arg(long, value_name = "N", default_value = "5", value_parser = small_count)]
    repeats: u32,

    /// Rows of one prompt step
    #[arg(long, value_name = "ROWS", default_value_t = DEFAULT_CHUNK, value_parser = small_count)]
    chunk: u32,

    /// Device bytes for caches, tables, scratch and staging
    #[arg(long, value_name = "SIZE", default_value = "512MiB", value_parser = budget)]
    kv_budget: Bytes,

    #[command(flatten)]
    cache: CacheArgs,
}

/// Bytes of weights that the layers of a preset take where nothing else is said.
const WEIGHTS: Bytes = Bytes::mib(4096);
/// Vocabulary of a preset's layers, so that its products are no part of their time.
const VOCAB: u32 = 1024;
/// Tokens that stand for the prompt of `kvzip`, whose words do not matter to random weights.
const REPEAT_TOKENS: u32 = 16;

/// What runs.
struct Subject {
    weights: Weights,
    evictions: Option<EvictionConfig>,
    scaled: Option<Scaled>,
    report: ModelReport,
}

/// Measures the four metrics.
pub(super) fn run(args: &MetricsArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let request = global.adapter()?;
    let presets = args.presets.load()?;
    let subject = match presets.model(&args.model).ok().filter(|_| !Path::new(&args.model).exists()) {
        Some(preset) => Subject::of_preset(args, preset)?,
        None => Subject::of_file(args)?,
    };
    let device = Device::open(&request)?;
    let tuned = global.tuned(&device)?;
    let Subject { weights, evictions, scaled, mut report } = subject;
    let settings = args.settings();
    let config = args.engine_config(&weights.geometry, evictions, &settings)?;
    let (mut engine, mut caches) = engine(&device, &weights, &config, &tuned)?;
    drop(weights);
    if scaled.is_none() {
        report.weights_bytes = Some(engine.weight_bytes());
    }
    let device_report = DeviceReport::new(&device, None).tuned_by(&tuned.source);
    output.text(&format!("device  {device_report}\nmodel   {report}\n\n"))?;
    let started = Instant::now();
    let results = measure(args, &settings, &mut engine, &mut caches)?;
    let results = match &scaled {
        Some(Scaled { layers, layers_measured, .. }) => {
            results.into_iter().map(|result| result.of_layers(*layers, *layers_measured)).collect()
        }
        None => results,
    };
    let report = MetricsReport {
        kind: "bench metrics",
        program: Program::THIS,
        device: device_report,
        model: report,
        scaled,
        kv_budget_bytes: args.kv_budget,
        page_tokens: args.cache.page_size,
        chunk_tokens: config.max_rows,
        repeats: settings.repeats,
        results,
        elapsed_s: started.elapsed().as_secs_f64(),
    };
    output.text(&report)?;
    output.json(&report)?;
    Ok(ExitCode::SUCCESS)
}

fn measure(
    args: &MetricsArgs,
    settings: &Settings,
    engine: &mut Engine<'_>,
    caches: &mut Caches,
) -> Result<Vec<SessionMetrics>> {
    let vocab = engine.geometry().vocab_size;
    // Any tokens will do: what is measured is time.
    let longest = args.context.iter().copied().max().unwrap_or(0);
    let text: Vec<u32> = (0..longest).map(|i| i.wrapping_mul(2_654_435_761) % vocab).collect();
    let bar = progress::counter("sessions", (args.context.len() * args.compress.len()) as u64);
    let mut results = Vec::new();
    for context in &args.context {
        for compression in &args.compress {
            bar.set_message(format!("{context} tokens, {}", compression.short()));
            let result = metrics::session(engine, caches, compression, &text[..*context as usize], settings);
            if result.is_err() {
                bar.finish_and_clear();
            }
            results.push(result?);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    Ok(results)
}

impl MetricsArgs {
    fn settings(&self) -> Settings {
        let (chunk, repeats) = (self.chunk as usize, self.repeats as usize);
        Settings { chunk, batch: self.batch, warm_up: WARM_UP, repeats }
    }

    fn engine_config(
        &self,
        geometry: &ModelGeometry,
        evictions: Option<EvictionConfig>,
        settings: &Settings,
    ) -> Result<EngineConfig> {
        // One session decodes beside a switch.
        let max_sessions = self.batch.max(2);
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
            evictions,
            swap_chunk: swap_chunk(self.kv_budget),
            max_arena: None,
        })
    }
}

impl Subject {
    fn of_file(args: &MetricsArgs) -> Result<Self> {
        if args.layers.is_some() {
            return Err(usage("--layers is for presets; a model file runs with all of its layers"));
        }
        let model = Model::open(&args.model)?;
        let evictions = args.cache.evictions(&args.compress, &model, 1)?;
        let weights = model.weights()?;
        Ok(Self { weights, evictions, scaled: None, report: model.report(None) })
    }

    fn of_preset(args: &MetricsArgs, preset: &ModelPreset) -> Result<Self> {
        if args.compress.iter().any(|compression| compression.head != HeadPattern::Full) {
            let name = &preset.name;
            return Err(usage(format!(
                "random weights in the shape of {name} have no scores of heads; leave out head="
            )));
        }
        args.cache.whole_pages(&args.compress)?;
        let ModelPreset { name, decoder, .. } = preset;
        if decoder.latent.is_some() || decoder.local.is_some() || decoder.experts.is_some() {
            return Err(usage(format!(
                "{name} has latents, windows or experts, which nothing here runs yet; choose a preset whose layers are \
                 all alike"
            )));
        }
        let whole = &decoder.geometry;
        let of = |num_layers: u32| ModelGeometry { num_layers, vocab_size: VOCAB, ..whole.clone() };
        let weights_of = |num_layers: u32| Decoder::dense(of(num_layers), false).map_or(Bytes::ZERO, |d| d.weights);
        let most = whole.num_layers;
        let layers = match args.layers {
            Some(n) if n > most => {
                return Err(usage(format!("--layers {n} are more than the {most} of {}", preset.name)));
            }
            Some(n) => n,
            None => (1..=most).rev().find(|n| weights_of(*n) <= WEIGHTS).unwrap_or(1),
        };
        let spinner = progress::spinner("making random weights");
        let weights = Weights::random(&of(layers), &mut ChaCha8Rng::seed_from_u64(0));
        spinner.finish_and_clear();
        let evictions = EvictionConfig::of(&args.compress, 1)
            .map(|config| EvictionConfig { repeat_prompt: (0..REPEAT_TOKENS).collect(), ..config });
        let scaled = Scaled::new((layers, most), (VOCAB, whole.vocab_size));
        let report = ModelReport::new(preset.name.clone(), &of(most), Some(weights_of(most)));
        Ok(Self { weights, evictions, scaled: Some(scaled), report })
    }
}
