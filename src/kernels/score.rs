//! Score: the attention that cached tokens receive from rows of the step, for policies that rank tokens by it.
//!
//! ```text
//! p[r, h, t]    = exp2(scale_log2 * <q[r, h], k[t]> - lse[r, h])     t <= index(r), else 0
//! score[list, t] += sum_r mean_h p[r, h, t]         or   score = max(score, max_{r, h} p[r, h, t])
//! q [rows][num_qo_heads][head_dim] f32      lse [rows][num_qo_heads] f32, base 2      score [list][capacity] f32
//! ```
//!
//! The log-sum-exp is what `merge_states` left, so nothing is normalised twice and no value is read: a row costs half of its
//! attention again, and only rows that a policy looks at are scored (the last 32 of a prompt, or one before an eviction).
//! Probabilities can not be summed by attention itself, because a row's log-sum-exp is known only after its last token;
//! storing all scores of a prompt instead would take `rows * num_qo_heads * tokens` numbers.
//!
//! **Work.** One workgroup of 64 lanes per [`ScoreItem`](super::abi::ScoreItem): at most [`TOKENS`] tokens of one list, and
//! [`rows_max`] rows; more rows add to the same scores in later dispatches. A
//! lane decodes its token's key into registers once; queries pass through workgroup memory, 16 (row, head) pairs at a time. A
//! score belongs to one lane, so no atomics, and its sum is in the order of rows.
//!
//! **Bytes.** The keys of a page once per item. **FLOPs.** `2 * head_dim` per (row, query head, token).

use super::abi::{Immediates as _, ScoreParams};
use super::attention::{CacheShape, Format};
use super::{Access, Binding, KernelSpec, Part, modules};

/// Tokens of an item at most: a multiple of every page size.
pub const TOKENS: u32 = 256;

/// Rows of an item at most. Software Vulkan stops a lane's loops after 65,535 rounds in all.
pub fn rows_max(shape: &CacheShape) -> u32 {
    let rounds = shape.heads.group_size() * (shape.heads.head_dim / 8 + 2) * (TOKENS / 64);
    (60_000 / rounds).max(1)
}

const BINDINGS: &[Binding] = &[
    ("step", Access::Read),
    ("tables", Access::Read),
    ("arena", Access::Read),
    ("q", Access::Read),
    ("lse", Access::Read),
    ("parameters", Access::Read),
    ("scores", Access::ReadWrite),
];

/// The kernel that reads pages of `format`.
pub fn kernel(format: &Format) -> KernelSpec {
    let (constants, mut parts) = format.reader(&[("WORKGROUP_SIZE", 64)]);
    parts.extend([&modules::ATTENTION_SHARED, &modules::EVICT_ROWS, &modules::SCORE].map(Part::from));
    KernelSpec { name: "score", constants, parts, bindings: BINDINGS, immediate_bytes: ScoreParams::BYTES }
}
