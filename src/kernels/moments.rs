//! Moments: sums of queries and of their products before rotary positions, for expected attention.
//!
//! ```text
//! sums[h]    += sum_r q[r, h]        products[h] += sum_r q[r, h] q[r, h]'         h: query heads of the layer
//! q [rows][num_qo_heads][head_dim] f32, before rotary positions      moments [slot][layer][head][head_dim + head_dim^2] f32
//! ```
//!
//! **Work.** One workgroup of 64 lanes per (query head, [`MomentItem`](super::abi::MomentItem)); rows pass through workgroup
//! memory 16 at a time, and a lane owns every 64th number. **FLOPs.** `2 * head_dim^2` per row and query head: about 1 % of
//! a layer.

use super::abi::{Immediates as _, MomentParams};
use super::attention::CacheShape;
use super::{Access, Binding, Constant, KernelSpec, modules};

const BINDINGS: &[Binding] = &[("step", Access::Read), ("q", Access::Read), ("moments", Access::ReadWrite)];

/// The kernel of a cache shape.
pub fn kernel(shape: &CacheShape) -> KernelSpec {
    let mut constants = shape.constants();
    constants.push(("WORKGROUP_SIZE".into(), Constant::U32(64)));
    let parts = vec![(&modules::MOMENTS).into()];
    KernelSpec { name: "moments", constants, parts, bindings: BINDINGS, immediate_bytes: MomentParams::BYTES }
}
