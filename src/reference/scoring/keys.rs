//! Scores that need keys alone.

use super::{List, Scores, Sum};

fn norm(key: &[f32]) -> f64 {
    key.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

/// `score[t] = -|k[t]|` (arXiv:2406.11430).
pub fn key_norm(list: &List<'_>) -> Scores {
    let norms: Vec<f64> = list.keys().map(norm).collect();
    Scores { scores: norms.iter().map(|norm| -norm).collect(), absolute: norms }
}

/// `score[t] = -cos(k[t], mean over t of k[t] / |k[t]|)` (`KeyDiff`, arXiv:2504.15364); keys of zeros, and a mean of
/// zeros, have no direction and a cosine of 0.
pub fn key_difference(list: &List<'_>) -> Scores {
    let width = list.head_dim as usize;
    let keys: Vec<(&[f32], f64)> = list.keys().map(|key| (key, norm(key))).collect();
    let mut scores = Scores::zeros(keys.len());
    let anchor: Vec<Sum> = (0..width)
        .map(|c| {
            let directed = keys.iter().filter(|(_, norm)| *norm != 0.0);
            Sum::of(directed.map(|(key, norm)| f64::from(key[c]) / norm / keys.len() as f64))
        })
        .collect();
    let length = anchor.iter().map(|a| a.value.powi(2)).sum::<f64>().sqrt();
    // What the anchor's own roundings do to its length.
    let of_length: f64 = anchor.iter().map(|a| a.value.abs() * a.absolute).sum::<f64>() / length.powi(2);
    for (t, (key, norm)) in keys.iter().enumerate().filter(|(_, (_, norm))| *norm != 0.0 && length != 0.0) {
        let cos = key.iter().zip(&anchor).map(|(k, a)| f64::from(*k) * a.value).sum::<f64>() / norm / length;
        // Every term has a key's channel, its norm, and an anchor's channel, made of channels and norms.
        let terms: f64 = key.iter().zip(&anchor).map(|(k, a)| f64::from(*k).abs() * a.absolute).sum();
        scores.scores[t] = -cos;
        scores.absolute[t] = 3.0 * terms / norm / length + cos.abs() * (1.0 + 2.0 * of_length);
    }
    scores
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(k: &[f32]) -> List<'_> {
        List { head_dim: 2, k, v: &[] }
    }

    #[test]
    fn keys_are_measured() {
        let scores = key_norm(&list(&[3.0, 4.0, 0.0, 0.0, -5.0, 12.0]));
        assert_eq!(scores.scores, [-5.0, 0.0, -13.0], "minus the length");
        assert_eq!(scores.absolute, [5.0, 0.0, 13.0], "a sum of squares");
    }

    #[test]
    fn keys_that_point_elsewhere_are_worth_more() {
        // Directions (1, 0), (1, 0), (0, 1), and one without: the anchor points along (2, 1).
        let scores = key_difference(&list(&[2.0, 0.0, 7.0, 0.0, 0.0, 3.0, 0.0, 0.0])).scores;
        let expected = [-2.0 / 5.0_f64.sqrt(), -2.0 / 5.0_f64.sqrt(), -1.0 / 5.0_f64.sqrt(), 0.0];
        for (a, b) in scores.iter().zip(expected) {
            assert!((a - b).abs() < 1e-12, "{scores:?} should be {expected:?}");
        }
        assert_eq!(key_difference(&list(&[1.0, 0.0, -1.0, 0.0])).scores, [0.0, 0.0], "no anchor");
    }
}
