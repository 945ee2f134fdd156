//! What codecs take from a model's weights.

use rayon::prelude::*;

use crate::compression::hidden::{Codec, HeadParameters, HiddenCodec, Transform, lowrank};
use crate::weights::{LayerWeights, Weights};

/// Parameters per `[layer][KV head]`, as far as one of the codecs needs them.
pub(super) fn of_weights(weights: &Weights, codecs: &[HiddenCodec]) -> Vec<HeadParameters> {
    let heads = weights.geometry.heads;
    let projects = |codec: Codec| matches!(codec.transform, Transform::LowRank { .. });
    let (keys, values) = (codecs.iter().any(|c| projects(c.k)), codecs.iter().any(|c| projects(c.v)));
    let lists: Vec<(&LayerWeights, u32)> =
        weights.layers.iter().flat_map(|layer| (0..heads.num_kv_heads).map(move |head| (layer, head))).collect();
    lists
        .into_par_iter()
        .map(|(layer, head)| {
            let basis = |first: u32, needed: bool| {
                let n = heads.head_dim as usize;
                if needed { lowrank::eigenvectors(gram(layer, first, n), n) } else { Vec::new() }
            };
            let first_key = heads.q_width() + head * heads.head_dim;
            HeadParameters {
                key_basis: basis(first_key, keys),
                value_basis: basis(first_key + heads.kv_width(), values),
                rope_theta: weights.geometry.rope_theta,
            }
        })
        .collect()
}

/// `W diag(gain)^2 W^T` of `n` rows of the stacked projections.
fn gram(layer: &LayerWeights, first_row: u32, n: usize) -> Vec<f64> {
    let rows: Vec<Vec<f64>> = (first_row..)
        .take(n)
        .map(|row| {
            let weights = layer.qkv.row(row).iter().zip(&layer.attention_norm);
            weights.map(|(w, gain)| w.to_f64() * f64::from(*gain)).collect()
        })
        .collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum();
    rows.iter().flat_map(|a| rows.iter().map(move |b| dot(a, b))).collect()
}
