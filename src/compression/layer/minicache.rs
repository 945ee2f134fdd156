//! Merged layers: which tokens stay apart, and what becomes of the others (`MiniCache`, arXiv:2405.14366, section 3).

use crate::compression::keep::{Domain, select};

/// How far the direction of a merged token lies from the lower layer's towards the upper one's.
pub const TOWARDS_UPPER: f64 = 0.6;

/// Indices of the tokens that stay as they are in both layers, ascending: the part `retain_permille` of them, rounded up,
/// whose distances are largest; ties by index.
pub fn retained(distances: &[f32], retain_permille: u32) -> Vec<u32> {
    let n_tokens = u32::try_from(distances.len()).expect("tokens are counted in 32 bits");
    let total = (u64::from(n_tokens) * u64::from(retain_permille)).div_ceil(1000);
    let total = u32::try_from(total).expect("a part should be no larger than its whole");
    let domain = Domain { lists: vec![0], total, floor: 0, sink: 0, recent: 0 };
    select(&domain, &[distances]).remove(0)
}

/// Cosine of the angle between two vectors; 0 where one is zero.
fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    (dot(a, b) / (dot(a, a) * dot(b, b)).max(1e-30).sqrt()).clamp(-1.0, 1.0)
}

/// Distance of a token's keys and values in two layers: `(1 - cos(k)) + (1 - cos(v))`.
pub fn distance(keys: [&[f32]; 2], values: [&[f32]; 2]) -> f64 {
    (1.0 - cosine(keys[0], keys[1])) + (1.0 - cosine(values[0], values[1]))
}

/// The direction of two vectors and the length of each: spherical interpolation (equation 3).
pub fn merge(lower: &[f32], upper: &[f32]) -> (Vec<f64>, [f64; 2]) {
    let length = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let lengths = [length(lower), length(upper)];
    let angle = cosine(lower, upper).acos();
    let weights = if angle > 1e-2 {
        [((1.0 - TOWARDS_UPPER) * angle).sin() / angle.sin(), (TOWARDS_UPPER * angle).sin() / angle.sin()]
    } else {
        [1.0 - TOWARDS_UPPER, TOWARDS_UPPER]
    };
    let scaled = |i: usize, x: f32| f64::from(x) * weights[i] / lengths[i].max(1e-15);
    (lower.iter().zip(upper).map(|(a, b)| scaled(0, *a) + scaled(1, *b)).collect(), lengths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_direction_lies_between_two_others() {
        let (direction, lengths) = merge(&[3.0, 0.0], &[0.0, 2.0]);
        assert_eq!(lengths, [3.0, 2.0], "lengths");
        let angle = direction[1].atan2(direction[0]).to_degrees();
        assert!((angle - 54.0).abs() < 1e-9, "0.6 of a right angle, not {angle}");
        let (same, _) = merge(&[1.0, 1.0], &[2.0, 2.0]);
        assert!(same.iter().all(|x| (x - 0.5_f64.sqrt()).abs() < 1e-9), "one direction stays");
        assert!((distance([&[1.0, 0.0], &[0.0, 1.0]], [&[1.0, 0.0], &[-1.0, 0.0]]) - 3.0).abs() < 1e-12, "1 and 2");
    }

    #[test]
    fn the_farthest_tokens_stay_apart() {
        assert_eq!(retained(&[0.1, 0.9, 0.2, 0.9], 250), [1], "a quarter of four, the first of two equals");
        assert_eq!(retained(&[0.1, 0.9, 0.2], 1), [1], "rounded up");
        assert!(retained(&[], 50).is_empty() && retained(&[1.0], 0).is_empty(), "none");
    }
}
