//! `f32`: every value in full, for telling errors of kernels from errors of codecs.
//!
//! ```text
//! keys    [width / 4][page_size][4] f32      values  [page_size][width / 4][4] f32      32 bits per value
//! ```

use super::{Quantize, Side, SideShape};

/// The `f32` quantiser.
#[derive(Clone, Copy, Debug)]
pub struct Float32;

const fn index(shape: SideShape, token: u32, channel: u32) -> usize {
    let cell = match shape.side {
        Side::Key => channel / 4 * shape.page_size + token,
        Side::Value => token * (shape.width / 4) + channel / 4,
    };
    (cell * 4 + channel % 4) as usize
}

impl Quantize for Float32 {
    fn words(&self, shape: SideShape) -> u32 {
        shape.page_size * shape.width
    }

    fn encode(&self, shape: SideShape, values: &[f32], out: &mut [u32]) {
        for token in 0..shape.page_size {
            for channel in 0..shape.width {
                out[index(shape, token, channel)] = values[shape.index(token, channel)].to_bits();
            }
        }
    }

    fn decode(&self, shape: SideShape, words: &[u32]) -> Vec<f32> {
        shape.fill(|t, c| f32::from_bits(words[index(shape, t, c)]))
    }
}
