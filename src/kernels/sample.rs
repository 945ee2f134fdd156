//! Sampling: one token per row of logits, without reading the logits back.
//!
//! ```text
//! greedy        argmax_i logit[i], the smallest i among equals
//! otherwise     p = softmax(logit / temperature) over the top_k largest logits, cut to the most probable tokens whose
//!               mass reaches top_p; a draw is argmax_i (log p[i] + gumbel(seed, position, i))
//! ```
//!
//! **Work.** One workgroup of 256 lanes per [`SampleItem`]. The top-k and top-p cuts are found by radix selection, 8 bits
//! at a time, on keys that sort like the floats; masses are added as integers, so the result is the same in every
//! run. Tokens equal to the one at the cut are all kept. The noise is a hash of (seed, position, token): the same
//! seed gives the same text, alone or in a batch.
//!
//! **Bytes.** `4 * vocab` per pass: 1 pass greedy, 2 with temperature, 4 more for each cut.
//!
//! The Gumbel-max form of sampling is Gumbel (1954); radix selection as in `AIR` top-k (arXiv:2306.15156 surveys it).

use super::abi::{Immediates as _, SampleItem, SampleParams};
use super::attention::lanes_module;
use super::{Access, Binding, Constant, KernelSpec, modules};
use crate::device::Tier;
use serde::{Deserialize, Serialize};

const BINDINGS: &[Binding] = &[("step", Access::Read), ("logits", Access::Read), ("tokens", Access::ReadWrite)];

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 takes the most probable token; otherwise logits are divided by it.
    pub temperature: f32,
    /// Keep this many of the most probable tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the most probable tokens until their mass reaches this; 1 keeps all.
    pub top_p: f32,
    /// Seed of the noise.
    pub seed: u64,
}

impl Sampling {
    /// Always the most probable token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };

    /// Checks the ranges.
    ///
    /// # Errors
    /// A sentence with the value.
    pub fn check(&self) -> Result<(), String> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(format!("temperature {} is not a number of at least 0", self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(format!("top-p {} is not above 0 and at most 1", self.top_p));
        }
        Ok(())
    }

    /// The work item for row `row` of the logits, drawing the token at `position` of its sequence.
    pub fn item(&self, row: u32, position: u32) -> SampleItem {
        // Below this the largest logit wins in f32 anyway, and its inverse stays finite.
        let greedy = self.temperature < 1e-6;
        let [s0, s1, s2, s3, s4, s5, s6, s7] = self.seed.to_le_bytes();
        SampleItem {
            row,
            top_k: self.top_k,
            seed: [u32::from_le_bytes([s0, s1, s2, s3]), u32::from_le_bytes([s4, s5, s6, s7])],
            inverse_temperature: if greedy { 0.0 } else { 1.0 / self.temperature },
            top_p: self.top_p,
            position,
            pad: 0,
        }
    }
}

/// The sampling kernel.
pub fn kernel(tier: Tier) -> KernelSpec {
    KernelSpec {
        name: "sample",
        constants: vec![("WORKGROUP_SIZE".into(), Constant::U32(256))],
        parts: vec![(lanes_module(tier)).into(), (&modules::SAMPLE).into()],
        bindings: BINDINGS,
        immediate_bytes: SampleParams::BYTES,
    }
}
