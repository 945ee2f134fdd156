//! How kernels are launched: what changes their speed and nothing else.
//!
//! A kernel's text follows from what it computes (its spec) and from its tuning: lanes, register tiles, loads in flight. Which
//! is fastest is an adapter's affair; every candidate is checked like any other kernel.

use super::attention::Format;
use super::decode::DecodeTuning;
use super::decode_choices::DecodeChoices;
use super::gather::GatherTuning;
use super::prefill::PrefillTuning;
use super::product_tuning::{CooperativeRows, ProductTuning};
use super::score::ScoreTuning;
use crate::device::Tier;

/// What a kernel of attention multiplies. How far its result may be from the reference follows from this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operands {
    /// Queries, keys, probabilities and values as they are, in f32.
    Full,
    /// All of them rounded to f16.
    Half,
    /// Queries as two digits of 8 bits; the others as they are.
    Digits,
}

/// The tuning of every kernel that has one; what is not chosen is as the methods say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tuning {
    /// Of decode, by classes of formats.
    pub decode: DecodeChoices,
    /// Of prefill, for all formats.
    pub prefill: Option<PrefillTuning>,
    /// Of products.
    pub product: Option<ProductTuning>,
    /// Of products of many rows on cooperative matrices.
    pub cooperative_product: Option<CooperativeRows>,
    /// Of the attention that cached tokens receive, for all formats.
    pub score: Option<ScoreTuning>,
    /// Of moves of tokens that stay, for all formats.
    pub gather: Option<GatherTuning>,
}

impl Tuning {
    /// How decode reads pages of a format on an adapter of a kind.
    pub fn decode(&self, adapter_kind: &str, format: &Format) -> DecodeTuning {
        self.decode.nearest(format).unwrap_or_else(|| DecodeTuning::of_kind(adapter_kind, format))
    }

    /// How prefill runs in a tier, where the chosen kernel serves the format.
    pub fn prefill(&self, tier: Tier) -> PrefillTuning {
        self.prefill.unwrap_or_else(|| PrefillTuning::of_tier(tier))
    }

    /// How an adapter of a kind, as `concertina devices` names them, multiplies.
    pub fn product(&self, adapter_kind: &str) -> ProductTuning {
        self.product.unwrap_or_else(|| ProductTuning::of_kind(adapter_kind))
    }

    /// The tile of products of many rows where a tier has them on cooperative matrices.
    pub fn cooperative_product(&self, tier: Tier) -> Option<CooperativeRows> {
        (tier == Tier::Cooperative).then(|| self.cooperative_product.unwrap_or(CooperativeRows::ALL[0]))
    }

    /// How tokens are scored.
    pub fn score(&self) -> ScoreTuning {
        self.score.unwrap_or_default()
    }

    /// How tokens that stay are moved.
    pub fn gather(&self) -> GatherTuning {
        self.gather.unwrap_or_default()
    }
}
