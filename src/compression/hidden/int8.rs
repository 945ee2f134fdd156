//! `int8`: 8 bits per value, one scale and minimum per token and KV head (asymmetric).
//!
//! ```text
//! side  codes: plane of 8 bits, [page_size] words (scale, min) f16        8 + 32 / width bits per value
//! ```
//!
//! Rounding as in [`affine`] with 255 levels. The token-wise scheme is that of `QServe` (arXiv:2405.04532) at 8 bits.
//! Deviation: scale and minimum lie in the page behind the codes.

use super::affine::{self, Affine};
use super::{Quantize, SideShape, plane};

/// Largest code.
pub const LEVELS: u32 = 255;
const BITS: u32 = 8;

/// The `int8` quantiser.
#[derive(Clone, Copy, Debug)]
pub struct Int8;

impl Quantize for Int8 {
    fn words(&self, shape: SideShape) -> u32 {
        plane::words(shape, BITS) + shape.page_size
    }

    fn encode(&self, shape: SideShape, values: &[f32], out: &mut [u32]) {
        let (codes, scales) = out.split_at_mut(plane::words(shape, BITS) as usize);
        let rows: Vec<Affine> =
            values.chunks_exact(shape.width as usize).map(|row| affine::measure(row.iter().copied(), LEVELS)).collect();
        plane::pack(shape, BITS, |t, c| rows[t as usize].code(values[shape.index(t, c)], LEVELS), codes);
        scales.iter_mut().zip(&rows).for_each(|(word, row)| *word = row.word());
    }

    fn decode(&self, shape: SideShape, words: &[u32]) -> Vec<f32> {
        let (codes, scales) = words.split_at(plane::words(shape, BITS) as usize);
        shape.fill(|t, c| Affine::from_word(scales[t as usize]).value(plane::unpack(shape, BITS, codes, t, c)))
    }
}
