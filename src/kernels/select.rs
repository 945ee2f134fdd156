//! Decide, select, carry: from raw scores to the indices of the tokens that stay.
//!
//! ```text
//! decide   decided[list, t] = mean over lists that decide together of the average of `kernel` neighbours' raw scores
//!          (zeros beyond the ends), or a hash of (seed, list, t)
//! select   kept[list, 0 ..] = indices, ascending, of what `compression::keep::select` keeps;  counts[list]
//! carry    raw[list, i] = raw[list, kept[list, i]], zero behind the last
//! decided, kept [list][capacity]
//! ```
//!
//! **Select** is a radix select on order-preserving 32-bit keys, eight bits at a time, one workgroup of 256 lanes per domain:
//! a histogram in workgroup memory, four rounds, then one pass that flags winners in order, so that ties go to the lower
//! list and the lower index whatever the device. Flags become indices by prefix sums. Everything is integer arithmetic, so the
//! result is that of the definition, exactly.
//!
//! **Bytes.** Scores five times per selection, from a cache that holds them.

use super::abi::{CarryParams, DecideParams, Immediates as _, SelectParams};
use super::{Access, Binding, Constant, KernelSpec, Module, modules};

fn kernel(
    name: &'static str,
    module: &'static Module,
    bindings: &'static [Binding],
    immediate_bytes: u32,
) -> KernelSpec {
    let constants = vec![("WORKGROUP_SIZE".into(), Constant::U32(256))];
    KernelSpec { name, constants, parts: vec![module.into()], bindings, immediate_bytes }
}

/// Raw scores to decided ones.
pub fn decide() -> KernelSpec {
    const BINDINGS: &[Binding] = &[("step", Access::Read), ("raw", Access::Read), ("decided", Access::ReadWrite)];
    kernel("decide", &modules::DECIDE, BINDINGS, DecideParams::BYTES)
}

/// Decided scores to indices.
pub fn select() -> KernelSpec {
    const BINDINGS: &[Binding] = &[
        ("step", Access::Read),
        ("decided", Access::Read),
        ("kept", Access::ReadWrite),
        ("counts", Access::ReadWrite),
    ];
    kernel("select", &modules::SELECT, BINDINGS, SelectParams::BYTES)
}

/// Raw scores to their new places.
pub fn carry() -> KernelSpec {
    const BINDINGS: &[Binding] = &[("step", Access::Read), ("kept", Access::Read), ("raw", Access::ReadWrite)];
    kernel("carry", &modules::CARRY, BINDINGS, CarryParams::BYTES)
}
