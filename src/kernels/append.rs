//! Append: the keys and values of new tokens go to their slots in open pages, as f16.
//!
//! ```text
//! page(list, layer)[K][cell][slot] = f16(kv[row][k_offset + kv_head * head_dim + 8 * cell ..])      V likewise
//! kv [rows][stride] f32      page: K [head_dim / 8][page_size] cells, V [page_size][head_dim / 8] cells
//! ```
//!
//! **Work.** One workgroup per [`AppendItem`](super::abi::AppendItem): consecutive rows of one sequence that fall into one page of one
//! KV head; a lane moves one cell of 16 bytes. Keys arrive with their rotary positions applied.
//!
//! **Bytes.** `4 * head_dim * 2` read and `2 * head_dim * 2` written per token and KV head. Rounding is to nearest even in
//! integer arithmetic, so that every device writes the bits that `half::f16` would.

use super::abi::{AppendParams, Immediates as _};
use super::attention::CacheShape;
use super::{Access, Binding, Constant, KernelSpec, modules};

const BINDINGS: &[Binding] =
    &[("step", Access::Read), ("tables", Access::Read), ("kv", Access::Read), ("arena", Access::ReadWrite)];

/// The append kernel of a cache shape.
pub fn kernel(shape: &CacheShape) -> KernelSpec {
    let mut constants = shape.constants();
    constants.push(("WORKGROUP_SIZE".into(), Constant::U32(64)));
    KernelSpec {
        name: "append",
        constants,
        parts: vec![(&modules::F16).into(), (&modules::APPEND).into()],
        bindings: BINDINGS,
        immediate_bytes: AppendParams::BYTES,
    }
}
