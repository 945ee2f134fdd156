//! Gather: tokens that stay move into fresh pages, dense and in order, as f16.
//!
//! ```text
//! target[K, V][slot] = f16(decode(source[kept[slot]]))       slots behind the last kept token repeat it
//! ```
//!
//! The target is a page of the window, which seal then encodes, or a page of the cache itself where that is f16. A kept
//! key keeps its rotary position, unless the item names angles by which it is turned to its place in the cache.
//!
//! **Work.** One workgroup of 64 lanes per [`GatherItem`](super::abi::GatherItem): one page of the target against one run of the
//! source; a lane moves whole tokens, and leaves those of other runs to their own items.
//!
//! **Exactness.** f16, f32 that holds f16, and codes between a minimum and a scale decode to the bits that the CPU gives. Where
//! a transform is undone (rotations, latents, turned keys) devices may round differently, by one unit of f16.

use super::abi::{GatherParams, Immediates as _};
use super::attention::Format;
use super::{Access, Binding, KernelSpec, Part, modules};

const BINDINGS: &[Binding] = &[
    ("step", Access::Read),
    ("tables", Access::Read),
    ("parameters", Access::Read),
    ("kept", Access::Read),
    ("arena", Access::ReadWrite),
    ("target_arena", Access::ReadWrite),
];

/// The kernel whose source pages have `format`.
pub fn kernel(format: &Format) -> KernelSpec {
    let (constants, mut parts) = format.reader(&[("WORKGROUP_SIZE", 64)]);
    parts.extend([&modules::ATTENTION_SHARED, &modules::EVICT_ROWS, &modules::GATHER].map(Part::from));
    KernelSpec { name: "gather", constants, parts, bindings: BINDINGS, immediate_bytes: GatherParams::BYTES }
}
