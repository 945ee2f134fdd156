//! Expected attention (arXiv:2510.00636, section 3), as `compression/token/expected.rs` writes it down.

use super::{List, Scores, Sum, softmax};

/// Mean and covariance of the queries of one query head, before rotary positions.
#[derive(Clone, Debug, PartialEq)]
pub struct QueryStatistics {
    /// `[head_dim]`.
    pub mean: Vec<f64>,
    /// `[head_dim][head_dim]`, over all rows: divided by their number.
    pub covariance: Vec<f64>,
}

impl QueryStatistics {
    /// Those of queries `[rows][group_size][head_dim]` per query head, without the first `n_skip` rows; zeros when none
    /// is left.
    pub fn of(q: &[f32], group_size: u32, head_dim: u32, n_skip: usize) -> Vec<Self> {
        let (group_size, width) = (group_size as usize, head_dim as usize);
        let of_head = |head: usize| {
            let rows = q.chunks_exact(group_size * width).skip(n_skip);
            let rows: Vec<&[f32]> = rows.map(|row| &row[head * width..(head + 1) * width]).collect();
            let n = rows.len().max(1) as f64;
            let mean: Vec<f64> =
                (0..width).map(|c| rows.iter().map(|row| f64::from(row[c])).sum::<f64>() / n).collect();
            let covariance = (0..width * width).map(|i| {
                let (a, b) = (i / width, i % width);
                rows.iter().map(|row| (f64::from(row[a]) - mean[a]) * (f64::from(row[b]) - mean[b])).sum::<f64>() / n
            });
            Self { covariance: covariance.collect(), mean }
        };
        (0..group_size).map(of_head).collect()
    }
}

/// The positions that queries are expected at.
#[derive(Clone, Copy, Debug)]
pub struct Future {
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Position of the next token.
    pub next: u32,
    /// How many from there on.
    pub count: u32,
}

impl Future {
    /// Mean cosine and sine of the angles `position * theta^(-2 i / d)` of each pair of channels (2 i, 2 i + 1).
    fn rotation(&self, head_dim: u32) -> Vec<(f64, f64)> {
        let pair = |i: u32| {
            let frequency = f64::from(self.rope_theta).powf(-2.0 * f64::from(i) / f64::from(head_dim));
            let angles = (0..self.count).map(|ahead| (f64::from(self.next) + f64::from(ahead)) * frequency);
            let (cos, sin) = angles.fold((0.0, 0.0), |(cos, sin), a| (cos + a.cos(), sin + a.sin()));
            (cos / f64::from(self.count), sin / f64::from(self.count))
        };
        (0..head_dim / 2).map(pair).collect()
    }
}

/// Every pair of a vector turned, and shortened where angles differ.
fn turn(x: &[Sum], rotation: &[(f64, f64)]) -> Vec<Sum> {
    let turned = x.chunks_exact(2).zip(rotation).flat_map(|(pair, (cos, sin))| {
        let (a, b) = (pair[0], pair[1]);
        let bound = |cos: f64, sin: f64| a.absolute * cos.abs() + b.absolute * sin.abs();
        [
            Sum { value: a.value * cos - b.value * sin, absolute: bound(*cos, *sin) },
            Sum { value: a.value * sin + b.value * cos, absolute: bound(*sin, *cos) },
        ]
    });
    turned.collect()
}

fn transposed(matrix: &[Sum], width: usize) -> Vec<Sum> {
    (0..width * width).map(|i| matrix[i % width * width + i / width]).collect()
}

/// `score[t] = |v[t]| * mean over query heads of softmax_t(mu' k[t] / sqrt(d) + k[t]^T S' k[t] / (2 d))`, where `mu'` and
/// `S'` are turned to the mean of the future positions. The first `n_skip` tokens take no part in the softmax and score 0;
/// a rule keeps them anyway.
///
/// # Panics
/// When a shape does not fit, or the future has no positions.
pub fn expected(list: &List<'_>, statistics: &[QueryStatistics], future: Future, n_skip: usize) -> Scores {
    assert!(future.count > 0, "a mean over no position");
    assert_eq!(list.k.len(), list.v.len(), "a value per key");
    let (width, d) = (list.head_dim as usize, f64::from(list.head_dim));
    let rotation = future.rotation(list.head_dim);
    let n_tokens = list.keys().len();
    let exact = |x: &[f64]| x.iter().map(|x| Sum { value: *x, absolute: x.abs() }).collect::<Vec<Sum>>();
    let heads = statistics.iter().map(|head| {
        assert_eq!((head.mean.len(), head.covariance.len()), (width, width * width), "one mean, one covariance");
        let mean = turn(&exact(&head.mean), &rotation);
        // R S R^T: rows turned, then columns.
        let rows: Vec<Sum> = exact(&head.covariance).chunks_exact(width).flat_map(|row| turn(row, &rotation)).collect();
        let columns = transposed(&rows, width);
        let covariance: Vec<Sum> = columns.chunks_exact(width).flat_map(|row| turn(row, &rotation)).collect();
        let logit = |key: &[f32]| {
            let k: Vec<f64> = key.iter().map(|x| f64::from(*x)).collect();
            let linear = mean.iter().zip(&k).map(|(m, k)| (m, k / d.sqrt()));
            let square = covariance.iter().enumerate().map(|(i, s)| (s, k[i / width] * k[i % width] / (2.0 * d)));
            linear.chain(square).fold(Sum::default(), |sum, (x, factor)| Sum {
                value: sum.value + x.value * factor,
                absolute: sum.absolute + x.absolute * factor.abs(),
            })
        };
        let logits: Vec<Sum> = list.keys().skip(n_skip).map(logit).collect();
        softmax(&logits, logits.len())
    });
    let taken = Scores::mean(&heads.collect::<Vec<_>>());
    let mut scores = Scores::zeros(n_tokens);
    let values = list.v.chunks_exact(width).enumerate().skip(n_skip);
    for ((t, value), (p, absolute)) in values.zip(taken.scores.iter().zip(&taken.absolute)) {
        let norm = value.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        scores.scores[t] = p * norm;
        scores.absolute[t] = (absolute + p) * norm;
    }
    scores
}

#[cfg(test)]
mod tests {
    use super::*;

    const STILL: Future = Future { rope_theta: 10_000.0, next: 0, count: 1 };

    #[track_caller]
    fn close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len(), "lengths");
        for (a, b) in found.iter().zip(expected) {
            assert!((a - b).abs() < 1e-6, "{found:?} should be {expected:?}");
        }
    }

    #[test]
    fn statistics_are_over_the_rows_that_are_left() {
        // One outlier, then (1, 0) and (3, 2): mean (2, 1), deviations of (1, 1).
        let found = QueryStatistics::of(&[99.0, 99.0, 1.0, 0.0, 3.0, 2.0], 1, 2, 1);
        assert_eq!(found, [QueryStatistics { mean: vec![2.0, 1.0], covariance: vec![1.0; 4] }], "by hand");
        let two = QueryStatistics::of(&[1.0, 2.0, 3.0, 4.0], 2, 2, 0);
        assert_eq!([&two[0].mean, &two[1].mean], [&[1.0, 2.0], &[3.0, 4.0]], "two heads of one row");
        assert_eq!(QueryStatistics::of(&[], 1, 2, 4)[0].mean, [0.0, 0.0], "no rows");
    }

    #[test]
    fn means_and_variances_both_attract() {
        let (ln2, root) = (2.0_f64.ln(), 2.0_f64.sqrt());
        // At position 0 nothing turns. Logits over keys (0, 0), (1, 0), (0, 2):
        // mean: (sqrt(2) ln 2, 0) / sqrt(2) gives 0, ln 2, 0; variance of channel 1: ln 2 * 4 / 4 gives 0, 0, ln 2.
        let head = QueryStatistics { mean: vec![root * ln2, 0.0], covariance: vec![0.0, 0.0, 0.0, ln2] };
        let list = List { head_dim: 2, k: &[0.0, 0.0, 1.0, 0.0, 0.0, 2.0], v: &[3.0, 4.0, 1.0, 0.0, 0.0, 2.0] };
        close(&expected(&list, std::slice::from_ref(&head), STILL, 0).scores, &[5.0 / 5.0, 2.0 / 5.0, 4.0 / 5.0]);
        // Without the first token, the others share evenly.
        close(&expected(&list, std::slice::from_ref(&head), STILL, 1).scores, &[0.0, 0.5, 1.0]);
        // A second head that does not care: the mean over both.
        let other = QueryStatistics { mean: vec![0.0; 2], covariance: vec![0.0; 4] };
        let both = expected(&list, &[head, other], STILL, 0).scores;
        close(&both, &[5.0 * (0.2 + 1.0 / 3.0) / 2.0, (0.4 + 1.0 / 3.0) / 2.0, 2.0 * (0.4 + 1.0 / 3.0) / 2.0]);
    }

    #[test]
    fn statistics_turn_to_the_mean_of_coming_positions() {
        // Positions 0 and pi / 2 apart do not exist with whole positions; the mean over (1, 2) by hand.
        let future = Future { rope_theta: 7.0, next: 1, count: 2 };
        let (cos, sin) = ((1.0_f64.cos() + 2.0_f64.cos()) / 2.0, (1.0_f64.sin() + 2.0_f64.sin()) / 2.0);
        close(&future.rotation(4).iter().flat_map(|(c, s)| [*c, *s]).collect::<Vec<_>>(), &{
            // The second pair turns by theta^(-1/2).
            let slow = 1.0 / 7.0_f64.sqrt();
            let angles = [slow, 2.0 * slow];
            let mean = |f: fn(f64) -> f64| angles.map(f).iter().sum::<f64>() / 2.0;
            [cos, sin, mean(f64::cos), mean(f64::sin)]
        });
        // mu = (1, 0) turns to (cos, sin); S = diag(1, 0) to the square of that.
        let head = QueryStatistics { mean: vec![1.0, 0.0], covariance: vec![1.0, 0.0, 0.0, 0.0] };
        let list = List { head_dim: 2, k: &[0.0, 0.0, 1.0, 2.0], v: &[1.0, 0.0, 1.0, 0.0] };
        let along = cos + 2.0 * sin;
        let weight = (along / 2.0_f64.sqrt() + along * along / 4.0).exp();
        let scores = expected(&list, &[head], future, 0);
        close(&scores.scores, &[1.0 / (1.0 + weight), weight / (1.0 + weight)]);
        assert!(scores.absolute.iter().zip(&scores.scores).all(|(a, s)| a > s), "more than the value's own");
    }
}
