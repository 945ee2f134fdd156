//! The report of `bench metrics`: the four metrics of one session, by its context and its compression.

use std::fmt;

use serde::Serialize;

use super::run_tables::cache;
use super::table::{Align, block, counted, number, table};
use super::{DeviceReport, ModelReport, Program};
use crate::eval::metrics::SessionMetrics;
use crate::geometry::Bytes;

/// The four metrics.
#[derive(Clone, Debug, Serialize)]
pub struct MetricsReport {
    /// `bench metrics`.
    pub kind: &'static str,
    /// The program.
    pub program: Program,
    /// The device.
    pub device: DeviceReport,
    /// The model. Of one whose layers were measured in part this is the whole of them, with the vocabulary that was measured.
    pub model: ModelReport,
    /// What was measured in the place of the whole model; `null` where it was all of it.
    pub scaled: Option<Scaled>,
    /// Device bytes for caches, tables, scratch and staging.
    pub kv_budget_bytes: Bytes,
    /// Tokens of a page.
    pub page_tokens: u32,
    /// Rows of a prompt step.
    pub chunk_tokens: u32,
    /// Prompts that were measured of each.
    pub repeats: usize,
    /// One per context and compression.
    pub results: Vec<SessionMetrics>,
    /// Time of all.
    pub elapsed_s: f64,
}

/// A model of which a part was measured, with random weights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Scaled {
    /// Layers that ran.
    pub layers_measured: u32,
    /// Layers that the figures stand for, in proportion.
    pub layers: u32,
    /// Tokens of the vocabulary that ran.
    pub vocab_measured: u32,
    /// Tokens of the model's vocabulary, whose output matrix no figure holds.
    pub vocab: u32,
    /// The same in words.
    pub words: String,
}

impl Scaled {
    /// So many layers and tokens of all.
    pub fn new(layers: (u32, u32), vocab: (u32, u32)) -> Self {
        let words = format!(
            "{} of {} with random weights ran; bytes and times are {:.2} times theirs, the fixed time of a step among \
             them, and sessions as many fewer; the output matrix of {} tokens, here {}, is left out",
            layers.0,
            counted(u64::from(layers.1), "layer"),
            f64::from(layers.1) / f64::from(layers.0),
            vocab.1,
            vocab.0,
        );
        Self { layers_measured: layers.0, layers: layers.1, vocab_measured: vocab.0, vocab: vocab.1, words }
    }
}

impl fmt::Display for MetricsReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Align::{Left, Right};
        let columns = [
            ("\ncontext", Right),
            ("\ncache", Left),
            ("bytes\nheld", Right),
            ("sessions\nthat fit", Right),
            ("prefill\ns", Right),
            ("of this,\ncompress s", Right),
            ("decode\nms/token", Right),
            ("p10 to p90\nms", Right),
            ("in a batch\nms/step", Right),
            ("switch\nms", Right),
        ];
        let ms = |seconds: f64| number(Some(seconds * 1e3));
        let rows = self.results.iter().map(|row| {
            let decode = row.decode_token_s;
            vec![
                row.context_tokens.to_string(),
                cache(&row.compression),
                row.cache_bytes.to_string(),
                row.concurrency.to_string(),
                format!("{:.3}", row.prefill_s.median),
                format!("{:.3}", row.compress_s.median),
                ms(decode.median),
                format!("{} to {}", ms(decode.p10), ms(decode.p90)),
                row.batch.map_or("-".to_owned(), |b| format!("{} x {}", b.sessions, ms(b.step_s.median))),
                ms(row.switch_s()),
            ]
        });
        writeln!(f, "{}", table(&columns, rows))?;
        let capacity = self.results.first().map_or(Bytes::ZERO, |row| row.capacity_bytes);
        let mut lines = vec![
            ("budget", format!("{}, of which {capacity} for pages", self.kv_budget_bytes)),
            ("prompts", format!("in chunks of {}, {}", self.chunk_tokens, counted(self.repeats as u64, "time"))),
            ("switch", "out and back, with nothing beside it".to_owned()),
            ("checked", "logits are numbers; what came back held the bytes that left".to_owned()),
        ];
        lines.extend(self.scaled.as_ref().map(|scaled| ("scaled", scaled.words.clone())));
        f.write_str(&block("four metrics", &lines))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_measured_in_part_is_said_in_words() {
        let scaled = Scaled::new((2, 32), (1024, 64_000));
        assert_eq!(
            scaled.words,
            "2 of 32 layers with random weights ran; bytes and times are 16.00 times theirs, the fixed time of a step among \
             them, and sessions as many fewer; the output matrix of 64000 tokens, here 1024, is left out",
            "one sentence"
        );
    }
}
