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
//! **Work.** One workgroup per [`ScoreItem`](super::abi::ScoreItem): at most [`TOKENS`] tokens of one list, and
//! [`rows_max`] rows; more rows add to the same scores in later dispatches. A score belongs to one workgroup, so no atomics.
//!
//! **Two texts.** `score.wgsl`, for keys whose channels are as they were, is a product of register tiles ([`ScoreTuning`]): queries
//! and keys pass through workgroup memory a few cells of channels at a time, keys decoded once for a tile of (row, head) pairs, and a
//! lane owns 8 pairs by 8 tokens, so that a value read from workgroup memory feeds 4 multiply-adds. An H100 returns 32 values and
//! computes 128 multiply-adds in a clock, so that is just enough. Probabilities of a lane's pairs are added where they are, and those
//! of its neighbours at the end, in the order of pairs. `score_general.wgsl` serves keys that are rotated, picked or latent: a lane
//! decodes its token's key into registers whole, and queries pass through workgroup memory, 16 pairs at a time.
//!
//! **Bytes.** The keys of a page once per tile of pairs. **FLOPs.** `2 * head_dim` per (row, query head, token).

use std::fmt;
use std::str::FromStr;

use super::abi::{Immediates as _, ScoreParams};
use super::attention::{CacheShape, Format};
use super::{Access, Binding, KernelSpec, Part, modules};
use crate::compression::hidden::Transform;

/// Tokens of an item at most: a multiple of every page size.
pub const TOKENS: u32 = 256;

/// Rows of an item at most. Software Vulkan stops a lane's loops after 65,535 rounds in all, of which the general text takes most.
pub fn rows_max(shape: &CacheShape) -> u32 {
    let rounds = shape.heads.group_size() * (shape.heads.head_dim / 8 + 2) * (TOKENS / 64);
    (60_000 / rounds).max(1)
}

/// Tile sizes of `score.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ScoreTuning {
    /// (row, query head) pairs of a tile, a multiple of 8.
    pub pairs: u32,
    /// Tokens of a tile, 64 or 128.
    pub tokens: u32,
    /// Cells of 8 channels of queries and keys that are staged together: 1, 2 or 4.
    pub cells: u32,
}

impl Default for ScoreTuning {
    /// 128 lanes, and half of the barriers of the others.
    fn default() -> Self {
        Self { pairs: 64, tokens: 128, cells: 4 }
    }
}

impl ScoreTuning {
    /// Everything that is worth measuring, the default first.
    pub fn candidates() -> Vec<Self> {
        let tiles = [(64, 128, 4), (64, 128, 2), (128, 128, 2), (64, 64, 4)];
        tiles.map(|(pairs, tokens, cells)| Self { pairs, tokens, cells }).into()
    }

    fn constants(self) -> [(&'static str, u32); 5] {
        let Self { pairs, tokens, cells } = self;
        let lanes = pairs / 8 * (tokens / 8);
        // Cells that a lane may decode of one load: all lanes should have some.
        let share = 1 << (cells * tokens / lanes).clamp(1, cells).ilog2();
        [
            ("WORKGROUP_SIZE", lanes),
            ("TILE_TOKENS", tokens),
            ("PAIR_GROUPS", pairs / 8),
            ("CHUNK_CELLS", cells),
            ("KEY_SHARE", share),
        ]
    }
}

impl fmt::Display for ScoreTuning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("tiled:{}:{}:{}", self.pairs, self.tokens, self.cells))
    }
}

impl FromStr for ScoreTuning {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::candidates();
        known.iter().copied().find(|tuning| tuning.to_string() == text).ok_or_else(|| {
            let names: Vec<String> = known.iter().map(ToString::to_string).collect();
            format!("'{text}' is no tuning of score: there are {}", names.join(", "))
        })
    }
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
pub fn kernel(format: &Format, tuning: ScoreTuning) -> KernelSpec {
    let general = [("WORKGROUP_SIZE", 64)];
    let tiled = tuning.constants();
    let (more, files): (&[_], _) = if format.codec.k.transform == Transform::None {
        (&tiled, [&modules::ATTENTION_SHARED, &modules::SCORE_BINDINGS, &modules::STAGE_KEYS, &modules::SCORE])
    } else {
        (
            &general,
            [&modules::ATTENTION_SHARED, &modules::SCORE_BINDINGS, &modules::EVICT_ROWS, &modules::SCORE_GENERAL],
        )
    };
    let (constants, mut parts) = format.reader(more);
    parts.extend(files.map(Part::from));
    KernelSpec { name: "score", constants, parts, bindings: BINDINGS, immediate_bytes: ScoreParams::BYTES }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tile_is_read_as_it_is_written_and_nonsense_is_refused() {
        assert_eq!(ScoreTuning::candidates()[0], ScoreTuning::default(), "the default comes first");
        for tuning in ScoreTuning::candidates() {
            assert_eq!(tuning.to_string().parse(), Ok(tuning), "{tuning}");
        }
        for wrong in
            ["", "tiled", "tiled:64:128", "tiled:64:128:4:1", "tiled:64:128:0", "tiled:60:128:4", "lanes:128:8"]
        {
            let error = wrong.parse::<ScoreTuning>().expect_err(wrong);
            assert!(error.contains("no tuning of score") && error.contains("tiled:64:128:4"), "{error}");
        }
    }
}
