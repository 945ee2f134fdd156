//! Perplexity of a text: consecutive windows from its first token, each run alone from position 0.
//!
//! ```text
//! nll(window) = mean over targets t in the second half of the window of -ln p(token[t] | token[..t])
//! perplexity  = exp(mean over windows of nll)
//! ```
//!
//! The first half of a window only gives context, so that every target has at least `window / 2` tokens before it; a
//! compression that evicts does so behind that half.

use serde::Serialize;

use super::prompt;
use crate::compression::Compression;
use crate::engine::{Engine, EngineError};
use crate::reference::compare::{log_sum_exp, widen};
use crate::reference::transformer::ReferenceModel;
use crate::schedule::Caches;

/// The result over a text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Perplexity {
    /// Tokens of a window.
    pub window: usize,
    /// Mean negative log-likelihood of each window, in nats.
    pub window_nll: Vec<f64>,
    /// Mean over all windows.
    pub mean_nll: f64,
    /// `exp(mean_nll)`.
    pub perplexity: f64,
}

impl Perplexity {
    /// The result of the negative log-likelihoods of windows of so many tokens.
    pub fn new(window: usize, window_nll: Vec<f64>) -> Self {
        let mean_nll = window_nll.iter().sum::<f64>() / window_nll.len() as f64;
        Self { window, window_nll, mean_nll, perplexity: mean_nll.exp() }
    }
}

/// Whole windows of a text, at most `max_windows`.
///
/// # Errors
/// A sentence with the numbers when there is none.
pub fn windows(tokens: &[u32], window: usize, max_windows: usize) -> Result<Vec<&[u32]>, String> {
    if window < 4 {
        return Err(format!("a window of {window} tokens is too short; use at least 4"));
    }
    let windows: Vec<_> = tokens.chunks_exact(window).take(max_windows).collect();
    if windows.is_empty() {
        return Err(format!("the text has {} tokens, which does not fill one window of {window}", tokens.len()));
    }
    Ok(windows)
}

/// Positions whose logits predict the targets of a window.
const fn predictors(window: usize) -> std::ops::Range<usize> {
    window / 2 - 1..window - 1
}

fn nll(logits: &[f64], target: u32) -> f64 {
    log_sum_exp(logits) - logits[target as usize]
}

/// Mean negative log-likelihood of a window through the engine, in nats. The first half is the document, behind which a
/// compression evicts.
///
/// # Errors
/// [`EngineError`].
pub fn window_on_engine(
    engine: &mut Engine<'_>,
    caches: &mut Caches,
    compression: &Compression,
    window: &[u32],
    chunk: usize,
) -> Result<f64, EngineError> {
    let wanted = predictors(window.len());
    let n = wanted.len() as f64;
    let mut sum = 0.0;
    let mut add = |position: usize, row: Vec<f32>| sum += nll(&widen(&row), window[position + 1]);
    prompt::logits(engine, caches, compression, window, wanted, chunk, &mut add)?;
    Ok(sum / n)
}

/// Perplexity through the engine.
///
/// # Errors
/// [`EngineError`].
pub fn on_engine(
    engine: &mut Engine<'_>,
    caches: &mut Caches,
    compression: &Compression,
    windows: &[&[u32]],
    chunk: usize,
) -> Result<Perplexity, EngineError> {
    let nll = windows.iter().map(|window| window_on_engine(engine, caches, compression, window, chunk));
    Ok(Perplexity::new(windows[0].len(), nll.collect::<Result<_, _>>()?))
}

/// Perplexity through the CPU reference.
pub fn on_reference(model: &ReferenceModel<'_>, windows: &[&[u32]]) -> Perplexity {
    let one = |tokens: &&[u32]| {
        let positions: Vec<usize> = predictors(tokens.len()).collect();
        let rows = model.logits(tokens, &positions);
        let sum: f64 = positions.iter().zip(&rows).map(|(p, row)| nll(row, tokens[p + 1])).sum();
        sum / positions.len() as f64
    };
    Perplexity::new(windows[0].len(), windows.iter().map(one).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_the_second_half() {
        assert_eq!(predictors(256), 127..255, "targets 128 to 255");
        assert_eq!(windows(&[1; 10], 4, 9).expect("two windows").len(), 2, "whole windows only");
        assert!(windows(&[1; 3], 4, 9).is_err(), "too short a text");
        assert!((nll(&[0.0, 0.0], 1) - std::f64::consts::LN_2).abs() < 1e-12, "a fair coin");
    }
}
