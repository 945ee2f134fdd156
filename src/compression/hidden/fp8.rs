//! `fp8`: 8 bits as e4m3 without any scale, which is what servers ship (OCP 8-bit floating point, section 5.3).
//!
//! ```text
//! side  codes: plane of 8 bits        sign, 4 bits of exponent (bias 7), 3 bits of mantissa        8 bits per value
//! ```
//!
//! Rounds to nearest even. Finite values beyond 448 become 448, as servers do; infinities and NaN become NaN.

use super::{Quantize, SideShape, plane};

const BITS: u32 = 8;
const NAN: u32 = 0x7f;
/// Bits of 448, the largest number.
const MAX: u32 = 0x7e;

/// The `fp8` quantiser.
#[derive(Clone, Copy, Debug)]
pub struct Fp8;

/// The code of a value.
pub fn code(x: f32) -> u32 {
    let bits = x.to_bits();
    let sign = bits >> 24 & 0x80;
    let magnitude = bits & 0x7fff_ffff;
    if magnitude >= 0x7f80_0000 {
        return sign | NAN;
    }
    // 2^-6 is the smallest normal number; below it a step is 2^-9.
    let code = if magnitude >= 0x3c80_0000 {
        let rebased = magnitude - (120 << 23);
        (rebased + 0x7_ffff + (rebased >> 20 & 1)) >> 20
    } else {
        round_subnormal(magnitude)
    };
    sign | code.min(MAX)
}

/// Multiples of 2^-9, ties to even; 8 is the smallest normal number.
fn round_subnormal(magnitude: u32) -> u32 {
    let steps = f32::from_bits(magnitude) * 512.0;
    let (whole, rest) = (steps.trunc(), steps.fract());
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a number from 0 to 8")]
    let whole = whole as u32;
    whole + u32::from(rest > 0.5 || (rest == 0.5 && whole % 2 == 1))
}

/// The value of a code.
pub fn value(code: u32) -> f32 {
    let (exponent, mantissa) = (code >> 3 & 0xf, code & 7);
    let magnitude = if code & 0x7f == NAN {
        f32::NAN
    } else if exponent == 0 {
        mantissa as f32 / 512.0
    } else {
        f32::from_bits((exponent + 120) << 23 | mantissa << 20)
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

impl Quantize for Fp8 {
    fn words(&self, shape: SideShape) -> u32 {
        plane::words(shape, BITS)
    }

    fn encode(&self, shape: SideShape, values: &[f32], out: &mut [u32]) {
        plane::pack(shape, BITS, |t, c| code(values[shape.index(t, c)]), out);
    }

    fn decode(&self, shape: SideShape, words: &[u32]) -> Vec<f32> {
        shape.fill(|t, c| value(plane::unpack(shape, BITS, words, t, c)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_the_code_of_its_value() {
        for c in 0..=255 {
            let x = value(c);
            assert_eq!(x.is_nan(), c & 0x7f == NAN, "code {c}");
            assert_eq!(code(x) & 0x7f, c & 0x7f, "code {c} is {x}");
            assert!(x.is_nan() || code(x) == c, "sign of code {c}");
        }
    }

    #[test]
    fn rounding_is_to_nearest_even_and_saturates() {
        for c in 0..MAX {
            let (low, high) = (value(c), value(c + 1));
            let middle = (low + high) / 2.0;
            let even = if c % 2 == 0 { c } else { c + 1 };
            assert_eq!(code(middle), even, "between {low} and {high}");
            assert_eq!(code(f32::from_bits(middle.to_bits() - 1)), c, "just below the middle");
            assert_eq!(code(f32::from_bits(middle.to_bits() + 1)), c + 1, "just above the middle");
        }
        assert_eq!((code(464.0), code(65504.0), code(-1e4)), (MAX, MAX, MAX | 0x80), "448 is the end");
        assert_eq!((code(f32::INFINITY), code(f32::NAN) & 0x7f), (NAN, NAN), "not numbers");
    }
}
