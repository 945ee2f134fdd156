//! Asymmetric rounding of a group of f16 values to `0..=levels`, exact on every device.
//!
//! ```text
//! min   = smallest value, as f16                      scale = f16 of (max - min) / levels, rounded so that
//! code  = round((x - min) / scale), ties up                   levels * scale >= max - min
//! x'    = code * scale + min                          |x' - x| <= scale / 2, up to rounding of f32
//! ```
//!
//! Shaders may divide inexactly and may join a product and a sum into one rounding. So nothing here depends on
//! either: a code is settled by comparing `x - min` with odd multiples of `scale / 2`, and every product has factors
//! short enough to be exact in f32. A group of equal values has scale 0 and code 0. A group with an infinity or a NaN has
//! NaN for scale and min and code 0: all of its values decode to NaN.

use half::f16;

/// Scale and minimum of a group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Affine {
    /// Difference between neighbouring codes.
    pub scale: f16,
    /// What code 0 stands for.
    pub min: f16,
}

/// NaN as it is written: half's own bits for a quiet NaN.
const NAN: f16 = f16::from_bits(0x7e00);

/// Scale and minimum of values that are exact in f16.
pub fn measure(values: impl Iterator<Item = f32> + Clone, levels: u32) -> Affine {
    if values.clone().any(|x| !x.is_finite()) {
        return Affine { scale: NAN, min: NAN };
    }
    let min = values.clone().fold(f32::INFINITY, f32::min);
    let range = values.fold(f32::NEG_INFINITY, f32::max) - min;
    let nearest = f16::from_f32(range * reciprocal(levels));
    // One step up where rounding made the range of codes shorter than that of the values.
    let short = nearest.to_f32() * levels as f32 >= range;
    let scale = if short { nearest } else { f16::from_bits(nearest.to_bits() + 1) };
    // No zero has a sign, since devices disagree about the smaller of two zeros.
    let min = if min == 0.0 { f16::ZERO } else { f16::from_f32(min) };
    Affine { scale, min }
}

/// `1 / levels` in f32, the factor that shaders are given.
pub fn reciprocal(levels: u32) -> f32 {
    1.0 / levels as f32
}

impl Affine {
    /// The code of a value.
    pub fn code(&self, x: f32, levels: u32) -> u32 {
        let (scale, min) = (self.scale.to_f32(), self.min.to_f32());
        if scale.is_nan() || scale == 0.0 {
            return 0;
        }
        let (difference, half) = (x - min, scale * 0.5);
        // The largest code whose lower edge is not above the difference.
        let above = |code: u32| difference >= (2 * code - 1) as f32 * half;
        let (mut low, mut high) = (0, levels);
        while low < high {
            let middle = (low + high).div_ceil(2);
            if above(middle) { low = middle } else { high = middle - 1 }
        }
        low
    }

    /// The value of a code.
    pub fn value(&self, code: u32) -> f32 {
        code as f32 * self.scale.to_f32() + self.min.to_f32()
    }

    /// Both numbers in one word, scale in the lower half.
    pub fn word(&self) -> u32 {
        u32::from(self.scale.to_bits()) | u32::from(self.min.to_bits()) << 16
    }

    /// Reads [`Self::word`].
    #[expect(clippy::cast_possible_truncation, reason = "each half of the word is one number")]
    pub const fn from_word(word: u32) -> Self {
        Self { scale: f16::from_bits(word as u16), min: f16::from_bits((word >> 16) as u16) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn no_value_moves_by_more_than_half_a_step(
            bits in proptest::collection::vec(any::<u16>(), 1..40),
            levels in prop::sample::select(vec![3_u32, 15, 255]),
        ) {
            let values: Vec<f32> = bits.iter().map(|b| f16::from_bits(*b).to_f32()).filter(|x| x.is_finite()).collect();
            prop_assume!(!values.is_empty());
            let affine = measure(values.iter().copied(), levels);
            for x in values {
                let code = affine.code(x, levels);
                prop_assert!(code <= levels, "code {}", code);
                let error = (f64::from(affine.value(code)) - f64::from(x)).abs();
                let step = f64::from(affine.scale.to_f32());
                // Beside half a step, the rounding of x - min and of the sum in f32.
                let slack = 1e-7 * (f64::from(x).abs() + 2.0 * f64::from(affine.min.to_f32()).abs());
                prop_assert!(error <= step / 2.0 + slack, "{} became {} with step {}", x, affine.value(code), step);
            }
        }
    }

    #[test]
    fn groups_without_a_range_and_without_numbers() {
        let constant = measure([2.5_f32; 4].into_iter(), 15);
        assert_eq!((constant.scale, constant.code(2.5, 15), constant.value(0)), (f16::ZERO, 0, 2.5), "constant");
        let zeros = measure([0.0_f32, -0.0].into_iter(), 15);
        assert_eq!(zeros.word(), 0, "zero has no sign");
        let poisoned = measure([1.0, f32::INFINITY].into_iter(), 15);
        assert_eq!((poisoned.word(), poisoned.code(1.0, 15)), (0x7e00_7e00, 0), "poison marks the group");
        assert!(poisoned.value(0).is_nan(), "and decodes to NaN");
        assert_eq!(Affine::from_word(poisoned.word()).word(), poisoned.word(), "round trip");
    }
}
