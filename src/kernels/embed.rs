//! Token embedding.
//!
//! ```text
//! x[r] = embedding[token[r]]      x [rows][hidden_size] f32
//! ```
//!
//! One workgroup of 64 lanes per row. The embedding shares the output matrix's layout `[hidden_size / 8][vocab]` of cells, so
//! that tied weights are stored once. Bytes: each operand once.

use super::abi::{EmbedParams, Immediates as _};
use super::{Access, Binding, Constant, KernelSpec, modules};

const BINDINGS: &[Binding] = &[("step", Access::Read), ("embedding", Access::Read), ("x", Access::ReadWrite)];

/// The kernel.
pub fn kernel() -> KernelSpec {
    KernelSpec {
        name: "embed",
        constants: vec![("WORKGROUP_SIZE".into(), Constant::U32(64))],
        parts: vec![(&modules::EMBED).into()],
        bindings: BINDINGS,
        immediate_bytes: EmbedParams::BYTES,
    }
}
