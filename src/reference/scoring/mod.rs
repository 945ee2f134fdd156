//! What the tokens of one list (layer, KV head) are worth, in f64: the oracle of every
//! [`Score`](crate::compression::token::Score).
//!
//! | score | here |
//! |---|---|
//! | `Attention` | [`attention`] |
//! | `Reconstruction` | [`reconstruction`] |
//! | `KeyDifference`, `KeyNorm` | [`key_difference`], [`key_norm`] |
//! | `Expected` | [`expected()`], over [`QueryStatistics`] |
//! | `Random` | exact: [`random::score`](crate::compression::token::random::score) |
//!
//! [`Scores::pooled`] and [`Scores::mean`] are the rest of a rule; what stays of the scores is
//! [`select`](crate::compression::keep::select).
//!
//! ```
//! use concertina::compression::token::Reduce;
//! use concertina::reference::scoring::{List, Queries, attention};
//! // Two tokens, one row that sees both and does not care: half of its attention each.
//! let list = List { head_dim: 2, k: &[1.0, 0.0, 0.0, 1.0], v: &[0.0; 4] };
//! let queries = Queries { group_size: 1, q: &[0.0, 0.0], visible: &[2] };
//! assert_eq!(attention(&list, &queries, Reduce::Mean).scores, [0.5, 0.5]);
//! ```

mod expected;
mod keys;

pub use expected::{Future, QueryStatistics, expected};
pub use keys::{key_difference, key_norm};

use crate::compression::token::Reduce;

/// The decoded tokens of a list.
#[derive(Clone, Copy, Debug)]
pub struct List<'a> {
    /// Channels of a head.
    pub head_dim: u32,
    /// Keys, `[tokens][head_dim]`.
    pub k: &'a [f32],
    /// Values, `[tokens][head_dim]`.
    pub v: &'a [f32],
}

impl<'a> List<'a> {
    /// The key of each token.
    fn keys(&self) -> std::slice::ChunksExact<'a, f32> {
        self.k.chunks_exact(self.head_dim as usize)
    }
}

/// The query rows of the heads that read a list.
#[derive(Clone, Copy, Debug)]
pub struct Queries<'a> {
    /// Query heads of the KV head.
    pub group_size: u32,
    /// Queries, `[rows][group_size][head_dim]`.
    pub q: &'a [f32],
    /// Tokens from the list's start that each row sees.
    pub visible: &'a [u32],
}

/// A number per token.
#[derive(Clone, Debug, PartialEq)]
pub struct Scores {
    /// What the tokens are worth.
    pub scores: Vec<f64>,
    /// How far each score moves, to first order, when every term of every sum in it moves by a part of itself, over that
    /// part. Times the roundings in a row and the unit roundoff, it bounds an error.
    pub absolute: Vec<f64>,
}

impl Scores {
    fn zeros(n_tokens: usize) -> Self {
        Self { scores: vec![0.0; n_tokens], absolute: vec![0.0; n_tokens] }
    }

    /// `f(own, other)` of scores and absolute values.
    fn zip(&mut self, other: &Self, f: impl Fn(f64, f64) -> f64) {
        self.scores.iter_mut().zip(&other.scores).for_each(|(own, other)| *own = f(*own, *other));
        self.absolute.iter_mut().zip(&other.absolute).for_each(|(own, other)| *own = f(*own, *other));
    }

    fn scale(&mut self, factor: f64) {
        self.scores.iter_mut().chain(&mut self.absolute).for_each(|x| *x *= factor);
    }

    /// The mean over `kernel` tokens, this one in the middle; beyond the ends there are zeros, which count.
    ///
    /// # Panics
    /// When `kernel` is even.
    pub fn pooled(&self, kernel: u32) -> Self {
        assert!(kernel % 2 == 1, "a kernel of {kernel} has no middle");
        let half = kernel as usize / 2;
        let pool = |values: &[f64]| {
            let window = |i: usize| &values[i.saturating_sub(half)..(i + half + 1).min(values.len())];
            (0..values.len()).map(|i| window(i).iter().sum::<f64>() / f64::from(kernel)).collect()
        };
        Self { scores: pool(&self.scores), absolute: pool(&self.absolute) }
    }

    /// The mean over lists: what all of a layer's lists go by under
    /// [`Share::Layer`](crate::compression::token::Share::Layer).
    ///
    /// # Panics
    /// Without lists, or when they differ in length.
    pub fn mean(lists: &[Self]) -> Self {
        let n_tokens = lists[0].scores.len();
        assert!(lists.iter().all(|list| list.scores.len() == n_tokens), "lists should have equal lengths");
        let mut mean = Self::zeros(n_tokens);
        lists.iter().for_each(|list| mean.zip(list, |a, b| a + b));
        mean.scale(1.0 / lists.len() as f64);
        mean
    }
}

/// A sum, and that of the magnitudes of its terms.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    value: f64,
    absolute: f64,
}

impl Sum {
    fn of(terms: impl Iterator<Item = f64>) -> Self {
        terms.fold(Self::default(), |sum, term| Self { value: sum.value + term, absolute: sum.absolute + term.abs() })
    }
}

/// Softmax over the logits; other tokens, up to `n_tokens`, get 0.
fn softmax(logits: &[Sum], n_tokens: usize) -> Scores {
    let top = logits.iter().map(|logit| logit.value).fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = logits.iter().map(|logit| (logit.value - top).exp()).sum();
    let p: Vec<f64> = logits.iter().map(|logit| (logit.value - top).exp() / total).collect();
    // d p[i] = p[i] (d logit[i] - sum_j p[j] d logit[j])
    let mean: f64 = logits.iter().zip(&p).map(|(logit, p)| logit.absolute * p).sum();
    let mut scores = Scores::zeros(n_tokens);
    for (i, (logit, p)) in logits.iter().zip(p).enumerate() {
        scores.scores[i] = p;
        scores.absolute[i] = p * (1.0 + logit.absolute + mean);
    }
    scores
}

/// Attention probabilities of each row and, within it, each query head.
fn probabilities(list: &List<'_>, queries: &Queries<'_>) -> Vec<Vec<Scores>> {
    let width = list.head_dim as usize;
    let n_tokens = list.keys().len();
    let per_row = queries.group_size as usize * width;
    assert_eq!(queries.q.len(), queries.visible.len() * per_row, "every row should say how much it sees");
    let scale = f64::from(list.head_dim).sqrt();
    let head = |q: &[f32], visible: u32| {
        assert!(visible as usize <= n_tokens, "a row sees {visible} of {n_tokens} tokens");
        let product = |key: &[f32]| Sum::of(q.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k) / scale));
        let logits: Vec<Sum> = list.keys().take(visible as usize).map(product).collect();
        softmax(&logits, n_tokens)
    };
    let rows = queries.q.chunks_exact(per_row).zip(queries.visible);
    rows.map(|(row, visible)| row.chunks_exact(width).map(|q| head(q, *visible)).collect()).collect()
}

/// The larger of both.
fn largest(mut a: Scores, b: &Scores) -> Scores {
    a.zip(b, f64::max);
    a
}

/// `score[t] = sum over rows of (mean | max over query heads) of softmax over what the row sees of (q k / sqrt(d))[t]`.
///
/// # Panics
/// When a shape does not fit.
pub fn attention(list: &List<'_>, queries: &Queries<'_>, reduce: Reduce) -> Scores {
    let mut sum = Scores::zeros(list.keys().len());
    for heads in probabilities(list, queries) {
        let row = match reduce {
            Reduce::Mean => Scores::mean(&heads),
            Reduce::Max => heads.iter().fold(Scores::zeros(sum.scores.len()), largest),
        };
        sum.zip(&row, |a, b| a + b);
    }
    sum
}

/// `score[t] = max over rows and query heads of softmax over what the row sees of (q k / sqrt(d))[t]`.
///
/// # Panics
/// When a shape does not fit.
pub fn reconstruction(list: &List<'_>, queries: &Queries<'_>) -> Scores {
    let none = Scores::zeros(list.keys().len());
    probabilities(list, queries).iter().flatten().fold(none, largest)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One channel; keys are logarithms, so that a query of 1 gives the numbers themselves as weights.
    fn keys(weights: &[f32]) -> Vec<f32> {
        weights.iter().map(|w| w.ln()).collect()
    }

    #[track_caller]
    fn close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len(), "lengths");
        for (a, b) in found.iter().zip(expected) {
            assert!((a - b).abs() < 1e-7, "{found:?} should be {expected:?}");
        }
    }

    #[test]
    fn attention_is_summed_over_rows_and_joined_over_heads() {
        let k = keys(&[1.0, 3.0, 4.0]);
        let list = List { head_dim: 1, k: &k, v: &[0.0; 3] };
        // Two rows of two heads: the first head sees weights, the second does not care. The first row sees two tokens.
        let queries = Queries { group_size: 2, q: &[1.0, 0.0, 1.0, 0.0], visible: &[2, 3] };
        let (third, eighth) = (1.0 / 3.0, 1.0 / 8.0);
        let mean = attention(&list, &queries, Reduce::Mean);
        close(
            &mean.scores,
            &[(0.25 + 0.5 + eighth + third) / 2.0, (0.75 + 0.5 + 3.0 * eighth + third) / 2.0, (0.5 + third) / 2.0],
        );
        let max = attention(&list, &queries, Reduce::Max);
        close(&max.scores, &[0.5 + third, 0.75 + 3.0 * eighth, 0.5]);
        let repeated = reconstruction(&list, &queries);
        close(&repeated.scores, &[0.5, 0.75, 0.5]);
        assert!(mean.absolute.iter().zip(&mean.scores).all(|(a, s)| a > s), "a sum moves by more than itself");
        let none = attention(&list, &Queries { group_size: 2, q: &[], visible: &[] }, Reduce::Mean);
        assert_eq!(none.scores, [0.0; 3], "no rows");
        let blind = reconstruction(&list, &Queries { group_size: 1, q: &[1.0], visible: &[0] });
        assert_eq!(blind.scores, [0.0; 3], "a row that sees nothing");
    }

    #[test]
    fn logits_are_scaled_by_the_root_of_the_width() {
        // Products of 0 and 2 ln 2, over sqrt(4): weights of 1 and 2.
        let k = [0.0, 0.0, 0.0, 0.0, 2.0_f32.ln(), 0.0, 2.0_f32.ln(), 0.0];
        let list = List { head_dim: 4, k: &k, v: &[0.0; 8] };
        let scores = attention(&list, &Queries { group_size: 1, q: &[1.0; 4], visible: &[2] }, Reduce::Mean);
        close(&scores.scores, &[1.0 / 3.0, 2.0 / 3.0]);
        // The second key's terms are ln 2 / 2 twice; the mean over tokens is two thirds of that.
        let ln2 = std::f64::consts::LN_2;
        close(&scores.absolute, &[(1.0 + 2.0 / 3.0 * ln2) / 3.0, 2.0 / 3.0 * (1.0 + ln2 + 2.0 / 3.0 * ln2)]);
    }

    #[test]
    fn scores_are_pooled_over_tokens_and_joined_over_lists() {
        let scores = Scores { scores: vec![3.0, 6.0, 0.0, 9.0], absolute: vec![3.0; 4] };
        close(&scores.pooled(3).scores, &[3.0, 3.0, 5.0, 3.0]);
        close(&scores.pooled(3).absolute, &[2.0, 3.0, 3.0, 2.0]);
        close(&scores.pooled(9).scores, &[2.0; 4]);
        assert_eq!(scores.pooled(1), scores, "no pooling");
        assert_eq!(Scores::zeros(0).pooled(3), Scores::zeros(0), "no tokens");
        let other = Scores { scores: vec![1.0; 4], absolute: vec![1.0; 4] };
        close(&Scores::mean(&[scores, other]).scores, &[2.0, 3.5, 0.5, 5.0]);
    }

    #[test]
    fn an_error_stays_within_the_bound() {
        // Every key moves by one part in 10^5; scores should move by no more than their absolute says.
        let part = 1e-5_f32;
        let k: Vec<f32> = (0..40).map(|i| ((i * 37 % 23) as f32 - 11.0) / 4.0).collect();
        let q: Vec<f32> = (0..16).map(|i| ((i * 29 % 17) as f32 - 8.0) / 4.0).collect();
        let moved: Vec<f32> =
            (0..).zip(&k).map(|(i, k)| k * if i % 3 == 0 { 1.0 + part } else { 1.0 - part }).collect();
        let (list, queries) =
            (List { head_dim: 4, k: &k, v: &[0.0; 40] }, Queries { group_size: 2, q: &q, visible: &[7, 10] });
        let near = List { k: &moved, ..list };
        for (a, b) in [
            (attention(&list, &queries, Reduce::Mean), attention(&near, &queries, Reduce::Mean)),
            (attention(&list, &queries, Reduce::Max), attention(&near, &queries, Reduce::Max)),
            (reconstruction(&list, &queries), reconstruction(&near, &queries)),
            (key_difference(&list), key_difference(&near)),
            (key_norm(&list), key_norm(&near)),
        ] {
            for ((x, y), absolute) in a.scores.iter().zip(&b.scores).zip(&a.absolute) {
                // f32 rounds the keys that moved.
                assert!((x - y).abs() <= absolute * f64::from(part) * 1.02, "{x} and {y}, {absolute}");
            }
        }
    }
}
