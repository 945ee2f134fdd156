//! `lowrank:R`: a page holds R latent channels of each head instead of `head_dim` (Palu, arXiv:2407.21118).
//!
//! ```text
//! z   = B^T x          B [head_dim][R] f16, orthonormal columns, one per (layer, KV head) and side
//! x'  = B z            values: applied once to the output, since sum p B z = B sum p z
//!                      keys: x is the key before rotary positions; x' is turned by its position when it is read
//! side  [page_size][R] in the quantiser that follows (f16 where none does)
//! ```
//!
//! B holds the leading eigenvectors of the Gram matrix of the head's projection, `W diag(gain)^2 W^T`: the directions in
//! which a normalised hidden state moves keys (or values) most. That needs no text and loses much; bases from the keys and
//! values of a text ([`HeadParameters`](super::HeadParameters) are replaced then) lose far less.
//!
//! Open pages hold keys after rotary positions, so sealing turns them back first. Cosines and sines are split into two
//! halves of 12 bits, and B is f16: all products are then exact in f32 and every device writes the same latents.
//!
//! Deviations. The paper decomposes groups of four heads together and distributes ranks by Fisher information; here a page
//! belongs to one KV head, and so does its basis, and every head has the same rank.

use half::f16;

/// `(cos, sin)` of each rotary pair at a position.
pub fn angles(position: u32, head_dim: u32, rope_theta: f32) -> Vec<(f32, f32)> {
    (0..head_dim / 2)
        .map(|i| {
            let frequency = f64::from(rope_theta).powf(-2.0 * f64::from(i) / f64::from(head_dim));
            let (sin, cos) = (f64::from(position) * frequency).sin_cos();
            #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is what is wanted")]
            let rounded = (cos as f32, sin as f32);
            rounded
        })
        .collect()
}

/// The upper 12 bits of a number's mantissa, and the rest.
fn halves(x: f32) -> (f32, f32) {
    let high = f32::from_bits(x.to_bits() & 0xffff_f000);
    (high, x - high)
}

/// A key after rotary positions, turned back and rounded to f16. Pairs are channels (2i, 2i + 1).
pub fn turn_back(key: &[f32], angles: &[(f32, f32)]) -> Vec<f32> {
    let round = |x: f32| f16::from_f32(x).to_f32();
    let mut out = Vec::with_capacity(key.len());
    for (pair, (cos, sin)) in key.chunks_exact(2).zip(angles) {
        let ((ch, cl), (sh, sl)) = (halves(*cos), halves(*sin));
        let [a, b] = [pair[0], pair[1]];
        out.push(round(((a * ch + a * cl) + b * sh) + b * sl));
        out.push(round(((b * ch + b * cl) - a * sh) - a * sl));
    }
    out
}

/// `B^T x` for one row, sums in channel order. `basis` is `[head_dim][head_dim]`, of whose columns the first `rank` count.
pub fn project(x: &[f32], basis: &[f16], rank: u32) -> Vec<f32> {
    let latent =
        |r: usize| x.iter().zip(basis.chunks_exact(x.len())).fold(0.0, |sum, (x, row)| sum + x * row[r].to_f32());
    (0..rank as usize).map(latent).collect()
}

/// `B z` for one row, in f64. `basis` as in [`project`].
pub fn lift(z: &[f32], basis: &[f16], head_dim: u32) -> Vec<f64> {
    let channel = |row: &[f16]| row.iter().zip(z).map(|(b, z)| b.to_f64() * f64::from(*z)).sum();
    basis.chunks_exact(head_dim as usize).map(channel).collect()
}

/// A key turned by its position, in f64.
pub fn turn(key: &[f64], angles: &[(f32, f32)]) -> Vec<f64> {
    let mut out = Vec::with_capacity(key.len());
    for (pair, (cos, sin)) in key.chunks_exact(2).zip(angles) {
        let (cos, sin) = (f64::from(*cos), f64::from(*sin));
        out.extend([pair[0] * cos - pair[1] * sin, pair[0] * sin + pair[1] * cos]);
    }
    out
}

/// The eigenvectors of a symmetric matrix `[n][n]`, largest eigenvalue first, as columns of `[n][n]`, rounded to f16
/// (cyclic Jacobi rotations).
pub fn eigenvectors(mut a: Vec<f64>, n: usize) -> Vec<f16> {
    let mut v = vec![0.0; n * n];
    (0..n).for_each(|i| v[i * n + i] = 1.0);
    let scale: f64 = a.iter().map(|x| x * x).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
    for _ in 0..30 {
        let off = (0..n).flat_map(|i| (0..i).map(move |j| (i, j))).map(|(i, j)| a[i * n + j].powi(2)).sum::<f64>();
        if off.sqrt() <= 1e-12 * scale {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                rotate_pair(&mut a, &mut v, n, p, q);
            }
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|x, y| a[y * n + y].total_cmp(&a[x * n + x]).then(x.cmp(y)));
    (0..n).flat_map(|row| order.iter().map(move |c| (row, *c))).map(|(r, c)| f16::from_f64(v[r * n + c])).collect()
}

/// One Jacobi rotation, which makes `a[p][q]` zero.
fn rotate_pair(a: &mut [f64], v: &mut [f64], n: usize, p: usize, q: usize) {
    let apq = a[p * n + q];
    if apq == 0.0 {
        return;
    }
    let theta = (a[q * n + q] - a[p * n + p]) / (2.0 * apq);
    let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
    let cos = 1.0 / (t * t + 1.0).sqrt();
    let sin = t * cos;
    let turn = |m: &mut [f64], i: usize, j: usize| {
        let (x, y) = (m[i], m[j]);
        (m[i], m[j]) = (cos * x - sin * y, sin * x + cos * y);
    };
    (0..n).for_each(|k| turn(a, k * n + p, k * n + q));
    (0..n).for_each(|k| turn(a, p * n + k, q * n + k));
    (0..n).for_each(|k| turn(v, k * n + p, k * n + q));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_of_low_rank_is_caught_by_its_basis() {
        // Rank 2 in 8 channels: every combination of two directions comes back.
        let (u, w) = ([1.0_f32, 2.0, 0.0, -1.0, 0.5, 3.0, 1.0, 0.0], [0.0_f32, 1.0, 1.0, 1.0, -2.0, 0.0, 0.5, 1.0]);
        let gram: Vec<f64> = (0..64).map(|i| f64::from(u[i / 8] * u[i % 8] + w[i / 8] * w[i % 8])).collect();
        let basis = eigenvectors(gram, 8);
        let x: Vec<f32> = u.iter().zip(&w).map(|(u, w)| 0.5 * u - 2.0 * w).collect();
        let back = lift(&project(&x, &basis, 2), &basis, 8);
        let error: f64 = back.iter().zip(&x).map(|(b, x)| (b - f64::from(*x)).abs()).fold(0.0, f64::max);
        assert!(error < 5e-3, "largest error {error}");
        let lost = lift(&project(&[1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], &basis, 2), &basis, 8);
        assert!((lost[0] - 1.0).abs() > 0.1, "another direction is lost");
    }

    #[test]
    fn turning_back_undoes_turning() {
        let key: Vec<f32> = (0..16).map(|c| (c as f32 - 7.5) * 0.25).collect();
        let angles = angles(12_345, 16, 10_000.0);
        let wide: Vec<f64> = key.iter().map(|x| f64::from(*x)).collect();
        #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is what is wanted")]
        let turned: Vec<f32> = turn(&wide, &angles).iter().map(|x| *x as f32).collect();
        assert!(turned.iter().zip(&key).any(|(a, b)| (a - b).abs() > 0.5), "something turned");
        assert!(turn_back(&turned, &angles).iter().zip(&key).all(|(a, b)| (a - b).abs() < 2e-3), "within f16");
    }
}
