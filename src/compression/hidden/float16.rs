//! `f16`: IEEE half precision, what open pages hold and what a cache is without compression.
//!
//! ```text
//! keys    [width / 8][page_size][8] f16      values  [page_size][width / 8][8] f16      16 bits per value
//! ```
//!
//! In keys, neighbouring tokens lie beside each other, for lanes that own tokens; in values, neighbouring channels do, for
//! lanes that own channels. Encoding rounds to nearest even; decoding is exact.

use half::f16;

use super::{Quantize, Side, SideShape};
use crate::geometry::CELL_CHANNELS;

/// The `f16` quantiser.
#[derive(Clone, Copy, Debug)]
pub struct Float16;

/// Index of a value, in f16 values from the side's start.
pub const fn index(shape: SideShape, token: u32, channel: u32) -> usize {
    let cell = match shape.side {
        Side::Key => channel / CELL_CHANNELS * shape.page_size + token,
        Side::Value => token * (shape.width / CELL_CHANNELS) + channel / CELL_CHANNELS,
    };
    (cell * CELL_CHANNELS + channel % CELL_CHANNELS) as usize
}

impl Quantize for Float16 {
    fn words(&self, shape: SideShape) -> u32 {
        shape.page_size * shape.width / 2
    }

    fn encode(&self, shape: SideShape, values: &[f32], out: &mut [u32]) {
        let halves: &mut [u16] = bytemuck::cast_slice_mut(out);
        // A page that is still open has fewer tokens; its other slots stay as they are.
        for (token, row) in (0..).zip(values.chunks_exact(shape.width as usize)) {
            for (channel, x) in (0..).zip(row) {
                halves[index(shape, token, channel)] = f16::from_f32(*x).to_bits();
            }
        }
    }

    fn decode(&self, shape: SideShape, words: &[u32]) -> Vec<f32> {
        let halves: &[u16] = bytemuck::cast_slice(words);
        shape.fill(|t, c| f16::from_bits(halves[index(shape, t, c)]).to_f32())
    }
}
