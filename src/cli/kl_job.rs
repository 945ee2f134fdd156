//! What `eval kl` measures, and the budget that holds all of its caches.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Result, anyhow};
use concertina::compression::Compression;
use concertina::compression::hidden::{HiddenCodec, examples};
use concertina::device::Device;
use concertina::engine::{Engine, EngineConfig, EngineError, EvictionConfig};
use concertina::eval::kl::{KlResult, KlSettings, PrefixSealing, Progress, prefixes, slots};
use concertina::geometry::{Bytes, ModelGeometry, PageGeometry};
use concertina::pool::PoolError;
use concertina::pool::page_table::TableShape;
use concertina::report::KlRow;
use concertina::schedule::REPEAT_ROOM;
use concertina::weights::Weights;

use super::args::CacheArgs;
use super::failure::usage;
use super::kl::{KlArgs, Seal};
use super::load::{Model, context_for};

/// Everything that is known before the device is opened.
pub(super) struct Job {
    pub(super) settings: KlSettings,
    pub(super) compressions: Vec<Compression>,
    codecs: Vec<HiddenCodec>,
    evictions: EvictionConfig,
    /// Tokens that the engine is made for: a window, and a calibration text.
    context: u32,
    pub(super) page: PageGeometry,
    pub(super) chunk: u32,
}

impl Job {
    /// Checks what was asked for against the model.
    pub(super) fn new(args: &KlArgs, opened: &Model) -> Result<Self> {
        let sealing = match args.seal {
            Seal::AfterPrefix => PrefixSealing::AfterPrefix,
            Seal::WhenFull => PrefixSealing::WhenFull,
        };
        let settings = KlSettings { prefix_tokens: args.prefix as usize, tail_tokens: args.tail as usize, sealing };
        let (window, longest) = (settings.window(), opened.geometry().context_length);
        if window > longest as usize {
            let (prefix, tail) = (args.prefix, args.tail);
            return Err(usage(format!(
                "--prefix {prefix}, --tail {tail} and one token to predict are {window} tokens, longer than the \
                 model's context of {longest}"
            )));
        }
        let page = PageGeometry { page_size: args.cache.page_size, head_dim: opened.geometry().heads.head_dim };
        let compressions = if args.compress.is_empty() { every_example(page) } else { args.compress.clone() };
        let calibrate = args.calibration.calibrate.as_deref();
        Self::of(settings, compressions, &args.cache, opened, calibrate, args.chunk)
    }

    /// The same for any measurement of many caches that are made of one prefix, whose window fits the model.
    pub(super) fn of(
        settings: KlSettings,
        compressions: Vec<Compression>,
        cache: &CacheArgs,
        opened: &Model,
        calibrate: Option<&Path>,
        chunk: u32,
    ) -> Result<Self> {
        let model = opened.geometry();
        let page = PageGeometry { page_size: cache.page_size, head_dim: model.heads.head_dim };
        let mut seen = BTreeSet::new();
        for compression in &compressions {
            if *compression == Compression::default() {
                return Err(usage("the full cache is what every --compress is compared with; leave 'full' out"));
            }
            if !seen.insert(compression.to_string()) {
                return Err(usage(format!("--compress gives {} twice", compression.short())));
            }
        }
        let codecs = cache.codecs(&compressions, model)?;
        // Caches are made of one prefix, and each policy observes it into a slot of its own.
        let slots = u32::try_from(slots(&compressions).0.len()).expect("a command line is short");
        let evictions = cache.evictions(&compressions, opened, slots)?.unwrap_or_default();
        let prefix = u32::try_from(settings.prefix_tokens).expect("no longer than the model's context");
        for compression in &compressions {
            if let Some(eviction) = compression.token.eviction() {
                eviction.check_kept(eviction.kept(prefix)).map_err(usage)?;
            }
        }
        // Every cache has a row in a step of the tail.
        let chunk = chunk.max(caches(&compressions));
        let window = u32::try_from(settings.window()).expect("no longer than the model's context");
        let context = context_for(window, calibrate, model.context_length);
        Ok(Self { settings, compressions, codecs, evictions, context, page, chunk })
    }

    /// The engine's sizes; the budget is what all caches need unless one was given.
    pub(super) fn engine_config(
        &self,
        device: &Device,
        weights: &Weights,
        budget: Option<Bytes>,
    ) -> Result<EngineConfig> {
        let caches = caches(&self.compressions);
        let config = EngineConfig {
            budget: budget.unwrap_or(Bytes::ZERO),
            max_rows: self.chunk,
            max_sessions: caches,
            // One more than sessions: the engine then reads logits back rather than tokens.
            max_logit_rows: caches + 1,
            context_length: self.context,
            page_size: self.page.page_size,
            codecs: self.codecs.clone(),
            evictions: Some(self.evictions.clone()),
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

    /// Bytes that hold the pages of all caches at once, and one more in f16 while its prefix is read; more for slabs that
    /// several page sizes leave partly used.
    fn bytes_of_pages(&self, model: &ModelGeometry) -> Bytes {
        let n_tokens = u32::try_from(self.settings.window()).expect("no longer than the model's context");
        let prefix = u32::try_from(self.settings.prefix_tokens).expect("no longer than the model's context");
        let bytes = |codec, n_tokens| {
            let (num_layers, num_kv_heads) = (model.num_layers, model.heads.num_kv_heads);
            TableShape { num_layers, num_kv_heads, page: self.page, codec }.bytes_for(n_tokens)
        };
        let of_cache = |compression: &Compression| {
            let kept = compression.token.eviction().map_or(prefix, |eviction| eviction.kept(prefix).min(prefix));
            // What was kept and the tail each end in a page that is partly used.
            bytes(compression.hidden, n_tokens - prefix + kept + 2 * self.page.page_size)
        };
        let compressed: Bytes = self.compressions.iter().map(of_cache).sum();
        let all = compressed.0 + 2 * bytes(HiddenCodec::F16, n_tokens + REPEAT_ROOM).0;
        Bytes(all + all / 10 + 64 * self.slab().0)
    }

    /// Says whose budget a refusal speaks of.
    pub(super) fn name_budget(&self, config: &EngineConfig, error: EngineError) -> anyhow::Error {
        match error {
            EngineError::Pool(error @ (PoolError::BudgetTooSmall { .. } | PoolError::DoesNotFit { .. })) => anyhow!(
                "{error} (for {} caches in a --kv-budget of {}; without --kv-budget it is as large as they need)",
                caches(&self.compressions),
                config.budget
            ),
            error => error.into(),
        }
    }

    /// The compressions, as `--compress` reads them.
    pub(super) fn names(&self) -> Vec<String> {
        self.compressions.iter().map(ToString::to_string).collect()
    }

    /// Steps of [`Progress`] that a window takes.
    pub(super) fn steps_of_window(&self) -> usize {
        prefixes(&self.compressions, &self.settings) * self.settings.prefix_tokens + self.settings.tail_tokens
    }

    /// Rows computed of rows in all: a step of the tail has one for each cache.
    pub(super) fn rows(&self, progress: Progress) -> (u64, u64) {
        let caches = u64::from(caches(&self.compressions));
        let prefixes = (prefixes(&self.compressions, &self.settings) * self.settings.prefix_tokens) as u64;
        let tail = self.settings.tail_tokens as u64;
        let (done, total) = (progress.done as u64, progress.total as u64);
        let (windows, here) = (done / (prefixes + tail), done % (prefixes + tail));
        let of_window = prefixes + tail * caches;
        let rows = here.min(prefixes) + here.saturating_sub(prefixes) * caches;
        (windows * of_window + rows, total / (prefixes + tail) * of_window)
    }

    /// The report's rows.
    pub(super) fn rows_of(&self, results: Vec<KlResult>) -> Vec<KlRow> {
        let Some(full) = results.first().cloned() else { return Vec::new() };
        let all = std::iter::once(Compression::default()).chain(self.compressions.iter().cloned());
        let row = |(result, compression): (KlResult, Compression)| {
            KlRow::new(result, &full, compression.hidden.effective_bits(self.page), self.settings.prefix_tokens)
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
    use super::super::args::DEFAULT_CHUNK;
    use super::*;
    use concertina::geometry::HeadGeometry;
    use concertina::pool::page_table::{PageTable, Window};
    use concertina::pool::{PagePool, PoolLayout};
    use concertina::schedule::Caches;

    /// The shape of the reference model.
    fn smollm2() -> ModelGeometry {
        ModelGeometry {
            num_layers: 30,
            hidden_size: 576,
            intermediate_size: 1536,
            heads: HeadGeometry { num_qo_heads: 9, num_kv_heads: 3, head_dim: 64 },
            vocab_size: 49152,
            context_length: 8192,
            rope_theta: 100_000.0,
            rms_norm_eps: 1e-5,
        }
    }

    /// Fills and seals a cache as the measurement does.
    fn fill(
        caches: &mut Caches,
        job: &Job,
        compression: &Compression,
        sealing: Sealing,
    ) -> Result<PageTable, PoolError> {
        let Caches { pool, ranges, window, full, .. } = caches;
        let shape = TableShape { codec: compression.hidden, sealing, ..*full };
        let n_tokens = u32::try_from(job.settings.window() - 1).expect("few tokens");
        let mut table = PageTable::admit(pool, ranges, shape, n_tokens)?;
        let (prefix, mut sealed) = (u32::try_from(job.settings.prefix_tokens).expect("few tokens"), false);
        while table.n_tokens() < n_tokens {
            let first = table.n_tokens();
            let rows = if first < prefix { job.chunk.min(prefix - first) } else { 1 };
            window.clear();
            table.grow(pool, window, table.shape().cut(first, rows))?;
            table.retire(pool)?;
            if table.n_tokens() >= prefix && !sealed && sealing == Sealing::OnRequest {
                while table.seal(pool, 1).is_ok() && !table.sealing_pages().is_empty() {
                    table.retire(pool)?;
                }
                table.seal_when_full(pool)?;
                sealed = true;
            }
        }
        Ok(table)
    }

    #[test]
    fn the_default_budget_holds_every_cache_at_once() {
        let model = smollm2();
        for (page_size, prefix_tokens, tail_tokens) in
            [(16, 1024, 256), (32, 96, 8), (64, 1024, 256), (64, 8000, 100), (128, 1024, 256), (128, 100, 30)]
        {
            for (sealing, name) in
                [(Sealing::OnRequest, PrefixSealing::AfterPrefix), (Sealing::WhenFull, PrefixSealing::WhenFull)]
            {
                let page = PageGeometry { page_size, head_dim: 64 };
                let compressions = every_example(page);
                let codecs: Vec<_> = compressions.iter().map(|c| c.hidden).collect();
                let settings = KlSettings { prefix_tokens, tail_tokens, sealing: name };
                let job = Job { settings, compressions, codecs, context: 8192, page, chunk: DEFAULT_CHUNK };
                let window = Window::new(page, 3, job.chunk, true);
                let smallest = job.codecs.iter().map(|codec| codec.page_bytes(page)).min().expect("codecs");
                let layout = PoolLayout {
                    // Tables come out of it here, which in the engine count among the fixed bytes.
                    budget: job.bytes_of_pages(&model),
                    staging: Bytes::ZERO,
                    scratch: Bytes::ZERO,
                    max_binding: Bytes::mib(128),
                    slab: job.slab(),
                    smallest_page: smallest,
                    fixed_entries: window.entries(),
                };
                let codec = HiddenCodec::F16;
                let full = TableShape { num_layers: 30, num_kv_heads: 3, page, codec, sealing: Sealing::WhenFull };
                let pool = PagePool::new(&layout).expect("a pool");
                let mut caches = Caches::new(pool, full, window, job.codecs.clone());
                for compression in std::iter::once(&Compression::default()).chain(&job.compressions) {
                    let filled = fill(&mut caches, &job, compression, sealing);
                    assert!(
                        filled.is_ok(),
                        "{name:?}, pages of {page_size}, {prefix_tokens} tokens, {compression}: {filled:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn progress_counts_the_rows_of_a_tail_step_for_every_cache() {
        let settings = KlSettings { prefix_tokens: 100, tail_tokens: 10, sealing: PrefixSealing::AfterPrefix };
        let page = PageGeometry { page_size: 64, head_dim: 64 };
        let compressions = every_example(page)[..3].to_vec();
        let job = Job { settings, compressions, codecs: Vec::new(), context: 8192, page, chunk: 128 };
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
