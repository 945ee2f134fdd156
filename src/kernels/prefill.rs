//! Chunked causal prefill: the rows of a chunk attend to everything cached before them and to themselves.
//!
//! ```text
//! s[r, h, t] = sm_scale * <q[r, h], k[t, h / group_size]>   for cache indices t <= index(r), else masked
//! m, l, o as in decode, one attention state per (position, query head)
//! q [rows][num_qo_heads][head_dim] f32      state_o [state][head_dim] f32      state_ml [state] (m, l), m base 2
//! ```
//!
//! The chunk's own keys and values are appended to the pages first, so the kernel reads one cache and needs no second
//! source. The mask compares cache indices, not positions: what was evicted is simply not there.
//!
//! **Work.** One workgroup per [`PrefillItem`](super::abi::PrefillItem): up to [`PrefillSpec::tile_positions`] positions of one sequence,
//! one KV head, and a run of tokens in one arena. The host ends each run at the tile's last position, so tiles above
//! the diagonal cost nothing.
//!
//! **Mapping.** 64 lanes; 32 rows (16 above `head_dim` 128) by 64 tokens. QK: 4 rows by 8 tokens in a lane's registers, so 16 loads of 16
//! bytes feed 256 multiply-adds; PV: a cell of 8 channels by a quad of rows. Workgroup memory 25 KiB at most.
//!
//! **Bytes.** K and V of a run once per tile of rows. **FLOPs.** `4 * num_qo_heads * head_dim` per (row, seen token).
//!
//! Method: FlashAttention (arXiv:2205.14135), online softmax in base 2.

use super::attention::{CacheShape, Format};
use super::{KernelSpec, modules};

const WORKGROUP_SIZE: u32 = 64;

/// A prefill kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PrefillSpec {
    /// The cache it reads.
    pub format: Format,
}

impl PrefillSpec {
    /// Rows of a tile: (position, query head of the group) pairs; at least one position of the whole group.
    pub fn tile_rows(shape: &CacheShape) -> u32 {
        let rows = if shape.heads.head_dim > 128 { 16 } else { 32 };
        rows.max(shape.heads.group_size().next_multiple_of(16))
    }

    /// Query positions of a tile.
    pub fn tile_positions(shape: &CacheShape) -> u32 {
        Self::tile_rows(shape) / shape.heads.group_size()
    }

    /// The kernel.
    pub fn kernel(&self) -> KernelSpec {
        let constants = [("WORKGROUP_SIZE", WORKGROUP_SIZE), ("TILE_ROWS", Self::tile_rows(&self.format.shape))];
        self.format.attention_kernel("prefill", &constants, &[&modules::PREFILL])
    }
}
