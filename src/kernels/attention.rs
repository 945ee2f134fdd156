//! What decode, prefill and append share: the geometry of a paged cache and the page codec.

use crate::compression::hidden::HiddenCodec;
use crate::device::Tier;
use crate::geometry::{CELL_CHANNELS, HeadGeometry, PageGeometry};
use crate::kernels::{Access, Binding, Constant, Module, modules};

/// Bindings of decode and prefill.
pub(super) const ATTENTION_BINDINGS: &[Binding] = &[
    ("step", Access::Read),
    ("tables", Access::Read),
    ("arena", Access::Read),
    ("q", Access::Read),
    ("state_o", Access::ReadWrite),
    ("state_ml", Access::ReadWrite),
];

/// The shape of a cache as kernels see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheShape {
    /// Attention heads.
    pub heads: HeadGeometry,
    /// Tokens of a page.
    pub page_size: u32,
    /// How a page becomes bytes.
    pub codec: HiddenCodec,
}

impl CacheShape {
    /// The page's shape.
    pub const fn page(&self) -> PageGeometry {
        PageGeometry { page_size: self.page_size, head_dim: self.heads.head_dim }
    }

    /// Constants that every kernel over pages needs.
    pub(crate) fn constants(&self) -> Vec<(&'static str, Constant)> {
        vec![
            ("HEAD_DIM", Constant::U32(self.heads.head_dim)),
            ("GROUP_SIZE", Constant::U32(self.heads.group_size())),
            ("NUM_KV_HEADS", Constant::U32(self.heads.num_kv_heads)),
            ("PAGE_SIZE", Constant::U32(self.page_size)),
        ]
    }

    /// The codec's WGSL.
    pub(crate) fn codec_module(&self) -> &'static Module {
        match self.codec {
            HiddenCodec::F16 => &modules::CODEC_F16,
        }
    }

    /// Cells of 8 channels in a head.
    pub const fn cells(&self) -> u32 {
        self.heads.head_dim / CELL_CHANNELS
    }
}

/// The reductions of a tier.
pub(crate) fn lanes_module(tier: Tier) -> &'static Module {
    match tier {
        Tier::Portable => &modules::LANES_PORTABLE,
        Tier::Subgroup => &modules::LANES_SUBGROUP,
    }
}
