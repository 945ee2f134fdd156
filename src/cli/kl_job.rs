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

use super::args::{CacheArgs, chooses};
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
            chooses: chooses(&self.compressions),
            evictions: Some(self.evictions.clone()),
            swap_chunk: Bytes::ZERO,
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
            TableShape { num_layers, num_kv_heads, page: self.page, codec, quest: None }.bytes_for(n_tokens)
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
    use std::sync::Arc;

    use super::super::args::DEFAULT_CHUNK;
    use super::*;
    use concertina::compression::head::{self, HeadScores};
    use concertina::compression::token::{self, TokenPolicy};
    use concertina::geometry::HeadGeometry;
    use concertina::pool::page_table::Window;
    use concertina::pool::{PagePool, PoolLayout};
    use concertina::schedule::{Abilities, Caches, SessionId};

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

    fn job(settings: KlSettings, page: PageGeometry, compressions: Vec<Compression>) -> Job {
        let codecs: BTreeSet<_> = compressions.iter().map(|c| c.hidden).filter(HiddenCodec::seals).collect();
        let (codecs, evictions) = (codecs.into_iter().collect(), EvictionConfig::default());
        Job { settings, compressions, codecs, evictions, context: 8192, page, chunk: DEFAULT_CHUNK }
    }

    /// Every example of codecs, of policies that leave something of the prefix, and of head patterns.
    fn everything(page: PageGeometry, prefix: u32) -> Vec<Compression> {
        let full = Compression::default;
        let possible = |token: &TokenPolicy| token.eviction().is_some_and(|e| e.check_kept(e.kept(prefix)).is_ok());
        let tokens = token::examples().filter(possible).map(|token| Compression { token, ..full() });
        let heads = head::examples().map(|head| Compression { head, ..full() });
        let codecs = every_example(page);
        let hidden = codecs.last().expect("some codec fits").hidden;
        // Windows that are wider than what the policy leaves of the other heads.
        let wide = "head=duo:0.1:recent512,token=streaming:0.1".parse().expect("both exist");
        let both: Vec<_> = tokens.chain(heads).chain([wide]).collect();
        // What stays in a codec, and as it was.
        let in_codec: Vec<_> = both.iter().map(|c| Compression { hidden, ..c.clone() }).collect();
        codecs.into_iter().chain(both).chain(in_codec).collect()
    }

    fn grow(caches: &mut Caches, id: SessionId, n_tokens: u32, chunk: u32) -> Result<(), PoolError> {
        let mut left = n_tokens;
        while left > 0 {
            let n = caches.cut(id, chunk.min(left));
            let Caches { pool, window, tables, .. } = caches;
            let table = tables.get_mut(&id).expect("it was admitted");
            window.clear();
            table.grow(pool, window, n)?;
            table.retire();
            left -= n;
        }
        Ok(())
    }

    /// Makes a cache as the measurement does: of the full one's prefix where it can, else of a prefix of its own; then the
    /// tail.
    fn fill(caches: &mut Caches, job: &Job, compression: &Compression, id: SessionId) -> Result<(), PoolError> {
        let count = |n: usize| u32::try_from(n).expect("few tokens");
        let (prefix, tail) = (count(job.settings.prefix_tokens), count(job.settings.tail_tokens));
        if *compression == Compression::default() {
            caches.admit(id, compression, prefix, prefix + tail + REPEAT_ROOM)?;
            grow(caches, id, prefix, job.chunk)?;
        } else if job.settings.sealing == PrefixSealing::WhenFull && !Caches::evicts(compression) {
            caches.admit(id, compression, prefix, prefix + tail)?;
            grow(caches, id, prefix, job.chunk)?;
        } else {
            let domains = caches.domains(compression, prefix).expect("the policy leaves something");
            let mut target = caches.admit_target(compression, prefix, tail)?;
            let mut kept = vec![None; target.shape().num_lists() as usize];
            for domain in domains.iter().filter(|domain| domain.total > 0) {
                let of_list = domain.total / count(domain.lists.len());
                domain.lists.iter().for_each(|list| kept[*list as usize] = Some((0..of_list).collect()));
            }
            target.keep(&mut caches.pool, kept.into_iter().map(Into::into).collect(), &[], prefix)?;
            caches.tables.insert(id, target);
        }
        grow(caches, id, tail, 1)
    }

    /// Caches over exactly the bytes that a job reckons with.
    fn caches(job: &Job, model: &ModelGeometry) -> Caches {
        let (page, window) = (job.page, Window::new(job.page, 3, job.chunk, true));
        let open = HiddenCodec::F16.page_bytes(page);
        let smallest = job.codecs.iter().map(|codec| codec.page_bytes(page)).fold(open, Bytes::min);
        let layout = PoolLayout {
            // Tables come out of it here, which in the engine count among the fixed bytes.
            budget: job.bytes_of_pages(model),
            staging: Bytes::ZERO,
            scratch: Bytes::ZERO,
            max_binding: Bytes::mib(128),
            slab: job.slab(),
            smallest_page: smallest,
            fixed_entries: window.entries(),
        };
        let full = TableShape { num_layers: 30, num_kv_heads: 3, page, codec: HiddenCodec::F16, quest: None };
        let scores: Vec<String> = (0..30).map(|layer| format!("0.{layer:02}\t0.5\t0.9\n")).collect();
        let scores = HeadScores::parse(&scores.concat()).expect("30 layers of three heads");
        let abilities = Abilities {
            codecs: job.codecs.clone(),
            slots: Some(8),
            head_scores: Some(Arc::new(scores)),
            ..Abilities::default()
        };
        Caches::new(PagePool::new(&layout).expect("a pool"), full, window, abilities)
    }

    #[test]
    fn the_default_budget_holds_every_cache_at_once() {
        let model = smollm2();
        for (page_size, prefix_tokens, tail_tokens) in
            [(16, 1024, 256), (32, 96, 8), (64, 1024, 256), (64, 8000, 100), (128, 1024, 256), (128, 100, 30)]
        {
            for sealing in [PrefixSealing::AfterPrefix, PrefixSealing::WhenFull] {
                let page = PageGeometry { page_size, head_dim: 64 };
                let settings = KlSettings { prefix_tokens, tail_tokens, sealing };
                let prefix = u32::try_from(prefix_tokens).expect("few tokens");
                // All together; and alone, where nothing makes up for one that was reckoned too small.
                let all = everything(page, prefix);
                let alone = all.iter().map(|compression| vec![compression.clone()]);
                for compressions in std::iter::once(all.clone()).chain(alone) {
                    let job = job(settings, page, compressions);
                    let mut caches = caches(&job, &model);
                    let full = Compression::default();
                    for (id, compression) in (0..).zip(std::iter::once(&full).chain(&job.compressions)) {
                        let filled = fill(&mut caches, &job, compression, SessionId(id));
                        assert!(
                            filled.is_ok(),
                            "{sealing:?}, pages of {page_size}, {prefix_tokens} tokens, {compression}: {filled:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_budget_for_fewer_caches_does_not_hold_them() {
        let page = PageGeometry { page_size: 64, head_dim: 64 };
        let settings = KlSettings { prefix_tokens: 8000, tail_tokens: 100, sealing: PrefixSealing::AfterPrefix };
        let job = job(settings, page, everything(page, 8000));
        let few = Job { codecs: job.codecs.clone(), ..self::job(settings, page, Vec::new()) };
        let mut caches = caches(&few, &smollm2());
        let all = (0..).zip(&job.compressions);
        let filled: Result<(), PoolError> = all.into_iter().try_for_each(|(id, compression)| {
            assert_ne!(*compression, Compression::default(), "the full cache is measured anyway");
            fill(&mut caches, &job, compression, SessionId(id))
        });
        assert!(matches!(filled, Err(PoolError::DoesNotFit { .. })), "bytes for two full caches: {filled:?}");
    }

    #[test]
    fn progress_counts_the_rows_of_a_tail_step_for_every_cache() {
        let settings = KlSettings { prefix_tokens: 100, tail_tokens: 10, sealing: PrefixSealing::WhenFull };
        let page = PageGeometry { page_size: 64, head_dim: 64 };
        let job = job(settings, page, every_example(page)[..3].to_vec());
        // Four caches, each with its own prefix: 400 rows of prefixes and 10 steps of a tail, in two windows.
        let rows = |done| job.rows(Progress { done, total: 820 });
        assert_eq!(rows(0), (0, 880), "nothing done");
        assert_eq!(rows(400), (400, 880), "all prefixes of a window");
        assert_eq!(rows(402), (408, 880), "two steps of the tail");
        assert_eq!(rows(410 + 100), (440 + 100, 880), "a prefix of the second window");
        assert_eq!(rows(820), (880, 880), "everything");
        let settings = KlSettings { sealing: PrefixSealing::AfterPrefix, ..settings };
        let job = self::job(settings, page, every_example(page)[..3].to_vec());
        // All caches are made of one prefix.
        let rows = |done| job.rows(Progress { done, total: 220 });
        assert_eq!(rows(100), (100, 280), "the prefix of a window");
        assert_eq!(rows(102), (108, 280), "two steps of the tail");
        assert_eq!(rows(110 + 50), (140 + 50, 280), "half of the second window's prefix");
    }

    #[test]
    fn every_example_fits_the_pages_and_is_no_full_cache() {
        let some = |page_size| every_example(PageGeometry { page_size, head_dim: 64 });
        assert!(some(64).iter().all(|c| *c != Compression::default()), "the full cache is measured anyway");
        assert!(some(128).len() > some(64).len() && some(64).len() > some(16).len(), "groups of 128 and 32");
    }
}
