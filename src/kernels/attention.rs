//! What decode, prefill and seal share: the geometry of a paged cache, and a page codec as constants and files.

use std::borrow::Cow;

use super::abi::{AttentionParams, Immediates as _};
use crate::compression::hidden::{Codec, HiddenCodec, Quantizer, Side, Transform, affine, plane, rot};
use crate::device::Tier;
use crate::geometry::{HeadGeometry, PageGeometry};
use crate::kernels::{Access, Binding, Constant, KernelSpec, Module, Part, modules};

/// Bindings of decode and prefill.
const ATTENTION_BINDINGS: &[Binding] = &[
    ("step", Access::Read),
    ("tables", Access::Read),
    ("arena", Access::Read),
    ("q", Access::Read),
    ("state_o", Access::ReadWrite),
    ("state_ml", Access::ReadWrite),
    ("parameters", Access::Read),
];

/// Constants of a prelude.
pub(super) type Constants = Vec<(Cow<'static, str>, Constant)>;

/// The shape of a cache as kernels see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheShape {
    /// Attention heads.
    pub heads: HeadGeometry,
    /// Tokens of a page.
    pub page_size: u32,
}

/// A cache whose pages have one codec: what a kernel reads, or what it makes of full pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Format {
    /// The cache.
    pub shape: CacheShape,
    /// How its pages become bytes.
    pub codec: HiddenCodec,
}

impl CacheShape {
    /// The page's shape.
    pub const fn page(&self) -> PageGeometry {
        PageGeometry { page_size: self.page_size, head_dim: self.heads.head_dim }
    }

    /// The same cache with pages of `codec`.
    pub const fn format(self, codec: HiddenCodec) -> Format {
        Format { shape: self, codec }
    }

    /// Constants that every kernel over pages needs.
    pub(super) fn constants(&self) -> Constants {
        let numbers = [
            ("HEAD_DIM", self.heads.head_dim),
            ("GROUP_SIZE", self.heads.group_size()),
            ("NUM_KV_HEADS", self.heads.num_kv_heads),
            ("PAGE_SIZE", self.page_size),
            ("SPAN", rot::span(self.heads.head_dim)),
        ];
        let mut constants: Constants = numbers.map(|(name, value)| (name.into(), Constant::U32(value))).into();
        constants.push(("NORMALISATION".into(), Constant::F32(rot::normalisation(self.heads.head_dim).to_bits())));
        constants
    }
}

impl Format {
    /// Constants of one side.
    pub(super) fn side_constants(&self, side: Side, constants: &mut Constants) {
        let prefix = match side {
            Side::Key => "KEY_",
            Side::Value => "VALUE_",
        };
        let page = self.shape.page();
        let codec = self.codec.side(side);
        let shape = codec.shape(side, page);
        let (mut bits, mut group, mut factor) = (0, 0, 0.0);
        let mut scales = codec.quantizer_words(side, page);
        match codec.quantizer {
            Quantizer::Int8 => {
                factor = affine::reciprocal(255);
                scales = plane::words(shape, 8);
            }
            Quantizer::Kivi { bits: b, group: g } => {
                (bits, group, factor) = (b, g, affine::reciprocal((1 << b) - 1));
                scales = plane::words(shape, b);
            }
            Quantizer::Gaussian { bits: b } => {
                (bits, factor) = (b, rot::scale_factor(b, shape.width));
                scales = rot::Gaussian { bits: b }.planes().iter().map(|p| plane::words(shape, *p)).sum();
            }
            Quantizer::F32 | Quantizer::F16 | Quantizer::Fp8 => {}
        }
        let at = match side {
            Side::Key => 0,
            Side::Value => self.codec.k.words(Side::Key, page) / 4,
        };
        let mut put = |name: &str, value| constants.push((format!("{prefix}{name}").into(), value));
        put("AT", Constant::U32(at));
        put("WIDTH", Constant::U32(shape.width));
        put("IS_KEY", Constant::Bool(side == Side::Key));
        put("SCALES", Constant::U32(scales));
        put("MASK", Constant::U32(codec.quantizer_words(side, page)));
        let centred = codec.transform == Transform::CentredRotation;
        put("ROTATES", Constant::Bool(centred || codec.transform == Transform::Rotation));
        put("CENTRES", Constant::Bool(centred));
        put("PICKS", Constant::Bool(matches!(codec.transform, Transform::Pruning { .. })));
        put("LIFTS", Constant::Bool(projects(codec)));
        let mut put = |name: &str, value| constants.push((format!("{prefix}CODEC_{name}").into(), value));
        put("BITS", Constant::U32(bits));
        put("GROUP", Constant::U32(group));
        put("FACTOR", Constant::F32(factor.to_bits()));
    }

    /// vec4s of a head's parameters: the bases of sides that are projected.
    pub(crate) fn parameter_vecs(&self) -> ParameterVecs {
        let head_dim = self.shape.heads.head_dim;
        let basis = |codec: Codec| if projects(codec) { head_dim * codec.width(head_dim) / 4 } else { 0 };
        let value_basis = basis(self.codec.k);
        ParameterVecs { value_basis, all: value_basis + basis(self.codec.v) }
    }

    /// Whether its keys are latents, which are turned by their positions when they are read.
    pub(crate) fn needs_angles(&self) -> bool {
        projects(self.codec.k)
    }

    /// An attention kernel that reads pages of this format.
    pub(super) fn attention_kernel(
        &self,
        name: &'static str,
        more: &[(&'static str, u32)],
        kernel: &[&'static Module],
    ) -> KernelSpec {
        let (constants, mut parts) = self.reader(more);
        parts.extend([&modules::ATTENTION_SHARED, &modules::ATTENTION_BINDINGS].map(Part::from));
        parts.extend(kernel.iter().map(|module| Part::from(*module)));
        KernelSpec { name, constants, parts, bindings: ATTENTION_BINDINGS, immediate_bytes: AttentionParams::BYTES }
    }

    /// Constants and codec files of a kernel that reads pages of this format.
    pub(super) fn reader(&self, more: &[(&'static str, u32)]) -> (Constants, Vec<Part>) {
        let mut constants = self.shape.constants();
        constants.extend(more.iter().map(|(name, value)| ((*name).into(), Constant::U32(*value))));
        self.side_constants(Side::Key, &mut constants);
        self.side_constants(Side::Value, &mut constants);
        constants.push(("OUT_DIM".into(), Constant::U32(self.shape.heads.head_dim)));
        constants.push(("VALUES_ARE_KEYS".into(), Constant::Bool(false)));
        constants.push(("PAIRED".into(), Constant::Bool(self.codec.paired)));
        constants.push(("LENGTHS".into(), Constant::U32(self.codec.side_words(self.shape.page()))));
        (constants, self.codec_parts())
    }

    /// The files of both sides' quantisers, and what they need.
    pub(super) fn codec_parts(&self) -> Vec<Part> {
        let common =
            [&modules::F16, &modules::F16_VALUES, &modules::F16_CELLS, &modules::PLANES, &modules::CODEC_AFFINE];
        let sides = [Side::Key, Side::Value].map(|side| {
            let module = codec_module(self.codec.side(side).quantizer);
            Part { module, side: Some(side) }
        });
        common.map(Part::from).into_iter().chain(sides).collect()
    }
}

/// Offsets in a head's parameters, in vec4s.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ParameterVecs {
    pub(crate) value_basis: u32,
    pub(crate) all: u32,
}

const fn projects(codec: Codec) -> bool {
    matches!(codec.transform, Transform::LowRank { .. })
}

/// The WGSL of a quantiser.
const fn codec_module(quantizer: Quantizer) -> &'static Module {
    match quantizer {
        Quantizer::F32 => &modules::CODEC_FLOAT32,
        Quantizer::F16 => &modules::CODEC_FLOAT16,
        Quantizer::Fp8 => &modules::CODEC_FP8,
        Quantizer::Int8 => &modules::CODEC_INT8,
        Quantizer::Kivi { .. } => &modules::CODEC_KIVI,
        Quantizer::Gaussian { .. } => &modules::CODEC_ROT,
    }
}

/// The reductions of a tier.
pub(crate) const fn lanes_module(tier: Tier) -> &'static Module {
    match tier {
        Tier::Portable => &modules::LANES_PORTABLE,
        Tier::Subgroup | Tier::Cooperative => &modules::LANES_SUBGROUP,
    }
}
