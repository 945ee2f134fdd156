//! Split-KV decode: one query row per sequence attends to its cached tokens.
//!
//! ```text
//! s[h, t] = sm_scale * <q[row, h], k[t, h / group_size]>
//! m[h] = max_t s,   l[h] = sum_t exp(s - m),   o[h] = sum_t exp(s - m) * v[t, h / group_size]     (unnormalised)
//! q [rows][num_qo_heads][head_dim] f32      state_o [state][head_dim] f32      state_ml [state] (m, l), m base 2
//! ```
//!
//! **Work.** One workgroup per [`DecodeItem`](super::abi::DecodeItem): a (row, KV head) and a run of at most [`DecodeSpec::KV_CHUNK`] tokens
//! whose pages lie in one arena. It writes `group_size` attention states from `slot` on; `merge_states` joins the runs.
//! Where a sequence is split depends on its own length alone, never on what else is in the batch, so that a
//! session's result does not change with its company (batch invariance).
//!
//! **Mapping.** Two kernels, of which [`DecodeTuning`] chooses. *General* serves every format: 64 lanes; in QK a lane owns whole
//! tokens of a tile of 256 (64 for large groups); scores of the tile lie in workgroup memory; the running maximum is shared. In
//! PV a lane owns one cell of 8 channels and a stripe of tokens; stripes are added once, at the end. Query heads of the
//! group are packed in `vec4`s, so a group of 3 computes 4. *Tiled* does the same in register tiles that are written out, with
//! several loads in flight, and folds scales into queries and weights (its text says how); formats
//! that it does not serve ([`DecodeTuning::fitted`]) go to the general one. Its scores are sums of f32 products
//! (`decode_products.wgsl`), or of whole numbers, with queries in two digits (`decode_digits.wgsl`), which rounds queries to 32,512
//! steps of their head's largest channel. Where a codec rotates channels, the query is
//! rotated once per item and the output once at the end, in workgroup memory.
//!
//! **Bytes.** Reads a page's bytes per page and KV head once, whatever the group size; writes
//! `group_size * (head_dim + 2) * 4` per item. **FLOPs.** `4 * num_qo_heads * tokens * head_dim`.
//!
//! **Degenerate.** A run of no tokens writes `m = -1e30, l = 0, o = 0`. Slots past the last token are never used,
//! whatever they hold.
//!
//! Method: FlashDecoding (Dao et al., 2023) and FlashInfer (arXiv:2501.01005); group packing as in both.

use std::fmt;
use std::str::FromStr;

use super::attention::{Format, lanes_module};
use super::tuning::Operands;
use super::{KernelSpec, modules};
use crate::compression::hidden::{Quantizer, Side, Transform};
use crate::device::Tier;
use crate::geometry::CELL_BYTES;

const WORKGROUP_SIZE: u32 = 64;
/// Tokens of a block of the tiled kernel, all in one page and in one group of every codec.
const BLOCK: u32 = 32;
/// Workgroup memory that every adapter has.
const WORKGROUP_BYTES: u64 = 32 * 1024;

/// How decode is launched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DecodeTuning {
    /// The kernel that serves every format.
    #[default]
    General,
    /// Register tiles.
    Tiled(DecodeTile),
}

/// A register tile of decode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DecodeTile {
    /// Lanes of a workgroup.
    pub lanes: u32,
    /// Tokens whose scores a lane computes at once.
    pub tokens: u32,
    /// Loads of 16 bytes of keys in flight for each of these tokens.
    pub key_loads: u32,
    /// Loads of 16 bytes of values in flight.
    pub value_loads: u32,
    /// Whether the first of these are asked for before scores are computed.
    pub ahead: bool,
    /// Whether scores are integer products of codes with queries that are rounded to two digits of 8 bits; else f32 products.
    pub digits: bool,
}

/// Words behind a tile's numbers.
const AHEAD: &str = ":ahead";
const DIGITS: &str = ":digits";

impl fmt::Display for DecodeTuning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::General => f.pad("general"),
            Self::Tiled(DecodeTile { lanes, tokens, key_loads, value_loads, ahead, digits }) => {
                let ahead = if *ahead { AHEAD } else { "" };
                let digits = if *digits { DIGITS } else { "" };
                f.pad(&format!("tiled:{lanes}:{tokens}:{key_loads}:{value_loads}{ahead}{digits}"))
            }
        }
    }
}

impl FromStr for DecodeTuning {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "general" {
            return Ok(Self::General);
        }
        let tile = text.strip_prefix("tiled:").and_then(|rest| {
            let (rest, digits) = rest.strip_suffix(DIGITS).map_or((rest, false), |rest| (rest, true));
            let (rest, ahead) = rest.strip_suffix(AHEAD).map_or((rest, false), |rest| (rest, true));
            let numbers = rest.split(':').map(|n| n.parse().ok());
            let [lanes, tokens, key_loads, value_loads] = numbers.collect::<Option<Vec<u32>>>()?.try_into().ok()?;
            Some(DecodeTile { lanes, tokens, key_loads, value_loads, ahead, digits })
        });
        tile.map(Self::Tiled).ok_or_else(|| {
            let form = "general, or tiled:LANES:TOKENS:KEY_LOADS:VALUE_LOADS[:ahead][:digits]";
            format!("'{text}' is no tuning of decode: {form}")
        })
    }
}

impl DecodeTuning {
    /// What is used where nothing was measured: on GPUs what was fastest on an H100 for formats of this kind; on
    /// processors that pretend to be one the general kernel, since compilers there take seconds over long texts.
    pub fn of_kind(adapter_kind: &str, format: &Format) -> Self {
        if adapter_kind == "cpu" {
            return Self::General;
        }
        let group = format.shape.heads.group_size();
        let tile = match format.codec.k.quantizer {
            Quantizer::F32 | Quantizer::F16 if group > 4 => DecodeTile::new(128, 2, 4, 8),
            Quantizer::F32 | Quantizer::F16 => DecodeTile::new(128, 1, 8, 8),
            Quantizer::Fp8 | Quantizer::Int8 => DecodeTile::new(64, 2, 1, 4),
            Quantizer::Kivi { .. } | Quantizer::Gaussian { .. } if group == 1 => DecodeTile::new(32, 1, 8, 8),
            // Two tokens a lane need more registers than there are.
            Quantizer::Kivi { .. } | Quantizer::Gaussian { .. } if group > 4 => DecodeTile::new(64, 1, 2, 4),
            Quantizer::Kivi { .. } | Quantizer::Gaussian { .. } => DecodeTile::new(64, 2, 4, 8),
        };
        Self::Tiled(tile.ahead()).fitted(format)
    }

    /// Everything that is worth trying for some format, the general kernel first.
    pub fn all() -> impl Iterator<Item = Self> {
        std::iter::once(Self::General).chain(TILES.into_iter().map(Self::Tiled))
    }

    /// Everything that is worth trying for a format, the general kernel first.
    pub fn candidates(format: &Format) -> Vec<Self> {
        let mut candidates = Vec::new();
        for tuning in Self::all().filter(|tuning| tuning.suits(format)) {
            let fitted = tuning.fitted(format);
            if !candidates.contains(&fitted) {
                candidates.push(fitted);
            }
        }
        candidates
    }

    /// Whether it is another launch for this format than one without digits.
    pub fn suits(&self, format: &Format) -> bool {
        !matches!(self, Self::Tiled(DecodeTile { digits: true, .. })) || has_digits(format)
    }

    /// What it multiplies where it reads pages of this format.
    pub fn operands(&self, format: &Format) -> Operands {
        match self.fitted(format) {
            Self::Tiled(DecodeTile { digits: true, .. }) => Operands::Digits,
            _ => Operands::Full,
        }
    }

    /// The kernel that reads pages of this format: as asked for, within what the format allows.
    pub fn fitted(&self, format: &Format) -> Self {
        match self {
            Self::General => Self::General,
            Self::Tiled(tile) => tile.fitted(format).map_or(Self::General, Self::Tiled),
        }
    }
}

/// Tiles that are worth trying: many lanes with few tokens each, and the other way round; from four to sixteen loads in flight.
const TILES: [DecodeTile; 17] = [
    DecodeTile::new(128, 1, 8, 8).ahead(),
    DecodeTile::new(128, 1, 8, 8),
    DecodeTile::new(64, 1, 8, 8).ahead(),
    DecodeTile::new(32, 1, 8, 8).ahead(),
    DecodeTile::new(128, 1, 4, 4).ahead(),
    DecodeTile::new(64, 1, 2, 4).ahead(),
    DecodeTile::new(128, 2, 4, 8).ahead(),
    DecodeTile::new(128, 2, 2, 4).ahead(),
    DecodeTile::new(64, 2, 4, 8).ahead(),
    DecodeTile::new(64, 2, 1, 4).ahead(),
    DecodeTile::new(64, 4, 1, 4).ahead(),
    DecodeTile::new(32, 1, 1, 4).ahead().digits(),
    DecodeTile::new(64, 1, 1, 4).ahead().digits(),
    DecodeTile::new(64, 2, 1, 4).ahead().digits(),
    DecodeTile::new(64, 2, 1, 2).digits(),
    DecodeTile::new(64, 2, 4, 8).ahead().digits(),
    DecodeTile::new(64, 4, 1, 4).ahead().digits(),
];

impl DecodeTile {
    const fn new(lanes: u32, tokens: u32, key_loads: u32, value_loads: u32) -> Self {
        Self { lanes, tokens, key_loads, value_loads, ahead: false, digits: false }
    }

    const fn ahead(self) -> Self {
        Self { ahead: true, ..self }
    }

    const fn digits(self) -> Self {
        Self { digits: true, ..self }
    }

    /// The tile with no more loads in flight than the format has; `None` where it can not read pages of the format.
    fn fitted(&self, format: &Format) -> Option<Self> {
        let Self { lanes, tokens, key_loads, value_loads, .. } = *self;
        let heads = format.shape.heads;
        let cells = heads.head_dim / 8;
        let codec = format.codec;
        // Three bits are two planes, of which a load holds different numbers of cells.
        let plain = [codec.k, codec.v].iter().all(|side| {
            matches!(side.transform, Transform::None | Transform::Rotation)
                && side.quantizer != Quantizer::Gaussian { bits: 3 }
        });
        let sizes = lanes.is_power_of_two() && (8..=256).contains(&lanes) && tokens.is_power_of_two() && tokens <= 4;
        if !sizes {
            return None;
        }
        let powers = heads.head_dim.is_power_of_two() && heads.head_dim >= 64 && key_loads.is_power_of_two();
        let whole = format.shape.page_size.is_multiple_of(BLOCK) && (lanes * tokens).is_multiple_of(BLOCK);
        if codec.paired || !plain || !powers || !whole || !value_loads.is_power_of_two() || lanes < cells {
            return None;
        }
        // All counts are powers of two, so the smaller one divides the larger.
        let span = |side| span(codec.side(side).quantizer);
        let keys = (cells / span(Side::Key)).min(key_loads);
        let blocks = lanes * tokens / span(Side::Value);
        let values = (blocks / (lanes / cells)).min(value_loads);
        let digits = self.digits && has_digits(format);
        let tile = Self { key_loads: keys, value_loads: values, digits, ..*self };
        (keys > 0 && values > 0 && tile.workgroup_bytes(format) <= WORKGROUP_BYTES).then_some(tile)
    }

    /// What the kernel declares, in whole cells.
    fn workgroup_bytes(&self, format: &Format) -> u64 {
        let heads = format.shape.heads;
        let queries = heads.group_size() * heads.head_dim / 4;
        let head_vecs = heads.group_size().div_ceil(4);
        let tile = self.lanes * self.tokens;
        let row = if self.digits { queries / 2 + 1 } else { queries + 1 };
        let folded = if channel_scales(format) { tile / BLOCK * row } else { 0 };
        let weights = weight_groups(format) * head_vecs * (tile + 1);
        let group = heads.group_size();
        let scores = match (self.digits, channel_scales(format)) {
            // Digits of queries, a lane's share of two numbers a head, and both for each block.
            (true, folds) => (group * (self.lanes + 1 + tile / BLOCK)).div_ceil(2) + if folds { 1 } else { row },
            (false, _) => head_vecs * self.lanes,
        };
        // Beside them at most as much as a lane's vec4 for reductions.
        let cells = queries + folded.max(weights).max(2 * self.lanes) + scores + 2 * self.lanes + 8;
        u64::from(cells) * CELL_BYTES
    }

    fn constants(&self, format: &Format) -> Vec<(&'static str, u32)> {
        let Self { lanes, tokens, key_loads, value_loads, ahead, digits: _ } = *self;
        let group = format.shape.heads.group_size();
        let (head_vecs, weight_groups) = (group.div_ceil(4), weight_groups(format));
        let span = |side| span(format.codec.side(side).quantizer);
        // Digits of eight channels, of as many as two words of codes have; of 2 bits in four words.
        let digit_vecs = if span(Side::Key) == 8 { 2 } else { 1 };
        let head_units = format.shape.heads.head_dim / (8 * digit_vecs);
        vec![
            ("WORKGROUP_SIZE", lanes),
            ("TOKENS", tokens),
            ("KEY_LOADS", key_loads),
            ("VALUE_LOADS", value_loads),
            ("KEY_IN_FLIGHT", key_loads * tokens),
            ("LANE_SCALES", tokens * weight_groups),
            ("AHEAD", u32::from(ahead)),
            ("KEY_UNITS", span(Side::Key)),
            ("VALUE_UNITS", span(Side::Value)),
            ("HEAD_VECS", head_vecs),
            ("SCORES", group * tokens),
            ("WEIGHT_GROUPS", weight_groups),
            ("WEIGHT_ROWS", weight_groups * head_vecs),
            ("ROTATED_ROWS", group),
            ("DIGIT_VECS", digit_vecs),
            ("DIGIT_QUADS", 2 * digit_vecs),
            ("DIGIT_UNITS", span(Side::Key) / digit_vecs),
            ("LANE_UNITS", head_units.div_ceil(BLOCK / tokens)),
        ]
    }
}

/// Cells of keys, or tokens of values, in 16 bytes.
const fn span(quantizer: Quantizer) -> u32 {
    match quantizer {
        Quantizer::F32 | Quantizer::F16 => 1,
        Quantizer::Fp8 | Quantizer::Int8 => 2,
        Quantizer::Kivi { bits, .. } => 16 / bits,
        Quantizer::Gaussian { bits } => 16 / bits,
    }
}

/// Whether keys are codes in proportion to what they stand for, up to scale and zero point.
const fn has_digits(format: &Format) -> bool {
    matches!(format.codec.k.quantizer, Quantizer::Kivi { .. } | Quantizer::Int8)
}

const fn channel_scales(format: &Format) -> bool {
    matches!(format.codec.k.quantizer, Quantizer::Kivi { .. })
}

/// Groups of channels in which a token's value has scales of its own; one where it has none.
const fn weight_groups(format: &Format) -> u32 {
    match format.codec.v.quantizer {
        Quantizer::Kivi { group, .. } if group < format.shape.heads.head_dim => format.shape.heads.head_dim / group,
        _ => 1,
    }
}

/// A decode kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DecodeSpec {
    /// The cache it reads.
    pub format: Format,
    /// The reductions it uses.
    pub tier: Tier,
    /// How it is launched; a format that this does not serve is read by the general kernel.
    pub tuning: DecodeTuning,
}

impl DecodeSpec {
    /// Tokens of a run at most: a multiple of every page size, long enough that an item's states are a small part of
    /// what it reads, short enough that one long sequence fills a device.
    pub const KV_CHUNK: u32 = 512;

    /// The same as one would write it first, to compare with: for formats whose channels are neither turned nor chosen.
    pub fn plain(&self) -> KernelSpec {
        let lanes = (self.format.shape.heads.head_dim / 8).next_multiple_of(8);
        let kernel = [lanes_module(self.tier), &modules::DECODE_PLAIN];
        self.format.attention_kernel("decode_plain", &[("WORKGROUP_SIZE", lanes)], &kernel)
    }

    /// The kernel.
    pub fn kernel(&self) -> KernelSpec {
        let lanes = lanes_module(self.tier);
        match self.tuning.fitted(&self.format) {
            DecodeTuning::Tiled(tile) => {
                let scores = if tile.digits { &modules::DECODE_DIGITS } else { &modules::DECODE_PRODUCTS };
                let kernel = [lanes, &modules::ROTATE_ROWS, scores, &modules::DECODE_TILED];
                self.format.attention_kernel("decode", &tile.constants(&self.format), &kernel)
            }
            DecodeTuning::General => {
                let head_vecs = self.format.shape.heads.group_size().div_ceil(4);
                let tokens_per_lane = if head_vecs <= 2 { 4 } else { 1 };
                let constants = [("WORKGROUP_SIZE", WORKGROUP_SIZE), ("TOKENS_PER_LANE", tokens_per_lane)];
                self.format.attention_kernel("decode", &constants, &[lanes, &modules::DECODE])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tuning_reads_back_and_bad_ones_are_refused() {
        for text in [
            "general",
            "tiled:64:4:2:8",
            "tiled:32:2:4:8:ahead",
            "tiled:64:2:1:4:ahead:digits",
            "tiled:64:2:1:4:digits",
        ] {
            assert_eq!(text.parse::<DecodeTuning>().map(|t| t.to_string()).as_deref(), Ok(text), "round trip");
        }
        for bad in [
            "",
            "tiled",
            "tiled:64:4:2",
            "tiled:64:4:2:x",
            "tiled:64:4:2:ahead",
            "tiled:1:2:3:4:5",
            "tiled:64:2:1:4:digits:ahead",
            "General",
        ] {
            assert!(bad.parse::<DecodeTuning>().is_err(), "'{bad}'");
        }
    }
}
