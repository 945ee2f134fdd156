//! Seal: full pages become codes.
//!
//! ```text
//! sealed page(list, layer) = Codec::encode(open page(list, layer))        bit by bit; see compression/hidden
//! ```
//!
//! **Work.** One workgroup per [`SealItem`](super::abi::SealItem), one kernel for keys and one for values: a full f16 page of
//! one KV head becomes one side of a sealed page. Numbers are transformed strip by strip in workgroup memory where the codec
//! asks for it; a lane then measures whole groups, and puts together whole words of codes.
//!
//! **Bytes.** `2 * page_size * head_dim` read, and again for codes where nothing is transformed (from a cache that holds
//! the page); the side's bytes written. Sealing happens once per `page_size` tokens.
//!
//! **Exactness.** Nothing depends on how a device divides, joins products with sums, or treats small numbers: see
//! [`affine`](crate::compression::hidden::affine) and [`rot`]. The same page gives the same bits everywhere, whether its
//! tokens came as a prompt or one by one.
//!
//! **Degenerate.** Groups with an infinity or a NaN decode to NaN; no other page is touched.

use super::abi::{Immediates as _, SealParams};
use super::attention::{Format, codec_module};
use super::{Access, Binding, Constant, KernelSpec, Part, modules};
use crate::compression::hidden::{Quantizer, Side, plane, rot};

const BINDINGS: &[Binding] = &[
    ("step", Access::Read),
    ("tables", Access::Read),
    ("parameters", Access::Read),
    ("open_arena", Access::ReadWrite),
    ("sealed_arena", Access::ReadWrite),
];

/// The kernel that encodes one side of pages of `format`.
pub fn kernel(format: &Format, side: Side) -> KernelSpec {
    let quantizer = format.codec.side(side).quantizer;
    let shape = format.codec.side(side).shape(side, format.shape.page());
    let mut constants = format.shape.constants();
    constants.push(("WORKGROUP_SIZE".into(), Constant::U32(64)));
    format.side_constants(side, "SIDE_", &mut constants);
    let (first_plane, scale_bits) = match quantizer {
        Quantizer::Gaussian { bits } => (plane::words(shape, rot::Gaussian { bits }.planes()[0]), 16),
        _ => (0, 32),
    };
    let parameters = format.parameter_vecs();
    let basis = if side == Side::Key { 0 } else { parameters.value_basis };
    for (name, value) in [
        ("PLANE_WORDS", first_plane),
        ("SCALE_BITS", scale_bits),
        ("HEAD_PARAMETERS", parameters.all),
        ("SIDE_BASIS", basis),
    ] {
        constants.push((name.into(), Constant::U32(value)));
    }
    let parts = [
        &modules::F16,
        &modules::F16_VALUES,
        &modules::PLANES,
        &modules::CODEC_AFFINE,
        codec_module(quantizer),
        &modules::SEAL,
    ];
    KernelSpec {
        name: if side == Side::Key { "seal_keys" } else { "seal_values" },
        constants,
        parts: parts.map(Part::from).into(),
        bindings: BINDINGS,
        immediate_bytes: SealParams::BYTES,
    }
}
