//! `rot4`, `rot3`, `rot2`: a rotation per head, then 4, 3 or 2 bits per value with one scale per token; `mean+rot4` and so on
//! take each page's mean out of the keys first.
//!
//! ```text
//! y     = R x       R = H S: fixed signs S, then an orthonormal Hadamard transform H of the head's channels
//! s     = f16 of a(bits) * mean |y| / sqrt(2 / pi)
//! level = (m + c(bits) m^3) s      m = 2 code + 1 - 2^bits: odd, from -(2^bits - 1) to 2^bits - 1
//! code  = that of the nearest level                                         y' = level
//! side  codes (3 bits as planes of 2 and 1), [page_size] f16 scales         bits + 16 / width bits per value
//! ```
//!
//! A rotated vector looks like Gaussian noise whatever its outliers were, so one data-free codebook serves all tokens, and
//! neither token groups nor calibration are needed: `QuaRot` (arXiv:2404.00456) for the rotation of keys after rotary
//! positions, `TurboQuant` (arXiv:2504.19874) for the Lloyd-Max codebook of a Gaussian on rotated coordinates. Queries
//! are rotated once per step, since `q . k = R q . R k`; outputs are rotated back once.
//!
//! Keys of neighbouring tokens share a large part, since the slow rotary pairs hardly turn within a page. With `mean+`
//! the quantiser sees `y - mean`, where `mean` is that of the page's rotated keys in f16, kept in the page (16 / `page_size`
//! more bits per key channel). The page at position 0 keeps mean 0: its first token is an attention sink unlike all
//! others, and a mean that suits the rest spoils it. Measured on SmolLM2-135M that lowers the median divergence by a third
//! at every width.
//!
//! Chosen by measured error: on a unit Gaussian of 64 channels the squared error is 0.116, 0.034 and 0.0097 at 2, 3 and 4
//! bits, where uniform levels of the best step give 0.117, 0.037 and 0.0115, and rounding between each token's minimum
//! and maximum gives 0.2 at 2 bits and needs 16 / width more bits.
//!
//! Deviations. The signs keep a vector of equal channels from becoming one large channel. A cubic stands for the table of
//! levels (it is the table at 2 bits, and costs 2 % more error at 4), because shaders compute faster than they look up.
//! The spread is estimated by the mean magnitude instead of the norm, because a sum of magnitudes is the same on every
//! device; that costs 1 to 3 %. Where `head_dim` is no power of two, H is the product of two transforms, of the first and
//! of the last `P` channels, `P` the largest power of two below it.

use half::f16;

use super::{Quantize, SideShape, plane};

/// `a`: level of `m` = 1 without the cubic, for a unit Gaussian.
const fn unit_level(bits: u32) -> f32 {
    match bits {
        2 => 0.446_65,
        3 => 0.235_21,
        _ => 0.117_81,
    }
}

/// `c * 8192`: how much levels spread towards the ends.
pub const fn cubic(bits: u32) -> u32 {
    match bits {
        2 => 116,
        3 => 51,
        _ => 19,
    }
}

/// 64 times the `k`-th positive edge between levels in units of the scale, a whole number: half-way between the levels of
/// `m = 2 k - 1` and `2 k + 1`.
pub const fn edge(bits: u32, k: u32) -> u32 {
    let (low, high) = (2 * k - 1, 2 * k + 1);
    32 * (low + high) + (cubic(bits) * (low * low * low + high * high * high) + 128) / 256
}

/// `sqrt(2 / pi)`, the mean magnitude of a unit Gaussian.
const MEAN_MAGNITUDE: f32 = 0.797_884_6;

/// What the sum of magnitudes of a token is multiplied with, as shaders are given it.
pub fn scale_factor(bits: u32, width: u32) -> f32 {
    unit_level(bits) / (MEAN_MAGNITUDE * width as f32)
}

/// Whether `S` turns a channel's sign.
pub const fn turns(channel: u32) -> bool {
    let mut x = (channel + 1).wrapping_mul(0x9e37_79b1);
    x ^= x >> 15;
    x.wrapping_mul(0x85eb_ca6b) >> 31 == 1
}

/// Channels of one Hadamard transform: the largest power of two up to `width`.
pub const fn span(width: u32) -> u32 {
    1 << width.ilog2()
}

/// `1 / sqrt(span)` in f32.
pub fn normalisation(width: u32) -> f32 {
    1.0 / (span(width) as f32).sqrt()
}

fn hadamard(x: &mut [f32]) {
    let mut stride = 1;
    while stride < x.len() {
        for pair in x.chunks_exact_mut(2 * stride) {
            let (low, high) = pair.split_at_mut(stride);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        stride *= 2;
    }
    #[expect(clippy::cast_possible_truncation, reason = "channels of a head")]
    let factor = normalisation(x.len() as u32);
    x.iter_mut().for_each(|x| *x *= factor);
}

/// `R x`, in place: additions in the order of the shader, each rounded to f32.
pub fn rotate(x: &mut [f32]) {
    for (channel, x) in (0..).zip(x.iter_mut()) {
        if turns(channel) {
            *x = -*x;
        }
    }
    let (width, span) = (x.len(), 1 << x.len().ilog2());
    hadamard(&mut x[..span]);
    if span < width {
        hadamard(&mut x[width - span..]);
    }
}

/// `R^-1 y`, in place.
pub fn rotate_back(y: &mut [f32]) {
    let (width, span) = (y.len(), 1 << y.len().ilog2());
    if span < width {
        hadamard(&mut y[width - span..]);
    }
    hadamard(&mut y[..span]);
    for (channel, y) in (0..).zip(y.iter_mut()) {
        if turns(channel) {
            *y = -*y;
        }
    }
}

/// Mean of each channel over a page of rotated keys, `[tokens][width]`, in f16; zero for the page at position 0, and where it is
/// no number.
pub fn page_mean(rotated: &[f32], width: u32, first_position: u32) -> Vec<f16> {
    let width = width as usize;
    let factor = 1.0 / (rotated.len() / width) as f32;
    let channel = |c: usize| {
        let mean = f16::from_f32(rotated.chunks_exact(width).fold(0.0_f32, |sum, row| sum + row[c]) * factor);
        if first_position == 0 || !mean.is_finite() { f16::ZERO } else { mean }
    };
    (0..width).map(channel).collect()
}

/// The quantiser of rotated values.
#[derive(Clone, Copy, Debug)]
pub struct Gaussian {
    /// Bits of a code: 4, 3 or 2.
    pub bits: u32,
}

impl Gaussian {
    /// Bits of each plane of a code, lowest first.
    pub const fn planes(&self) -> &'static [u32] {
        match self.bits {
            2 => &[2],
            3 => &[2, 1],
            _ => &[4],
        }
    }

    /// The scale of a token: NaN where a value is not finite.
    fn scale(&self, row: &[f32]) -> f16 {
        let sum = row.iter().fold(0.0, |sum, x| sum + x.abs());
        #[expect(clippy::cast_possible_truncation, reason = "channels of a head")]
        let mean = sum * scale_factor(self.bits, row.len() as u32);
        let scale = f16::from_f32(mean);
        if scale.is_finite() { scale } else { f16::from_bits(0x7e00) }
    }

    /// The code of a value: how many edges between levels are not above it.
    fn code(&self, x: f32, scale: f16) -> u32 {
        if scale.is_nan() {
            return 0;
        }
        // Products of two numbers of 11 bits, exact in f32.
        let unit = scale.to_f32() / 64.0;
        let edge = |k: u32| edge(self.bits, k) as f32 * unit;
        let half = 1 << (self.bits - 1);
        let positive = (1..half).filter(|k| x >= edge(*k)).count();
        let negative = (1..half).filter(|k| x >= -edge(*k)).count();
        u32::try_from(positive + negative).expect("edges are few") + u32::from(x >= 0.0)
    }

    fn value(&self, code: u32, scale: f16) -> f32 {
        let m = (2 * code) as f32 - ((1_u32 << self.bits) - 1) as f32;
        let s = scale.to_f32();
        m * (s + s * (cubic(self.bits) as f32 / 8192.0) * (m * m))
    }
}

impl Quantize for Gaussian {
    fn words(&self, shape: SideShape) -> u32 {
        self.planes().iter().map(|bits| plane::words(shape, *bits)).sum::<u32>() + shape.page_size.div_ceil(8) * 4
    }

    fn encode(&self, shape: SideShape, values: &[f32], mut out: &mut [u32]) {
        let scales: Vec<f16> = values.chunks_exact(shape.width as usize).map(|row| self.scale(row)).collect();
        let mut shift = 0;
        for &bits in self.planes() {
            let (codes, rest) = out.split_at_mut(plane::words(shape, bits) as usize);
            let code = |t, c| self.code(values[shape.index(t, c)], scales[t as usize]) >> shift;
            plane::pack(shape, bits, code, codes);
            shift += bits;
            out = rest;
        }
        for (token, scale) in scales.iter().enumerate() {
            out[token / 2] |= u32::from(scale.to_bits()) << (16 * (token % 2));
        }
    }

    fn decode(&self, shape: SideShape, mut words: &[u32]) -> Vec<f32> {
        let mut codes = vec![0; (shape.page_size * shape.width) as usize];
        let mut shift = 0;
        for &bits in self.planes() {
            let (plane, rest) = words.split_at(plane::words(shape, bits) as usize);
            for token in 0..shape.page_size {
                for channel in 0..shape.width {
                    codes[shape.index(token, channel)] |= plane::unpack(shape, bits, plane, token, channel) << shift;
                }
            }
            shift += bits;
            words = rest;
        }
        let scales: &[u16] = bytemuck::cast_slice(words);
        shape.fill(|t, c| self.value(codes[shape.index(t, c)], f16::from_bits(scales[t as usize])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compression::hidden::Side;

    #[test]
    fn a_rotation_keeps_products_and_can_be_undone() {
        for width in [8, 24, 64, 72, 80, 96, 128, 200, 256] {
            let a: Vec<f32> = (0..width).map(|c| ((c * 37 + 11) % 29) as f32 - 14.0).collect();
            let b: Vec<f32> = (0..width).map(|c| ((c * 17 + 5) % 23) as f32 - 11.0).collect();
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
            let (mut ra, mut rb) = (a.clone(), b.clone());
            rotate(&mut ra);
            rotate(&mut rb);
            assert!((dot(&ra, &rb) - dot(&a, &b)).abs() < 1e-3, "product at width {width}");
            assert!(ra.iter().zip(&a).any(|(r, a)| (r - a).abs() > 1.0), "width {width}: something turned");
            rotate_back(&mut ra);
            assert!(ra.iter().zip(&a).all(|(r, a)| (r - a).abs() < 1e-4), "back at width {width}");
        }
    }

    #[test]
    fn an_outlier_and_a_constant_both_spread() {
        for x in [(0..64).map(|c| if c == 9 { 100.0 } else { 0.0 }).collect(), vec![3.0_f32; 64]] {
            let mut y: Vec<f32> = x;
            let norm = y.iter().map(|x| x * x).sum::<f32>().sqrt();
            rotate(&mut y);
            let top = y.iter().fold(0.0_f32, |top, y| top.max(y.abs()));
            assert!(top < 0.5 * norm, "the largest channel is {top} of a norm of {norm}");
        }
    }

    #[test]
    fn a_gaussian_loses_what_the_codebook_says() {
        // Quantiles of a Gaussian by bisection of its distribution function, in a fixed shuffled order.
        let shape = SideShape { side: Side::Value, page_size: 16, width: 64 };
        let quantile = |p: f64| {
            let (mut low, mut high) = (-6.0_f64, 6.0_f64);
            for _ in 0..60 {
                let middle = (low + high) / 2.0;
                let steps = 400;
                let width = (middle + 8.0) / f64::from(steps);
                let density = |x: f64| (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
                let mass: f64 = (0..steps).map(|i| density(-8.0 + (f64::from(i) + 0.5) * width) * width).sum();
                if mass < p { low = middle } else { high = middle }
            }
            low
        };
        #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is what is wanted")]
        let values: Vec<f32> = (0..1024).map(|i| quantile((f64::from(i * 389 % 1024) + 0.5) / 1024.0) as f32).collect();
        for (bits, expected) in [(2, 0.1165), (3, 0.0345), (4, 0.0097)] {
            let quantizer = Gaussian { bits };
            let mut words = vec![0; quantizer.words(shape) as usize];
            quantizer.encode(shape, &values, &mut words);
            let back = quantizer.decode(shape, &words);
            let squared = |x: &f32| f64::from(*x).powi(2);
            let error: f64 = back.iter().zip(&values).map(|(b, v)| squared(&(b - v))).sum::<f64>();
            let error = error / values.iter().map(squared).sum::<f64>();
            assert!((error / expected - 1.0).abs() < 0.06, "{bits} bits: {error}");
        }
    }
}
