//! `concertina run`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, anyhow};
use clap::Args;
use concertina::compression::Compression;
use concertina::compression::hidden::HiddenCodec;
use concertina::disk::session_file::Origin;
use concertina::engine::{Engine, EngineConfig, EngineError};
use concertina::geometry::Bytes;
use concertina::report::{
    DeviceReport, FaultsReport, Meter, Program, RoundReport, RunReport, RunSettings, SessionReport, Trace,
};
use concertina::schedule::{
    Answer, Caches, HostConfig, Rates, Request, Round, ScheduleConfig, Scheduler, SessionId, StepReport, Store,
};

use super::args::{self, CacheArgs, CalibrateArg, Global, ModelArg, SamplingArgs, chooses};
use super::documents::{self, Inquiry, Prompt};
use super::failure::{INTERRUPTED, usage};
use super::interrupt;
use super::load::{self, Model};
use super::losses::Losses;
use super::output::{Output, OutputFile};
use super::run_progress::SessionBars;
use super::session_dir::{self, SessionDir};

/// Ask questions about many documents at once, within one byte budget
///
/// Each document becomes a session: a prompt of the document and its question, the model's answer, and so on for the questions
/// of --then. Questions about one document share its pages, and only the first reads it. Sessions share the budget: one begins when the pool can promise all pages that its prompts and answers can
/// need, and those that hold pages compute together, their prompts cut into chunks that fit beside the decode rows. The
/// others wait in the order given; one that has answered gives up its pages to them. At the end every page is back; if not,
/// the command fails.
///
/// Where the device has no memory for a step, the step is made smaller. Where the device is lost, another one is opened, three
/// times at most; caches in host memory come back from there, and the others are computed again.
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
  concertina run --model model.gguf --document *.txt --ask 'Who?' --then 'When?' --host-budget 1GiB --swap-codec kivi4
  concertina run --model model.gguf --document *.txt --ask 'Who?' --session-dir sessions
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

    /// Keep sessions in files in this folder: caches that host memory has no room for, and every session at the end, or when the
    /// run is interrupted; `concertina session load` goes on with them
    #[arg(long, value_name = "FOLDER")]
    session_dir: Option<PathBuf>,

    /// Bytes of files for caches that fit neither on the device nor in host memory
    #[arg(long, value_name = "SIZE", default_value = "16GiB", requires = "session_dir", value_parser = args::budget)]
    disk_budget: Bytes,

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

    /// Encode caches in this codec before they leave the device, where it makes them smaller and there is room for both forms:
    /// less to copy, and a loss of its own that answers afterwards have
    #[arg(long, value_name = "CODEC")]
    swap_codec: Option<HiddenCodec>,

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
    sessions: Option<Sessions>,
}

/// Where sessions are kept, and what they belong to.
struct Sessions {
    folder: SessionDir,
    origin: Origin,
}

/// What a run has come to, whatever device it is on.
struct Running {
    scheduler: Scheduler,
    ids: Vec<SessionId>,
    meter: Meter,
    trace: Option<Trace>,
    /// What each session held.
    held: Vec<Held>,
}

/// Bytes of pages that a session held last, and the most of them that others held too.
#[derive(Clone, Copy, Default)]
struct Held {
    last: Bytes,
    shared: Bytes,
}

/// Runs sessions.
pub(super) fn run(args: &RunArgs, global: &Global) -> Result<ExitCode> {
    run_by(&mut |scheduler, engine| scheduler.step(engine), args, global)
}

/// How a step is taken: in tests, not always well.
type Step<'s> = &'s mut dyn FnMut(&mut Scheduler, &mut Engine<'_>) -> Result<StepReport, EngineError>;

/// Runs sessions on a device, and on another one where that is lost.
fn run_by(step: Step<'_>, args: &RunArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let trace_file = args.trace.as_deref().map(|path| OutputFile::open("the trace", path)).transpose()?;
    let request = global.adapter()?;
    let (job, model) = prepare(args)?;
    let mut losses = Losses::default();
    let mut running: Option<Running> = None;
    let (device_report, model_report, saved) = loop {
        let device = losses.open(&request)?;
        let tuned = global.tuned(&device)?;
        // Their copy on the host is gone while the run goes on; another device gets them from the file.
        let weights = model.weights()?;
        let (mut engine, mut caches) = load::engine(&device, &weights, &job.config, &tuned)?;
        drop(weights);
        load::calibrate(&mut engine, &mut caches, &model, &job.config, args.calibration.calibrate.as_deref())?;
        if let Some(sessions) = &job.sessions {
            engine.keep_in(sessions.folder.path().to_owned());
        }
        let device_report = DeviceReport::new(&device, Some(engine.clock())).tuned_by(&tuned.source);
        let model_report = model.report(Some(engine.weight_bytes()));
        let running = match &mut running {
            Some(running) => {
                losses.hand_over(&mut engine, &caches, &running.scheduler)?;
                running
            }
            None => {
                interrupt::install()?;
                output.text(&format!("device  {device_report}\nmodel   {model_report}\n\n"))?;
                let trace = trace_file.is_some().then(Trace::default);
                running.insert(begin(&job, &model, engine.link_rates()?, caches, trace)?)
            }
        };
        match steps(&job, step, &mut engine, running)? {
            Ok(()) => {
                let saved = save(&job, &model, &running.ids, &mut engine, &running.scheduler)?;
                break (device_report, model_report, saved);
            }
            Err(error) => losses.take(error, &mut engine, &mut running.scheduler)?,
        }
    };
    let Running { mut scheduler, ids, meter, trace, held } = running.expect("it ran");
    if let (Some(file), Some(trace)) = (trace_file, trace) {
        file.write(trace.json(scheduler.now()).as_bytes())?;
    }

    let interrupted = interrupt::requested();
    let (saved, failed) = saved;
    for id in &ids {
        scheduler.cancel(*id)?;
    }
    let report = RunReport {
        program: Program::THIS,
        device: device_report,
        model: model_report,
        sessions: session_reports(&job, &model, &ids, &scheduler, (&held, saved)),
        settings: job.settings,
        metrics: meter.metrics(&scheduler),
        pool: scheduler.report(),
        host_peak_bytes: scheduler.away_bytes(Store::Host).1,
        disk_peak_bytes: scheduler.away_bytes(Store::Disk).1,
        elapsed_s: scheduler.now().as_secs_f64(),
        faults: FaultsReport { steps_shrunk: meter.steps_shrunk(), ..losses.report },
        interrupted,
    };
    output.text(&report)?;
    let pool = &report.pool;
    if pool.pages_in_use_bytes + pool.committed_bytes > Bytes::ZERO {
        let (held, promised) = (pool.pages_in_use_bytes, pool.committed_bytes);
        return Err(anyhow!("{held} of pages are in use and {promised} promised after the last session: a defect"));
    }
    output.json(&report)?;
    if let Some(error) = failed {
        return Err(error);
    }
    if interrupted && job.sessions.is_some() {
        let names: Vec<_> = report.sessions.iter().filter_map(|s| s.saved_as.as_deref()).collect();
        eprintln!(
            "interrupted: {} sessions were saved; concertina session load goes on with {}",
            names.len(),
            names.join(" ")
        );
        return Ok(ExitCode::SUCCESS);
    }
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
    let open = |path: &PathBuf| -> Result<Sessions> {
        let origin = session_dir::origin(&model, &args.cache, &args.calibration)?;
        Ok(Sessions { folder: SessionDir::open(path)?, origin })
    };
    let sessions = args.session_dir.as_ref().map(open).transpose()?;
    if args.swap_codec.is_some() && args.host_budget == Bytes::ZERO && args.session_dir.is_none() {
        return Err(usage(
            "--swap-codec is for caches that leave; give them somewhere to go with --host-budget or --session-dir",
        ));
    }
    let swapped = args.swap_codec.map(|hidden| Compression { hidden, ..Compression::default() });
    let all: Vec<Compression> = compressions.iter().chain(&args.ladder).chain(&swapped).cloned().collect();
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
        evictions: match args.ladder.is_empty() && swapped.is_none() {
            true => evictions,
            false => Some(evictions.unwrap_or_default()),
        },
        swap_chunk: if sessions.is_some() || args.host_budget > Bytes::ZERO {
            args::swap_chunk(args.kv_budget)
        } else {
            Bytes::ZERO
        },
        max_arena: None,
    };
    let settings = RunSettings {
        kv_budget_bytes: args.kv_budget,
        host_budget_bytes: args.host_budget,
        swap_codec: args.swap_codec,
        disk_budget_bytes: if sessions.is_some() { args.disk_budget } else { Bytes::ZERO },
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
    Ok((Job { compressions, inquiries, prompts, later, ladder, think, settings, config, sessions }, model))
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
fn begin(job: &Job, model: &Model, rates: Rates, caches: Caches, trace: Option<Trace>) -> Result<Running> {
    let disk_rates = job.sessions.as_ref().map(|sessions| sessions.folder.rates()).transpose()?;
    let host = HostConfig {
        budget: job.settings.host_budget_bytes,
        rates,
        disk_budget: job.settings.disk_budget_bytes,
        disk_rates: disk_rates.unwrap_or_default(),
        codec: job.settings.swap_codec,
        ..HostConfig::default()
    };
    let config = ScheduleConfig { host, ..load::schedule_config(&job.config) };
    let (mut scheduler, mut meter) = (Scheduler::new(config, caches), Meter::default());
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
            keep: job.sessions.is_some(),
        };
        meter.session(&scheduler, &request);
        ids.push(scheduler.submit(request).map_err(|e| anyhow!("document '{}': {e}", inquiry.document))?);
    }
    let mut running = Running { scheduler, meter, trace, held: vec![Held::default(); ids.len()], ids };
    if let Some(trace) = &mut running.trace {
        running.ids.iter().zip(&job.inquiries).for_each(|(id, inquiry)| trace.name(*id, &inquiry.document));
        trace.step(&running.scheduler);
    }
    Ok(running)
}

/// Steps until every session has ended, or an interrupt cancels those that have not, or the engine fails.
fn steps(job: &Job, step: Step<'_>, engine: &mut Engine<'_>, running: &mut Running) -> Result<Result<(), EngineError>> {
    let Running { scheduler, ids, meter, trace, held } = running;
    let bars = SessionBars::new(ids.iter().copied().zip(job.inquiries.iter().map(|i| i.document.as_str())));
    while !scheduler.is_idle() && !interrupt::requested() {
        bars.update(scheduler);
        let step = match step(scheduler, engine) {
            Ok(step) => step,
            Err(error) => {
                bars.clear();
                return Ok(Err(error));
            }
        };
        let moved = step.out_bytes + step.in_bytes > Bytes::ZERO;
        let moved = moved || !step.compressed.is_empty() || !step.evicted.is_empty() || step.shortage.is_some();
        if step.prefill_rows + step.decode_rows == 0 && !moved && step.idle.is_zero() && step.asked.is_empty() {
            return Err(anyhow!("no session can take a step, though {} wait: a defect", scheduler.waiting().len()));
        }
        meter.step(scheduler, &step, engine.last_step().device);
        if let Some(trace) = trace {
            trace.step(scheduler);
        }
        for (id, held) in ids.iter().zip(&mut *held) {
            if let Some(table) = scheduler.caches().tables.get(id) {
                held.last = table.held_bytes();
                held.shared = held.shared.max(scheduler.caches().shared_bytes(*id));
            }
        }
    }
    bars.clear();
    Ok(Ok(()))
}

/// A session in a file: its name, and the file's bytes.
type SavedAs = (String, Bytes);

/// Saves every session, where there is a folder for them, each to a file of its own; what was saved, and the first that could not
/// be. Those after it are tried all the same.
fn save(
    job: &Job,
    model: &Model,
    ids: &[SessionId],
    engine: &mut Engine<'_>,
    scheduler: &Scheduler,
) -> Result<(Vec<Option<SavedAs>>, Option<anyhow::Error>)> {
    let Some(Sessions { folder, origin }) = &job.sessions else { return Ok((vec![None; ids.len()], None)) };
    let (mut all, mut failed) = (Vec::new(), None);
    for (id, inquiry) in ids.iter().zip(&job.inquiries) {
        let session = scheduler.session(*id).expect("a submitted session is known");
        let questions = std::iter::once(&inquiry.question).chain(job.later.iter().map(|(question, _)| question));
        let turns = session_dir::turns(model, session, questions);
        let saved = session_dir::saved(engine, scheduler, *id, origin, turns);
        match saved.and_then(|saved| folder.save_new(&inquiry.document, saved)) {
            Ok(saved) => all.push(Some(saved)),
            Err(error) => {
                all.push(None);
                failed.get_or_insert(error);
            }
        }
    }
    Ok((all, failed))
}

fn session_reports(
    job: &Job,
    model: &Model,
    ids: &[SessionId],
    scheduler: &Scheduler,
    (held, saved): (&[Held], Vec<Option<SavedAs>>),
) -> Vec<SessionReport> {
    let all = ids.iter().zip(held.iter().zip(saved)).zip(job.inquiries.iter().zip(&job.prompts));
    all.map(|((id, (held, saved)), (inquiry, prompt))| {
        let (saved_as, saved_bytes) = saved.unzip();
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
            saved_as,
            saved_bytes,
            ..SessionReport::new(inquiry.document.clone(), session, held.last)
        }
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use concertina::device::loss::Failure;
    use concertina::model::reference_model_path;
    use concertina::schedule::Place;
    use serde_json::Value;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        run: RunArgs,
        #[command(flatten)]
        global: Global,
    }

    /// What a run of two documents, of which one fits, reports, where some steps fail.
    fn report(step: Step<'_>) -> Value {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name).display().to_string();
        std::fs::write(path("a.txt"), "The town lies by the sea. ".repeat(4)).expect("written");
        std::fs::write(path("b.txt"), "The mill stands on the hill. ".repeat(4)).expect("written");
        let (a, b, json, model) =
            (path("a.txt"), path("b.txt"), path("report.json"), reference_model_path().display().to_string());
        let line = ["run", "--model", &model, "--document", &a, &b, "--ask", "Where is it?", "--then", "Say it again."];
        let sizes = ["--max-new", "4", "--context", "256", "--kv-budget", "9MiB", "--host-budget", "64MiB"];
        let line = Line::parse_from(line.iter().chain(&sizes).chain(&["--json", &json]));
        run_by(step, &line.run, &line.global).expect("it goes on");
        serde_json::from_slice(&std::fs::read(json).expect("written")).expect("JSON")
    }

    fn answers(report: &Value) -> Vec<&Value> {
        let sessions = report["sessions"].as_array().expect("a list").iter();
        sessions
            .flat_map(|session| session["rounds"].as_array().expect("a list"))
            .map(|round| &round["answer"])
            .collect()
    }

    #[test]
    #[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
    fn a_run_goes_on_when_memory_is_short_and_the_device_is_lost_gpu() {
        let undisturbed = report(&mut |scheduler, engine| scheduler.step(engine));
        assert_eq!(undisturbed["faults"]["device_losses"], 0, "nothing went wrong");
        assert_eq!(undisturbed["metrics"]["concurrency"]["resident_max"], 1, "there is room for one");
        let (mut steps, mut lost) = (0, false);
        let disturbed = report(&mut |scheduler, engine| {
            steps += 1;
            let somewhere = |place: Place| scheduler.sessions().any(|(_, session)| session.place == place);
            if steps == 2 {
                engine.device().fail_after(0, Failure::NoMemory);
            } else if !lost && somewhere(Place::Host) && somewhere(Place::Device) {
                lost = true;
                // Not in the step that follows: until then the last pages are on the device.
                engine.device().fail_after(1, Failure::Loss);
            }
            scheduler.step(engine)
        });
        let faults = &disturbed["faults"];
        assert_eq!((&faults["device_losses"], &faults["steps_shrunk"]), (&1.into(), &1.into()), "{faults}");
        let caches = ["caches_restored", "caches_recomputed"].map(|name| faults[name].as_u64().expect("a number"));
        assert_eq!(caches, [1, 1], "one was on the host and one on the device: {faults}");
        assert_eq!(answers(&disturbed), answers(&undisturbed), "the answers are the same");
        assert_eq!(answers(&disturbed).len(), 4, "two documents, two questions");
        assert_eq!(disturbed["pool"]["pages_in_use_bytes"], 0, "all bytes are back");
    }

    #[test]
    #[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
    fn a_device_that_is_lost_again_and_again_is_an_error_gpu() {
        let error = std::panic::catch_unwind(|| {
            report(&mut |scheduler, engine| {
                engine.device().fail_after(0, Failure::Loss);
                scheduler.step(engine)
            })
        });
        let message = error.expect_err("it gives up").downcast::<String>().expect("a message");
        assert!(message.contains("as 3 before it were; give a smaller --chunk"), "{message}");
    }
}
