//! The hidden dimension: how one page of K and V becomes bytes. One file per codec, whose WGSL twin of the same name
//! lies under `shaders/codec/`.

pub mod f16;

use crate::geometry::{Bytes, PageGeometry};

/// How a page becomes bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HiddenCodec {
    /// IEEE half precision, lossless for what the append kernel writes.
    #[default]
    F16,
}

impl HiddenCodec {
    /// The registry.
    pub const ALL: [Self; 1] = [Self::F16];

    /// The name that the parser reads.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::F16 => "f16",
        }
    }

    /// Bytes of one page.
    pub const fn page_bytes(&self, page: PageGeometry) -> Bytes {
        match self {
            Self::F16 => f16::page_bytes(page),
        }
    }

    /// Bytes of K and V of one token and KV head, metadata included.
    pub const fn token_bytes(&self, head_dim: u32) -> Bytes {
        match self {
            Self::F16 => f16::page_bytes(PageGeometry { page_size: 1, head_dim }),
        }
    }
}
