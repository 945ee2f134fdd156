//! Seal: full pages become codes.
//!
//! ```text
//! sealed page(list, layer) = Codec::encode(open page(list, layer))        bit by bit; see compression/hidden
//! ```
//!
//! **Work.** One dispatch for both sides. A [`SealItem`](super::abi::SealItem), a full f16 page of one KV head, is
//! [`SealSpec::strips`] workgroups of 64 lanes, those of its keys first. How a side is encoded depends on where its scales are:
//!
//! | file | of | strip |
//! |---|---|---|
//! | `seal_blocks` | f16, fp8, int8, values of kivi: no scale, or scales of tokens | about 512 cells |
//! | `seal_channels` | keys of kivi: scales of channels over a group of tokens | a group, in the channels of 8 words of codes |
//! | `seal_rotated` | rotated channels | 16 tokens; the page where its mean is taken out |
//! | `seal_general` | pruned keys, latents, f32 | the page |
//!
//! Functions of a codec's file that begin with `side_` serve the file that seals its pages; those that begin with `codec_` every
//! kernel, and all codecs have them.
//!
//! The first two load all cells of a strip at once, 8 in a lane (4 for keys of `kivi4`), and keep them in registers as f16. Ranges are
//! minima and maxima of whole numbers in the order of f16, so they find what is no number as well; a lane packs its codes
//! in registers. Rotation, in workgroup memory, takes two passes: strides up to 4 when a cell is loaded, all others by the
//! lane that holds every eighth channel.
//!
//! **Bytes.** `4 * page_size * head_dim` read and the sealed page written, each once and in whole cells. `seal_general` reads
//! pruned keys several times. Sealing happens once per `page_size` tokens.
//!
//! **Exactness.** Nothing depends on how a device divides, joins products with sums, or treats small numbers: see
//! [`affine`](crate::compression::hidden::affine) and [`rot`]. The same page gives the same bits everywhere, whether its
//! tokens came as a prompt or one by one.
//!
//! **Degenerate.** Groups with an infinity or a NaN decode to NaN; no other page is touched.

use super::abi::{Immediates as _, SealParams};
use super::attention::{Constants, Format};
use super::{Access, Binding, Constant, KernelSpec, Module, Part, modules};
use crate::compression::hidden::{Codec, Quantizer, Side, Transform, rot};

const BINDINGS: &[Binding] = &[
    ("step", Access::Read),
    ("tables", Access::Read),
    ("parameters", Access::Read),
    ("open_arena", Access::ReadWrite),
    ("sealed_arena", Access::ReadWrite),
];

/// Lanes of a workgroup.
const LANES: u32 = 64;
/// Cells of f16 that a lane loads at once, about.
const LANE_CELLS: u32 = 8;
/// Tokens that are rotated together; `seal_rotated.wgsl`.
const ROTATED_TOKENS: u32 = 16;
/// Lanes that share a word's channels; `seal_channels.wgsl`.
const SHARERS: u32 = 8;

/// Sealing of pages of one format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SealSpec {
    format: Format,
}

/// How a side is encoded.
enum Method {
    /// Scales of tokens, or none; bits of a code.
    Blocks(u32),
    /// Scales of channels over groups of tokens.
    Channels { bits: u32, group: u32 },
    /// Rotated channels.
    Rotated,
    /// Anything else.
    General,
}

impl Method {
    const fn new(side: Side, codec: Codec) -> Self {
        match (codec.transform, codec.quantizer) {
            (Transform::Rotation | Transform::CentredRotation, _) => Self::Rotated,
            (Transform::Pruning { .. } | Transform::LowRank { .. }, _) => Self::General,
            // Rotated channels alone are rounded like a Gaussian.
            (Transform::None, Quantizer::F32 | Quantizer::Gaussian { .. }) => Self::General,
            (Transform::None, Quantizer::F16) => Self::Blocks(16),
            (Transform::None, Quantizer::Fp8 | Quantizer::Int8) => Self::Blocks(8),
            (Transform::None, Quantizer::Kivi { bits, group }) => match side {
                Side::Key => Self::Channels { bits, group },
                Side::Value => Self::Blocks(bits),
            },
        }
    }

    const fn module(&self) -> &'static Module {
        match self {
            Self::Blocks(_) => &modules::SEAL_BLOCKS,
            Self::Channels { .. } => &modules::SEAL_CHANNELS,
            Self::Rotated => &modules::SEAL_ROTATED,
            Self::General => &modules::SEAL_GENERAL,
        }
    }
}

impl SealSpec {
    /// Sealing of pages of `format`.
    pub const fn new(format: Format) -> Self {
        Self { format }
    }

    /// Workgroups of an item.
    pub fn strips(&self) -> u32 {
        self.side_strips(Side::Key) + self.side_strips(Side::Value)
    }

    fn method(&self, side: Side) -> Method {
        Method::new(side, self.format.codec.side(side))
    }

    fn cells(&self) -> u32 {
        self.format.shape.heads.head_dim / 8
    }

    /// Tokens of a strip of blocks: whole blocks, which are 16 tokens at most.
    fn block_tokens(&self) -> u32 {
        let tokens = LANES * LANE_CELLS / self.cells();
        (1 << tokens.ilog2()).clamp(16, self.format.shape.page_size)
    }

    fn side_strips(&self, side: Side) -> u32 {
        let page_size = self.format.shape.page_size;
        match self.method(side) {
            Method::Blocks(_) => page_size / self.block_tokens(),
            Method::Channels { bits, group } => {
                let words = (self.format.shape.heads.head_dim * bits).div_ceil(32);
                page_size / group * words.div_ceil(LANES / SHARERS)
            }
            Method::Rotated if self.format.codec.side(side).transform == Transform::CentredRotation => 1,
            Method::Rotated => page_size / ROTATED_TOKENS,
            Method::General => 1,
        }
    }

    /// Sizes that loops which are written out depend on.
    fn sizes(&self, side: Side, constants: &mut Constants) {
        let cells = self.cells();
        let sizes = match self.method(side) {
            Method::Blocks(bits) => {
                let (strip, span) = (self.block_tokens(), 16 / bits);
                let blocks = match side {
                    Side::Key => strip * cells.div_ceil(span),
                    Side::Value => strip / span * cells,
                };
                vec![("STRIP", strip), ("SPAN", span), ("LANE_BLOCKS", blocks.div_ceil(LANES))]
            }
            Method::Channels { bits, group } => vec![("UNIT_CELLS", 4 / bits), ("LANE_TOKENS", group / SHARERS)],
            Method::Rotated => {
                let span_cells = rot::span(self.format.shape.heads.head_dim) / 8;
                vec![
                    ("LANE_CELLS", (ROTATED_TOKENS * cells).div_ceil(LANES)),
                    ("SPAN_CELLS", span_cells),
                    ("SPAN_PAIRS", span_cells / 2),
                    ("FAR_STAGES", span_cells.ilog2()),
                ]
            }
            Method::General => Vec::new(),
        };
        let prefix = match side {
            Side::Key => "KEY_",
            Side::Value => "VALUE_",
        };
        let all = sizes.into_iter().chain([("STRIPS", self.side_strips(side))]);
        constants.extend(all.map(|(name, value)| (format!("{prefix}{name}").into(), Constant::U32(value))));
    }

    /// The kernel.
    pub fn kernel(&self) -> KernelSpec {
        let mut constants = self.format.shape.constants();
        let parameters = self.format.parameter_vecs();
        for (name, value) in [
            ("WORKGROUP_SIZE", LANES),
            ("HEAD_PARAMETERS", parameters.all),
            ("KEY_BASIS", 0),
            ("VALUE_BASIS", parameters.value_basis),
        ] {
            constants.push((name.into(), Constant::U32(value)));
        }
        let mut parts = self.format.codec_parts();
        for side in [Side::Key, Side::Value] {
            self.format.side_constants(side, &mut constants);
            self.sizes(side, &mut constants);
            parts.push(Part { module: self.method(side).module(), side: Some(side) });
        }
        parts.push((&modules::SEAL).into());
        KernelSpec { name: "seal", constants, parts, bindings: BINDINGS, immediate_bytes: SealParams::BYTES }
    }
}
