//! `concertina simulate`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, anyhow};
use clap::Args;
use concertina::compression::Compression;
use concertina::eval::simulate::{Listener, SimulateError, SimulatedMachine};
use concertina::geometry::Bytes;
use concertina::kernels::registry::DEFAULT_PAGE_SIZE;
use concertina::report::{Meter, ModelReport, Program, SimulateReport, SimulateRow, SimulateSettings};
use concertina::schedule::workload::{Arrivals, Distribution, Workload};
use concertina::schedule::{Scheduler, SessionId, StepReport};
use concertina::theory::presets::Gpu;
use concertina::theory::step::{Achieved, Machine};
use indicatif::ProgressBar;

use super::args::{self, Global, swap_chunk};
use super::failure::usage;
use super::output::{Output, OutputFile};
use super::progress;
use super::theory_args::{NamedModel, PresetsArg, model};

/// Ask what a GPU that is not here would do: thousands of sessions over a virtual clock
///
/// The schedule is the one that `run` uses, down to pages and bytes; steps take the time that the theory says, from the FLOP
/// and the bytes of each against the GPU's peaks and the parts of them that are achieved. Sessions come, read a document, ask,
/// read the answer, ask again. Several compressions see the same sessions. The same seed gives the same trace hash. Needs no
/// GPU; runs on one core.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina simulate --model yi-34b --gpu h100 --memory 80GB --sessions 10000 --arrival poisson:2/s --context lognormal:50k --compress kivi4
  concertina simulate --model llama-3-8b --gpu l4 --context-length 64k --context uniform:4k..50k --compress full int8 kivi4 kivi2
  concertina simulate --model yi-6b --gpu a100 --host-budget 200GB --arrival poisson:500/h --compress full token=keydiff:0.5
  concertina simulate --model yi-34b --gpu h200 --weights 20GB --arrival all --rounds 1 --json - | jq '.results[].trace_hash'")]
pub(super) struct SimulateArgs {
    /// A model by its name, of those that `concertina presets` lists, or a GGUF file, or a Hugging Face repository: owner/name; of a file only its shape is used
    #[arg(long, value_name = "NAME|PATH|owner/name")]
    model: String,

    /// A GPU by its name, of those that `concertina presets` lists
    #[arg(long, value_name = "NAME", default_value = "h100")]
    gpu: String,

    #[command(flatten)]
    presets: PresetsArg,

    /// Device memory for weights and caches; the GPU's where not given
    #[arg(long, value_name = "SIZE", value_parser = args::budget)]
    memory: Option<Bytes>,

    /// Bytes of the weights, where they are quantised; two per parameter where not given
    #[arg(long, value_name = "SIZE", value_parser = args::budget)]
    weights: Option<Bytes>,

    /// Sessions that come
    #[arg(long, value_name = "N", default_value = "1000", value_parser = session_count)]
    sessions: u32,

    /// When they come: all, or poisson:RATE with a rate such as 2/s, 30/min or 500/h
    #[arg(long, value_name = "WHEN", default_value = "poisson:2/s")]
    arrival: Arrivals,

    /// Tokens of their documents: fixed:N, uniform:FROM..TO, lognormal:MEDIAN[:SIGMA] with a sigma of 0.5 where not given, or
    /// exp:MEAN
    #[arg(long, value_name = "TOKENS", default_value = "lognormal:50k")]
    context: Distribution,

    /// Questions that each asks
    #[arg(long, value_name = "N", default_value = "3", value_parser = round_count)]
    rounds: u32,

    /// Tokens of a question
    #[arg(long, value_name = "TOKENS", default_value = "fixed:50")]
    question: Distribution,

    /// Tokens of an answer: 250 are about a screen
    #[arg(long, value_name = "TOKENS", default_value = "fixed:250")]
    answer: Distribution,

    /// Seconds between an answer and the next question
    #[arg(long, value_name = "SECONDS", default_value = "exp:30")]
    think: Distribution,

    /// Seed of the sessions: the same seed gives the same trace
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// Host memory for caches that do not fit; without it, such a cache is dropped and computed again
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = args::budget)]
    host_budget: Bytes,

    /// Bytes that a step moves each way; as for `run` where not given, but at least a page of every list
    #[arg(long, value_name = "SIZE", value_parser = args::budget)]
    swap_chunk: Option<Bytes>,

    /// Sessions that may compute at once
    #[arg(long, value_name = "N", default_value = "64", value_parser = args::small_count)]
    max_sessions: u32,

    /// Sessions whose prompts are scored at once for what evictions keep; scores take device memory
    #[arg(long, value_name = "N", default_value = "1", value_parser = args::small_count)]
    observed: u32,

    /// Rows of one step: decode rows of all sessions and prompt tokens beside them
    #[arg(long, value_name = "ROWS", default_value = "1024", value_parser = args::small_count)]
    chunk: u32,

    /// Tokens of one page of the cache: 16, 32, 64 or 128
    #[arg(long, value_name = "TOKENS", default_value_t = DEFAULT_PAGE_SIZE, value_parser = args::page_size)]
    page_size: u32,

    /// Longest context, documents, questions and answers together; the model's where not given. It may exceed that: only bytes
    /// and times are simulated
    #[arg(long, value_name = "TOKENS", value_parser = token_count)]
    context_length: Option<u32>,

    /// The part of the GPU's FLOP/s that is achieved
    #[arg(long, value_name = "PART", default_value_t = Achieved::default().flops, value_parser = part)]
    achieved_flops: f64,

    /// The part of the bandwidth of its memory that is achieved
    #[arg(long, value_name = "PART", default_value_t = Achieved::default().bandwidth, value_parser = part)]
    achieved_bandwidth: f64,

    /// The part of the link to the host that is achieved
    #[arg(long, value_name = "PART", default_value_t = Achieved::default().link, value_parser = part)]
    achieved_link: f64,

    /// Compressions of the caches, each as for `run`: a simulation each, of the same sessions
    #[arg(long, value_name = "METHODS", num_args = 1.., default_value = "full")]
    compress: Vec<Compression>,

    /// Harder compressions for caches that do not fit, the mildest first, as for `run`
    #[arg(long, value_name = "METHODS", num_args = 1..)]
    ladder: Vec<Compression>,

    /// Draw the time to the first token against the time that a session takes of the machine into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// Reads a part of a peak.
fn part(text: &str) -> Result<f64, String> {
    let part = text.parse().ok().filter(|part| *part > 0.0 && *part <= 1.0);
    part.ok_or_else(|| "expected a part of the peak, above 0 and at most 1".to_owned())
}

/// Reads a number of sessions: each keeps its times until the end, about a kilobyte; its tokens only until it is over.
fn session_count(text: &str) -> Result<u32, String> {
    const MAX: u32 = 1_000_000;
    text.parse().ok().filter(|n| (1..=MAX).contains(n)).ok_or_else(|| format!("expected a number from 1 to {MAX}"))
}

/// Reads a number of questions.
fn round_count(text: &str) -> Result<u32, String> {
    const MAX: u32 = 1_000;
    text.parse().ok().filter(|n| (1..=MAX).contains(n)).ok_or_else(|| format!("expected a number from 1 to {MAX}"))
}

/// Reads a number of tokens, where `k` stands for thousands.
fn token_count(text: &str) -> Result<u32, String> {
    match text.strip_suffix(['k', 'K']) {
        Some(thousands) => args::token_count(&format!("{thousands}000")),
        None => args::token_count(text),
    }
}

/// What is simulated.
struct Job {
    machine: SimulatedMachine,
    workload: Workload,
    settings: SimulateSettings,
    model: ModelReport,
    gpu: Gpu,
}

/// Simulates.
pub(super) fn run(args: &SimulateArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let svg = args.svg.as_deref().map(|path| OutputFile::open("the plot", path)).transpose()?;
    let job = prepare(args)?;
    // What can not be simulated is known before the first one begins.
    for compression in &args.compress {
        job.machine.begin(0, compression, &args.ladder).map_err(refused)?;
    }
    output.text(&format!("gpu     {}, {}\nmodel   {}\n\n", job.gpu.gpu, job.settings.memory_bytes, job.model))?;
    let started = Instant::now();
    let length = u64::from(args.sessions) * args.compress.len() as u64;
    let bar = progress::work("simulating", length);
    let mut results = Vec::new();
    for compression in &args.compress {
        bar.set_message(compression.short());
        let result = simulate(args, &job, compression, &bar);
        if result.is_err() {
            bar.finish_and_clear();
        }
        results.push(result?);
    }
    bar.finish_and_clear();
    let Job { settings, model, gpu, .. } = job;
    let elapsed_s = started.elapsed().as_secs_f64();
    let report = SimulateReport { program: Program::THIS, model, gpu, settings, results, elapsed_s };
    output.text(&report)?;
    if let Some(svg) = svg {
        svg.write(report.plot().svg().as_bytes())?;
    }
    output.json(&report)?;
    Ok(ExitCode::SUCCESS)
}

/// A simulation that can not begin as it was asked for is wrong usage; a defect is not.
fn refused(error: SimulateError) -> anyhow::Error {
    match error {
        SimulateError::Stuck { .. } => error.into(),
        SimulateError::Pool(error) => usage(format!("beside the weights, {error}")),
        error => usage(error.to_string()),
    }
}

fn prepare(args: &SimulateArgs) -> Result<Job> {
    let presets = args.presets.load()?;
    let gpu = presets.gpu(&args.gpu).map_err(usage)?.clone();
    let NamedModel { name, decoder } = model(&args.model, &presets)?;
    if gpu.unified && args.host_budget > Bytes::ZERO {
        let (name, budget) = (&gpu.name, args.host_budget);
        return Err(usage(format!(
            "the memory of {name} is the host's, so that there is no other for --host-budget {budget}; give --memory more"
        )));
    }
    if args.chunk < args.max_sessions {
        let (chunk, max) = (args.chunk, args.max_sessions);
        return Err(usage(format!("--chunk {chunk} has no row for each of {max} sessions at once")));
    }
    let achieved =
        Achieved { flops: args.achieved_flops, bandwidth: args.achieved_bandwidth, link: args.achieved_link };
    let memory = args.memory.unwrap_or(gpu.memory_bytes);
    let decoder = decoder.with_weights(args.weights);
    let context_length = args.context_length.unwrap_or(decoder.geometry.context_length);
    let model = ModelReport::new(name, &decoder.geometry, None);
    let model = ModelReport { weights_bytes: Some(decoder.weights), ..model };
    let page_bytes = Bytes(model.kv_per_token_bytes.0 * u64::from(args.page_size));
    let chunk = match args.host_budget {
        Bytes::ZERO => Bytes::ZERO,
        _ => swap_chunk(memory.saturating_sub(decoder.weights)).max(Bytes(2 * page_bytes.0)),
    };
    let machine = SimulatedMachine {
        machine: Machine::new(&gpu, &achieved),
        memory,
        host_budget: args.host_budget,
        swap_chunk: args.swap_chunk.unwrap_or(chunk),
        max_rows: args.chunk,
        max_sessions: args.max_sessions,
        observed: args.observed,
        context_length,
        page_size: args.page_size,
        model: decoder,
    };
    let workload = Workload {
        sessions: args.sessions,
        arrival: args.arrival,
        context: args.context,
        rounds: args.rounds,
        question: args.question,
        answer: args.answer,
        think: args.think,
        seed: args.seed,
    };
    let settings = SimulateSettings {
        model: args.model.clone(),
        presets: args.presets.files(),
        workload: workload.clone(),
        achieved,
        memory_bytes: memory,
        weights_bytes: machine.model.weights,
        host_budget_bytes: args.host_budget,
        swap_chunk_bytes: machine.swap_chunk,
        max_sessions: args.max_sessions,
        observed: args.observed,
        chunk_tokens: args.chunk,
        page_tokens: args.page_size,
        context_tokens: context_length,
        ladder: args.ladder.iter().map(Compression::short).collect(),
    };
    Ok(Job { machine, workload, settings, model, gpu })
}

/// Measures a simulation, and shows how far it is.
struct Watch<'a> {
    meter: Meter,
    bar: &'a ProgressBar,
    finished: u64,
}

/// Sessions that end before the bar moves: drawing takes longer than a step.
const BAR_EVERY: u64 = 16;

impl Listener for Watch<'_> {
    fn submitted(&mut self, scheduler: &Scheduler, session: SessionId) {
        if let Some(session) = scheduler.session(session) {
            self.meter.session(scheduler, &session.request);
        }
    }

    fn stepped(&mut self, scheduler: &Scheduler, step: &StepReport) {
        self.meter.step(scheduler, step, step.elapsed);
        self.finished += step.finished.len() as u64;
        if self.finished >= BAR_EVERY {
            self.bar.inc(std::mem::take(&mut self.finished));
        }
    }
}

/// One compression.
fn simulate(args: &SimulateArgs, job: &Job, compression: &Compression, bar: &ProgressBar) -> Result<SimulateRow> {
    let median = args.context.median().round().clamp(1.0, f64::from(job.machine.context_length));
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped above")]
    let predicted = job.machine.predict(compression, median as u32).map_err(refused)?;
    let mut simulation = job.machine.begin(args.seed, compression, &args.ladder).map_err(refused)?;
    let mut watch = Watch { meter: Meter::default(), bar, finished: 0 };
    simulation.run(&job.workload, &mut watch).map_err(refused)?;
    bar.inc(watch.finished + simulation.refused.values().map(|refused| u64::from(refused.sessions)).sum::<u64>());
    let pool = simulation.scheduler.report();
    if pool.pages_in_use_bytes + pool.committed_bytes > Bytes::ZERO {
        return Err(anyhow!("pages are in use or promised after the last session: a defect"));
    }
    Ok(SimulateRow::new(compression, predicted, &simulation, &watch.meter))
}
