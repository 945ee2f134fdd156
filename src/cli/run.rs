//! `concertina run`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, anyhow};
use clap::Args;
use concertina::compression::Compression;
use concertina::device::Device;
use concertina::engine::{Engine, EngineConfig};
use concertina::geometry::Bytes;
use concertina::report::{DeviceReport, Meter, Program, RoundReport, RunReport, RunSettings, SessionReport, Trace};
use concertina::schedule::{Answer, HostConfig, Request, Round, ScheduleConfig, Scheduler, SessionId};

use super::args::{self, CacheArgs, CalibrateArg, Global, ModelArg, SamplingArgs, chooses};
use super::documents::{self, Inquiry, Prompt};
use super::failure::{INTERRUPTED, usage};
use super::interrupt;
use super::load::{self, Model};
use super::output::{Output, OutputFile};
use super::run_progress::SessionBars;

/// Ask questions about many documents at once, within one byte budget
///
/// Each document becomes a session: a prompt of the document and its question, the model's answer, and so on for the questions
/// of --then. Questions about one document share its pages, and only the first reads it. Sessions share the budget: one begins when the pool can promise all pages that its prompts and answers can
/// need, and those that hold pages compute together, their prompts cut into chunks that fit beside the decode rows. The
/// others wait in the order given; one that has answered gives up its pages to them. At the end every page is back; if not,
/// the command fails.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina run --model model.gguf --document a.txt b.txt c.txt --ask 'What is this about?'
  concertina run --model model.gguf --document a.txt --ask 'Who?' --document b.txt --ask 'When?'
  concertina run --model model.gguf --document a.txt a.txt a.txt --ask 'Who?' 'When?' 'Why?'
  concertina run --model owner/name --document *.txt --ask 'Summarise.' --document-tokens 1000 --kv-budget 64MiB
  concertina run --model model.gguf --document *.txt --ask 'Summarise.' --compress kivi4 --kv-budget 64MiB
  concertina run --model model.gguf --document a.txt b.txt --ask 'Why?' --compress full k:kivi2,v:rot4
  concertina run --model model.gguf --document *.txt --ask 'Who?' --then 'When?' 'Why?' --host-budget 1GiB
  concertina run --model model.gguf --document *.txt --ask 'Who?' --then 'When?' --ladder kivi4 token=keydiff:0.5,hidden=kivi4
  concertina run --model model.gguf --document a.txt --ask 'Why?' --json - | jq .metrics")]
pub(super) struct RunArgs {
    #[command(flatten)]
    model: ModelArg,

    /// Documents, UTF-8 text: one session each
    #[arg(long, value_name = "PATH", num_args = 1.., required = true)]
    document: Vec<PathBuf>,

    /// The question about each document, in order; a single one serves all
    #[arg(long, value_name = "TEXT", num_args = 1.., required = true)]
    ask: Vec<String>,

    /// What is asked of every document after its first answer, in order
    #[arg(long, value_name = "TEXT", num_args = 1..)]
    then: Vec<String>,

    /// Time between an answer and the next question, on the clock of the schedule: where nobody else has anything to compute
    /// it passes at once
    #[arg(long, value_name = "SECONDS", default_value = "0", value_parser = args::seconds)]
    think: Duration,

    /// Use only so many of the first tokens of each document
    #[arg(long, value_name = "TOKENS", value_parser = args::token_count)]
    document_tokens: Option<u32>,

    /// Device bytes for caches, tables, scratch and staging; weights are apart
    #[arg(long, value_name = "SIZE", default_value = "48MiB", value_parser = args::budget)]
    kv_budget: Bytes,

    /// Host memory for caches that do not fit: a session that thinks gives up its pages to one that waits, and gets them back for
    /// its next question. Without it, its cache is dropped and computed again
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = args::budget)]
    host_budget: Bytes,

    /// Tokens to produce per answer at most
    #[arg(long, value_name = "TOKENS", default_value = "64", value_parser = args::token_count)]
    max_new: u32,

    /// Longest context, prompt and answer together; the model's where not given
    #[arg(long, value_name = "TOKENS", value_parser = args::token_count)]
    context: Option<u32>,

    /// Sessions that may compute at once
    #[arg(long, value_name = "N", default_value = "8", value_parser = args::small_count)]
    max_sessions: u32,

    /// Sessions whose prompts are scored at once for what evictions keep; others wait
    #[arg(long, value_name = "N", default_value = "4", value_parser = args::small_count)]
    observed: u32,

    /// Rows of one step: decode rows of all sessions and prompt tokens beside them
    #[arg(long, value_name = "ROWS", default_value_t = args::DEFAULT_CHUNK, value_parser = args::small_count)]
    chunk: u32,

    #[command(flatten)]
    cache: CacheArgs,

    /// What is done to each cache, in order, or once for all: a codec of `concertina codecs`, or dimension=method pairs;
    /// `full` keeps everything
    #[arg(long, value_name = "METHODS", num_args = 1.., default_value = "full")]
    compress: Vec<Compression>,

    /// Harder compressions for caches that do not fit, the mildest first: where the host has no room left, a cache moves to the
    /// next that makes it smaller, rather than being dropped
    #[arg(long, value_name = "METHODS", num_args = 1..)]
    ladder: Vec<Compression>,

    #[command(flatten)]
    calibration: CalibrateArg,

    #[command(flatten)]
    sampling: SamplingArgs,

    /// Write what sessions did over time into this file, which Perfetto shows (ui.perfetto.dev)
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
}

/// Everything of a run that is known before the first step.
struct Job {
    compressions: Vec<Compression>,
    inquiries: Vec<Inquiry>,
    prompts: Vec<Prompt>,
    /// Questions that follow the first, and their tokens.
    later: Vec<(String, Vec<u32>)>,
    ladder: Vec<Compression>,
    think: Duration,
    settings: RunSettings,
    config: EngineConfig,
}

/// Runs sessions.
pub(super) fn run(args: &RunArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let trace_file = args.trace.as_deref().map(|path| OutputFile::open("the trace", path)).transpose()?;
    let request = global.adapter()?;
    let (job, model) = prepare(args)?;
    let device = Device::open(&request)?;
    let weights = model.weights()?;
    let (mut engine, mut caches) = load::engine(&device, &weights, &job.config)?;
    drop(weights);
    load::calibrate(&mut engine, &mut caches, &model, &job.config, args.calibration.calibrate.as_deref())?;
    let device_report = DeviceReport::new(&device, Some(engine.clock()));
    let model_report = model.report(Some(engine.weight_bytes()));
    output.text(&format!("device  {device_report}\nmodel   {model_report}\n\n"))?;

    let rates = engine.link_rates()?;
    let host = HostConfig { budget: job.settings.host_budget_bytes, rates, ..HostConfig::default() };
    let config = ScheduleConfig { host, ..load::schedule_config(&job.config) };
    let mut scheduler = Scheduler::new(config, caches);
    let mut meter = Meter::default();
    let ids = submit(&job, &model, &mut scheduler, &mut meter)?;
    interrupt::install()?;
    let mut trace = trace_file.is_some().then(Trace::default);
    let held = steps(&job, &ids, &mut engine, &mut scheduler, (&mut meter, trace.as_mut()))?;
    if let (Some(file), Some(trace)) = (trace_file, trace) {
        file.write(trace.json(scheduler.now()).as_bytes())?;
    }

    let interrupted = interrupt::requested();
    let report = RunReport {
        program: Program::THIS,
        device: device_report,
        model: model_report,
        sessions: session_reports(&job, &model, &ids, &scheduler, &held),
        settings: job.settings,
        metrics: meter.metrics(&scheduler),
        pool: scheduler.report(),
        host_peak_bytes: scheduler.host_bytes().1,
        elapsed_s: scheduler.now().as_secs_f64(),
        interrupted,
    };
    output.text(&report)?;
    let pool = &report.pool;
    if pool.pages_in_use_bytes + pool.committed_bytes > Bytes::ZERO {
        let (held, promised) = (pool.pages_in_use_bytes, pool.committed_bytes);
        return Err(anyhow!("{held} of pages are in use and {promised} promised after the last session: a defect"));
    }
    output.json(&report)?;
    if interrupted {
        let cancelled = report.sessions.iter().filter(|s| s.ended_by == "cancelled").count();
        eprintln!("interrupted: {cancelled} of {} sessions were cancelled", report.sessions.len());
        return Ok(INTERRUPTED.into());
    }
    Ok(ExitCode::SUCCESS)
}

/// Reads and checks everything that needs neither a device nor weights.
fn prepare(args: &RunArgs) -> Result<(Job, Model)> {
    let sampling = args.sampling.sampling()?;
    let inquiries = documents::inquiries(&args.document, &args.ask)?;
    let compressions = one_each(&args.compress, inquiries.len())?;
    let n_documents = u32::try_from(inquiries.len()).unwrap_or(u32::MAX);
    // More are never admitted, and scratch grows with them.
    let max_sessions = args.max_sessions.min(n_documents);
    if args.chunk < max_sessions {
        let chunk = args.chunk;
        return Err(usage(format!("--chunk {chunk} has no row for each of {max_sessions} sessions at once")));
    }
    let model = Model::open(&args.model.model)?;
    let context_length = args::context(args.context, model.geometry())?;
    let longest = model.geometry().context_length;
    let limit = args.document_tokens.map(|n| n as usize);
    let later = documents::later(&model, &args.then)?;
    let mut prompts = Vec::with_capacity(inquiries.len());
    for inquiry in &inquiries {
        let prompt = documents::prompt(&model, inquiry, limit)?;
        documents::check_length(inquiry, &prompt, &later, args.max_new, context_length)?;
        prompts.push(prompt);
    }
    let all: Vec<Compression> = compressions.iter().chain(&args.ladder).cloned().collect();
    let evictions = args.cache.evictions(&all, &model, max_sessions.min(args.observed))?;
    let config = EngineConfig {
        budget: args.kv_budget,
        max_rows: args.chunk,
        max_sessions,
        max_logit_rows: max_sessions,
        context_length: load::context_for(context_length, args.calibration.calibrate.as_deref(), longest),
        page_size: args.cache.page_size,
        codecs: args.cache.codecs(&all, model.geometry())?,
        chooses: chooses(&all),
        // A cache that gets smaller is an eviction, if only of bits.
        evictions: if args.ladder.is_empty() { evictions } else { Some(evictions.unwrap_or_default()) },
        swap_chunk: swap_chunk(args.host_budget, args.kv_budget),
        max_arena: None,
    };
    let settings = RunSettings {
        kv_budget_bytes: args.kv_budget,
        host_budget_bytes: args.host_budget,
        think_s: args.think.as_secs_f64(),
        max_new_tokens: args.max_new,
        context_tokens: context_length,
        document_tokens: limit,
        max_sessions,
        chunk_tokens: args.chunk,
        page_tokens: args.cache.page_size,
        sampling,
    };
    let (ladder, think) = (args.ladder.clone(), args.think);
    Ok((Job { compressions, inquiries, prompts, later, ladder, think, settings, config }, model))
}

/// What a step copies at most, of which five times as much is held: at most a twelfth of the budget. A power of two, so that
/// a budget that a message advises is one that its advice was made for.
fn swap_chunk(host_budget: Bytes, kv_budget: Bytes) -> Bytes {
    const SMALLEST: u64 = 256 << 10;
    const LARGEST: u64 = 64 << 20;
    if host_budget == Bytes::ZERO {
        return Bytes::ZERO;
    }
    Bytes(((kv_budget.0 / 64 + 1).next_power_of_two() / 2).clamp(SMALLEST, LARGEST))
}

/// A compression per document: as many as there are documents, or one for all.
fn one_each(compressions: &[Compression], documents: usize) -> Result<Vec<Compression>> {
    match compressions {
        [one] => Ok(vec![one.clone(); documents]),
        several if several.len() == documents => Ok(several.to_vec()),
        several => Err(usage(format!(
            "{} compressions for {documents} documents; give each document its --compress, or a single one for all",
            several.len()
        ))),
    }
}

/// Queues every session.
fn submit(job: &Job, model: &Model, scheduler: &mut Scheduler, meter: &mut Meter) -> Result<Vec<SessionId>> {
    let mut ids = Vec::new();
    let all = job.inquiries.iter().zip(&job.prompts).zip(&job.compressions);
    let round =
        |tokens: &Vec<u32>| Round { tokens: tokens.clone(), max_new: job.settings.max_new_tokens, think: job.think };
    for ((inquiry, prompt), compression) in all {
        let request = Request {
            prompt: prompt.tokens.clone(),
            max_new: job.settings.max_new_tokens,
            sampling: job.settings.sampling,
            stop: model.tokenizer.eos_ids().to_vec(),
            compression: compression.clone(),
            document: Some(prompt.compressed_tokens),
            rounds: job.later.iter().map(|(_, tokens)| round(tokens)).collect(),
            ladder: job.ladder.clone(),
            priority: 0,
        };
        meter.session(scheduler, &request);
        ids.push(scheduler.submit(request).map_err(|e| anyhow!("document '{}': {e}", inquiry.document))?);
    }
    Ok(ids)
}

/// Bytes of pages that a session held last, and the most of them that others held too.
#[derive(Clone, Copy, Default)]
struct Held {
    last: Bytes,
    shared: Bytes,
}

/// Steps until every session has ended, or an interrupt cancels those that have not; what each held.
fn steps(
    job: &Job,
    ids: &[SessionId],
    engine: &mut Engine<'_>,
    scheduler: &mut Scheduler,
    (meter, mut trace): (&mut Meter, Option<&mut Trace>),
) -> Result<Vec<Held>> {
    if let Some(trace) = &mut trace {
        ids.iter().zip(&job.inquiries).for_each(|(id, inquiry)| trace.name(*id, &inquiry.document));
        trace.step(scheduler);
    }
    let bars = SessionBars::new(ids.iter().copied().zip(job.inquiries.iter().map(|i| i.document.as_str())));
    let mut held = vec![Held::default(); ids.len()];
    while !scheduler.is_idle() && !interrupt::requested() {
        bars.update(scheduler);
        let step = scheduler.step(engine)?;
        let moved = step.out_bytes + step.in_bytes > Bytes::ZERO;
        let moved = moved || !step.compressed.is_empty();
        if step.prefill_rows + step.decode_rows == 0 && !moved && step.idle.is_zero() && step.asked.is_empty() {
            return Err(anyhow!("no session can take a step, though {} wait: a defect", scheduler.waiting().len()));
        }
        meter.step(scheduler, &step, engine.last_step().device);
        if let Some(trace) = &mut trace {
            trace.step(scheduler);
        }
        for (id, held) in ids.iter().zip(&mut held) {
            if let Some(table) = scheduler.caches().tables.get(id) {
                held.last = table.held_bytes();
                held.shared = held.shared.max(scheduler.caches().shared_bytes(*id));
            }
        }
    }
    for id in ids {
        scheduler.cancel(*id)?;
    }
    bars.clear();
    Ok(held)
}

fn session_reports(
    job: &Job,
    model: &Model,
    ids: &[SessionId],
    scheduler: &Scheduler,
    held: &[Held],
) -> Vec<SessionReport> {
    let all = ids.iter().zip(held).zip(job.inquiries.iter().zip(&job.prompts));
    all.map(|((id, held), (inquiry, prompt))| {
        let session = scheduler.session(*id).expect("a submitted session is known");
        let questions = std::iter::once(&inquiry.question).chain(job.later.iter().map(|(question, _)| question));
        let round = |(question, round): (&String, &Answer)| {
            let answer = model.tokenizer.decode(&session.produced[round.produced.clone()]);
            RoundReport::new(question.clone(), answer, round)
        };
        SessionReport {
            rounds: questions.zip(&session.answers).map(round).collect(),
            document_tokens: prompt.document_tokens,
            used_tokens: prompt.used_tokens,
            kv_shared_bytes: held.shared,
            ..SessionReport::new(inquiry.document.clone(), session, held.last)
        }
    })
    .collect()
}
