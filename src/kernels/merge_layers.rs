//! Merge layers: tokens of two layers as a direction that both have, and a length in each (arXiv:2405.14366, section 3).
//!
//! ```text
//! e        = slerp(x / |x|, y / |y|, 0.6)      x of the lower layer, y of the upper; keys and values each
//! page     = codec(e), f16(|x|), f16(|y|)
//! distance = (1 - cos(x_k, y_k)) + (1 - cos(x_v, y_v))
//! ```
//!
//! The tokens with the largest distances stay as they are in both layers. The paper measures angles of keys and values
//! apart and keeps those of either; here a token is one thing, so the two are added.
//!
//! **Work.** One workgroup of 64 lanes per [`MergeLayersItem`](super::abi::MergeLayersItem): a page of each layer's tokens, which
//! `gather` has put into the window; a lane owns a token. The lower layer's page becomes that of the directions, which
//! seal then encodes; lengths go to the merged page directly.
//!
//! **Exactness.** Arc cosine and sine are only as good as the device's (WGSL promises few bits), so directions are compared
//! within 2^-9, and everything after them exactly.

use super::abi::{Immediates as _, MergeLayersParams};
use super::attention::CacheShape;
use super::{Access, Binding, Constant, KernelSpec, modules};

const BINDINGS: &[Binding] = &[
    ("step", Access::Read),
    ("tables", Access::Read),
    ("window", Access::ReadWrite),
    ("merged", Access::ReadWrite),
    ("distances", Access::ReadWrite),
];

/// The kernel of a cache shape.
pub fn kernel(shape: &CacheShape) -> KernelSpec {
    let mut constants = shape.constants();
    constants.push(("WORKGROUP_SIZE".into(), Constant::U32(64)));
    let parts = vec![(&modules::F16).into(), (&modules::F16_VALUES).into(), (&modules::MERGE_LAYERS).into()];
    KernelSpec { name: "merge_layers", constants, parts, bindings: BINDINGS, immediate_bytes: MergeLayersParams::BYTES }
}
