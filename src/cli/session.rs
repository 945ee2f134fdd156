//! `concertina session`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, anyhow};
use clap::{Args, Subcommand};
use concertina::compression::Compression;
use concertina::device::Device;
use concertina::disk::SessionFile;
use concertina::engine::{Engine, EngineConfig};
use concertina::geometry::Bytes;
use concertina::report::{
    DeviceReport, LoadReport, LoadedSession, Program, RefusedFile, SaveReport, SavedDocument, SessionDetails,
    SessionList,
};
use concertina::schedule::{Request, Round, Scheduler, SessionId};

use super::args::{self, CacheArgs, CalibrateArg, Global, ModelArg, SamplingArgs, chooses};
use super::documents;
use super::failure::{INTERRUPTED, usage};
use super::interrupt;
use super::load::{self, Model};
use super::output::Output;
use super::run_progress::SessionBars;
use super::session_dir::{self, SessionDir};
use super::tuning::Tuned;

/// Sessions in files: save documents that have been read, go on with a session, see what there is
///
/// A session file holds a session's tokens and its cache as it is, compressed or not. A session that is loaded goes on bit by
/// bit as it would have in the process that saved it. `concertina run --session-dir` saves its sessions too.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina session save --model model.gguf --session-dir sessions --document *.txt --compress kivi4
  concertina session list --session-dir sessions
  concertina session load --model model.gguf --session-dir sessions a --ask 'Who?' 'When?'
  concertina session inspect sessions/a.session")]
pub(super) struct SessionArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Clone, Debug, Subcommand)]
enum What {
    Save(SaveArgs),
    Load(LoadArgs),
    List(ListArgs),
    Inspect(InspectArgs),
}

/// Read documents and save their caches, before anything is asked
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina session save --model model.gguf --session-dir sessions --document a.txt b.txt
  concertina session save --model model.gguf --session-dir sessions --document a.txt --compress token=keydiff:0.5,hidden=kivi4")]
struct SaveArgs {
    #[command(flatten)]
    model: ModelArg,

    /// The folder of session files
    #[arg(long, value_name = "FOLDER")]
    session_dir: PathBuf,

    /// Documents, UTF-8 text: one session each
    #[arg(long, value_name = "PATH", num_args = 1.., required = true)]
    document: Vec<PathBuf>,

    /// Use only so many of the first tokens of each document
    #[arg(long, value_name = "TOKENS", value_parser = args::token_count)]
    document_tokens: Option<u32>,

    /// What is done to each cache
    #[arg(long, value_name = "METHODS", default_value = "full")]
    compress: Compression,

    #[command(flatten)]
    engine: EngineArgs,
}

/// Go on with sessions: ask them questions, and save them again
///
/// Where a run was interrupted in the middle of an answer, the answer is finished first.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina session load --model model.gguf --session-dir sessions a --ask 'Who?'
  concertina session load --model model.gguf --session-dir sessions a b --ask 'Who?' 'When?' --no-save")]
struct LoadArgs {
    #[command(flatten)]
    model: ModelArg,

    /// The folder of session files
    #[arg(long, value_name = "FOLDER")]
    session_dir: PathBuf,

    /// Names of sessions, as `concertina session list` shows them
    #[arg(value_name = "NAME", required = true)]
    name: Vec<String>,

    /// What every session is asked, in order
    #[arg(long, value_name = "TEXT", num_args = 1..)]
    ask: Vec<String>,

    /// Tokens to produce per answer at most
    #[arg(long, value_name = "TOKENS", default_value = "64", value_parser = args::token_count)]
    max_new: u32,

    /// Leave the files as they are
    #[arg(long)]
    no_save: bool,

    #[command(flatten)]
    engine: EngineArgs,

    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Show every session of a folder
///
/// Files that are damaged, of another version, or no session files are named with the reason.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina session list --session-dir sessions
  concertina session list --session-dir sessions --json - | jq '.sessions[].name'")]
struct ListArgs {
    /// The folder of session files
    #[arg(long, value_name = "FOLDER")]
    session_dir: PathBuf,
}

/// Show what a session file holds
///
/// The whole file is read and checked. It needs neither a GPU nor the model.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina session inspect sessions/a.session
  concertina session inspect sessions/a.session --json - | jq .origin")]
struct InspectArgs {
    /// The file
    file: PathBuf,
}

#[derive(Args, Clone, Debug)]
struct EngineArgs {
    /// Device bytes for caches, tables, scratch and staging; weights are apart
    #[arg(long, value_name = "SIZE", default_value = "48MiB", value_parser = args::budget)]
    kv_budget: Bytes,

    /// Longest context, prompt and answers together; the model's where not given
    #[arg(long, value_name = "TOKENS", value_parser = args::token_count)]
    context: Option<u32>,

    /// Sessions that may compute at once
    #[arg(long, value_name = "N", default_value = "8", value_parser = args::small_count)]
    max_sessions: u32,

    /// Rows of one step: decode rows of all sessions and prompt tokens beside them
    #[arg(long, value_name = "ROWS", default_value_t = args::DEFAULT_CHUNK, value_parser = args::small_count)]
    chunk: u32,

    #[command(flatten)]
    cache: CacheArgs,

    #[command(flatten)]
    calibration: CalibrateArg,
}

impl EngineArgs {
    /// For so many sessions of these compressions.
    fn config(&self, model: &Model, compressions: &[Compression], sessions: usize) -> Result<EngineConfig> {
        let max_sessions = self.max_sessions.min(u32::try_from(sessions).unwrap_or(u32::MAX));
        if self.chunk < max_sessions {
            let chunk = self.chunk;
            return Err(usage(format!("--chunk {chunk} has no row for each of {max_sessions} sessions at once")));
        }
        let context = args::context(self.context, model.geometry())?;
        let longest = model.geometry().context_length;
        Ok(EngineConfig {
            budget: self.kv_budget,
            max_rows: self.chunk,
            max_sessions,
            max_logit_rows: max_sessions,
            context_length: load::context_for(context, self.calibration.calibrate.as_deref(), longest),
            page_size: self.cache.page_size,
            codecs: self.cache.codecs(compressions, model.geometry())?,
            chooses: chooses(compressions),
            evictions: self.cache.evictions(compressions, model, max_sessions)?,
            swap_chunk: args::swap_chunk(self.kv_budget),
            max_arena: None,
        })
    }

    /// The engine and an empty schedule.
    fn start<'d>(
        &self,
        device: &'d Device,
        model: &Model,
        config: &EngineConfig,
        tuned: &Tuned,
    ) -> Result<(Engine<'d>, Scheduler)> {
        let weights = model.weights()?;
        let (mut engine, mut caches) = load::engine(device, &weights, config, tuned)?;
        drop(weights);
        load::calibrate(&mut engine, &mut caches, model, config, self.calibration.calibrate.as_deref())?;
        Ok((engine, Scheduler::new(load::schedule_config(config), caches)))
    }
}

/// Does it.
pub(super) fn run(args: &SessionArgs, global: &Global) -> Result<ExitCode> {
    match &args.what {
        What::Save(args) => save(args, global),
        What::Load(args) => load(args, global),
        What::List(args) => list(args, global),
        What::Inspect(args) => inspect(args, global),
    }
}

/// Steps until every session is over, or there is an interrupt.
fn steps(engine: &mut Engine<'_>, scheduler: &mut Scheduler, sessions: &[(SessionId, String)]) -> Result<()> {
    let bars = SessionBars::new(sessions.iter().map(|(id, name)| (*id, name.as_str())));
    while !scheduler.is_idle() && !interrupt::requested() {
        bars.update(scheduler);
        scheduler.step(engine)?;
    }
    bars.clear();
    Ok(())
}

fn save(args: &SaveArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let adapter = global.adapter()?;
    let folder = SessionDir::open(&args.session_dir)?;
    // Any question will do: it is not read.
    let inquiries = documents::inquiries(&args.document, &["?".to_owned()])?;
    let model = Model::open(&args.model.model)?;
    let origin = session_dir::origin(&model, &args.engine.cache, &args.engine.calibration)?;
    let config = args.engine.config(&model, std::slice::from_ref(&args.compress), inquiries.len())?;
    let limit = args.document_tokens.map(|n| n as usize);
    let mut requests = Vec::new();
    for inquiry in &inquiries {
        let mut prompt = documents::prompt(&model, inquiry, limit)?;
        documents::check_length(inquiry, &prompt, &[], 1, config.context_length)?;
        prompt.tokens.truncate(prompt.compressed_tokens as usize);
        let compression = args.compress.clone();
        requests.push(Request { compression, keep: true, ..Request::new(prompt.tokens, 1) });
    }
    let device = Device::open(&adapter)?;
    let tuned = global.tuned(&device)?;
    let (mut engine, mut scheduler) = args.engine.start(&device, &model, &config, &tuned)?;
    let mut sessions = Vec::new();
    for (inquiry, request) in inquiries.iter().zip(requests) {
        let id = scheduler.submit(request).map_err(|e| anyhow!("document '{}': {e}", inquiry.document))?;
        sessions.push((id, inquiry.document.clone()));
    }
    engine.keep_in(folder.path().to_owned());
    interrupt::install()?;
    steps(&mut engine, &mut scheduler, &sessions)?;
    let mut report = SaveReport { program: Program::THIS, sessions: Vec::new() };
    for (id, document) in &sessions {
        let session = scheduler.session(*id).expect("a submitted session is known");
        if !session.is_finished() {
            continue;
        }
        let mut saved = session_dir::saved(&mut engine, &scheduler, *id, &origin, Vec::new())?;
        // What it had to produce is no part of the document.
        saved.record.prompt.truncate(session.request.prompt.len());
        let (tokens, cache_bytes) = (saved.record.prompt.len(), Bytes(saved.pages.len() as u64));
        let compression = saved.record.compression.to_string();
        let (name, file_bytes) = folder.save_new(document, saved)?;
        scheduler.cancel(*id)?;
        let document = document.clone();
        report.sessions.push(SavedDocument { document, name, compression, tokens, cache_bytes, file_bytes });
    }
    output.text(&report)?;
    output.json(&report)?;
    if interrupt::requested() {
        eprintln!("interrupted: {} of {} documents were saved", report.sessions.len(), sessions.len());
        return Ok(INTERRUPTED.into());
    }
    Ok(ExitCode::SUCCESS)
}

/// Tokens of a question about a document that was saved before anything was asked.
fn first_question(model: &Model, question: &str) -> Result<Vec<u32>> {
    // What follows a document does not depend on it.
    let asked = model.chat(&format!(".\n\n{question}"))?;
    let any = model.chat(".\n\n")?;
    let common = asked.iter().zip(&any).take_while(|(a, b)| a == b).count();
    Ok(asked[common..].to_vec())
}

/// What a session is asked: the tokens that go on behind its prompt, and its request.
fn request(args: &LoadArgs, model: &Model, name: &str, file: &SessionFile) -> Result<(Vec<u32>, Request)> {
    let record = file.record();
    let later = |question: &String| -> Result<Round> {
        Ok(Round { tokens: model.next_turn(question)?, max_new: args.max_new, think: Default::default() })
    };
    let mut questions = args.ask.iter();
    let mut more = Vec::new();
    if record.answered {
        let Some(question) = questions.next() else {
            return Err(usage(format!("'{name}' has answered all that it was asked; give it a question with --ask")));
        };
        more = if file.turns().is_empty() { first_question(model, question)? } else { model.next_turn(question)? };
    }
    let request = Request {
        max_new: if record.answered { args.max_new } else { record.max_new },
        sampling: args.sampling.sampling()?,
        stop: model.tokenizer.eos_ids().to_vec(),
        rounds: questions.map(later).collect::<Result<_>>()?,
        keep: true,
        ..Request::new(Vec::new(), 1)
    };
    Ok((more, request))
}

fn load(args: &LoadArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let adapter = global.adapter()?;
    if let Some(at) = args.ask.iter().position(|question| question.trim().is_empty()) {
        return Err(usage(format!("--ask number {} of {} is empty", at + 1, args.ask.len())));
    }
    let folder = SessionDir::open(&args.session_dir)?;
    let model = Model::open(&args.model.model)?;
    let mut files = Vec::new();
    for name in &args.name {
        let file = folder.open_session(name)?;
        let (more, request) = request(args, &model, name, &file)?;
        files.push((name.clone(), file, more, request));
    }
    let mut engine_args = args.engine.clone();
    engine_args.cache.page_size = files[0].1.origin().page_tokens;
    let origin = session_dir::origin(&model, &engine_args.cache, &engine_args.calibration)?;
    for (name, file, ..) in &files {
        file.origin().serves(&origin).map_err(|error| anyhow!("'{name}': {error}"))?;
    }
    let compressions: Vec<_> = files.iter().map(|(_, file, ..)| file.record().compression.clone()).collect();
    let config = engine_args.config(&model, &compressions, files.len())?;
    let device = Device::open(&adapter)?;
    let tuned = global.tuned(&device)?;
    let (mut engine, mut scheduler) = engine_args.start(&device, &model, &config, &tuned)?;
    let device_report = DeviceReport::new(&device, Some(engine.clock())).tuned_by(&tuned.source);
    let model_report = model.report(Some(engine.weight_bytes()));
    output.text(&format!("device  {device_report}\nmodel   {model_report}\n\n"))?;

    let (mut sessions, mut before) = (Vec::new(), Vec::new());
    for (name, file, more, request) in files {
        let (turns, bytes) = (file.turns().to_vec(), file.page_bytes());
        let answered = file.record().answered;
        let id = engine.restore(&mut scheduler, file, &more, request);
        sessions.push((id.map_err(|error| anyhow!("'{name}': {error}"))?, name));
        before.push((turns, bytes, answered));
    }
    interrupt::install()?;
    steps(&mut engine, &mut scheduler, &sessions)?;
    let mut loaded = Vec::new();
    for ((id, name), (mut turns, restored_bytes, answered)) in sessions.iter().zip(before) {
        let session = scheduler.session(*id).expect("a restored session is known");
        // An answer that was under way belongs to the question before.
        let open = (!answered).then(|| turns.pop().map(|turn| turn.question).unwrap_or_default());
        let questions: Vec<_> = open.into_iter().chain(args.ask.iter().cloned()).collect();
        let new = session_dir::turns(&model, session, questions.iter());
        turns.extend(new.iter().cloned());
        let mut one = LoadedSession::new(name.clone(), session, new, restored_bytes);
        if !args.no_save {
            let mut saved = session_dir::saved(&mut engine, &scheduler, *id, &origin, turns)?;
            saved.name.clone_from(name);
            one.file_bytes = Some(folder.replace(saved)?);
        }
        scheduler.cancel(*id)?;
        loaded.push(one);
    }
    let interrupted = interrupt::requested();
    let (device, model) = (device_report, model_report);
    let report = LoadReport { program: Program::THIS, device, model, sessions: loaded, interrupted };
    output.text(&report)?;
    output.json(&report)?;
    Ok(if interrupted && args.no_save { INTERRUPTED.into() } else { ExitCode::SUCCESS })
}

fn list(args: &ListArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let mut report = SessionList { program: Program::THIS, sessions: Vec::new(), refused: Vec::new() };
    for (path, opened) in SessionDir::existing(&args.session_dir).all()? {
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match opened {
            Ok(opened) => report.sessions.push(SessionDetails::new(file, &opened)),
            Err(error) => report.refused.push(RefusedFile { file, reason: error.to_string() }),
        }
    }
    output.text(&report)?;
    output.json(&report)?;
    Ok(ExitCode::SUCCESS)
}

fn inspect(args: &InspectArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let file = SessionFile::open(&args.file).map_err(|error| anyhow!("'{}': {error}", args.file.display()))?;
    let details = SessionDetails::new(args.file.display().to_string(), &file);
    output.text(&details)?;
    output.json(&details)?;
    Ok(ExitCode::SUCCESS)
}
