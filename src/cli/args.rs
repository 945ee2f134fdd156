//! Arguments that several commands share.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, ValueEnum};
use concertina::compression::Compression;
use concertina::compression::head::{HeadPattern, HeadScores};
use concertina::compression::hidden::HiddenCodec;
use concertina::compression::token::TokenPolicy;
use concertina::device::{AdapterChoice, AdapterRequest, Tier};
use concertina::engine::EvictionConfig;
use concertina::geometry::{Bytes, ModelGeometry, PageGeometry};
use concertina::kernels::registry::{DEFAULT_PAGE_SIZE, PAGE_SIZES};
use concertina::kernels::sample::Sampling;

use concertina::schedule::Caches;

use super::failure::usage;
use super::load::{Model, read_text};
use super::resume::fingerprint;

/// Rows of a step where nothing else is said.
pub(super) const DEFAULT_CHUNK: u32 = 128;
/// Largest budget: far beyond any device, and far from where sizes overflow.
const BUDGET_MAX: Bytes = Bytes(1 << 40);

/// Options of every command.
#[derive(Args, Clone, Debug)]
pub(super) struct Global {
    /// Adapter to use: auto, an index of `concertina devices`, or a part of its name
    ///
    /// `auto` prefers discrete to integrated to virtual adapters, and those to software.
    #[arg(
        long,
        global = true,
        value_name = "auto|INDEX|NAME",
        default_value = "auto",
        help_heading = "Global options"
    )]
    device: String,

    /// Consider only adapters of this graphics API
    #[arg(long, global = true, value_enum, value_name = "API", help_heading = "Global options")]
    backend: Option<Backend>,

    /// Use this tier of kernels; by default the best that the adapter can run
    #[arg(long, global = true, value_enum, value_name = "TIER", help_heading = "Global options")]
    tier: Option<TierArg>,

    /// Launch kernels as this file of `concertina tune` says, or as they are by default: a FILE, or `default`
    ///
    /// Without it what `concertina tune` found on this adapter is used, where it was run.
    #[arg(long, global = true, value_name = "FILE|default", help_heading = "Global options")]
    pub(super) tuning: Option<String>,

    /// Write the results to this file as JSON; `-` writes them to the standard output instead of the tables
    ///
    /// The file is written whole at the end or not at all. Names in it end in their unit: _bytes, _tokens, _s, _ms.
    #[arg(long, global = true, value_name = "FILE", help_heading = "Global options")]
    pub(super) json: Option<String>,
}

/// A graphics API.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Backend {
    /// Vulkan.
    Vulkan,
    /// Metal.
    Metal,
    /// Direct3D 12.
    Dx12,
}

/// A tier of kernels.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum TierArg {
    /// Core WGSL only.
    Portable,
    /// Subgroup operations.
    Subgroup,
    /// Cooperative matrices of f16 for prompts, after a self-test.
    Cooperative,
}

impl Global {
    /// The backend's name, where one was given.
    pub(super) fn backend(&self) -> Option<String> {
        self.backend.map(|backend| format!("{backend:?}").to_lowercase())
    }

    /// What to look for among the adapters.
    pub(super) fn adapter(&self) -> Result<AdapterRequest> {
        if self.device.trim().is_empty() {
            return Err(usage("--device is empty; give auto, an index of `concertina devices` or a part of a name"));
        }
        let choice = self.device.parse::<AdapterChoice>().unwrap_or_else(|never| match never {});
        let tier = self.tier.map(|tier| match tier {
            TierArg::Portable => Tier::Portable,
            TierArg::Subgroup => Tier::Subgroup,
            TierArg::Cooperative => Tier::Cooperative,
        });
        Ok(AdapterRequest { choice, backend: self.backend(), tier })
    }
}

/// The model.
#[derive(Args, Clone, Debug)]
pub(super) struct ModelArg {
    /// GGUF file, or a Hugging Face repository: owner/name or owner/name/file.gguf
    ///
    /// Files from a repository are fetched once and kept in the cache of the Hugging Face tools (`HF_HOME`).
    #[arg(long, value_name = "PATH|owner/name")]
    pub(super) model: String,
}

/// Scores of the heads of the model that the demo runs: made by `concertina calibrate heads`.
const BUILT_IN_HEADS: &str = include_str!("../../patterns/smollm2-135m-instruct.tsv");
/// What `kvzip` asks a model to do.
const REPEAT: &str = "\n\nRepeat the previous context exactly:\n\n";

/// How a cache is kept.
#[derive(Args, Clone, Debug)]
pub(super) struct CacheArgs {
    /// Tokens of one page of the cache: 16, 32, 64 or 128
    #[arg(long, value_name = "TOKENS", default_value_t = DEFAULT_PAGE_SIZE, value_parser = page_size)]
    pub(super) page_size: u32,

    /// Scores of KV heads that `head=duo` and `head=prune` choose by, as `concertina calibrate heads` writes them; those of
    /// SmolLM2-135M-Instruct are built in
    #[arg(long, value_name = "FILE")]
    pub(super) head_scores: Option<PathBuf>,
}

impl CacheArgs {
    /// What tells these scores of heads from others.
    pub(super) fn head_scores_fingerprint(&self) -> Result<String> {
        match &self.head_scores {
            Some(path) => Ok(fingerprint(read_text("the head scores", path)?.as_bytes())),
            None => Ok(fingerprint(BUILT_IN_HEADS.as_bytes())),
        }
    }

    /// The codecs of some compressions, each once; kernels are made for them.
    ///
    /// A codec that pages of this size can not have is wrong usage,
    pub(super) fn codecs(&self, compressions: &[Compression], model: &ModelGeometry) -> Result<Vec<HiddenCodec>> {
        let page = PageGeometry { page_size: self.page_size, head_dim: model.heads.head_dim };
        let mut codecs: Vec<_> = compressions.iter().flat_map(Caches::codecs_of).collect();
        codecs.sort_unstable();
        codecs.dedup();
        codecs.iter().try_for_each(|codec| codec.check(page)).map_err(usage)?;
        Ok(codecs)
    }

    /// Caps that are no whole pages are wrong usage.
    pub(super) fn whole_pages(&self, compressions: &[Compression]) -> Result<()> {
        for eviction in compressions.iter().filter_map(|compression| compression.token.eviction()) {
            if let Some(every) = eviction.every.filter(|every| every % self.page_size != 0) {
                let size = self.page_size;
                return Err(usage(format!(
                    "token={eviction}: every{every} is no multiple of the pages of {size} tokens"
                )));
            }
        }
        Ok(())
    }

    /// What evictions need, so many sessions being observed at once; `None` where nothing is evicted.
    ///
    /// Scores of another model's heads are wrong usage.
    pub(super) fn evictions(
        &self,
        compressions: &[Compression],
        model: &Model,
        slots: u32,
    ) -> Result<Option<EvictionConfig>> {
        let Some(config) = EvictionConfig::of(compressions, slots) else { return Ok(None) };
        self.whole_pages(compressions)?;
        let geometry = model.geometry();
        let name = model.name();
        let mut head_scores = None;
        if compressions.iter().any(|compression| compression.head != HeadPattern::Full) {
            let scores = match &self.head_scores {
                Some(path) => {
                    let text = read_text("the head scores", path)?;
                    HeadScores::parse(&text).map_err(|e| usage(format!("'{}': {e}", path.display())))?
                }
                None => HeadScores::parse(BUILT_IN_HEADS).map_err(usage)?,
            };
            scores.check(&name, geometry.num_layers, geometry.heads.num_kv_heads).map_err(usage)?;
            for compression in compressions {
                compression
                    .head
                    .lists(Some(&scores), geometry.num_layers, geometry.heads.num_kv_heads)
                    .map_err(usage)?;
            }
            head_scores = Some(Arc::new(scores));
        }
        let repeat_prompt = model.tokenizer.encode(REPEAT, false)?;
        Ok(Some(EvictionConfig { head_scores, repeat_prompt, ..config }))
    }
}

/// Whether decode rows under one of the compressions choose the pages that they read.
pub(super) fn chooses(compressions: &[Compression]) -> bool {
    compressions.iter().any(|compression| matches!(compression.token, TokenPolicy::Quest { .. }))
}

/// A text that codecs are fitted to.
#[derive(Args, Clone, Debug)]
pub(super) struct CalibrateArg {
    /// Take the bases of `lowrank` codecs from this text, rather than from the weights alone
    ///
    /// The model reads its first 1024 tokens over a full cache; the bases are the directions in which its keys and values
    /// vary there. Any text in the language of the documents will do.
    #[arg(long, value_name = "FILE")]
    pub(super) calibrate: Option<PathBuf>,
}

impl CalibrateArg {
    /// What tells this text from others.
    pub(super) fn fingerprint(&self) -> Result<Option<String>> {
        let of = |path: &PathBuf| Ok(fingerprint(read_text("the calibration text", path)?.as_bytes()));
        self.calibrate.as_ref().map(of).transpose()
    }
}

/// What a step copies at most, of which five times as much is held: at most a twelfth of the budget. A power of two, so that
/// a budget that a message advises is one that its advice was made for.
pub(super) fn swap_chunk(kv_budget: Bytes) -> Bytes {
    const SMALLEST: u64 = 256 << 10;
    const LARGEST: u64 = 64 << 20;
    Bytes(((kv_budget.0 / 64 + 1).next_power_of_two() / 2).clamp(SMALLEST, LARGEST))
}

/// What is done to a cache.
#[derive(Args, Clone, Debug)]
pub(super) struct CompressArg {
    /// What is done to the cache: a codec of `concertina codecs`, or dimension=method pairs; `full` keeps everything
    #[arg(long, value_name = "METHODS", default_value = "full")]
    pub(super) compress: Compression,
}

/// How tokens are chosen.
#[derive(Args, Clone, Debug)]
pub(super) struct SamplingArgs {
    /// Divide logits by this; 0 always takes the most probable token
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f32,

    /// Choose among so many of the most probable tokens; 0 keeps all
    #[arg(long, default_value_t = 0)]
    top_k: u32,

    /// Choose among the most probable tokens until their mass reaches this; 1 keeps all
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f32,

    /// Seed of the choice: the same seed gives the same text
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl SamplingArgs {
    /// The choice, its ranges checked.
    pub(super) fn sampling(&self) -> Result<Sampling> {
        let Self { temperature, top_k, top_p, seed } = *self;
        let sampling = Sampling { temperature, top_k, top_p, seed };
        sampling.check().map_err(usage)?;
        Ok(sampling)
    }
}

/// Reads a page size that there are kernels for.
pub(super) fn page_size(text: &str) -> Result<u32, String> {
    let size = text.parse().ok().filter(|size| PAGE_SIZES.contains(size));
    size.ok_or_else(|| format!("there are pages of {} tokens", PAGE_SIZES.map(|size| size.to_string()).join(", ")))
}

/// Reads a budget.
pub(super) fn budget(text: &str) -> Result<Bytes, String> {
    let bytes: Bytes = text.parse().map_err(|e: concertina::geometry::ParseBytesError| e.to_string())?;
    if bytes > BUDGET_MAX {
        return Err(format!("a budget is at most {BUDGET_MAX}"));
    }
    Ok(bytes)
}

/// Reads a time in seconds: at most a year.
pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    const MAX: f64 = 366.0 * 86_400.0;
    let seconds = text.parse().ok().filter(|s| (0.0..=MAX).contains(s));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| format!("expected seconds from 0 to {MAX}"))
}

/// Reads a number of tokens, rows or sessions: at least 1, and small enough for products of two to stay far from
/// overflow.
pub(super) fn small_count(text: &str) -> Result<u32, String> {
    const MAX: u32 = 16_384;
    text.parse().ok().filter(|n| (1..=MAX).contains(n)).ok_or_else(|| format!("expected a number from 1 to {MAX}"))
}

/// Reads a number of tokens that is only bounded by the context.
pub(super) fn token_count(text: &str) -> Result<u32, String> {
    const MAX: u32 = 1 << 24;
    text.parse().ok().filter(|n| (1..=MAX).contains(n)).ok_or_else(|| format!("expected a number from 1 to {MAX}"))
}

/// The context to use: the model's, or a shorter one.
pub(super) fn context(asked: Option<u32>, model: &ModelGeometry) -> Result<u32> {
    let longest = model.context_length;
    match asked {
        None => Ok(longest),
        Some(asked) if asked <= longest => Ok(asked),
        Some(asked) => Err(usage(format!("--context {asked} is longer than the model's context of {longest} tokens"))),
    }
}
