//! Decode over latents that are keys and values at once: multi-head latent attention (MLA, arXiv:2405.04434) with the
//! up-projections absorbed into queries and outputs.
//!
//! ```text
//! s[h, t] = sm_scale * <q[row, h], c[t]>               c [tokens][width_qk]: the latent, then the rotary part
//! o[h]    = sum_t softmax_t(s) * c[t][..width_vo]      values are the first channels of keys
//! q [rows][num_qo_heads][width_qk] f32      state_o [state][width_vo] f32      state_ml [state] (m, l), m base 2
//! ```
//!
//! It is the kernel of [`decode`](super::decode) under other widths: queries and keys have `width_qk` channels (576 in
//! `DeepSeek`-V2), outputs `width_vo` (512), and a page holds keys alone, in any codec of keys that leaves channels where they
//! are.
//!
//! **Work.** All query heads share one list of pages. They are cut into tiles of [`HEAD_TILE`] heads, and a tile stands where a
//! KV head stands in [`DecodeItem`](super::abi::DecodeItem): `q_row = row * tiles + tile`, with the same pages for every tile.
//!
//! **Bytes.** A page once per tile for QK and once more for PV, which the device's cache serves. **FLOPs.**
//! `2 * num_qo_heads * tokens * (width_qk + width_vo)`.

use super::attention::CacheShape;
use super::decode::{DecodeSpec, DecodeTuning};
use super::{Constant, KernelSpec};
use crate::compression::hidden::{Codec, HiddenCodec, Side};
use crate::device::Tier;
use crate::geometry::{HeadGeometry, PageGeometry};

/// Query heads of one item: what 32 KiB of workgroup memory hold of queries of 576 channels.
pub const HEAD_TILE: u32 = 8;

/// Latent attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LatentDecodeSpec {
    /// Query heads, a multiple of [`HEAD_TILE`].
    pub num_qo_heads: u32,
    /// Channels of queries and keys.
    pub width_qk: u32,
    /// Channels of values and outputs: the first ones of a key, at most 512.
    pub width_vo: u32,
    /// Tokens of a page.
    pub page_size: u32,
    /// How keys become bytes; without a transform of channels.
    pub codec: Codec,
    /// The reductions it uses.
    pub tier: Tier,
}

impl LatentDecodeSpec {
    /// Tiles of query heads.
    pub const fn tiles(&self) -> u32 {
        self.num_qo_heads / HEAD_TILE
    }

    /// A page of latents.
    pub const fn page(&self) -> PageGeometry {
        PageGeometry { page_size: self.page_size, head_dim: self.width_qk }
    }

    /// Words of a page, which has no values of its own.
    pub fn page_words(&self) -> u32 {
        self.codec.words(Side::Key, self.page())
    }

    /// The shape that [`merge_states`](super::merge_states) joins the states of.
    pub const fn merge_shape(&self) -> CacheShape {
        let heads =
            HeadGeometry { num_qo_heads: self.num_qo_heads, num_kv_heads: self.tiles(), head_dim: self.width_vo };
        CacheShape { heads, page_size: self.page_size }
    }

    /// The kernel.
    pub fn kernel(&self) -> KernelSpec {
        let heads =
            HeadGeometry { num_qo_heads: self.num_qo_heads, num_kv_heads: self.tiles(), head_dim: self.width_qk };
        let shape = CacheShape { heads, page_size: self.page_size };
        let codec = HiddenCodec { k: self.codec, v: Codec::default(), paired: false };
        let mut spec =
            DecodeSpec { format: shape.format(codec), tier: self.tier, tuning: DecodeTuning::General }.kernel();
        for (name, value) in &mut spec.constants {
            match name.as_ref() {
                "OUT_DIM" | "VALUE_WIDTH" => *value = Constant::U32(self.width_vo),
                "VALUES_ARE_KEYS" => *value = Constant::Bool(true),
                // A tile of 64 tokens leaves room for wide queries.
                "TOKENS_PER_LANE" => *value = Constant::U32(1),
                _ => {}
            }
        }
        KernelSpec { name: "latent_decode", ..spec }
    }
}
