//! Where the bits of a code lie: planes of 1, 2, 4 or 8 bits per value.
//!
//! A side of a page (its keys, or its values) is a matrix `[page_size][width]` of codes. Keys are read by lanes that
//! own tokens, values by lanes that own cells of 8 channels; in both a lane loads 16 bytes that it uses whole:
//!
//! ```text
//! keys    [width * bits / 128][page_size] blocks: 128 / bits channels of one token, lowest channel in the lowest bits.
//!         What remains of a token (0 to 3 words) follows as [page_size][words].
//! values  [page_size / tau][width / 8] blocks: 8 channels of tau = 16 / bits tokens, token after token.
//! ```
//!
//! Codes of 3 bits are a plane of 2 bits and a plane of 1 bit, so that no code crosses a word.

use super::{Side, SideShape};

/// Words of a plane: a multiple of 4.
pub const fn words(shape: SideShape, bits: u32) -> u32 {
    match shape.side {
        Side::Key => token_words(shape.width, bits) * shape.page_size,
        Side::Value => shape.page_size * bits / 16 * (shape.width / 8) * 4,
    }
}

/// Words of one token's codes in a plane of keys.
pub const fn token_words(width: u32, bits: u32) -> u32 {
    (width * bits).div_ceil(32)
}

/// Word of the plane, and lowest bit in it, of a code.
pub const fn place(shape: SideShape, bits: u32, token: u32, channel: u32) -> (usize, u32) {
    let (word, shift) = match shape.side {
        Side::Key => {
            let words = token_words(shape.width, bits);
            let whole = words / 4 * 4;
            let word = channel * bits / 32;
            let at = if word < whole {
                (word / 4 * shape.page_size + token) * 4 + word % 4
            } else {
                whole * shape.page_size + token * (words - whole) + (word - whole)
            };
            (at, channel * bits % 32)
        }
        Side::Value => {
            let tau = 16 / bits;
            let block = token / tau * (shape.width / 8) + channel / 8;
            let bit = token % tau * 8 * bits + channel % 8 * bits;
            (block * 4 + bit / 32, bit % 32)
        }
    };
    (word as usize, shift)
}

/// Writes all codes, `[page_size][width]`, into a plane; only the lowest `bits` bits of each.
pub fn pack(shape: SideShape, bits: u32, code: impl Fn(u32, u32) -> u32, plane: &mut [u32]) {
    for token in 0..shape.page_size {
        for channel in 0..shape.width {
            let (word, shift) = place(shape, bits, token, channel);
            plane[word] |= (code(token, channel) & ((1 << bits) - 1)) << shift;
        }
    }
}

/// Reads one code.
pub fn unpack(shape: SideShape, bits: u32, plane: &[u32], token: u32, channel: u32) -> u32 {
    let (word, shift) = place(shape, bits, token, channel);
    plane[word] >> shift & ((1 << bits) - 1)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_code_has_bits_of_its_own() {
        for side in [Side::Key, Side::Value] {
            for width in [8, 40, 64, 72, 80, 96, 128, 256] {
                for bits in [1, 2, 4, 8] {
                    let shape = SideShape { side, page_size: 32, width };
                    let n = words(shape, bits);
                    assert!(n.is_multiple_of(4), "a plane is whole cells");
                    let mut seen = BTreeSet::new();
                    for token in 0..32 {
                        for channel in 0..width {
                            let (word, shift) = place(shape, bits, token, channel);
                            assert!(word < n as usize && shift + bits <= 32, "inside, in one word");
                            assert!(seen.insert((word, shift)), "{side:?} {width} {bits}: ({token}, {channel})");
                        }
                    }
                    if width * bits % 32 == 0 || side == Side::Value {
                        assert_eq!(n * 32, 32 * width * bits, "no bit is unused");
                    }
                }
            }
        }
    }

    #[test]
    fn codes_come_back() {
        let shape = SideShape { side: Side::Value, page_size: 16, width: 24 };
        let code = |t: u32, c: u32| (t * 7 + c * 3) % 16;
        let mut plane = vec![0; words(shape, 4) as usize];
        pack(shape, 4, code, &mut plane);
        assert_eq!(unpack(shape, 4, &plane, 5, 17), code(5, 17), "a value");
        // Token 1 of the first block: its eight channels fill the second word.
        assert_eq!(plane[1], (0..8).fold(0, |w, c| w | code(1, c) << (4 * c)), "the layout that shaders read");
    }
}
