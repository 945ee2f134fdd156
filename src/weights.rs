//! A decoder's weights on the host: plain data that the model reader fills, the CPU reference computes with and
//! the engine uploads.

use half::f16;
use rand::{Rng, RngExt as _};

use crate::geometry::ModelGeometry;

/// A row-major f16 matrix: row `r` makes output feature `r`, so `y = x * W^T`.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// Output features.
    pub rows: u32,
    /// Input features.
    pub cols: u32,
    /// `rows * cols` values.
    pub data: Vec<f16>,
}

impl Matrix {
    /// A matrix from its values.
    ///
    /// # Panics
    /// When `data` does not hold `rows * cols` values.
    pub fn new(rows: u32, cols: u32, data: Vec<f16>) -> Self {
        assert_eq!(data.len(), rows as usize * cols as usize, "a {rows} x {cols} matrix should have that many values");
        Self { rows, cols, data }
    }

    /// The values of one row.
    pub fn row(&self, r: u32) -> &[f16] {
        let cols = self.cols as usize;
        &self.data[r as usize * cols..(r as usize + 1) * cols]
    }
}

/// The weights of one layer.
///
/// Query and key rows are in the order of rotary pairs `(2i, 2i + 1)`, as GGUF files of the llama architecture
/// store them.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerWeights {
    /// RMS norm before attention, `[hidden_size]`.
    pub attention_norm: Vec<f32>,
    /// Query, key and value projections, rows stacked: `[q_width + 2 * kv_width, hidden_size]`.
    pub qkv: Matrix,
    /// Output projection of attention, `[hidden_size, q_width]`.
    pub attention_output: Matrix,
    /// RMS norm before the feed-forward layer, `[hidden_size]`.
    pub ffn_norm: Vec<f32>,
    /// Gate and up projections, rows stacked: `[2 * intermediate_size, hidden_size]`.
    pub gate_up: Matrix,
    /// Down projection, `[hidden_size, intermediate_size]`.
    pub down: Matrix,
}

/// All weights of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct Weights {
    /// The shapes that the matrices below have.
    pub geometry: ModelGeometry,
    /// Token embedding, `[vocab_size, hidden_size]`.
    pub embedding: Matrix,
    /// One entry per layer.
    pub layers: Vec<LayerWeights>,
    /// Final RMS norm, `[hidden_size]`.
    pub output_norm: Vec<f32>,
    /// Output projection `[vocab_size, hidden_size]`; `None` when it shares the embedding.
    pub output: Option<Matrix>,
}

impl Weights {
    /// Random weights of a shape, with an output matrix of its own: for measuring time, which does not depend on their values.
    /// Scaled by the root of their inputs, so that activations stay numbers through any number of layers.
    pub fn random(geometry: &ModelGeometry, rng: &mut impl Rng) -> Self {
        let mut matrix = |rows: u32, cols: u32| {
            let scale = (cols as f32).sqrt().recip();
            let n = rows as usize * cols as usize;
            Matrix::new(rows, cols, (0..n).map(|_| f16::from_f32(rng.random_range(-1.0_f32..1.0) * scale)).collect())
        };
        let ModelGeometry { hidden_size: hidden, intermediate_size: inner, heads, vocab_size, .. } = *geometry;
        let norm = vec![1.0; hidden as usize];
        let layers = (0..geometry.num_layers)
            .map(|_| LayerWeights {
                attention_norm: norm.clone(),
                qkv: matrix(heads.q_width() + 2 * heads.kv_width(), hidden),
                attention_output: matrix(hidden, heads.q_width()),
                ffn_norm: norm.clone(),
                gate_up: matrix(2 * inner, hidden),
                down: matrix(hidden, inner),
            })
            .collect();
        let embedding = matrix(vocab_size, hidden);
        let output = Some(matrix(vocab_size, hidden));
        Self { geometry: geometry.clone(), embedding, layers, output_norm: norm, output }
    }

    /// The matrix that turns the last hidden state into logits.
    pub fn output_matrix(&self) -> &Matrix {
        self.output.as_ref().unwrap_or(&self.embedding)
    }
}
