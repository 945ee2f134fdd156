//! Bases of latents from a text: the directions in which a model's own keys and values vary.
//!
//! ```text
//! gram(layer, KV head) = sum over the text's tokens of x x^T        x: a key before rotary positions, or a value
//! basis                = its eigenvectors, largest eigenvalue first
//! ```
//!
//! The projection onto the first R of them loses the least squared error on that text (Eckart and Young, 1936). Bases from the
//! weights alone, which an engine starts with, assume hidden states without any direction; on real models they lose far
//! more.

use rayon::prelude::*;

use super::prompt::Driver;
use crate::compression::Compression;
use crate::compression::hidden::{HeadParameters, lowrank};
use crate::engine::{Engine, EngineError};
use crate::schedule::Caches;

/// Fewest tokens that a basis of `head_dim` directions can be taken from.
pub const fn tokens_min(head_dim: u32) -> usize {
    2 * head_dim as usize
}

/// Reads `tokens` over a full cache, takes bases from the keys and values, and hands them to the engine's codecs; `each`
/// hears of every (layer, KV head) that is done.
///
/// # Errors
/// [`EngineError::Input`] when there are too few tokens, others when the cache does not fit.
pub fn calibrate(
    engine: &mut Engine<'_>,
    caches: &mut Caches,
    tokens: &[u32],
    chunk: usize,
    each: &mut dyn FnMut(),
) -> Result<Vec<HeadParameters>, EngineError> {
    let geometry = engine.geometry().clone();
    let head_dim = geometry.heads.head_dim;
    let (n, needed) = (tokens.len(), tokens_min(head_dim));
    if n < needed {
        return Err(EngineError::Input(format!(
            "a calibration text of {n} tokens is too short for heads of {head_dim} channels; give at least {needed}"
        )));
    }
    let mut driver = Driver::new(engine, caches);
    let probe = driver.admit(&Compression::default(), n, n)?;
    let read = driver.prefill(probe, tokens, 0..0, chunk, &mut |_, _| ()).and_then(|()| {
        let lists = (0..geometry.num_layers).flat_map(|l| (0..geometry.heads.num_kv_heads).map(move |h| (l, h)));
        lists
            .map(|(layer, kv_head)| {
                let (keys, values) = driver.rows(probe, layer, kv_head)?;
                each();
                Ok(of_rows(&keys, &values, head_dim, geometry.rope_theta))
            })
            .collect::<Result<Vec<_>, EngineError>>()
    });
    driver.end()?;
    let parameters = read?;
    engine.set_codec_parameters(&parameters)?;
    Ok(parameters)
}

/// Bases of one head from its keys, after rotary positions from 0 on, and values, each `[tokens][head_dim]`.
fn of_rows(keys: &[f32], values: &[f32], head_dim: u32, rope_theta: f32) -> HeadParameters {
    let width = head_dim as usize;
    let before: Vec<f32> = (0..)
        .zip(keys.chunks_exact(width))
        .flat_map(|(position, key)| lowrank::turn_back(key, &lowrank::angles(position, head_dim, rope_theta)))
        .collect();
    let basis = |rows: &[f32]| lowrank::eigenvectors(gram(rows, width), width);
    HeadParameters { key_basis: basis(&before), value_basis: basis(values), rope_theta }
}

/// `sum x x^T` of rows.
fn gram(rows: &[f32], width: usize) -> Vec<f64> {
    let product = |i: usize, j: usize| rows.chunks_exact(width).map(|x| f64::from(x[i]) * f64::from(x[j])).sum::<f64>();
    (0..width * width).into_par_iter().map(|at| product(at / width, at % width)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_basis_follows_the_rows() {
        // Keys and values vary along one direction each; the first column is that direction.
        let direction = [0.6_f32, 0.0, 0.8, 0.0, 0.0, 0.0, 0.0, 0.0];
        let values: Vec<f32> = (0..32_u8).flat_map(|t| direction.map(|d| d * (f32::from(t) - 15.5))).collect();
        let keys: Vec<f32> = (0..32)
            .flat_map(|position| {
                let wide: Vec<f64> = direction.iter().map(|x| f64::from(*x)).collect();
                lowrank::turn(&wide, &lowrank::angles(position, 8, 10_000.0))
            })
            .map(|x| half::f16::from_f64(x).to_f32())
            .collect();
        let head = of_rows(&keys, &values, 8, 10_000.0);
        for basis in [&head.key_basis, &head.value_basis] {
            for (c, expected) in direction.iter().enumerate() {
                let got = basis[c * 8].to_f32();
                assert!((got.abs() - expected.abs()).abs() < 5e-3, "channel {c}: {got}");
            }
        }
    }
}
