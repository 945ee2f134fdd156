//! `kivi4`, `kivi2`: 4 or 2 bits, keys per channel over groups of tokens, values per token over groups of channels
//! (KIVI, arXiv:2402.02750, section 3).
//!
//! ```text
//! keys    codes, [page_size / group][width] words (scale, min)                    bits + 32 / group bits per value
//! values  codes, [ceil(width / group)][page_size] words (scale, min)              bits + 32 / group, the last group
//!                                                                                 of channels may be shorter
//! ```
//!
//! Keys have channels of large magnitude at every token, values have not: hence the two directions. Groups of 32 by
//! default; 64 and 128 cost fewer bits. Rounding as in [`affine`].
//!
//! Deviations: the residual window of unquantised tokens is the open page, so between 1 and `page_size` tokens instead
//! of a fixed 128, and keys and values leave it together; keys are quantised after rotary positions, as in the
//! authors' code.

use super::affine::{self, Affine};
use super::{Quantize, Side, SideShape, plane};

/// Group sizes that can be chosen.
pub const GROUPS: [u32; 3] = [32, 64, 128];

/// The KIVI quantiser.
#[derive(Clone, Copy, Debug)]
pub struct Kivi {
    /// Bits of a code: 4 or 2.
    pub bits: u32,
    /// Tokens of a group of keys, channels of a group of values.
    pub group: u32,
}

impl Kivi {
    const fn levels(&self) -> u32 {
        (1 << self.bits) - 1
    }

    /// Index of a value's scale and minimum.
    const fn scale_index(&self, shape: SideShape, token: u32, channel: u32) -> usize {
        let index = match shape.side {
            Side::Key => token / self.group * shape.width + channel,
            Side::Value => channel / self.group * shape.page_size + token,
        };
        index as usize
    }

    const fn scales(&self, shape: SideShape) -> u32 {
        match shape.side {
            Side::Key => shape.page_size / self.group * shape.width,
            Side::Value => shape.width.div_ceil(self.group) * shape.page_size,
        }
    }
}

impl Quantize for Kivi {
    fn words(&self, shape: SideShape) -> u32 {
        plane::words(shape, self.bits) + self.scales(shape)
    }

    fn encode(&self, shape: SideShape, values: &[f32], out: &mut [u32]) {
        let (codes, scales) = out.split_at_mut(plane::words(shape, self.bits) as usize);
        let mut groups: Vec<Vec<f32>> = vec![Vec::new(); scales.len()];
        for token in 0..shape.page_size {
            for channel in 0..shape.width {
                groups[self.scale_index(shape, token, channel)].push(values[shape.index(token, channel)]);
            }
        }
        let groups: Vec<Affine> = groups.iter().map(|g| affine::measure(g.iter().copied(), self.levels())).collect();
        let code = |t, c| groups[self.scale_index(shape, t, c)].code(values[shape.index(t, c)], self.levels());
        plane::pack(shape, self.bits, code, codes);
        scales.iter_mut().zip(&groups).for_each(|(word, group)| *word = group.word());
    }

    fn decode(&self, shape: SideShape, words: &[u32]) -> Vec<f32> {
        let (codes, scales) = words.split_at(plane::words(shape, self.bits) as usize);
        shape.fill(|t, c| {
            let group = Affine::from_word(scales[self.scale_index(shape, t, c)]);
            group.value(plane::unpack(shape, self.bits, codes, t, c))
        })
    }
}
