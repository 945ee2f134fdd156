//! Prefill on cooperative matrices: the items and states of [`prefill`](super::prefill), with f16 operands and f32 sums.
//!
//! **Rounding.** Scaled and rotated queries, decoded keys and values, and probabilities are rounded to f16 before they are
//! multiplied; sums, maxima, the softmax and the outputs are f32. Probabilities are at most 1. Caches of f32 codes, which need
//! not fit in f16, stay with `prefill.wgsl`. The bound is
//! [`Tolerance::attention_f16`](crate::reference::compare::Tolerance::attention_f16).
//!
//! **Mapping.** 128 lanes, 64 rows. Each of four subgroups multiplies 16 rows, whose query matrices stay in registers, with a tile of
//! keys in workgroup memory. Scores go through workgroup memory, where two lanes to a row do the softmax. What the tile
//! adds to the outputs comes back the same way, slice by slice of channels, and is added to outputs in registers: a
//! cooperative matrix can not be scaled row by row. Six barriers per tile of 64 tokens at `head_dim` 128.
//!
//! **Memory.** A matrix of 16 x 16 is multiplied in 4096 multiply-adds; its keys or values cost 4 clocks of workgroup memory, its
//! share of scores, probabilities and outputs about 3 more.
//!
//! **Adapters.** 16 x 16 x 16 matrices of f16 with f32 sums, subgroups of 32 lanes, and a passed
//! [`self_test`](super::self_test).

use super::attention::Format;
use crate::compression::hidden::Quantizer;

/// Rows of a tile.
pub(super) const TILE_ROWS: u32 = 64;
const LANES: u32 = 128;

/// Tile sizes of the cooperative kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CooperativeTile {
    /// Tokens of a tile, 32 or 64.
    pub tokens: u32,
    /// Channels of the outputs that pass through workgroup memory together, 32 or 64; fewer where the head's width is no multiple.
    pub slice: u32,
}

impl Default for CooperativeTile {
    fn default() -> Self {
        Self { tokens: 64, slice: 64 }
    }
}

impl CooperativeTile {
    /// All there are.
    pub const ALL: [Self; 4] = [
        Self { tokens: 64, slice: 64 },
        Self { tokens: 64, slice: 32 },
        Self { tokens: 32, slice: 64 },
        Self { tokens: 32, slice: 32 },
    ];

    /// Whether pages of this format can be read: heads of whole matrices whose keys and values fit in f16.
    pub(super) fn serves(self, format: &Format) -> bool {
        let head_dim = format.shape.heads.head_dim;
        let fits = [format.codec.k, format.codec.v].iter().all(|codec| codec.quantizer != Quantizer::F32);
        fits && head_dim.is_multiple_of(16) && (32..=128).contains(&head_dim)
    }

    /// 16-channel blocks of a slice: the most that divide the head evenly.
    fn slice_blocks(self, head_dim: u32) -> u32 {
        let blocks = head_dim / 16;
        (1..=self.slice / 16).rev().find(|n| blocks.is_multiple_of(*n)).unwrap_or(1)
    }

    pub(super) fn constants(self, head_dim: u32) -> Vec<(&'static str, u32)> {
        let slice_blocks = self.slice_blocks(head_dim);
        let share = |cells: u32, most: u32| 1 << (cells / LANES).clamp(1, most).ilog2();
        let cells = head_dim / 8;
        vec![
            ("WORKGROUP_SIZE", LANES),
            ("TILE_TOKENS", self.tokens),
            ("TOKEN_BLOCKS", self.tokens / 16),
            ("HEAD_BLOCKS", head_dim / 16),
            ("SLICE_BLOCKS", slice_blocks),
            ("SLICES", head_dim / 16 / slice_blocks),
            // vec4s of a lane: half of a row's scores, and half of its channels in a slice.
            ("LANE_QUADS", self.tokens / 8),
            ("LANE_VECS", slice_blocks * 2),
            // A power of two that divides the cells of a head.
            ("KEY_SHARE", share(cells * self.tokens, 1 << cells.trailing_zeros())),
            ("VALUE_SHARE", share(cells * self.tokens, self.tokens)),
        ]
    }
}
