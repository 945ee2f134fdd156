//! `concertina eval kl`.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, anyhow};
use clap::{Args, ValueEnum};
use concertina::compression::Compression;
use concertina::compression::hidden::{HiddenCodec, examples};
use concertina::device::Device;
use concertina::engine::{Engine, EngineConfig, EngineError};
use concertina::eval::kl::{self, KlResult, KlSettings, PrefixSealing, Progress};
use concertina::geometry::{Bytes, ModelGeometry, PageGeometry};
use concertina::pool::PoolError;
use concertina::pool::page_table::{Sealing, TableShape};
use concertina::report::{DeviceReport, KlReport, KlRow, Program};
use concertina::theory::predict::kv_bytes;
use concertina::weights::Weights;

use super::args::{CacheArgs, CalibrateArg, DEFAULT_CHUNK, Global, ModelArg, budget, small_count, token_count};
use super::failure::usage;
use super::load::{Model, calibrate, engine, read_text};
use super::output::{Output, OutputFile};
use super::progress;

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
  concertina eval kl --model model.gguf --text book.txt --windows 4 --json kl.json --svg kl.svg
  concertina eval kl --model model.gguf --text essay.txt --prefix 512 --tail 64 --page-size 128")]
pub(super) struct KlArgs {
    #[command(flatten)]
    model: ModelArg,

    /// The text, UTF-8
    #[arg(long, value_name = "FILE")]
    text: PathBuf,

    /// Tokens of the prefix
    #[arg(long, value_name = "TOKENS", default_value = "1024", value_parser = token_count)]
    prefix: u32,

    /// Tokens that are fed after it, at each of which distributions are compared
    #[arg(long, value_name = "TOKENS", default_value = "256", value_parser = token_count)]
    tail: u32,

    /// Windows of prefix and tail to use, from the beginning of the text
    #[arg(long, value_name = "N", default_value = "1", value_parser = small_count)]
    windows: u32,

    /// When the prefix is compressed
    #[arg(long, value_enum, value_name = "WHEN", default_value = "after-prefix")]
    seal: Seal,

    /// Compressions to measure, each as for `run`; every example of `concertina codecs` where not given
    #[arg(long, value_name = "METHODS", num_args = 1..)]
    compress: Vec<Compression>,

    /// Device bytes for all caches, tables, scratch and staging; as much as they need where not given
    #[arg(long, value_name = "SIZE", value_parser = budget)]
    kv_budget: Option<Bytes>,

    /// Rows of one step over the prefix
    #[arg(long, value_name = "ROWS", default_value_t = DEFAULT_CHUNK, value_parser = small_count)]
    chunk: u32,

    /// Draw mean KL against bytes per token into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,

    #[command(flatten)]
    cache: CacheArgs,

    #[command(flatten)]
    calibration: CalibrateArg,
}

/// When the prefix is compressed.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Seal {
    /// Read over a full cache, then sealed: what the cache alone costs
    AfterPrefix,
    /// Sealed page by page, as in a session: the prefix reads what is sealed
    WhenFull,
}

/// Everything that is known before the device is opened.
struct Job {
    settings: KlSettings,
    compressions: Vec<Compression>,
    codecs: Vec<HiddenCodec>,
    page: PageGeometry,
    chunk: u32,
}

/// Measures KL.
pub(super) fn run(args: &KlArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let svg = args.svg.as_deref().map(|path| OutputFile::open("the plot", path)).transpose()?;
    let request = global.adapter()?;
    let text = read_text("the text", &args.text)?;
    let path = args.text.display();
    let model = Model::open(&args.model.model)?;
    let job = Job::new(args, model.geometry())?;
    let tokens = model.tokenizer.encode(&text, false)?;
    let windows =
        job.settings.windows(&tokens, args.windows as usize).map_err(|sentence| anyhow!("'{path}': {sentence}"))?;
    if windows.len() < args.windows as usize {
        let (n, all) = (windows.len(), args.windows);
        eprintln!("'{path}' has {n} of the {all} windows");
    }
    let device = Device::open(&request)?;
    let weights = model.weights()?;
    let config = job.engine_config(&device, &weights, args.kv_budget)?;
    let named = |error| job.name_budget(&config, error);
    let (mut engine, mut caches) = engine(&device, &weights, &config).map_err(|error| match error.downcast() {
        Ok(error) => named(error),
        Err(error) => error,
    })?;
    drop(weights);
    calibrate(&mut engine, &mut caches, &model, &config, args.calibration.calibrate.as_deref())?;
    let device_report = DeviceReport::new(&device, None);
    let model_report = model.report(Some(engine.weight_bytes()));
    output.text(&format!("device  {device_report}\nmodel   {model_report}\n\n"))?;

    let started = Instant::now();
    let bar = progress::work("measuring", 1);
    let result = kl::on_engine(
        &mut engine,
        &mut caches,
        &job.compressions,
        &windows,
        &job.settings,
        job.chunk as usize,
        &mut |progress| {
            let (rows, of) = job.rows(progress);
            bar.set_length(of);
            bar.set_position(rows);
        },
    );
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
        results: job.rows_of(result.map_err(named)?, model.geometry()),
        elapsed_s: started.elapsed().as_secs_f64(),
    };
    output.text(&report)?;
    if let Some(svg) = svg {
        svg.write(report.plot().svg().as_bytes())?;
    }
    output.json(&report)?;
    Ok(ExitCode::SUCCESS)
}

impl Job {
    /// Checks what was asked for against the model.
    fn new(args: &KlArgs, model: &ModelGeometry) -> Result<Self> {
        let sealing = match args.seal {
            Seal::AfterPrefix => PrefixSealing::AfterPrefix,
            Seal::WhenFull => PrefixSealing::WhenFull,
        };
        let settings = KlSettings { prefix_tokens: args.prefix as usize, tail_tokens: args.tail as usize, sealing };
        let (window, longest) = (settings.window(), model.context_length);
        if window > longest as usize {
            let (prefix, tail) = (args.prefix, args.tail);
            return Err(usage(format!(
                "--prefix {prefix}, --tail {tail} and one token to predict are {window} tokens, longer than the \
                 model's context of {longest}"
            )));
        }
        let page = PageGeometry { page_size: args.cache.page_size, head_dim: model.heads.head_dim };
        let compressions = if args.compress.is_empty() { every_example(page) } else { args.compress.clone() };
        let mut seen = BTreeSet::new();
        for compression in &compressions {
            let hidden = compression.hidden;
            if *compression == Compression::default() {
                return Err(usage("the full cache is what every --compress is compared with; leave 'full' out"));
            }
            if !seen.insert(compression.to_string()) {
                return Err(usage(format!("--compress gives {hidden} twice")));
            }
        }
        let codecs = args.cache.codecs(&compressions, model)?;
        // Every cache has a row in a step of the tail.
        let chunk = args.chunk.max(caches(&compressions));
        Ok(Self { settings, compressions, codecs, page, chunk })
    }

    /// The engine's sizes; the budget is what all caches need unless one was given.
    fn engine_config(&self, device: &Device, weights: &Weights, budget: Option<Bytes>) -> Result<EngineConfig> {
        let caches = caches(&self.compressions);
        let config = EngineConfig {
            budget: budget.unwrap_or(Bytes::ZERO),
            max_rows: self.chunk,
            max_sessions: caches,
            // One more than sessions: the engine then reads logits back rather than tokens.
            max_logit_rows: caches + 1,
            context_length: u32::try_from(self.settings.window()).expect("no longer than the model's context"),
            page_size: self.page.page_size,
            codecs: self.codecs.clone(),
            max_arena: None,
        };
        if budget.is_some() {
            return Ok(config);
        }
        let pages = self.bytes_of_pages(&weights.geometry);
        let budget = pages + fixed_bytes(device, weights, &config, self.slab())?;
        Ok(EngineConfig { budget, ..config })
    }

    /// What a slab of pages takes.
    fn slab(&self) -> Bytes {
        let open = HiddenCodec::F16.page_bytes(self.page);
        Bytes(16 * self.codecs.iter().map(|codec| codec.page_bytes(self.page)).fold(open, Bytes::max).0)
    }

    /// Bytes that hold the pages of all caches at once: each sealed with its open page, the full one, and one more in
    /// f16 while its prefix is read; more for slabs that several page sizes leave partly used.
    fn bytes_of_pages(&self, model: &ModelGeometry) -> Bytes {
        let n_tokens = u32::try_from(self.settings.window()).expect("no longer than the model's context");
        let bytes = |codec| {
            let (num_layers, num_kv_heads) = (model.num_layers, model.heads.num_kv_heads);
            let shape = TableShape { num_layers, num_kv_heads, page: self.page, codec, sealing: Sealing::WhenFull };
            shape.bytes_for(n_tokens)
        };
        let sealed: Bytes = self.compressions.iter().map(|compression| bytes(compression.hidden)).sum();
        let all = sealed.0 + 2 * bytes(HiddenCodec::F16).0;
        Bytes(all + all / 10 + 64 * self.slab().0)
    }

    /// Says whose budget a refusal speaks of.
    fn name_budget(&self, config: &EngineConfig, error: EngineError) -> anyhow::Error {
        match error {
            EngineError::Pool(error @ (PoolError::BudgetTooSmall { .. } | PoolError::DoesNotFit { .. })) => anyhow!(
                "{error} (for {} caches in a --kv-budget of {}; without --kv-budget it is as large as they need)",
                caches(&self.compressions),
                config.budget
            ),
            error => error.into(),
        }
    }

    /// Rows computed of rows in all: a step of the tail has one for each cache.
    fn rows(&self, progress: Progress) -> (u64, u64) {
        let caches = u64::from(caches(&self.compressions));
        let prefixes = caches * self.settings.prefix_tokens as u64;
        let tail = self.settings.tail_tokens as u64;
        let (done, total) = (progress.done as u64, progress.total as u64);
        let (windows, here) = (done / (prefixes + tail), done % (prefixes + tail));
        let of_window = prefixes + tail * caches;
        let rows = here.min(prefixes) + here.saturating_sub(prefixes) * caches;
        (windows * of_window + rows, total / (prefixes + tail) * of_window)
    }

    /// The report's rows.
    fn rows_of(&self, results: Vec<KlResult>, model: &ModelGeometry) -> Vec<KlRow> {
        let Some(full) = results.first().cloned() else { return Vec::new() };
        let all = std::iter::once(Compression::default()).chain(self.compressions.iter().copied());
        let row = |(result, compression): (KlResult, Compression)| {
            let bits = compression.hidden.effective_bits(self.page);
            KlRow::new(result, &full, (bits, kv_bytes(model, &compression, 1)))
        };
        results.into_iter().zip(all).map(row).collect()
    }
}

/// Caches in the pool: the full one and the others.
fn caches(compressions: &[Compression]) -> u32 {
    u32::try_from(compressions.len() + 1).expect("a command line is short")
}

/// Every example of the registry that pages of this shape can have, but the full cache.
fn every_example(page: PageGeometry) -> Vec<Compression> {
    let fitting = examples().filter(|codec| codec.seals() && codec.check(page).is_ok());
    fitting.map(|hidden| Compression { hidden, ..Compression::default() }).collect()
}

/// What the engine holds besides pages, from the refusal of a budget that has no room for any. Arenas of a single slab
/// make it count what pages in many arenas take.
fn fixed_bytes(device: &Device, weights: &Weights, config: &EngineConfig, slab: Bytes) -> Result<Bytes> {
    let nothing = EngineConfig { budget: Bytes(1), max_arena: Some(slab), ..config.clone() };
    match Engine::new(device, weights, &nothing) {
        Err(EngineError::Pool(PoolError::BudgetTooSmall { fixed, .. })) => Ok(fixed),
        Err(error) => Err(error.into()),
        Ok(_) => Err(anyhow!("an engine was made within one byte: a defect")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_counts_the_rows_of_a_tail_step_for_every_cache() {
        let settings = KlSettings { prefix_tokens: 100, tail_tokens: 10, sealing: PrefixSealing::AfterPrefix };
        let page = PageGeometry { page_size: 64, head_dim: 64 };
        let compressions = every_example(page)[..3].to_vec();
        let job = Job { settings, compressions, codecs: Vec::new(), page, chunk: 128 };
        // Four caches: 400 steps of prefixes and 10 of a tail, in two windows.
        let rows = |done| job.rows(Progress { done, total: 820 });
        assert_eq!(rows(0), (0, 880), "nothing done");
        assert_eq!(rows(400), (400, 880), "all prefixes of a window");
        assert_eq!(rows(402), (408, 880), "two steps of the tail");
        assert_eq!(rows(410 + 100), (440 + 100, 880), "a prefix of the second window");
        assert_eq!(rows(820), (880, 880), "everything");
    }

    #[test]
    fn every_example_fits_the_pages_and_is_no_full_cache() {
        let some = |page_size| every_example(PageGeometry { page_size, head_dim: 64 });
        assert!(some(64).iter().all(|c| *c != Compression::default()), "the full cache is measured anyway");
        assert!(some(128).len() > some(64).len() && some(64).len() > some(16).len(), "groups of 128 and 32");
    }
}
