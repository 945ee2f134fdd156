//! Chunked causal prefill: the rows of a chunk attend to everything cached before them and to themselves.
//!
//! ```text
//! s[r, h, t] = sm_scale * <q[r, h], k[t, h / group_size]>   for cache indices t <= index(r), else masked
//! m, l, o as in decode, one attention state per (position, query head)
//! q [rows][num_qo_heads][head_dim] f32      state_o [state][head_dim] f32      state_ml [state] (m, l), m base 2
//! ```
//!
//! The chunk's own keys and values are appended to the pages first, so the kernel reads one cache and needs no second
//! source. The mask compares cache indices, not positions: what was evicted is simply not there.
//!
//! **Work.** One [`PrefillItem`](super::abi::PrefillItem) has up to [`ITEM_ROWS`] rows, (position, query head of the group) pairs of one
//! sequence and one KV head, and a run of tokens in one arena. The host ends each run at the item's last position, so tiles
//! above the diagonal cost nothing. A kernel with smaller tiles runs several workgroups per item ([`PrefillSpec::tiles`]).
//!
//! **Three texts** take the same items ([`PrefillTuning`]). `prefill.wgsl` serves every codec whose keys and values have all channels,
//! rotated ones and merged layers included. `prefill_general.wgsl` serves every format, and alone keys that are pruned channels, whose
//! query channels differ from page to page, and latents. `prefill_coop.wgsl` multiplies on cooperative matrices
//! ([`prefill_coop`]).
//!
//! **Mapping.** `prefill.wgsl` is two products of register tiles over operands in workgroup memory: keys and
//! values are decoded once per tile, queries are staged again from the device's cache because they do not fit. A lane owns
//! 8 rows by `tokens / lanes per row group` scores, then 8 rows by about `4 * vecs` channels. What a workgroup memory read returns
//! so feeds 2.7 to 4 multiply-adds per value: an H100 returns 32 values and computes 128 multiply-adds in a clock. Rotated
//! queries wait in the item's own output slots. `prefill_general.wgsl`: 64 lanes, 32 rows (16 above `head_dim` 128) by 64 tokens, queries in
//! workgroup memory, keys and values decoded into registers by every lane that needs them.
//!
//! **Bytes.** K and V of a run once per tile of rows. **FLOPs.** `4 * num_qo_heads * head_dim` per (row, seen token).
//!
//! **Order of additions.** A score is one chain over its channels, an output one chain over the run's tokens; neither depends on the
//! number of rows nor on the row's place.
//!
//! Method: FlashAttention (arXiv:2205.14135), online softmax in base 2.

use std::fmt;
use std::str::FromStr;

use super::attention::{CacheShape, Format};
use super::prefill_coop::{self, CooperativeTile};
use super::tuning::Operands;
use super::{KernelSpec, modules};
use crate::compression::hidden::{Side, Transform};
use crate::device::Tier;

/// Rows of an item at most. A group has no more heads than half of it.
pub const ITEM_ROWS: u32 = 64;

/// Tokens whose probabilities are in workgroup memory at once: as many as the smallest tile has.
const PART_TOKENS: u32 = 64;

/// Workgroup memory that every supported adapter has.
const PORTABLE_WORKGROUP_BYTES: u32 = 32 * 1024;

/// How prefill is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PrefillTuning {
    /// The kernel that serves every format.
    General,
    /// Register tiles.
    Tiled(PrefillTile),
    /// Cooperative matrices.
    Cooperative(CooperativeTile),
}

/// Tile sizes of `prefill.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PrefillTile {
    /// Rows of a tile, 32 or 64; 32 at most where heads are wider than 128.
    pub rows: u32,
    /// Tokens of a tile, 64 or 128.
    pub tokens: u32,
    /// vec4s of output channels that a lane owns for each of its rows, about: 2 or 4. It decides the number of lanes.
    pub vecs: u32,
    /// Cells of 8 channels of queries and keys that are staged together: 1, 2 or 4.
    pub cells: u32,
}

impl Default for PrefillTile {
    fn default() -> Self {
        Self { rows: 64, tokens: 64, vecs: 2, cells: 2 }
    }
}

impl PrefillTuning {
    /// What a tier runs where nothing else is chosen.
    pub fn of_tier(tier: Tier) -> Self {
        match tier {
            Tier::Portable | Tier::Subgroup => Self::Tiled(PrefillTile::default()),
            Tier::Cooperative => Self::Cooperative(CooperativeTile::default()),
        }
    }

    /// Everything that is worth measuring for a format, the general kernel first.
    pub fn candidates(format: &Format) -> Vec<Self> {
        let tiles = [
            (64, 64, 2, 2),
            (64, 128, 2, 1),
            (64, 64, 4, 2),
            (64, 64, 2, 1),
            (32, 64, 2, 4),
            (32, 64, 4, 4),
            (32, 128, 2, 1),
        ];
        let tiled = tiles.map(|(rows, tokens, vecs, cells)| Self::Tiled(PrefillTile { rows, tokens, vecs, cells }));
        let cooperative = CooperativeTile::ALL.map(Self::Cooperative);
        let all = [Self::General].into_iter().chain(tiled).chain(cooperative);
        all.filter(|tuning| tuning.serves(format)).collect()
    }

    /// Whether the kernel can read pages of this format.
    pub fn serves(&self, format: &Format) -> bool {
        let whole = |side| {
            let transform = format.codec.side(side).transform;
            !matches!(transform, Transform::Pruning { .. } | Transform::LowRank { .. })
        };
        let plain = whole(Side::Key) && whole(Side::Value);
        match self {
            Self::General => true,
            Self::Tiled(tile) => {
                plain && Mapping::new(*tile, format.shape.heads.head_dim).bytes() <= PORTABLE_WORKGROUP_BYTES
            }
            Self::Cooperative(tile) => plain && tile.serves(format),
        }
    }

    /// This one where it serves the format; otherwise register tiles, or the general kernel.
    fn for_format(self, format: &Format) -> Self {
        let choices = [self, Self::of_tier(Tier::Portable)];
        choices.into_iter().find(|tuning| tuning.serves(format)).unwrap_or(Self::General)
    }
}

impl fmt::Display for PrefillTuning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::General => f.pad("general"),
            Self::Tiled(PrefillTile { rows, tokens, vecs, cells }) => {
                f.pad(&format!("tiled:{rows}:{tokens}:{vecs}:{cells}"))
            }
            Self::Cooperative(CooperativeTile { tokens, slice }) => f.pad(&format!("cooperative:{tokens}:{slice}")),
        }
    }
}

impl FromStr for PrefillTuning {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, rest) = text.split_once(':').unwrap_or((text, ""));
        let numbers: Option<Vec<u32>> = rest.split(':').filter(|n| !n.is_empty()).map(|n| n.parse().ok()).collect();
        let tuning = match (kind, numbers.as_deref()) {
            ("general", Some([])) => Some(Self::General),
            ("tiled", Some(&[rows, tokens, vecs, cells])) => {
                let known = [32, 64].contains(&rows)
                    && [64, 128].contains(&tokens)
                    && [2, 4].contains(&vecs)
                    && [1, 2, 4].contains(&cells);
                known.then_some(Self::Tiled(PrefillTile { rows, tokens, vecs, cells }))
            }
            ("cooperative", Some(&[tokens, slice])) => {
                CooperativeTile::ALL.into_iter().find(|t| (t.tokens, t.slice) == (tokens, slice)).map(Self::Cooperative)
            }
            _ => None,
        };
        tuning.ok_or_else(|| {
            format!(
                "'{text}' is no tuning of prefill: general, tiled:ROWS:TOKENS:VECS:CELLS (32 or 64, 64 or 128, 2 or 4, 1, 2 or \
                 4), or cooperative:TOKENS:SLICE (32 or 64 each)"
            )
        })
    }
}

/// How a workgroup of `prefill.wgsl` shares out a tile.
#[derive(Clone, Copy, Debug)]
struct Mapping {
    rows: u32,
    tokens: u32,
    cells: u32,
    head_vecs: u32,
    /// Lanes that own the same rows.
    across: u32,
    /// Values that are staged together.
    value_tokens: u32,
}

impl Mapping {
    fn new(tile: PrefillTile, head_dim: u32) -> Self {
        let PrefillTile { rows, tokens, vecs, cells } = tile;
        let rows = if head_dim > 128 { rows.min(32) } else { rows };
        let head_vecs = head_dim / 4;
        let wanted = head_vecs.div_ceil(vecs).max(8);
        // A power of two, so that tokens divide evenly; not the next one, which would leave lanes without channels.
        let across = 1 << wanted.ilog2();
        let eight = Self { rows, tokens, cells, head_vecs, across, value_tokens: 8 };
        let sixteen = Self { value_tokens: 16, ..eight };
        if sixteen.bytes() <= PORTABLE_WORKGROUP_BYTES { sixteen } else { eight }
    }

    const fn lanes(&self) -> u32 {
        self.rows / 8 * self.across
    }

    const fn lane_vecs(&self) -> u32 {
        self.head_vecs.div_ceil(self.across)
    }

    /// Workgroup memory: staged queries and keys, staged values, probabilities, parts of maxima.
    const fn bytes(&self) -> u32 {
        let staged = (self.rows + self.tokens) * self.cells * 2;
        let values = self.value_tokens * self.lane_vecs() * self.across;
        let probabilities = PART_TOKENS * (self.rows / 4 + 1);
        16 * (staged + values + probabilities + self.rows)
    }

    fn constants(&self) -> Vec<(&'static str, u32)> {
        let share = |cells: u32, most: u32| 1 << (cells / self.lanes()).clamp(1, most).ilog2();
        vec![
            ("WORKGROUP_SIZE", self.lanes()),
            ("TILE_TOKENS", self.tokens),
            ("ROW_GROUPS", self.rows / 8),
            ("ACROSS", self.across),
            ("LANE_TOKENS", self.tokens / self.across),
            ("LANE_VECS", self.lane_vecs()),
            ("PART_TOKENS", PART_TOKENS),
            ("PARTS", self.tokens / PART_TOKENS),
            ("PART_LANE", PART_TOKENS / self.across),
            ("CHUNK_CELLS", self.cells),
            ("VALUE_TOKENS", self.value_tokens),
            // Cells that a lane may decode of one load: all lanes should have some.
            ("KEY_SHARE", share(self.cells * self.tokens, self.cells)),
            ("VALUE_SHARE", share(self.value_tokens * self.head_vecs / 2, self.value_tokens)),
        ]
    }
}

/// A prefill kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PrefillSpec {
    /// The cache it reads.
    pub format: Format,
    /// How it is launched; it serves the format.
    tuning: PrefillTuning,
}

impl PrefillSpec {
    /// The kernel for a format, as `tuning` says where that serves the format.
    pub fn new(format: Format, tuning: PrefillTuning) -> Self {
        Self { format, tuning: tuning.for_format(&format) }
    }

    /// Query positions of an item at most.
    pub fn item_positions(shape: &CacheShape) -> u32 {
        ITEM_ROWS / shape.heads.group_size()
    }

    /// What it multiplies.
    pub const fn operands(&self) -> Operands {
        match self.tuning {
            PrefillTuning::Cooperative(_) => Operands::Half,
            PrefillTuning::General | PrefillTuning::Tiled(_) => Operands::Full,
        }
    }

    fn tile_rows(&self) -> u32 {
        let head_dim = self.format.shape.heads.head_dim;
        match self.tuning {
            PrefillTuning::Tiled(tile) => Mapping::new(tile, head_dim).rows,
            PrefillTuning::Cooperative(_) => prefill_coop::TILE_ROWS,
            PrefillTuning::General if head_dim > 128 => 16,
            PrefillTuning::General => 32,
        }
    }

    /// Workgroups of an item.
    pub fn tiles(&self) -> u32 {
        ITEM_ROWS / self.tile_rows()
    }

    /// The kernel.
    pub fn kernel(&self) -> KernelSpec {
        let head_dim = self.format.shape.heads.head_dim;
        let mut constants = vec![("ITEM_ROWS", ITEM_ROWS), ("TILE_ROWS", self.tile_rows())];
        let staged = [&modules::PREFILL_ROWS, &modules::STAGE_KEYS, &modules::PREFILL_STAGE];
        let (name, kernel) = match self.tuning {
            PrefillTuning::General => {
                constants.push(("WORKGROUP_SIZE", 64));
                ("prefill", vec![&modules::PREFILL_GENERAL])
            }
            PrefillTuning::Tiled(tile) => {
                constants.extend(Mapping::new(tile, head_dim).constants());
                ("prefill", [&staged[..], &[&modules::PREFILL]].concat())
            }
            PrefillTuning::Cooperative(tile) => {
                constants.extend(tile.constants(head_dim));
                ("prefill_coop", [&staged[..], &[&modules::PREFILL_COOP]].concat())
            }
        };
        let modules = [&[&modules::ROTATE_ROWS, &modules::PREFILL_TILE][..], &kernel].concat();
        self.format.attention_kernel(name, &constants, &modules)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compression::hidden::HiddenCodec;
    use crate::geometry::HeadGeometry;

    fn format(codec: &str, head_dim: u32) -> Format {
        let heads = HeadGeometry { num_qo_heads: 4, num_kv_heads: 1, head_dim };
        let codec: HiddenCodec = codec.parse().expect("a codec");
        CacheShape { heads, page_size: 64 }.format(codec)
    }

    #[test]
    fn tunings_read_back_as_they_are_written() {
        let candidates = PrefillTuning::candidates(&format("f16", 128));
        assert!(candidates.len() > 6, "all kernels serve plain heads: {candidates:?}");
        for tuning in candidates {
            assert_eq!(tuning.to_string().parse(), Ok(tuning), "{tuning}");
        }
        for text in
            ["", "tiled", "tiled:64:64:2", "tiled:48:64:2:2", "general:1", "cooperative:16:16", "tiled:64:64:2:x"]
        {
            assert!(text.parse::<PrefillTuning>().is_err(), "'{text}' is no tuning");
        }
    }

    #[test]
    fn a_kernel_that_does_not_serve_a_format_gives_way() {
        let cooperative = PrefillTuning::of_tier(Tier::Cooperative);
        let chosen = |codec, head_dim| PrefillSpec::new(format(codec, head_dim), cooperative).tuning;
        assert_eq!(chosen("kivi4", 128), cooperative, "codes are decoded to f16");
        assert_eq!(chosen("f32", 128), PrefillTuning::of_tier(Tier::Portable), "f32 does not fit in f16");
        assert_eq!(chosen("f16", 72), PrefillTuning::of_tier(Tier::Portable), "no multiple of 16");
        assert_eq!(chosen("think:0.6+int8", 128), PrefillTuning::General, "channels differ from page to page");
    }
}
