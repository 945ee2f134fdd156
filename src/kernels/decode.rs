//! Split-KV decode: one query row per sequence attends to its cached tokens.
//!
//! ```text
//! s[h, t] = sm_scale * <q[row, h], k[t, h / group_size]>
//! m[h] = max_t s,   l[h] = sum_t exp(s - m),   o[h] = sum_t exp(s - m) * v[t, h / group_size]     (unnormalised)
//! q [rows][num_qo_heads][head_dim] f32      state_o [state][head_dim] f32      state_ml [state] (m, l), m base 2
//! ```
//!
//! **Work.** One workgroup per [`DecodeItem`](super::abi::DecodeItem): a (row, KV head) and a run of at most [`DecodeSpec::KV_CHUNK`] tokens
//! whose pages lie in one arena. It writes `group_size` attention states from `slot` on; `merge_states` joins the runs.
//! Where a sequence is split depends on its own length alone, never on what else is in the batch, so that a
//! session's result does not change with its company (batch invariance).
//!
//! **Mapping.** 64 lanes. In QK a lane owns whole tokens of a tile of 256 (64 for large groups); scores of the tile lie in
//! workgroup memory; the running maximum is shared. In PV a lane owns one cell of 8 channels and a stripe of tokens; stripes are
//! added once, at the end. Where a codec transforms channels, the query is transformed once per item and the output
//! once at the end, in workgroup memory. Query heads of the group are packed in `vec4`s, so a group of 3 computes 4.
//!
//! **Bytes.** Reads a page's bytes per page and KV head once, whatever the group size; writes
//! `group_size * (head_dim + 2) * 4` per item. **FLOPs.** `4 * num_qo_heads * tokens * head_dim`.
//!
//! **Degenerate.** A run of no tokens writes `m = -1e30, l = 0, o = 0`. Slots past the last token are never used,
//! whatever they hold.
//!
//! Method: FlashDecoding (Dao et al., 2023) and FlashInfer (arXiv:2501.01005); group packing as in both.

use super::attention::{Format, lanes_module};
use super::{KernelSpec, modules};
use crate::device::Tier;

const WORKGROUP_SIZE: u32 = 64;

/// A decode kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DecodeSpec {
    /// The cache it reads.
    pub format: Format,
    /// The reductions it uses.
    pub tier: Tier,
}

impl DecodeSpec {
    /// Tokens of a run at most: a multiple of every page size, long enough that an item's states are a small part of
    /// what it reads, short enough that one long sequence fills a device.
    pub const KV_CHUNK: u32 = 512;

    /// The kernel.
    pub fn kernel(&self) -> KernelSpec {
        let head_vecs = self.format.shape.heads.group_size().div_ceil(4);
        let tokens_per_lane = if head_vecs <= 2 { 4 } else { 1 };
        let constants = [("WORKGROUP_SIZE", WORKGROUP_SIZE), ("TOKENS_PER_LANE", tokens_per_lane)];
        self.format.attention_kernel("decode", &constants, &[lanes_module(self.tier), &modules::DECODE])
    }
}
