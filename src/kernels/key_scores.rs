//! Key scores: what tokens are worth by their keys, and by what queries are expected to be.
//!
//! ```text
//! norm        score[t] = -|k[t]|                                                           arXiv:2406.11430
//! anchor      a = sum_t k[t] / |k[t]|         difference  score[t] = -cos(k[t], a)          arXiv:2504.15364
//! expected    z[h, t] = mu[h] . k[t] / sqrt(d) + k[t]' Sigma[h] k[t] / (2 d)
//!             score[t] = mean_h softmax_t(z[h]) * |v[t]|                                   arXiv:2510.00636
//!             over tokens behind the first `skip`; those have score 0
//! k, v [tokens][head_dim]      moments [query head][head_dim + head_dim^2]: mu, Sigma      score [list][capacity] f32
//! ```
//!
//! `anchor` and the sums of `expected` are summaries: a list's items add to one in order, one dispatch after another.
//!
//! **Work.** One workgroup of 64 lanes per [`KeyScoreItem`](super::abi::KeyScoreItem), at most [`TOKENS`] tokens of one list; lane =
//! token.
//! **Bytes.** Keys once per mode, values once for `expected`. **FLOPs.** `2 * head_dim` per token; for `expected`
//! `4 * group_size * head_dim^2`.

use super::abi::{Immediates as _, KeyScoreParams};
use super::attention::{CacheShape, Format};
use super::{Access, Binding, KernelSpec, Part, modules};

/// Tokens of an item at most: one for each lane, because software Vulkan stops a lane's loops after 65,535 rounds in all, of
/// which a token takes up to half.
pub const TOKENS: u32 = 64;

/// What is computed; a shader reads it as a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyScoreMode {
    /// Norms of keys.
    Norm = 0,
    /// A list's sum of normalised keys.
    Anchor = 1,
    /// Cosines against that sum.
    Difference = 2,
    /// Maxima and sums of expected attention.
    ExpectedSum = 3,
    /// Expected attention.
    Expected = 4,
}

const BINDINGS: &[Binding] = &[
    ("step", Access::Read),
    ("tables", Access::Read),
    ("arena", Access::Read),
    ("parameters", Access::Read),
    ("moments", Access::Read),
    ("summary", Access::ReadWrite),
    ("scores", Access::ReadWrite),
];

/// The kernel that reads pages of `format`.
pub fn kernel(format: &Format) -> KernelSpec {
    let (constants, mut parts) = format.reader(&[("WORKGROUP_SIZE", 64)]);
    parts.extend([&modules::ATTENTION_SHARED, &modules::EVICT_ROWS, &modules::KEY_SCORES].map(Part::from));
    KernelSpec { name: "key_scores", constants, parts, bindings: BINDINGS, immediate_bytes: KeyScoreParams::BYTES }
}

/// f32 values of a list's summary.
pub fn summary_values(shape: &CacheShape) -> u32 {
    shape.heads.head_dim.max(2 * shape.heads.group_size())
}

/// f32 values of a query head's moments.
pub const fn moment_values(head_dim: u32) -> u32 {
    head_dim + head_dim * head_dim
}
