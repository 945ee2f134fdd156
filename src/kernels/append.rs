//! Append: the keys and values of new tokens go to their slots in open pages, as f16; rotary positions are applied on the way.
//!
//! ```text
//! page(list, layer)[K][cell][slot] = f16(turn(rows[row][k_offset + kv_head * head_dim + 8 * cell ..]))      V likewise, not turned
//! rows[row][0 .. q_width] = turn(rows[row][0 .. q_width])
//! turn: (a, b) -> (a cos - b sin, a sin + b cos)     pairs (2i, 2i + 1) of a head
//!       angle = position * theta^(-2i / head_dim)    (arXiv:2104.09864, equation 34)
//! rows [rows][stride] f32      page: K [head_dim / 8][page_size] cells, V [page_size][head_dim / 8] cells
//! ```
//!
//! **Work.** One workgroup per [`AppendItem`](super::abi::AppendItem), consecutive rows of one sequence that fall into one page of one
//! KV head, and one per row whose queries are turned, in place. A lane writes cells of 16 bytes. Four neighbouring lanes take
//! a cell of four tokens, 64 bytes of K in a row, and the next four the next cell, so that eight fours write whole lines of V as
//! well; of queries neighbouring lanes take neighbouring vec4s. Items come first, since a page takes longer than a row. Keys
//! are turned only as they are written; attention reads them from their pages. Without [`Positions::Rotary`] rows come with
//! their positions applied.
//!
//! Angles come from the host in `step`, computed in f64: WGSL promises no accuracy for sine and cosine of large arguments.
//!
//! **Bytes.** `4 * head_dim * 2` read and `2 * head_dim * 2` written per token and KV head. Rounding is to nearest even in
//! integer arithmetic, so that every device writes the bits that `half::f16` would.

use super::abi::{AppendParams, Immediates as _};
use super::attention::CacheShape;
use super::{Access, Binding, Constant, KernelSpec, modules};

const BINDINGS: &[Binding] =
    &[("step", Access::Read), ("tables", Access::Read), ("rows", Access::ReadWrite), ("arena", Access::ReadWrite)];

/// Lanes of a workgroup.
const LANES: u32 = 64;
/// vec4s of queries that a lane loads before it stores any, at most.
const QUERY_LOADS: u32 = 4;
/// Likewise cells of keys and of values each.
const CELL_LOADS: u32 = 4;

/// Whether queries and keys carry their positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Positions {
    /// They do, or need none.
    Applied,
    /// They are turned here.
    Rotary,
}

/// The append kernel of a cache shape.
pub fn kernel(shape: &CacheShape, positions: Positions) -> KernelSpec {
    let mut constants = shape.constants();
    let loads = |n: u32, most| n.div_ceil(LANES).min(most);
    for (name, value) in [
        ("WORKGROUP_SIZE", LANES),
        ("QUERY_LOADS", loads(shape.heads.q_width() / 4, QUERY_LOADS)),
        ("CELL_LOADS", loads(shape.page_size * shape.heads.head_dim / 8, CELL_LOADS)),
    ] {
        constants.push((name.into(), Constant::U32(value)));
    }
    constants.push(("TURNS".into(), Constant::Bool(positions == Positions::Rotary)));
    KernelSpec {
        name: "append",
        constants,
        parts: vec![(&modules::F16).into(), (&modules::APPEND).into()],
        bindings: BINDINGS,
        immediate_bytes: AppendParams::BYTES,
    }
}
