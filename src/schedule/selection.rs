//! What a backend can do, what an eviction wants of coming rows, and what it keeps.

use std::sync::Arc;

use crate::compression::head::HeadScores;
use crate::compression::hidden::HiddenCodec;
use crate::compression::keep::Domain;
use crate::compression::token::{Reduce, Rows, Rule, Score};
use crate::geometry::Bytes;

/// What a backend can do besides reading full caches.
#[derive(Clone, Debug, Default)]
pub struct Abilities {
    /// Codecs that it has kernels for, f16 aside.
    pub codecs: Vec<HiddenCodec>,
    /// Sessions that it scores at once; `None` where it can neither evict nor share.
    pub slots: Option<u32>,
    /// Bytes of what a slot holds.
    pub slot_bytes: Bytes,
    /// Bytes of host memory that a step can copy in each direction; none where caches can not leave.
    pub swap_bytes: Bytes,
    /// Whether decode rows can choose the pages that they read.
    pub chooses: bool,
    /// Which heads keep everything, for head patterns.
    pub head_scores: Option<Arc<HeadScores>>,
}

/// Rows whose attention, or whose queries, an eviction will want.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observed {
    /// The session's slot.
    pub slot: u32,
    /// First row of the segment.
    pub first: u32,
    /// What is kept of them.
    pub what: Observation,
}

/// What is kept of observed rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observation {
    /// The sum of the attention that each token receives.
    Attention,
    /// The largest.
    Largest,
    /// Moments of their queries.
    Queries,
}

impl Observed {
    /// What an eviction by `score` after position `end` wants of `n` rows from position `first` on.
    pub fn of(score: &Score, slot: u32, first: u32, end: u32, n: u32) -> Option<Self> {
        let (from, what) = match score {
            Score::Attention { rows, reduce } => {
                let from = match rows {
                    Rows::All => 0,
                    Rows::Last(last) => end.saturating_sub(*last),
                };
                (from, if *reduce == Reduce::Max { Observation::Largest } else { Observation::Attention })
            }
            Score::Expected { n_skip, .. } => (*n_skip, Observation::Queries),
            _ => return None,
        };
        let first = from.saturating_sub(first);
        (first < n).then_some(Self { slot, first, what })
    }
}

/// What stays in an eviction, and how it is decided.
#[derive(Clone, Debug)]
pub struct Selection {
    /// Lists that choose together; every list of the new table once. Lists that keep nothing are closed.
    pub domains: Vec<Domain>,
    /// How tokens are scored, where scores decide anything.
    pub rule: Option<Rule>,
    /// The slot of the session's raw scores.
    pub slot: u32,
    /// Whether raw scores go on with the tokens that stayed.
    pub carries: bool,
    /// Kept keys are turned to their places in the cache, and positions go on from there.
    pub rerotates: bool,
    /// Layers whose tokens become directions in common.
    pub merge: Option<Merging>,
}

/// Which layers are merged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merging {
    /// Lower and upper layer.
    pub pairs: Vec<(u32, u32)>,
    /// Of the tokens that both hold, those that stay as they are, of 1000.
    pub retain_permille: u32,
}
