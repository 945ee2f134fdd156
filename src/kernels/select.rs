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
//! **Select** is a radix select on order-preserving 32-bit keys, one workgroup of 256 lanes per domain. A histogram of the first 11
//! bits, in three copies so that lanes with like scores do not wait for each other; a second of the next 11, in which lanes also
//! keep the few keys that passed the first, up to 16 each; a third of the last 10, of the keys that were kept, or where a lane met
//! more of them of all once more. A scan over lanes finds the bin in each. One pass then writes the indices of what stays, in
//! order, by scans over 4,096 tokens at a time that count tokens above the key and tokens that have it, so that ties go to the
//! lower list and the lower index whatever the device. Where a list has a floor above what always stays, the same is done for it
//! alone first, and leaves flags instead. Everything is integer arithmetic, so the result is that of the definition, exactly.
//!
//! **Bytes.** Scores three times, of which the second and third come from the device's cache where it holds them; four times
//! where many scores share 11 bits. 64 bytes of a lane are on their way at once.

use super::abi::{CarryParams, DecideParams, Immediates as _, SelectParams};
use super::{Access, Binding, Constant, KernelSpec, Module, modules};

/// Lanes of a workgroup.
const LANES: u32 = 256;
/// Bins of a histogram: a digit has 11 bits.
const BINS: u32 = 1 << 11;
/// Four scores each that a lane has on their way at once.
const LOADS: u32 = 4;

fn kernel(
    name: &'static str,
    module: &'static Module,
    bindings: &'static [Binding],
    immediate_bytes: u32,
) -> KernelSpec {
    let constants = vec![("WORKGROUP_SIZE".into(), Constant::U32(LANES))];
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
    let mut spec = kernel("select", &modules::SELECT, BINDINGS, SelectParams::BYTES);
    let more = [("LOADS", LOADS), ("LANE_BINS", BINS / LANES)];
    spec.constants.extend(more.map(|(name, value)| (name.into(), Constant::U32(value))));
    spec
}

/// Raw scores to their new places.
pub fn carry() -> KernelSpec {
    const BINDINGS: &[Binding] = &[("step", Access::Read), ("kept", Access::Read), ("raw", Access::ReadWrite)];
    kernel("carry", &modules::CARRY, BINDINGS, CarryParams::BYTES)
}
