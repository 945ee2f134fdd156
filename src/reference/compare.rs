//! How far two results are apart, and how far they may be.
//!
//! Kernel error is measured against the f64 oracle over the same decoded cache, with bounds derived from the arithmetic
//! ([`Tolerance`]); quality is measured between distributions ([`kl_divergence`], [`agree_top1`]) and only reported.

/// Normalised mean squared error, `sum (a - b)^2 / sum b^2`; infinite when any value of `a` is not finite.
///
/// # Panics
/// When the lengths differ or nothing is compared.
pub fn nmse(a: &[f32], reference: &[f64]) -> f64 {
    assert_eq!(a.len(), reference.len(), "compared results should have equal lengths");
    assert!(!a.is_empty(), "an empty comparison would always pass");
    if a.iter().any(|x| !x.is_finite()) {
        return f64::INFINITY;
    }
    let error: f64 = a.iter().zip(reference).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
    let power: f64 = reference.iter().map(|b| b * b).sum();
    if error == 0.0 { 0.0 } else { error / power }
}

/// A bound on the error of one f32 result.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    relative: f64,
}

impl Tolerance {
    /// Unit roundoff of f32.
    const U: f64 = 1.0 / (1 << 24) as f64;

    /// Attention over `n_tokens` tokens of `head_dim` channels whose products `q * k` have root mean square
    /// `product_rms`.
    ///
    /// A score is a sum of `head_dim` such products. Its partial sums grow like a random walk, and each addition rounds
    /// by up to u of the partial sum; the errors add up like a random walk too (Higham, Accuracy and Stability,
    /// section 2.8), to `u * product_rms * head_dim / sqrt(2)`, which the softmax scale divides by `sqrt(head_dim)`.
    /// An absolute error of the score is a relative error of its probability, beside about 8 u for `exp2` and the
    /// joining of stripes and states. The weighted sum of the values adds `sqrt(n_tokens) * u`. All of it multiplies
    /// the sum of `p * |v|`. A factor of 8 covers the tail over the millions of outputs compared.
    pub fn attention(n_tokens: usize, head_dim: u32, product_rms: f64) -> Self {
        let score = product_rms * (f64::from(head_dim) / 2.0).sqrt();
        Self { relative: 8.0 * Self::U * (score + (n_tokens as f64).sqrt() + 8.0) }
    }

    /// Unit roundoff of f16.
    const U16: f64 = 1.0 / (1 << 11) as f64;

    /// Attention whose queries, keys, values and probabilities are rounded to f16 before they are multiplied, with sums in
    /// f32: cooperative matrices.
    ///
    /// Beside the errors of [`Self::attention`], each of the two factors of a product carries up to `U16` of it. Over `head_dim`
    /// independent products that is `sqrt(2 * head_dim) * U16 * product_rms`, which the softmax scale divides by
    /// `sqrt(head_dim)`: an absolute error of the score, and so a relative one of its probability. Probability and value add
    /// `U16` each. Probabilities below 2^-14 are rounded by 2^-25 of the largest, which over a few thousand tokens stays below
    /// `U16`. The factor of 8 covers the tail, and drivers that cut off instead of rounding.
    pub fn attention_f16(n_tokens: usize, head_dim: u32, product_rms: f64) -> Self {
        let rounding = 8.0 * Self::U16 * (2.0_f64.sqrt() * product_rms + 3.0);
        Self { relative: rounding + Self::attention(n_tokens, head_dim, product_rms).relative }
    }

    /// Attention whose queries, with what is folded into them, are rounded to 32,512 steps of their head's largest channel;
    /// keys are multiplied as whole numbers above the smallest of their group, and all else is as in [`Self::attention`].
    ///
    /// The largest channel is at most `sqrt(head_dim)` times the root mean square, and rounding loses `1 / sqrt(12)` of a step in
    /// the mean, so a query carries an error of `sqrt(head_dim / 12) / 32512` of that. What it meets is a key's distance from the
    /// smallest of its group: at most twice the largest key, which for keys spread evenly is `2 sqrt(3)` times their root mean
    /// square. A product's error is then `sqrt(head_dim) / 32512` of `product_rms`; over `head_dim` independent products, and
    /// through the softmax scale, it is the same for the score. The factor of 8 covers the tail.
    pub fn attention_digits(n_tokens: usize, head_dim: u32, product_rms: f64) -> Self {
        let rounding = 8.0 * f64::from(head_dim).sqrt() * product_rms / 32512.0;
        Self { relative: rounding + Self::attention(n_tokens, head_dim, product_rms).relative }
    }

    /// A sum of `n` products.
    pub fn dot(n: usize) -> Self {
        Self { relative: 8.0 * Self::U * ((n as f64).sqrt() + 2.0) }
    }

    /// The same where one factor of each product is rounded to f16, in proportion to the root of the squares of the products.
    pub fn dot_f16(n: usize) -> Self {
        Self { relative: 8.0 * Self::U16 + Self::dot(n).relative }
    }

    /// The largest error of a result, where `scale` is the magnitude that it is in proportion to.
    pub fn bound(&self, scale: f64) -> f64 {
        // The smallest normal f32 keeps results that should be zero comparable.
        self.relative * scale + f64::from(f32::MIN_POSITIVE)
    }

    /// The largest `error / bound` over all results, where `scale` is the magnitude that each bound multiplies;
    /// above 1 is a failure. Infinite when any result is not finite.
    ///
    /// # Panics
    /// When the lengths differ or nothing is compared.
    pub fn worst(&self, results: &[f32], reference: &[f64], scale: &[f64]) -> f64 {
        assert!(results.len() == reference.len() && results.len() == scale.len(), "lengths should be equal");
        assert!(!results.is_empty(), "an empty comparison would always pass");
        results.iter().zip(reference.iter().zip(scale)).fold(0.0, |worst, (a, (b, scale))| {
            if !a.is_finite() {
                return f64::INFINITY;
            }
            f64::max(worst, (f64::from(*a) - b).abs() / self.bound(*scale))
        })
    }
}

/// `ln sum exp(logits)`.
pub fn log_sum_exp(logits: &[f64]) -> f64 {
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    top + logits.iter().map(|x| (x - top).exp()).sum::<f64>().ln()
}

/// Kullback-Leibler divergence `KL(p || q)` in nats between two rows of logits.
///
/// # Panics
/// When the lengths differ or are zero.
pub fn kl_divergence(p_logits: &[f64], q_logits: &[f64]) -> f64 {
    assert_eq!(p_logits.len(), q_logits.len(), "both should cover the same vocabulary");
    assert!(!p_logits.is_empty(), "an empty comparison would always pass");
    let (p_total, q_total) = (log_sum_exp(p_logits), log_sum_exp(q_logits));
    let terms = p_logits.iter().zip(q_logits).map(|(p, q)| {
        let log_p = p - p_total;
        log_p.exp() * (log_p - (q - q_total))
    });
    terms.sum::<f64>().max(0.0)
}

/// Index of the largest value, the first among equals.
pub fn argmax(values: &[f64]) -> usize {
    let mut best = 0;
    for (i, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = i;
        }
    }
    best
}

/// Whether both rows have their largest value at the same place.
pub fn agree_top1(a: &[f64], b: &[f64]) -> bool {
    argmax(a) == argmax(b)
}

/// f32 values as f64.
pub fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|x| f64::from(*x)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nmse_sees_small_errors_and_no_numbers() {
        assert_eq!(nmse(&[1.0, 2.0], &[1.0, 2.0]), 0.0, "equal");
        assert!((nmse(&[1.1, 2.0], &[1.0, 2.0]) - 0.002).abs() < 1e-6, "0.1^2 / 5");
        assert_eq!(nmse(&[f32::NAN, 2.0], &[1.0, 2.0]), f64::INFINITY, "poison is an error");
        assert_eq!(nmse(&[1.0], &[0.0]), f64::INFINITY, "anything against zero");
    }

    #[test]
    fn a_tolerance_fails_just_outside_its_bound() {
        let tolerance = Tolerance::attention(100, 64, 1.0);
        let bound = tolerance.relative;
        let inside = tolerance.worst(&[1.0], &[1.0 + 0.9 * bound], &[1.0]);
        let outside = tolerance.worst(&[1.0], &[1.0 + 1.1 * bound], &[1.0]);
        assert!(inside < 1.0 && outside > 1.0, "{inside} and {outside}");
        assert_eq!(tolerance.worst(&[f32::NAN], &[1.0], &[1.0]), f64::INFINITY, "poison is an error");
        assert!(bound < 2e-5, "the bound should stay tight: {bound:e}");
    }

    #[test]
    fn rounding_operands_to_f16_widens_the_bound_and_no_further() {
        let (plain, rounded) = (Tolerance::attention(100, 64, 1.0), Tolerance::attention_f16(100, 64, 1.0));
        assert!(rounded.relative > 100.0 * plain.relative && rounded.relative < 0.02, "{:e}", rounded.relative);
    }

    #[test]
    fn queries_in_digits_are_nearer_than_operands_in_f16() {
        let [plain, digits, half] = [Tolerance::attention, Tolerance::attention_digits, Tolerance::attention_f16]
            .map(|tolerance| tolerance(100, 128, 4.0 / 3.0).relative);
        assert!(plain < digits && digits < half / 4.0, "{plain:e}, {digits:e}, {half:e}");
    }

    #[test]
    fn divergence_is_zero_only_for_equal_distributions() {
        let p = [0.0, 1.0, 2.0];
        assert_eq!(kl_divergence(&p, &p), 0.0, "equal");
        assert!(kl_divergence(&p, &[1.0, 2.0, 3.0]) < 1e-15, "a shift changes nothing");
        // Two-way by hand: p = (1/2, 1/2), q = (1/4, 3/4).
        let expected = 0.5 * (2.0_f64).ln() + 0.5 * (2.0_f64 / 3.0).ln();
        assert!((kl_divergence(&[0.0, 0.0], &[0.0, 3.0_f64.ln()]) - expected).abs() < 1e-12, "by hand");
        assert!(agree_top1(&p, &[0.0, 0.0, 0.1]) && !agree_top1(&p, &[9.0, 0.0, 0.1]), "top-1");
    }
}
