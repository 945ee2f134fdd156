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
//! **Two texts.** `prefill.wgsl` serves every codec whose keys and values have all channels, rotated ones and merged layers
//! included. `prefill_general.wgsl` serves keys that are pruned channels, whose query channels differ from page to page, and latents.
//! Both take the same items.
//!
//! **Mapping** ([`PrefillTuning`]). `prefill.wgsl` is two products of register tiles over operands in workgroup memory: keys and
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
use super::{KernelSpec, modules};
use crate::compression::hidden::{Side, Transform};

/// Rows of an item at most. A group has no more heads than half of it.
pub const ITEM_ROWS: u32 = 64;

/// Workgroup memory that every supported adapter has.
const PORTABLE_WORKGROUP_BYTES: u32 = 32 * 1024;

/// Tile sizes of `prefill.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PrefillTuning {
    /// Rows of a tile, 32 or 64; 32 at most where heads are wider than 128.
    pub rows: u32,
    /// Tokens of a tile, 64 or 128.
    pub tokens: u32,
    /// vec4s of output channels that a lane owns for each of its rows, about: 2 or 4. It decides the number of lanes.
    pub vecs: u32,
    /// Cells of 8 channels of queries and keys that are staged together: 1, 2 or 4.
    pub cells: u32,
}

impl PrefillTuning {
    /// Every choice that is worth measuring and fits the portable workgroup memory for heads of `head_dim`.
    pub fn candidates(head_dim: u32) -> Vec<Self> {
        let all = [(64, 64, 2, 2), (64, 64, 4, 2), (64, 64, 2, 1), (32, 64, 2, 4), (32, 64, 4, 4), (32, 128, 2, 1)];
        let mut kept: Vec<Self> = Vec::new();
        for (rows, tokens, vecs, cells) in all {
            let tuning = Self { rows, tokens, vecs, cells };
            if Mapping::new(tuning, head_dim).bytes() <= PORTABLE_WORKGROUP_BYTES {
                kept.push(tuning);
            }
        }
        kept
    }
}

impl Default for PrefillTuning {
    fn default() -> Self {
        Self { rows: 64, tokens: 64, vecs: 2, cells: 2 }
    }
}

impl fmt::Display for PrefillTuning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}x{}x{}", self.rows, self.tokens, self.vecs, self.cells)
    }
}

impl FromStr for PrefillTuning {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let numbers: Vec<u32> = text.split('x').flat_map(str::parse).collect();
        let (&[rows, tokens, vecs, cells], 4) = (numbers.as_slice(), text.split('x').count()) else {
            let example = Self::default();
            return Err(format!("'{text}' is no prefill tuning; give rows, tokens, vecs and cells, like {example}"));
        };
        let tuning = Self { rows, tokens, vecs, cells };
        let known = [32, 64].contains(&tuning.rows)
            && [64, 128].contains(&tuning.tokens)
            && [2, 4].contains(&tuning.vecs)
            && [1, 2, 4].contains(&tuning.cells);
        if known {
            Ok(tuning)
        } else {
            Err(format!("prefill tuning {text}: rows are 32 or 64, tokens 64 or 128, vecs 2 or 4, cells 1, 2 or 4"))
        }
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
    fn new(tuning: PrefillTuning, head_dim: u32) -> Self {
        let PrefillTuning { rows, tokens, vecs, cells } = tuning;
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
        let probabilities = self.tokens * (self.rows / 4 + 1);
        16 * (staged + values + probabilities + self.rows)
    }

    fn constants(&self) -> Vec<(&'static str, u32)> {
        let share = |cells: u32, most: u32| 1 << (cells / self.lanes()).clamp(1, most).ilog2();
        vec![
            ("WORKGROUP_SIZE", self.lanes()),
            ("TILE_ROWS", self.rows),
            ("TILE_TOKENS", self.tokens),
            ("ROW_GROUPS", self.rows / 8),
            ("ACROSS", self.across),
            ("LANE_TOKENS", self.tokens / self.across),
            ("LANE_VECS", self.lane_vecs()),
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
    /// Tile sizes; `prefill_general.wgsl` has its own.
    pub tuning: PrefillTuning,
}

impl PrefillSpec {
    /// Query positions of an item at most.
    pub fn item_positions(shape: &CacheShape) -> u32 {
        ITEM_ROWS / shape.heads.group_size()
    }

    /// Whether keys and values have all channels.
    fn is_plain(&self) -> bool {
        let plain = |side| {
            !matches!(self.format.codec.side(side).transform, Transform::Pruning { .. } | Transform::LowRank { .. })
        };
        plain(Side::Key) && plain(Side::Value)
    }

    fn tile_rows(&self) -> u32 {
        let head_dim = self.format.shape.heads.head_dim;
        match self.is_plain() {
            true => Mapping::new(self.tuning, head_dim).rows,
            false if head_dim > 128 => 16,
            false => 32,
        }
    }

    /// Workgroups of an item.
    pub fn tiles(&self) -> u32 {
        ITEM_ROWS / self.tile_rows()
    }

    /// The kernel.
    pub fn kernel(&self) -> KernelSpec {
        let mut constants = vec![("ITEM_ROWS", ITEM_ROWS)];
        if self.is_plain() {
            constants.extend(Mapping::new(self.tuning, self.format.shape.heads.head_dim).constants());
            let modules = [&modules::ROTATE_ROWS, &modules::PREFILL_TILE, &modules::PREFILL_ROWS, &modules::PREFILL];
            self.format.attention_kernel("prefill", &constants, &modules)
        } else {
            constants.extend([("WORKGROUP_SIZE", 64), ("TILE_ROWS", self.tile_rows())]);
            let modules = [&modules::ROTATE_ROWS, &modules::PREFILL_TILE, &modules::PREFILL_GENERAL];
            self.format.attention_kernel("prefill", &constants, &modules)
        }
    }
}
