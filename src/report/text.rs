//! The reports of `generate` and `tokenize`.

use std::fmt;

use serde::Serialize;

use super::table::{Align, count, counted, number, table};
use super::{DecodeMetric, DeviceReport, ModelReport, PrefillMetric, Program};
use crate::geometry::Bytes;
use crate::kernels::sample::Sampling;
use crate::pool::PoolReport;

/// A text that was produced.
#[derive(Clone, Debug, Serialize)]
pub struct GenerateReport {
    /// The program.
    pub program: Program,
    /// The device.
    pub device: DeviceReport,
    /// The model.
    pub model: ModelReport,
    /// What was done to the cache, in the form that `--compress` reads.
    pub compression: String,
    /// How tokens were chosen.
    pub sampling: Sampling,
    /// Tokens of the prompt, the chat template included.
    pub prompt_tokens: usize,
    /// Tokens produced, the one that ended the text included.
    pub new_tokens: usize,
    /// The text produced.
    pub text: String,
    /// Until the first token.
    pub first_token_s: Option<f64>,
    /// Steps over the prompt.
    pub prefill: PrefillMetric,
    /// Steps after it.
    pub decode: DecodeMetric,
    /// `stop`, `length` or `cancelled`, as in [`SessionReport::ended_by`](super::SessionReport::ended_by).
    pub ended_by: &'static str,
    /// The pool at the end.
    pub pool: PoolReport,
}

impl fmt::Display for GenerateReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} in {} s, {} tokens/s; {} in {} s, {} ms each, {} tokens/s; ended by {}; on {}",
            counted(self.prefill.prompt_tokens, "prompt token"),
            number(Some(self.prefill.elapsed_s)),
            number(self.prefill.tokens_per_s),
            counted(self.decode.decode_tokens, "further token"),
            number(Some(self.decode.elapsed_s)),
            number(self.decode.step_ms),
            number(self.decode.tokens_per_s),
            self.ended_by,
            self.device,
        )
    }
}

/// A text as a model sees it.
#[derive(Clone, Debug, Serialize)]
pub struct TokenizeReport {
    /// The program.
    pub program: Program,
    /// The model.
    pub model: ModelReport,
    /// The tokens, in order.
    pub tokens: Vec<TokenReport>,
    /// How many there are.
    pub count_tokens: usize,
    /// Bytes of an uncompressed cache of so many tokens, without the unused rest of its last pages.
    pub kv_bytes: Bytes,
}

/// One token.
#[derive(Clone, Debug, Serialize)]
pub struct TokenReport {
    /// Its number in the vocabulary.
    pub id: u32,
    /// Its text; U+FFFD stands for a part of a character.
    pub piece: String,
    /// Whether it is a control or user-defined token.
    pub marker: bool,
}

impl fmt::Display for TokenizeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = [("position", Align::Right), ("id", Align::Right), ("piece", Align::Left)];
        let rows = self.tokens.iter().enumerate().map(|(position, token)| {
            // Quoted and escaped, since most pieces begin with a space.
            let piece = if token.marker { token.piece.clone() } else { format!("{:?}", token.piece) };
            vec![position.to_string(), token.id.to_string(), piece]
        });
        f.write_str(&table(&columns, rows))?;
        writeln!(
            f,
            "\n{} x {} = {} of KV cache ({} bytes)",
            counted(self.count_tokens as u64, "token"),
            self.model.kv_per_token_bytes,
            self.kv_bytes,
            count(self.kv_bytes.0)
        )
    }
}
