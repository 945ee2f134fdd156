//! How large an engine is, and what it can do.

use std::sync::Arc;

use super::swap::SwapSizes;
use crate::compression::Compression;
use crate::compression::head::HeadScores;
use crate::compression::hidden::HiddenCodec;
use crate::compression::layer::LayerPolicy;
use crate::compression::token::Score;
use crate::geometry::{Bytes, CELL_BYTES, ModelGeometry};
use crate::kernels::eviction::EvictionSizes;
use crate::kernels::executor::AttentionSizes;
use crate::pool::{PoolError, PoolLayout};
use crate::schedule::{Caches, REPEAT_ROOM};

/// How large an [`Engine`](super::Engine) is.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Device bytes for pages, tables, scratch and staging; weights are apart.
    pub budget: Bytes,
    /// Rows of one step at most.
    pub max_rows: u32,
    /// Sessions in one step at most.
    pub max_sessions: u32,
    /// Rows of logits in one step at most; at least `max_sessions`.
    pub max_logit_rows: u32,
    /// Longest context, in tokens.
    pub context_length: u32,
    /// Tokens of a page.
    pub page_size: u32,
    /// Codecs besides f16 that sessions may have; each costs its kernels, compiled at the start.
    pub codecs: Vec<HiddenCodec>,
    /// Whether decode rows of sessions may choose the pages that they read (`quest`).
    pub chooses: bool,
    /// What sessions may do besides; `None` where nothing is evicted and no layers share or skip.
    pub evictions: Option<EvictionConfig>,
    /// Bytes of a cache that a step copies to the host, and back, at most; none where caches never leave the device. Five times
    /// as much is held for it.
    pub swap_chunk: Bytes,
    /// Largest arena; the adapter's binding limit where `None`.
    pub max_arena: Option<Bytes>,
}

/// What evictions need.
#[derive(Clone, Debug, Default)]
pub struct EvictionConfig {
    /// Sessions whose rows are observed for a coming eviction at once; others wait.
    pub slots: u32,
    /// Whether moments of queries are kept, for expected attention.
    pub moments: bool,
    /// Which heads keep everything, for head patterns.
    pub head_scores: Option<Arc<HeadScores>>,
    /// The tokens that ask for the context again, for `kvzip`.
    pub repeat_prompt: Vec<u32>,
}

impl EvictionConfig {
    /// What these compressions need; `None` where none of them evicts or shares.
    pub fn of(compressions: &[Compression], slots: u32) -> Option<Self> {
        let moments = |compression: &Compression| {
            let score = compression.token.eviction().map(|eviction| eviction.rule(u32::MAX).score);
            matches!(score, Some(Score::Expected { .. }))
        };
        let ragged =
            |compression: &Compression| Caches::evicts(compression) || compression.layer != LayerPolicy::default();
        let slots = if compressions.iter().any(Caches::observes) { slots } else { 0 };
        let any = compressions.iter().any(ragged);
        any.then(|| Self { slots, moments: compressions.iter().any(moments), ..Self::default() })
    }
}

impl EngineConfig {
    /// Makes the budget that a refusal advises one that suffices: staging grows with the budget, so the first answer
    /// of the pool can still be too small.
    pub(super) fn advise(&self, layout: &dyn Fn(&Self) -> PoolLayout, mut error: PoolError) -> PoolError {
        // Each round adds what the round before has grown by, a small fraction of it.
        for _ in 0..8 {
            let PoolError::BudgetTooSmall { fixed, slab, .. } = error else { break };
            let advised = Self { budget: fixed + slab, ..self.clone() };
            match layout(&advised).split() {
                Ok(_) => break,
                Err(next) => error = next,
            }
        }
        match error {
            PoolError::BudgetTooSmall { fixed, slab, .. } => {
                PoolError::BudgetTooSmall { budget: self.budget, fixed, slab }
            }
            other => other,
        }
    }

    pub(super) fn eviction_sizes(&self, geometry: &ModelGeometry) -> Option<EvictionSizes> {
        self.evictions.as_ref().map(|evictions| EvictionSizes {
            num_lists: geometry.num_lists(),
            // Repeated chunks stand behind the context for a while.
            capacity: self.context_length + REPEAT_ROOM,
            slots: evictions.slots,
            moments: evictions.moments,
        })
    }

    pub(super) fn swap_sizes(&self, smallest_page: Bytes) -> Option<SwapSizes> {
        (self.swap_chunk > Bytes::ZERO)
            .then(|| SwapSizes { chunk: self.swap_chunk.align_up(CELL_BYTES), smallest_page })
    }

    /// Whether any page is ever sealed.
    pub(super) fn seals(&self) -> bool {
        self.codecs.iter().any(HiddenCodec::seals)
    }

    pub(super) fn attention_sizes(&self, geometry: &ModelGeometry, max_states: u32) -> AttentionSizes<'_> {
        AttentionSizes {
            max_states,
            max_rows: self.max_rows,
            codecs: &self.codecs,
            num_lists: geometry.num_lists(),
            context_length: self.context_length,
            choosing: if self.chooses { self.max_sessions } else { 0 },
        }
    }
}
