//! The report of `calibrate heads`.

use std::fmt;

use serde::Serialize;

use super::table::{Align, block, table};
use super::{DeviceReport, ModelReport, Program};
use crate::eval::heads::{HeadMeasures, HeadSettings};

/// Heads that a table shows.
const SHOWN: usize = 12;

/// What heads are worth.
#[derive(Clone, Debug, Serialize)]
pub struct HeadsReport {
    /// The program.
    pub program: Program,
    /// The device.
    pub device: DeviceReport,
    /// The model.
    pub model: ModelReport,
    /// Path of the prose, as given; `null` for the built-in one.
    pub text: Option<String>,
    /// How they were measured.
    pub settings: HeadSettings,
    /// What was measured, per list, `[layer][KV head]`.
    pub measured: HeadMeasures,
    /// What made the scores.
    pub by: String,
    /// The scores, in the same order.
    pub scores: Vec<f64>,
    /// Time of all reading.
    pub elapsed_s: f64,
}

impl fmt::Display for HeadsReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Align::Right;
        let columns = ["layer", "KV head", "score", "induction", "copy", "reach", "echo"].map(|name| (name, Right));
        let HeadMeasures { induction, copy, reach, echo } = &self.measured;
        let mut best: Vec<usize> = (0..self.scores.len()).collect();
        best.sort_by(|a, b| self.scores[*b].total_cmp(&self.scores[*a]));
        let rows = best.iter().take(SHOWN).map(|list| {
            let heads = self.model.geometry.heads.num_kv_heads as usize;
            let numbers = [&self.scores, induction, copy, reach, echo].map(|of| format!("{:.3}", of[*list]));
            [(list / heads).to_string(), (list % heads).to_string()].into_iter().chain(numbers).collect()
        });
        writeln!(f, "{}", table(&columns, rows))?;
        let shown = best.len().min(SHOWN);
        let lines = [
            ("shown", format!("the best {shown} of {} KV heads over all layers", best.len())),
            ("scores", self.by.clone()),
            ("prose", self.text.clone().unwrap_or_else(|| "built in".to_owned())),
            ("time", format!("{:.1} s", self.elapsed_s)),
        ];
        f.write_str(&block("head scores", &lines))
    }
}
