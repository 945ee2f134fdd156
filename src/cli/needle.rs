//! `concertina eval needle`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::{Args, ValueEnum};
use concertina::compression::Compression;
use concertina::device::Device;
use concertina::eval::kl::{KlSettings, PrefixSealing};
use concertina::eval::needle::{self, NeedleOutcome, NeedleStyle, NeedleTask};
use concertina::geometry::Bytes;
use concertina::report::{CaseOutcome, DeviceReport, NeedleCase, NeedleReport, NeedleRow, Program};

use super::args::{CacheArgs, CalibrateArg, DEFAULT_CHUNK, Global, ModelArg, budget, small_count, token_count};
use super::calibrate::PROSE;
use super::failure::usage;
use super::kl_job::Job;
use super::load::{Model, calibrate, engine, read_text};
use super::output::{Output, OutputFile};
use super::progress;
use super::resume::{ResumeArg, Resumed, fingerprint};

/// What is still found: a sentence in a long document, asked for once the document is compressed
///
/// "The pass key is 48213. Remember it." is planted in prose. Each cache reads the document, is compressed, and is then asked
/// for the key, which is right when every digit is; the answer is begun, so that the model has only to go on. Caches are
/// compressed before they see the question, as where many questions are asked about a document; with --query-aware behind
/// it. All caches are made of one reading of the document, and all answers advance together.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina eval needle --model model.gguf --compress duo:0.5 keydiff:0.5 snapkv:0.25 kivi2
  concertina eval needle --model model.gguf --text book.txt --lengths 512,2048 --depths 0.1,0.5,0.9 --compress duo:0.25
  concertina eval needle --model model.gguf --compress snapkv:0.25 tova:0.25 --query-aware --svg needle.svg
  concertina eval needle --model model.gguf --compress kivi4 kivi2 --style multi --json needle.json --resume needle.jsonl")]
pub(super) struct NeedleArgs {
    #[command(flatten)]
    model: ModelArg,

    /// Compressions to measure, each as for `run`; the full cache is always asked too
    #[arg(long, value_name = "METHODS", num_args = 1.., required = true)]
    compress: Vec<Compression>,

    /// Tokens of the prompts
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "512,1024,2048", value_parser = token_count)]
    lengths: Vec<u32>,

    /// Where in the document the needle stands: 0 is its beginning, 1 its end
    #[arg(long, value_name = "PARTS", value_delimiter = ',', default_value = "0.1,0.3,0.5,0.7,0.9", value_parser = part)]
    depths: Vec<f64>,

    /// Compress caches behind the question rather than before it is known
    #[arg(long)]
    query_aware: bool,

    /// What is hidden
    #[arg(long, value_enum, value_name = "STYLE", default_value = "passkey")]
    style: Style,

    /// Prose around needles, UTF-8, repeated where it is short; an essay is built in
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,

    /// Seed of what is hidden
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// Device bytes for all caches, tables, scratch and staging; as much as they need where not given
    #[arg(long, value_name = "SIZE", value_parser = budget)]
    kv_budget: Option<Bytes>,

    /// Rows of one step over a prompt
    #[arg(long, value_name = "ROWS", default_value_t = DEFAULT_CHUNK, value_parser = small_count)]
    chunk: u32,

    /// Draw wrong answers against bytes per token into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,

    #[command(flatten)]
    resume: ResumeArg,

    #[command(flatten)]
    cache: CacheArgs,

    #[command(flatten)]
    calibration: CalibrateArg,
}

/// What is hidden.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Style {
    /// A key of five digits
    Passkey,
    /// A word
    Word,
    /// Four keys of different places, one of which is asked for
    Multi,
}

impl From<Style> for NeedleStyle {
    fn from(style: Style) -> Self {
        match style {
            Style::Passkey => Self::Passkey,
            Style::Word => Self::Word,
            Style::Multi => Self::Multi,
        }
    }
}

/// Reads a part of a whole.
fn part(text: &str) -> Result<f64, String> {
    let part = text.parse().ok().filter(|part| (0.0..=1.0).contains(part));
    part.ok_or_else(|| "expected a number from 0 to 1".to_owned())
}

/// A question of the measurement.
struct Asked {
    length: u32,
    depth: f64,
    task: NeedleTask,
}

/// Every length and depth, prompts over consecutive prose.
fn questions(args: &NeedleArgs, model: &Model) -> Result<Vec<Asked>> {
    let text = match &args.text {
        Some(path) => read_text("the text", path)?,
        None => PROSE.to_owned(),
    };
    let prose = model.tokenizer.encode(&text, false)?;
    let mut all = Vec::new();
    let mut from = 0;
    let longest = model.geometry().context_length;
    for length in &args.lengths {
        for depth in &args.depths {
            let seed = args.seed.wrapping_add(all.len() as u64);
            let task = prompt(model, args.style.into(), (seed, *depth), &prose[from..], *length, &prose)?;
            let n = task.tokens.len() + task.answer.len();
            if n > longest as usize {
                return Err(usage(format!(
                    "--lengths {length}: prompt and answer are {n} tokens, longer than the model's context of {longest}"
                )));
            }
            from = (from + *length as usize) % prose.len();
            all.push(Asked { length: *length, depth: *depth, task });
        }
    }
    Ok(all)
}

/// A prompt of at most `length` tokens over prose that begins with `first` and goes on with `prose` again and again.
fn prompt(
    model: &Model,
    style: NeedleStyle,
    (seed, depth): (u64, f64),
    first: &[u32],
    length: u32,
    prose: &[u32],
) -> Result<NeedleTask> {
    let needle = style.needle(seed, depth);
    let answer = model.tokenizer.encode(&needle.answer, false)?;
    let with = |n: usize| -> Result<NeedleTask> {
        let around: Vec<u32> = first.iter().chain(prose.iter().cycle()).take(n).copied().collect();
        let document = needle.in_prose(&model.tokenizer.decode(&around));
        let mut tokens = model.chat(&format!("{document}\n\n{}", needle.question))?;
        // What every question about the document begins with is compressed before the question is read.
        let any_question = model.chat(&format!("{document}\n\n"))?;
        let document = tokens.iter().zip(&any_question).take_while(|(a, b)| a == b).count();
        tokens.extend(model.tokenizer.encode(needle.begun, false)?);
        Ok(NeedleTask { tokens, document, answer: answer.clone() })
    };
    let around = with(0)?.tokens.len();
    let mut n = (length as usize).saturating_sub(around);
    loop {
        if n == 0 {
            return Err(usage(format!(
                "--lengths {length} leaves no room for prose: the needle, the question and the chat format take {around} \
                 tokens"
            )));
        }
        let task = with(n)?;
        // Cutting a text can change how its ends are tokenised.
        let over = task.tokens.len().saturating_sub(length as usize);
        if over == 0 {
            return Ok(task);
        }
        n = n.saturating_sub(over);
    }
}

/// What all caches together need room for, and that every policy leaves something at every length.
fn job(args: &NeedleArgs, asked: &[Asked], model: &Model) -> Result<Job> {
    let prefixes = asked.iter().map(|asked| asked.task.prefix(args.query_aware));
    let tails = asked.iter().map(|asked| asked.task.tokens.len() - asked.task.prefix(args.query_aware));
    let answers = asked.iter().map(|asked| asked.task.answer.len());
    for (asked, prefix) in asked.iter().zip(prefixes.clone()) {
        let prefix = u32::try_from(prefix).expect("no longer than the model's context");
        for eviction in args.compress.iter().filter_map(|compression| compression.token.eviction()) {
            let checked = eviction.check_kept(eviction.kept(prefix));
            checked.map_err(|sentence| usage(format!("--lengths {}: {sentence}", asked.length)))?;
        }
    }
    let settings = KlSettings {
        prefix_tokens: prefixes.max().unwrap_or(1),
        tail_tokens: tails.max().unwrap_or(1) + answers.max().unwrap_or(1),
        sealing: PrefixSealing::AfterPrefix,
    };
    let calibrate = args.calibration.calibrate.as_deref();
    Job::of(settings, args.compress.clone(), &args.cache, model, calibrate, args.chunk)
}

/// What results are of.
fn settings(args: &NeedleArgs, asked: &[Asked], model: &Model, job: &Job) -> Result<serde_json::Value> {
    let tokens = asked.iter().flat_map(|asked| &asked.task.tokens).flat_map(|token| token.to_le_bytes());
    Ok(serde_json::json!({
        "measure": "eval needle",
        "model": model.identity()?,
        "compress": job.names(),
        "lengths": args.lengths,
        "depths": args.depths,
        "style": NeedleStyle::from(args.style),
        "query_aware": args.query_aware,
        "seed": args.seed,
        "text": fingerprint(&tokens.collect::<Vec<u8>>()),
        "page_tokens": job.page.page_size,
        "chunk_tokens": job.chunk,
        "head_scores": args.cache.head_scores_fingerprint()?,
        "calibrate": args.calibration.fingerprint()?,
    }))
}

/// Asks.
pub(super) fn run(args: &NeedleArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let svg = args.svg.as_deref().map(|path| OutputFile::open("the plot", path)).transpose()?;
    let request = global.adapter()?;
    let model = Model::open(&args.model.model)?;
    let asked = questions(args, &model)?;
    let job = job(args, &asked, &model)?;
    let mut resumed = Resumed::open(&args.resume, &settings(args, &asked, &model, &job)?)?;
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
    let work = |asked: &Asked| asked.task.rows(&job.compressions, args.query_aware) as u64;
    let bar = progress::work("asking", asked.iter().map(work).sum());
    let mut cases = Vec::with_capacity(asked.len());
    for (index, question) in asked.iter().enumerate() {
        if let Some(case) = resumed.unit(index)? {
            bar.inc(work(question));
            bar.reset_eta();
            cases.push(case);
            continue;
        }
        let Asked { length, depth, task } = question;
        let (aware, chunk) = (args.query_aware, job.chunk as usize);
        let mut advance = |rows: usize| bar.inc(rows as u64);
        let result = needle::on_engine(&mut engine, &mut caches, &job.compressions, task, aware, chunk, &mut advance);
        if result.is_err() {
            bar.finish_and_clear();
        }
        let with_text = |outcome: NeedleOutcome| CaseOutcome { text: model.tokenizer.decode(&outcome.answer), outcome };
        let case = NeedleCase {
            length_tokens: *length,
            depth: *depth,
            prompt_tokens: task.tokens.len(),
            prefix_tokens: task.prefix(aware),
            answer: model.tokenizer.decode(&task.answer),
            outcomes: result.map_err(named)?.into_iter().map(with_text).collect(),
        };
        resumed.add(index, &case)?;
        cases.push(case);
    }
    bar.finish_and_clear();
    let report = NeedleReport {
        program: Program::THIS,
        device: device_report,
        model: model_report,
        text: args.text.as_ref().map(|path| path.display().to_string()),
        style: args.style.into(),
        query_aware: args.query_aware,
        seed: args.seed,
        depths: args.depths.clone(),
        page_tokens: job.page.page_size,
        kv_budget_bytes: config.budget,
        results: NeedleRow::of_cases(&cases),
        cases,
        elapsed_s: started.elapsed().as_secs_f64(),
    };
    output.text(&report)?;
    if let Some(svg) = svg {
        svg.write(report.plot().svg().as_bytes())?;
    }
    output.json(&report)?;
    Ok(ExitCode::SUCCESS)
}
