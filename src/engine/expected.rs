//! What queries to come are expected to be, from the moments of those seen (arXiv:2510.00636, section 3).
//!
//! ```text
//! mu    = R mean(q)          R = mean over the next `future` positions of the rotation by position
//! Sigma = R cov(q) R'        q before rotary positions
//! ```
//!
//! R turns and shrinks each rotary pair by itself: a complex number per pair.

use rayon::prelude::*;

use super::EngineError;
use super::eviction::Evictor;
use crate::geometry::WORD_BYTES;
use crate::kernels::key_scores::moment_values;

/// A mean rotation per pair: (cosine, sine).
fn mean_rotation(head_dim: u32, rope_theta: f32, next: u32, future: u32) -> Vec<(f64, f64)> {
    let positions = next..next + future.max(1);
    let n = f64::from(positions.end - positions.start);
    let of_pair = |pair: u32| {
        let frequency = f64::from(rope_theta).powf(-2.0 * f64::from(pair) / f64::from(head_dim));
        let sum = positions.clone().fold((0.0, 0.0), |(cos, sin), position| {
            let (s, c) = (f64::from(position) * frequency).sin_cos();
            (cos + c, sin + s)
        });
        (sum.0 / n, sum.1 / n)
    };
    (0..head_dim / 2).map(of_pair).collect()
}

/// Turns the pairs of a vector.
fn turn(x: &mut [f64], rotation: &[(f64, f64)]) {
    for (pair, (cos, sin)) in x.chunks_exact_mut(2).zip(rotation) {
        let (a, b) = (pair[0], pair[1]);
        pair[0] = a * cos - b * sin;
        pair[1] = a * sin + b * cos;
    }
}

/// Means and covariances after rotation, from sums over `n` queries: `[head_dim]`, then `[head_dim][head_dim]`.
fn rotated(sums: &[f32], head_dim: usize, n: f64, rotation: &[(f64, f64)]) -> Vec<f32> {
    let (of_queries, of_products) = sums.split_at(head_dim);
    let mean: Vec<f64> = of_queries.iter().map(|x| f64::from(*x) / n).collect();
    let mut covariance: Vec<Vec<f64>> = (of_products.chunks_exact(head_dim).zip(&mean))
        .map(|(row, a)| row.iter().zip(&mean).map(|(x, b)| f64::from(*x) / n - a * b).collect())
        .collect();
    // R C R': rows, then columns.
    covariance.iter_mut().for_each(|row| turn(row, rotation));
    let mut column = vec![0.0; head_dim];
    for j in 0..head_dim {
        column.iter_mut().zip(&covariance).for_each(|(x, row)| *x = row[j]);
        turn(&mut column, rotation);
        column.iter().zip(&mut covariance).for_each(|(x, row)| row[j] = *x);
    }
    let mut mean = mean;
    turn(&mut mean, rotation);
    #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is what is wanted")]
    mean.into_iter().chain(covariance.into_iter().flatten()).map(|x| x as f32).collect()
}

impl Evictor<'_> {
    /// Makes what is expected of a slot's queries, whose cache has seen `n_tokens` tokens, ready for `key_scores`.
    pub(super) fn expect_queries(
        &mut self,
        slot: u32,
        n_tokens: u32,
        (future, n_skip): (u32, u32),
    ) -> Result<(), EngineError> {
        let shape = *self.attention.shape();
        let head_dim = shape.heads.head_dim;
        let (sizes, buffers) = (self.kernels.sizes(), self.kernels.buffers());
        let bytes = u64::from(sizes.slot_moments(&shape)) * WORD_BYTES;
        let mut encoder = self.device.raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.copy_buffer_to_buffer(&buffers.moments, u64::from(slot) * bytes, self.back.target(), 0, bytes);
        self.device.submit(encoder)?;
        let mut read = Vec::new();
        let length = usize::try_from(bytes).expect("moments fit in the address space");
        self.back.read(self.device, length, &mut read)?;
        let sums: Vec<f32> = bytemuck::pod_collect_to_vec(&read);
        let rotation = mean_rotation(head_dim, self.rope_theta, n_tokens, future);
        let n = f64::from(n_tokens.saturating_sub(n_skip).max(1));
        let expected: Vec<f32> = sums
            .par_chunks_exact(moment_values(head_dim) as usize)
            .flat_map_iter(|sums| rotated(sums, head_dim as usize, n, &rotation))
            .collect();
        Ok(self.uploader.upload(self.device, bytemuck::cast_slice(&expected), &buffers.expected, 0)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_turn_like_the_queries_that_they_are_of() {
        let queries = [[1.0_f64, 2.0], [3.0, -1.0], [0.5, 0.25]];
        let moments = |queries: &[[f64; 2]]| -> Vec<f32> {
            let sum = |f: &dyn Fn(&[f64; 2]) -> f64| queries.iter().map(f).sum::<f64>();
            let of = |i: usize, j: usize| sum(&move |q: &[f64; 2]| q[i] * q[j]);
            #[expect(clippy::cast_possible_truncation, reason = "moments are summed up in f32")]
            [sum(&|q| q[0]), sum(&|q| q[1]), of(0, 0), of(0, 1), of(1, 0), of(1, 1)].map(|x| x as f32).to_vec()
        };
        let rotation = mean_rotation(2, 10_000.0, 7, 1);
        let turned = queries.map(|mut q| {
            turn(&mut q, &rotation);
            q
        });
        let unit = [(1.0, 0.0)];
        let (a, b) = (rotated(&moments(&queries), 2, 3.0, &rotation), rotated(&moments(&turned), 2, 3.0, &unit));
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5), "{a:?} {b:?}");
        let shrunk = mean_rotation(2, 10_000.0, 0, 1000)[0];
        assert!(shrunk.0.hypot(shrunk.1) < 0.01, "a fast pair averages out over many positions");
    }
}
