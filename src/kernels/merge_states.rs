//! Merging attention states: the partial results of one query row over disjoint runs of tokens become its output.
//!
//! ```text
//! m = max_i m_i      l = sum_i exp2(m_i - m) * l_i      o = sum_i exp2(m_i - m) * o_i / l      lse = m + log2(l)
//! state_o [state][head_dim] f32   state_ml [state] (m, l)   o [rows][num_qo_heads][head_dim] f32   lse [rows][num_qo_heads]
//! ```
//!
//! **Work.** One workgroup per query head of a [`MergeItem`](super::abi::MergeItem) = (row, KV head): a long context has hundreds
//! of states, which lanes share out. The order in which they are added depends on their number alone. The same kernel joins
//! splits, arenas and codecs.
//!
//! **Bytes.** `states * (head_dim + 2) * 4` read, `num_qo_heads * (head_dim + 1) * 4` written per row.
//!
//! **Degenerate.** No token in any run gives `o = 0` and `lse = -1e30`.

use super::abi::{Immediates as _, MergeParams};
use super::attention::CacheShape;
use super::{Access, Binding, Constant, KernelSpec, flat_grid, modules};

const BINDINGS: &[Binding] = &[
    ("step", Access::Read),
    ("state_o", Access::Read),
    ("state_ml", Access::Read),
    ("o", Access::ReadWrite),
    ("lse", Access::ReadWrite),
];

/// Lanes: eight stripes of states of common widths, and two of the widest output, of 512 channels.
const WORKGROUP_SIZE: u32 = 256;
/// States that a lane asks for at once: with the stripes as many as 32K tokens have.
const LOADS: u32 = 8;

/// Workgroups for so many items.
pub const fn grid(shape: &CacheShape, n_items: u32) -> [u32; 3] {
    flat_grid(n_items * shape.heads.group_size())
}

/// The merge kernel of a cache shape.
pub fn kernel(shape: &CacheShape) -> KernelSpec {
    let mut constants = shape.constants();
    let numbers = [("WORKGROUP_SIZE", WORKGROUP_SIZE), ("LOADS", LOADS)];
    constants.extend(numbers.map(|(name, value)| (name.into(), Constant::U32(value))));
    KernelSpec {
        name: "merge_states",
        constants,
        parts: vec![(&modules::MERGE_STATES).into()],
        bindings: BINDINGS,
        immediate_bytes: MergeParams::BYTES,
    }
}
