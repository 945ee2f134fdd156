//! The transformer's row-wise operators: embedding, RMS norm, rotary positions, gated activation.
//!
//! ```text
//! embed             x[r] = embedding[token[r]]                             x [rows][hidden_size] f32
//! rms_norm          y[r] = weight * x[s] / sqrt(mean(x[s]^2) + eps)        s = r, or an entry of a row list
//! rope              (a, b) -> (a cos - b sin, a sin + b cos)               pairs (2i, 2i + 1) of each query and key head
//!                   angle = position * theta^(-2i / head_dim)              (arXiv:2104.09864, equation 34)
//! gated_activation  y[r] = silu(gate[r]) * up[r]                           gate_up [rows][2 * intermediate_size] f32
//! ```
//!
//! One workgroup of 64 lanes per row. Angles come from the host in `step`, computed in f64: WGSL promises no accuracy for sine and
//! cosine of large arguments. The embedding shares the output matrix's layout `[hidden_size / 8][vocab]` of cells, so
//! that tied weights are stored once.
//!
//! Bytes: each operand once. These kernels are bound by memory everywhere.

use super::abi::{EmbedParams, GatedActivationParams, Immediates, RmsNormParams, RopeParams};
use super::attention::lanes_module;
use super::{Access, Binding, Constant, KernelSpec, Module, Part, modules};
use crate::device::Tier;

fn kernel<I: Immediates>(
    name: &'static str,
    modules: Vec<&'static Module>,
    bindings: &'static [Binding],
) -> KernelSpec {
    let constants = vec![("WORKGROUP_SIZE".into(), Constant::U32(64))];
    let parts = modules.into_iter().map(Part::from).collect();
    KernelSpec { name, constants, parts, bindings, immediate_bytes: I::BYTES }
}

/// Token embedding.
pub fn embed() -> KernelSpec {
    const BINDINGS: &[Binding] = &[("step", Access::Read), ("embedding", Access::Read), ("x", Access::ReadWrite)];
    kernel::<EmbedParams>("embed", vec![&modules::EMBED], BINDINGS)
}

/// RMS norm (arXiv:1910.07467).
pub fn rms_norm(tier: Tier) -> KernelSpec {
    const BINDINGS: &[Binding] =
        &[("step", Access::Read), ("x", Access::Read), ("weight", Access::Read), ("y", Access::ReadWrite)];
    kernel::<RmsNormParams>("rms_norm", vec![lanes_module(tier), &modules::RMS_NORM], BINDINGS)
}

/// Rotary positions.
pub fn rope() -> KernelSpec {
    const BINDINGS: &[Binding] = &[("step", Access::Read), ("x", Access::ReadWrite)];
    kernel::<RopeParams>("rope", vec![&modules::ROPE], BINDINGS)
}

/// Gated activation (`SwiGLU`, arXiv:2002.05202).
pub fn gated_activation() -> KernelSpec {
    const BINDINGS: &[Binding] = &[("gate_up", Access::Read), ("y", Access::ReadWrite)];
    kernel::<GatedActivationParams>("gated_activation", vec![&modules::GATED_ACTIVATION], BINDINGS)
}
