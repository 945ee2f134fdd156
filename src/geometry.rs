//! Sizes and shapes: the numbers every other room computes with.
//!
//! Nothing here knows about a GPU, a file or a policy. All byte arithmetic of the project starts from
//! [`ModelGeometry`] and [`PageGeometry`], so that the pool, the kernels, the theory and the reports can
//! not disagree about how large a cache is.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Sub, SubAssign};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Bytes of one f16 value.
pub const F16_BYTES: u64 = 2;
/// Bytes of one f32 or u32 value.
pub const WORD_BYTES: u64 = 4;
/// Bytes that one lane loads at once; every page region is aligned to it.
pub const CELL_BYTES: u64 = 16;
/// Channels in one 16-byte cell of f16 values.
pub const CELL_CHANNELS: u32 = 8;
/// Query heads that can share a KV head.
pub const GROUP_SIZE_MAX: u32 = 32;
/// Channels that the query heads of one KV head can have together: what attention keeps of them, and of a tile of
/// scores, fits in 32 KiB of workgroup memory.
pub const GROUP_WIDTH_MAX: u32 = 2048;

/// A number of bytes.
///
/// Prints in binary units (`48.00 MiB`) and parses both families: `48MiB` is 48 * 2^20, `48MB` is 48 * 10^6.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// No bytes.
    pub const ZERO: Self = Self(0);

    /// `n` binary megabytes.
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// Rounded up to a multiple of `alignment` bytes.
    pub const fn align_up(self, alignment: u64) -> Self {
        Self(self.0.div_ceil(alignment) * alignment)
    }

    /// `self - other`, or zero where `other` is larger.
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl Add for Bytes {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl AddAssign for Bytes {
    fn add_assign(&mut self, other: Self) {
        self.0 += other.0;
    }
}

impl Sub for Bytes {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self(self.0 - other.0)
    }
}

impl SubAssign for Bytes {
    fn sub_assign(&mut self, other: Self) {
        self.0 -= other.0;
    }
}

impl Sum for Bytes {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        Self(iter.map(|b| b.0).sum())
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self.0 {
            n if n >= 1 << 30 => format!("{:.2} GiB", n as f64 / (1u64 << 30) as f64),
            n if n >= 1 << 20 => format!("{:.2} MiB", n as f64 / (1u64 << 20) as f64),
            n if n >= 1 << 10 => format!("{:.1} KiB", n as f64 / 1024.0),
            n => format!("{n} B"),
        };
        f.pad(&text)
    }
}

/// A byte count that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a size in bytes; write a number and a unit, such as 48MiB, 1.5GiB, 200MB or 4096")]
pub struct ParseBytesError(String);

impl FromStr for Bytes {
    type Err = ParseBytesError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseBytesError(text.to_owned());
        let trimmed = text.trim();
        let split = trimmed.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(split);
        let value: f64 = number.parse().map_err(|_| error())?;
        let scale: u64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "kib" | "k" => 1 << 10,
            "mib" | "m" => 1 << 20,
            "gib" | "g" => 1 << 30,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            _ => return Err(error()),
        };
        let bytes = value * scale as f64;
        if !bytes.is_finite() || bytes < 0.0 || bytes >= u64::MAX as f64 {
            return Err(error());
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "range checked above")]
        Ok(Self(bytes as u64))
    }
}

/// Attention heads of one layer.
///
/// `num_qo_heads` query heads share `num_kv_heads` key/value heads in groups of [`Self::group_size`]: query head
/// `h` reads KV head `h / group_size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HeadGeometry {
    /// Query (and output) heads.
    pub num_qo_heads: u32,
    /// Key/value heads.
    pub num_kv_heads: u32,
    /// Channels of one head.
    pub head_dim: u32,
}

impl HeadGeometry {
    /// Query heads per KV head.
    pub const fn group_size(&self) -> u32 {
        self.num_qo_heads / self.num_kv_heads
    }

    /// Width of a query or output row: `num_qo_heads * head_dim`.
    pub const fn q_width(&self) -> u32 {
        self.num_qo_heads * self.head_dim
    }

    /// Width of a key or value row: `num_kv_heads * head_dim`.
    pub const fn kv_width(&self) -> u32 {
        self.num_kv_heads * self.head_dim
    }

    /// The softmax scale, `1 / sqrt(head_dim)`.
    pub fn sm_scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Checks what the kernels rely on.
    ///
    /// # Errors
    /// A sentence with the numbers when heads do not divide, `head_dim` is not a multiple of 8 up to 256, or the query
    /// heads of a group together are wider than the kernels' workgroup memory holds.
    pub fn check(&self) -> Result<(), String> {
        let Self { num_qo_heads, num_kv_heads, head_dim } = *self;
        if num_kv_heads == 0 || num_qo_heads == 0 || num_qo_heads % num_kv_heads != 0 {
            return Err(format!("{num_qo_heads} query heads can not share {num_kv_heads} KV heads evenly"));
        }
        if head_dim == 0 || head_dim % CELL_CHANNELS != 0 || head_dim > 256 {
            return Err(format!("head_dim {head_dim} is not a multiple of {CELL_CHANNELS} between 8 and 256"));
        }
        let group_size = self.group_size();
        let width = u64::from(group_size) * u64::from(head_dim);
        if group_size > GROUP_SIZE_MAX || width > u64::from(GROUP_WIDTH_MAX) {
            return Err(format!(
                "{group_size} query heads of {head_dim} channels share a KV head ({width} channels); at most \
                 {GROUP_SIZE_MAX} heads and {GROUP_WIDTH_MAX} channels are supported"
            ));
        }
        Ok(())
    }
}

/// The shape of a decoder-only transformer with rotary positions, RMS norms and a gated feed-forward layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelGeometry {
    /// Transformer layers.
    pub num_layers: u32,
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Width of the gated feed-forward layer.
    pub intermediate_size: u32,
    /// Attention heads.
    pub heads: HeadGeometry,
    /// Rows of the embedding.
    pub vocab_size: u32,
    /// Longest trained context, in tokens.
    pub context_length: u32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Added to the mean square in RMS norm.
    pub rms_norm_eps: f32,
}

impl ModelGeometry {
    /// Lists `(layer, KV head)` pairs, each of which owns a page list: `num_layers * num_kv_heads`.
    pub const fn num_lists(&self) -> u32 {
        self.num_layers * self.heads.num_kv_heads
    }

    /// Checks what the forward pass relies on.
    ///
    /// # Errors
    /// A sentence with the numbers.
    pub fn check(&self) -> Result<(), String> {
        self.heads.check()?;
        for (name, value) in [
            ("num_layers", self.num_layers),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("vocab_size", self.vocab_size),
            ("context_length", self.context_length),
        ] {
            if value == 0 || value > 1 << 24 {
                return Err(format!("{name} is {value}; expected 1 to {}", 1 << 24));
            }
        }
        for (name, value) in [("hidden_size", self.hidden_size), ("intermediate_size", self.intermediate_size)] {
            if value % CELL_CHANNELS != 0 {
                return Err(format!("{name} {value} is not a multiple of {CELL_CHANNELS}"));
            }
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            return Err(format!("rope_theta {} is not a positive number", self.rope_theta));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            return Err(format!("rms_norm_eps {} is not a number of at least 0", self.rms_norm_eps));
        }
        Ok(())
    }
}

/// One page: `page_size` tokens of one `(layer, KV head)`, keys first, then values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PageGeometry {
    /// Tokens of one page.
    pub page_size: u32,
    /// Channels of a head.
    pub head_dim: u32,
}

impl PageGeometry {
    /// Pages that hold `n_tokens` tokens of one `(layer, KV head)`.
    pub const fn pages_for(&self, n_tokens: u32) -> u32 {
        n_tokens.div_ceil(self.page_size)
    }

    /// Elements of K (or of V) in one page.
    pub const fn elements(&self) -> u64 {
        self.page_size as u64 * self.head_dim as u64
    }
}

/// Yi-34B-200K, the running example of arXiv:2405.08944, for tests of several rooms.
#[cfg(test)]
pub(crate) fn yi_34b() -> ModelGeometry {
    ModelGeometry {
        num_layers: 60,
        hidden_size: 7168,
        intermediate_size: 20480,
        heads: HeadGeometry { num_qo_heads: 56, num_kv_heads: 8, head_dim: 128 },
        vocab_size: 64000,
        context_length: 200_000,
        rope_theta: 5e6,
        rms_norm_eps: 1e-5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_in_both_unit_families() {
        assert_eq!("48MiB".parse(), Ok(Bytes::mib(48)), "binary");
        assert_eq!("48 MB".parse(), Ok(Bytes(48_000_000)), "decimal");
        assert_eq!("1.5GiB".parse(), Ok(Bytes(3 << 29)), "fraction");
        assert_eq!("4096".parse(), Ok(Bytes(4096)), "plain");
        for bad in ["", "MiB", "-3MiB", "4 parsecs", "1e400", "1..2"] {
            assert!(bad.parse::<Bytes>().is_err(), "{bad} should be refused");
        }
    }

    #[test]
    fn a_shape_that_no_model_has_is_refused() {
        let yi = yi_34b();
        assert_eq!(yi.check(), Ok(()), "a real model passes");
        assert_eq!(yi.num_lists(), 480, "a page list per layer and KV head");
        assert!(ModelGeometry { hidden_size: 7, ..yi.clone() }.check().is_err(), "not a multiple of 8");
        assert!(ModelGeometry { num_layers: 0, ..yi.clone() }.check().is_err(), "no layers");
        assert!(ModelGeometry { rope_theta: f32::NAN, ..yi }.check().is_err(), "not a number");
    }

    #[test]
    fn heads_that_do_not_divide_are_refused() {
        let odd = HeadGeometry { num_qo_heads: 9, num_kv_heads: 2, head_dim: 64 };
        assert!(odd.check().is_err(), "9 heads on 2");
        let ragged = HeadGeometry { num_qo_heads: 8, num_kv_heads: 2, head_dim: 20 };
        assert!(ragged.check().is_err(), "head_dim 20");
        let group = |num_qo_heads, head_dim| HeadGeometry { num_qo_heads, num_kv_heads: 1, head_dim }.check();
        assert!(group(32, 64).is_ok() && group(16, 128).is_ok() && group(8, 256).is_ok(), "2048 channels");
        assert!(group(33, 8).is_err() && group(17, 128).is_err() && group(9, 256).is_err(), "too many");
    }
}
