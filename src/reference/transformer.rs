//! The forward pass of a llama-type decoder on the CPU, in f64: the oracle for the engine's logits.
//!
//! The whole sequence runs densely from position 0. There is no cache, no page and no batch here, so nothing of
//! what the engine does can be wrong in the same way. With `n` tokens, hidden states `x` of shape
//! `[n, hidden_size]` and a layer's weights:
//!
//! ```text
//! norm(x, g)[t, c] = x[t, c] * g[c] / sqrt(mean_c(x[t, c]^2) + rms_norm_eps)
//!
//! q | k | v        = norm(x, attention_norm) * qkv^T           [n, q_width], [n, kv_width], [n, kv_width]
//! q, k             = rope(q), rope(k)                          per head: pairs (2i, 2i + 1) of token t turn by
//!                                                              t * rope_theta^(-2i / head_dim)
//! a[t, h]          = sum over j <= t of softmax_j(q[t, h] . k[j, h / group_size] * sm_scale)
//!                                       * v[j, h / group_size] [n, num_qo_heads, head_dim]
//! x                = x + a * attention_output^T                [n, hidden_size]
//! gate | up        = norm(x, ffn_norm) * gate_up^T             [n, intermediate_size] each
//! x                = x + (silu(gate) * up) * down^T            [n, hidden_size], silu(z) = z / (1 + exp(-z))
//!
//! logits           = norm(x, output_norm) * output^T           [positions, vocab_size], after the last layer
//! ```
//!
//! Where layers share caches, k and v of a layer are those of its owner. Where prompt tokens skip layers, x of every token
//! but the prompt's last stays what it is from the first skipped layer on, and k and v come of it there.
//!
//! Weights are f16 and convert to f64 exactly; every activation and sum is f64. Sums run in index order whatever
//! the number of threads, so that results are the same bits on every run.

use half::f16;
use rayon::prelude::*;

use crate::geometry::HeadGeometry;
use crate::weights::{LayerWeights, Matrix, Weights};

/// Tokens that one pass over a weight row serves; wide enough to keep the sums of a row in vector registers.
const TOKEN_BLOCK: usize = 8;
/// Weight rows that one task holds as f64; their tokens then stay in the core's own cache.
const ROW_TILE: usize = 16;

/// The reference decoder: borrowed weights and the one choice that a real cache forces on the arithmetic.
#[derive(Clone, Debug)]
pub struct ReferenceModel<'a> {
    weights: &'a Weights,
    round_kv_to_f16: bool,
    /// The layer whose keys and values each layer reads; its own where there is none.
    owners: Vec<usize>,
    /// The first layer that prompt tokens skip, and tokens of the prompt.
    skip: Option<(usize, usize)>,
}

impl<'a> ReferenceModel<'a> {
    /// A model that keeps keys and values in f64.
    pub const fn new(weights: &'a Weights) -> Self {
        Self { weights, round_kv_to_f16: false, owners: Vec::new(), skip: None }
    }

    /// Layers that read other layers' keys and values: of each layer the owner.
    #[must_use]
    pub fn share_layers(mut self, owners: &[u32]) -> Self {
        self.owners = owners.iter().map(|owner| *owner as usize).collect();
        self
    }

    /// Prompt tokens but the last stop below a layer.
    #[must_use]
    pub const fn skip_prefill(mut self, from: u32, prompt_tokens: usize) -> Self {
        self.skip = Some((from as usize, prompt_tokens));
        self
    }

    /// Whether keys (after the rotation) and values are rounded to f16, as a cache of f16 pages stores them.
    #[must_use]
    pub const fn round_kv_to_f16(mut self, round: bool) -> Self {
        self.round_kv_to_f16 = round;
        self
    }

    /// The logits `[vocab_size]` that follow each of `positions` (0 is the first token), in the order asked for.
    ///
    /// # Panics
    /// When a token is not below `vocab_size`, or a position is not below `tokens.len()`.
    pub fn logits(&self, tokens: &[u32], positions: &[usize]) -> Vec<Vec<f64>> {
        let geometry = &self.weights.geometry;
        let hidden_size = geometry.hidden_size as usize;
        let mut x = Vec::with_capacity(tokens.len() * hidden_size);
        for &token in tokens {
            assert!(token < geometry.vocab_size, "token {token} of a vocabulary of {}", geometry.vocab_size);
            x.extend(self.weights.embedding.row(token).iter().map(|w| w.to_f64()));
        }
        let mut caches: Vec<Vec<f64>> = Vec::new();
        for (index, layer) in self.weights.layers.iter().enumerate() {
            let before = x.clone();
            let owner = self.owners.get(index).copied().unwrap_or(index);
            self.layer(layer, &mut x, owner, &mut caches);
            if let Some((from, prompt_tokens)) = self.skip
                && index >= from
            {
                let stopped = prompt_tokens.saturating_sub(1) * hidden_size;
                x[..stopped].copy_from_slice(&before[..stopped]);
            }
        }
        let mut wanted = Vec::with_capacity(positions.len() * hidden_size);
        for &position in positions {
            assert!(position < tokens.len(), "position {position} of {} tokens", tokens.len());
            wanted.extend_from_slice(&x[position * hidden_size..][..hidden_size]);
        }
        let normed = self.norm(&wanted, &self.weights.output_norm);
        let logits = matmul(&normed, self.weights.output_matrix());
        logits.chunks_exact(geometry.vocab_size as usize).map(<[f64]>::to_vec).collect()
    }

    /// The logits that follow one token at a position, whose layers attend to what a cache holds of each (layer, KV head), the
    /// token itself included: keys after rotary positions and values, each `[tokens][head_dim]`.
    ///
    /// # Panics
    /// When the token is not below `vocab_size`, or a list has other widths.
    pub fn logits_over(
        &self,
        token: u32,
        position: u32,
        list: &mut dyn FnMut(u32, u32) -> (Vec<f32>, Vec<f32>),
    ) -> Vec<f64> {
        let geometry = &self.weights.geometry;
        let heads = geometry.heads;
        let (head_dim, group) = (heads.head_dim as usize, heads.group_size() as usize);
        assert!(token < geometry.vocab_size, "token {token} of a vocabulary of {}", geometry.vocab_size);
        let mut x: Vec<f64> = self.weights.embedding.row(token).iter().map(|w| w.to_f64()).collect();
        for (index, layer) in (0..).zip(&self.weights.layers) {
            let qkv = matmul(&self.norm(&x, &layer.attention_norm), &layer.qkv);
            let mut q = qkv[..heads.q_width() as usize].to_vec();
            self.rotate(&mut q, position as usize);
            let mut attended = Vec::with_capacity(q.len());
            for kv_head in 0..heads.num_kv_heads {
                let (k, v) = list(index, kv_head);
                for query in q.chunks_exact(head_dim).skip(kv_head as usize * group).take(group) {
                    let scores: Vec<f64> = k
                        .chunks_exact(head_dim)
                        .map(|k| query.iter().zip(k).map(|(a, b)| a * f64::from(*b)).sum::<f64>())
                        .map(|s| s / (head_dim as f64).sqrt())
                        .collect();
                    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let total: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
                    let mut out = vec![0.0; head_dim];
                    for (score, v) in scores.iter().zip(v.chunks_exact(head_dim)) {
                        let p = (score - largest).exp() / total;
                        out.iter_mut().zip(v).for_each(|(o, v)| *o += p * f64::from(*v));
                    }
                    attended.extend(out);
                }
            }
            add_in_place(&mut x, &matmul(&attended, &layer.attention_output));
            self.feed_forward(layer, &mut x);
        }
        matmul(&self.norm(&x, &self.weights.output_norm), self.weights.output_matrix())
    }

    /// One layer, in place on `x` of shape `[n, hidden_size]`; `caches` are keys and values of the layers before it.
    fn layer(&self, layer: &LayerWeights, x: &mut [f64], owner: usize, caches: &mut Vec<Vec<f64>>) {
        let geometry = &self.weights.geometry;
        let mut qkv = matmul(&self.norm(x, &layer.attention_norm), &layer.qkv);
        self.rotate_and_round(&mut qkv);
        let (q_width, kv_width) = (geometry.heads.q_width() as usize, 2 * geometry.heads.kv_width() as usize);
        let rows = qkv.chunks_exact_mut(q_width + kv_width);
        match caches.get(owner) {
            Some(cache) => {
                rows.zip(cache.chunks_exact(kv_width)).for_each(|(row, kv)| row[q_width..].copy_from_slice(kv));
                caches.push(Vec::new());
            }
            None => caches.push(rows.flat_map(|row| row[q_width..].to_vec()).collect()),
        }
        let attended = causal_attention(&qkv, geometry.heads);
        add_in_place(x, &matmul(&attended, &layer.attention_output));
        self.feed_forward(layer, x);
    }

    /// The gated feed-forward part of a layer, added to `x`.
    fn feed_forward(&self, layer: &LayerWeights, x: &mut [f64]) {
        let geometry = &self.weights.geometry;
        let gate_up = matmul(&self.norm(x, &layer.ffn_norm), &layer.gate_up);
        let width = geometry.intermediate_size as usize;
        let gated: Vec<f64> = gate_up
            .chunks_exact(2 * width)
            .flat_map(|row| {
                let (gate, up) = row.split_at(width);
                gate.iter().zip(up).map(|(&z, &u)| z / (1.0 + (-z).exp()) * u)
            })
            .collect();
        add_in_place(x, &matmul(&gated, &layer.down));
    }

    /// RMS norm of every row of `x`, scaled by `gain`.
    fn norm(&self, x: &[f64], gain: &[f32]) -> Vec<f64> {
        let eps = f64::from(self.weights.geometry.rms_norm_eps);
        x.chunks_exact(gain.len())
            .flat_map(|row| {
                let mean_square = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
                let scale = 1.0 / (mean_square + eps).sqrt();
                row.iter().zip(gain).map(move |(v, &g)| v * scale * f64::from(g))
            })
            .collect()
    }

    /// Turns heads by a position.
    fn rotate(&self, heads: &mut [f64], position: usize) {
        let head_dim = self.weights.geometry.heads.head_dim as usize;
        let base = f64::from(self.weights.geometry.rope_theta);
        for head in heads.chunks_exact_mut(head_dim) {
            for (i, pair) in head.chunks_exact_mut(2).enumerate() {
                let frequency = base.powf(-2.0 * i as f64 / head_dim as f64);
                let (sin, cos) = (position as f64 * frequency).sin_cos();
                let [a, b] = [pair[0], pair[1]];
                pair.copy_from_slice(&[a * cos - b * sin, a * sin + b * cos]);
            }
        }
    }

    /// Turns queries and keys by their positions, then rounds keys and values if the cache would.
    fn rotate_and_round(&self, qkv: &mut [f64]) {
        let heads = self.weights.geometry.heads;
        let (q_width, kv_width) = (heads.q_width() as usize, heads.kv_width() as usize);
        for (position, row) in qkv.chunks_exact_mut(q_width + 2 * kv_width).enumerate() {
            self.rotate(&mut row[..q_width + kv_width], position);
            if self.round_kv_to_f16 {
                for value in &mut row[q_width..] {
                    *value = f16::from_f64(*value).to_f64();
                }
            }
        }
    }
}

/// Attention of every token to itself and all earlier ones: `qkv` is `[n, q_width + 2 * kv_width]`, the result
/// `[n, q_width]`.
fn causal_attention(qkv: &[f64], heads: HeadGeometry) -> Vec<f64> {
    let head_dim = heads.head_dim as usize;
    let (q_width, kv_width) = (heads.q_width() as usize, heads.kv_width() as usize);
    let row_width = q_width + 2 * kv_width;
    let group_size = heads.group_size() as usize;
    let sm_scale = 1.0 / (head_dim as f64).sqrt();
    let mut out = vec![0.0; qkv.len() / row_width * q_width];
    out.par_chunks_exact_mut(head_dim).enumerate().for_each(|(index, out)| {
        let (token, head) = (index / (q_width / head_dim), index % (q_width / head_dim));
        let query = &qkv[token * row_width + head * head_dim..][..head_dim];
        let kv_start = q_width + head / group_size * head_dim;
        let key = |j: usize| &qkv[j * row_width + kv_start..][..head_dim];
        let value = |j: usize| &qkv[j * row_width + kv_start + kv_width..][..head_dim];

        let scores: Vec<f64> =
            (0..=token).map(|j| sm_scale * query.iter().zip(key(j)).map(|(a, b)| a * b).sum::<f64>()).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mut total = 0.0;
        for (j, score) in scores.iter().enumerate() {
            let weight = (score - largest).exp();
            total += weight;
            for (o, v) in out.iter_mut().zip(value(j)) {
                *o += weight * v;
            }
        }
        for o in out {
            *o /= total;
        }
    });
    out
}

/// `x * w^T`: `x` is `[n, cols]`, the result `[n, rows]`.
///
/// Tokens are packed in blocks of [`TOKEN_BLOCK`] with the channel outermost, so that one weight meets a whole
/// block at once; tasks take [`ROW_TILE`] rows each, convert them once and pass all tokens by them.
fn matmul(x: &[f64], w: &Matrix) -> Vec<f64> {
    let (rows, cols) = (w.rows as usize, w.cols as usize);
    let n_tokens = x.len() / cols;
    let packed: Vec<Vec<[f64; TOKEN_BLOCK]>> = x
        .par_chunks(TOKEN_BLOCK * cols)
        .map(|block| {
            let token = |t: usize, c: usize| block.get(t * cols + c).copied().unwrap_or(0.0);
            (0..cols).map(|c| std::array::from_fn(|t| token(t, c))).collect()
        })
        .collect();

    let mut transposed = vec![0.0; rows * n_tokens];
    transposed.par_chunks_mut(ROW_TILE * n_tokens.max(1)).enumerate().for_each(|(tile, out)| {
        let first = tile * ROW_TILE;
        let count = ROW_TILE.min(rows - first);
        let tile_weights: Vec<f64> = w.data[first * cols..(first + count) * cols].iter().map(|v| v.to_f64()).collect();
        for (block, channels) in packed.iter().enumerate() {
            for (row, weights) in tile_weights.chunks_exact(cols).enumerate() {
                let mut sums = [0.0; TOKEN_BLOCK];
                for (&weight, values) in weights.iter().zip(channels) {
                    for (sum, value) in sums.iter_mut().zip(values) {
                        *sum += weight * value;
                    }
                }
                let out = &mut out[row * n_tokens..][..n_tokens][block * TOKEN_BLOCK..];
                out.iter_mut().zip(sums).for_each(|(o, s)| *o = s);
            }
        }
    });

    let mut y = vec![0.0; n_tokens * rows];
    y.par_chunks_exact_mut(rows).enumerate().for_each(|(t, row)| {
        row.iter_mut().enumerate().for_each(|(r, o)| *o = transposed[r * n_tokens + t]);
    });
    y
}

/// `x += y`, element by element.
fn add_in_place(x: &mut [f64], y: &[f64]) {
    for (a, b) in x.iter_mut().zip(y) {
        *a += b;
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::geometry::ModelGeometry;

    fn random_matrix(rng: &mut ChaCha8Rng, rows: u32, cols: u32) -> Matrix {
        let data = (0..rows * cols).map(|_| f16::from_f32(rng.random_range(-0.5..0.5f32))).collect();
        Matrix::new(rows, cols, data)
    }

    /// Two layers, four query heads on two KV heads of 8 channels, 50 tokens in the vocabulary.
    fn tiny(seed: u64) -> Weights {
        let heads = HeadGeometry { num_qo_heads: 4, num_kv_heads: 2, head_dim: 8 };
        let geometry = ModelGeometry {
            num_layers: 2,
            hidden_size: 24,
            intermediate_size: 40,
            heads,
            vocab_size: 50,
            context_length: 64,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-5,
        };
        assert_eq!(geometry.check(), Ok(()), "the tiny model is a valid one");
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        let layers = (0..2)
            .map(|_| LayerWeights {
                attention_norm: (0..24).map(|_| rng.random_range(0.5..1.5)).collect(),
                qkv: random_matrix(rng, heads.q_width() + 2 * heads.kv_width(), 24),
                attention_output: random_matrix(rng, 24, heads.q_width()),
                ffn_norm: (0..24).map(|_| rng.random_range(0.5..1.5)).collect(),
                gate_up: random_matrix(rng, 80, 24),
                down: random_matrix(rng, 24, 40),
            })
            .collect();
        let embedding = random_matrix(rng, 50, 24);
        let output = Some(random_matrix(rng, 50, 24));
        Weights { geometry, embedding, layers, output_norm: vec![1.25; 24], output }
    }

    fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    }

    #[test]
    fn later_tokens_do_not_change_earlier_logits() {
        let weights = tiny(1);
        let model = ReferenceModel::new(&weights);
        // 19 tokens: two full blocks of the matrix product and a part of one.
        let mut tokens: Vec<u32> = (0..19).map(|t| t * 7 % 50).collect();
        let positions: Vec<usize> = (0..19).collect();
        let before = model.logits(&tokens, &positions);
        tokens[11] = 49;
        let after = model.logits(&tokens, &positions);
        assert_eq!(before[..11], after[..11], "positions before the change, bit for bit");
        for t in 11..19 {
            assert!(largest_difference(&before[t], &after[t]) > 1e-6, "position {t} sees the changed token");
        }
    }

    #[test]
    fn a_layer_without_output_leaves_norm_and_output_matrix() {
        let mut weights = tiny(2);
        weights.layers.truncate(1);
        weights.geometry.num_layers = 1;
        weights.layers[0].attention_output.data.fill(f16::ZERO);
        weights.layers[0].down.data.fill(f16::ZERO);
        let logits = ReferenceModel::new(&weights).logits(&[3, 17], &[1, 0]);
        for (got, token) in logits.iter().zip([17, 3]) {
            let x: Vec<f64> = weights.embedding.row(token).iter().map(|w| w.to_f64()).collect();
            let rms = (x.iter().map(|v| v * v).sum::<f64>() / 24.0 + f64::from(1e-5f32)).sqrt();
            let expected: Vec<f64> = (0..50)
                .map(|r| weights.output_matrix().row(r).iter().zip(&x).map(|(w, v)| w.to_f64() * v / rms * 1.25).sum())
                .collect();
            assert!(largest_difference(got, &expected) < 1e-12, "token {token}");
        }
    }

    #[test]
    fn logits_equal_a_token_by_token_computation() {
        // Independent of `matmul` and `causal_attention`: scalar loops over one token at a time.
        let weights = tiny(3);
        let tokens = [5, 9, 33, 2, 48, 0, 21, 7, 7, 30];
        let mut x: Vec<Vec<f64>> =
            tokens.iter().map(|&t| weights.embedding.row(t).iter().map(|w| w.to_f64()).collect()).collect();
        let norm = |x: &[f64], g: &[f32]| -> Vec<f64> {
            let rms = (x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64 + f64::from(1e-5f32)).sqrt();
            x.iter().zip(g).map(|(v, &g)| v / rms * f64::from(g)).collect()
        };
        let times = |w: &Matrix, x: &[f64]| -> Vec<f64> {
            (0..w.rows).map(|r| w.row(r).iter().zip(x).map(|(w, v)| w.to_f64() * v).sum()).collect()
        };
        let turn = |head: &[f64], t: usize| -> Vec<f64> {
            (0..8)
                .map(|c| {
                    let (sin, cos) = (t as f64 / 10_000f64.powf(f64::from(c / 2 * 2) / 8.0)).sin_cos();
                    let other = head[(c ^ 1) as usize];
                    head[c as usize] * cos + if c % 2 == 0 { -other * sin } else { other * sin }
                })
                .collect()
        };
        for layer in &weights.layers {
            let qkv: Vec<Vec<f64>> = x.iter().map(|x| times(&layer.qkv, &norm(x, &layer.attention_norm))).collect();
            for t in 0..tokens.len() {
                let mut attended = Vec::new();
                for h in 0..4 {
                    let q = turn(&qkv[t][h * 8..][..8], t);
                    let e: Vec<f64> = (0..=t)
                        .map(|j| {
                            turn(&qkv[j][32 + h / 2 * 8..][..8], j).iter().zip(&q).map(|(a, b)| a * b).sum::<f64>()
                        })
                        .map(|s| (s / 8f64.sqrt()).exp())
                        .collect();
                    let total: f64 = e.iter().sum();
                    attended.extend(
                        (0..8).map(|c| (0..=t).map(|j| e[j] / total * qkv[j][48 + h / 2 * 8 + c]).sum::<f64>()),
                    );
                }
                add_in_place(&mut x[t], &times(&layer.attention_output, &attended));
            }
            for x in &mut x {
                let gate_up = times(&layer.gate_up, &norm(x, &layer.ffn_norm));
                let gated: Vec<f64> =
                    (0..40).map(|i| gate_up[i] / (1.0 + (-gate_up[i]).exp()) * gate_up[40 + i]).collect();
                add_in_place(x, &times(&layer.down, &gated));
            }
        }
        let positions: Vec<usize> = (0..tokens.len()).collect();
        let logits = ReferenceModel::new(&weights).logits(&tokens, &positions);
        for (t, got) in logits.iter().enumerate() {
            let expected = times(weights.output_matrix(), &norm(&x[t], &weights.output_norm));
            assert!(largest_difference(got, &expected) < 1e-10, "position {t}");
        }
    }

    #[test]
    fn rounding_keys_and_values_changes_logits_a_little() {
        let weights = tiny(4);
        let tokens: Vec<u32> = (0..20).collect();
        let exact = ReferenceModel::new(&weights).logits(&tokens, &[19]);
        let rounded = ReferenceModel::new(&weights).round_kv_to_f16(true).logits(&tokens, &[19]);
        let difference = largest_difference(&exact[0], &rounded[0]);
        assert!(difference > 1e-9 && difference < 1e-1, "difference {difference:e}");
    }

    #[test]
    fn no_positions_make_no_logits() {
        assert!(ReferenceModel::new(&tiny(5)).logits(&[1, 2], &[]).is_empty(), "nothing asked, nothing given");
    }
}
