//! The report of `bench step`.

use std::fmt;

use serde::Serialize;

use super::run_tables::cache;
use super::table::{Align, block, counted, number, table};
use super::{DeviceReport, ModelReport, Program};
use crate::eval::step::{StepFigures, StepOutcome, StepRow};
use crate::geometry::Bytes;

/// Decode steps end to end.
#[derive(Clone, Debug, Serialize)]
pub struct StepReport {
    /// `bench step`.
    pub kind: &'static str,
    /// The program.
    pub program: Program,
    /// The device, and the clock of its kernels.
    pub device: DeviceReport,
    /// The model.
    pub model: ModelReport,
    /// Device bytes for caches, tables, scratch and staging.
    pub kv_budget_bytes: Bytes,
    /// Tokens of a page.
    pub page_tokens: u32,
    /// Steps that were measured of each.
    pub steps: usize,
    /// Bytes that the device reads per second, measured in the same process.
    pub read_bytes_per_s: f64,
    /// One per batch, context and compression.
    pub rows: Vec<StepRow>,
    /// Time of all, prompts included.
    pub elapsed_s: f64,
}

impl StepReport {
    /// Rows without figures.
    pub fn without_figures(&self) -> usize {
        self.rows.iter().filter(|row| matches!(row.outcome, StepOutcome::Failed(_))).count()
    }
}

fn cells(row: &StepRow) -> Vec<String> {
    let name = vec![row.batch.to_string(), row.context_tokens.to_string(), cache(&row.compression)];
    let StepOutcome::Measured(figures) = &row.outcome else { return [name, vec!["none".to_owned()]].concat() };
    let StepFigures { seconds, device_s, host_s, .. } = figures;
    let ms = |seconds: f64| number(Some(seconds * 1e3));
    let figures = vec![
        number(Some(figures.tokens_per_s)),
        ms(seconds.median),
        format!("{} to {}", ms(seconds.p10), ms(seconds.p90)),
        ms(device_s.median),
        ms(host_s.median),
        format!("{:.1} %", figures.host_part * 100.0),
        format!("{:.1}", figures.dispatches_per_layer),
        figures.weight_bytes.to_string(),
        figures.cache_bytes.to_string(),
        ms(figures.floor_s),
        format!("{:.1} %", figures.of_floor * 100.0),
        format!("{:.1} %", figures.device_of_floor * 100.0),
    ];
    [name, figures].concat()
}

impl fmt::Display for StepReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Align::{Left, Right};
        let columns = [
            ("\nsessions", Right),
            ("\ncontext", Right),
            ("\ncache", Left),
            ("\ntokens/s", Right),
            ("step\nms", Right),
            ("p10 to p90\nms", Right),
            ("device\nms", Right),
            ("host\nms", Right),
            ("of the\nstep", Right),
            ("kernels\nper layer", Right),
            ("bytes of\nweights", Right),
            ("\nof caches", Right),
            ("floor\nms", Right),
            ("step at\nof floor", Right),
            ("device at\nof floor", Right),
        ];
        let rows = self.rows.iter().map(|row| {
            let mut cells = cells(row);
            cells.resize(columns.len(), String::new());
            cells
        });
        writeln!(f, "{}", table(&columns, rows))?;
        for row in &self.rows {
            if let StepOutcome::Failed(why) = &row.outcome {
                writeln!(f, "{}: {why}", row.case)?;
            }
        }
        let clock = self.device.clock.clone().unwrap_or_default();
        let lines = [
            (
                "step",
                format!("from having tokens to having the next, median of {}", counted(self.steps as u64, "step")),
            ),
            ("device", format!("by {clock}")),
            ("host", "planning and recording, before the submission".to_owned()),
            (
                "floor",
                format!(
                    "weights once, and what rows read of their caches, at {} GB/s, which is what the device reads",
                    number(Some(self.read_bytes_per_s * 1e-9))
                ),
            ),
            ("checked", "logits are numbers, and one session's are the same without company, bit by bit".to_owned()),
        ];
        f.write_str(&block("decode steps", &lines))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compression::Compression;

    #[test]
    fn a_row_without_figures_keeps_its_name() {
        let row = StepRow {
            case: "step/2x64/full".to_owned(),
            batch: 2,
            context_tokens: 64,
            compression: Compression::default().to_string(),
            outcome: StepOutcome::Failed("too large".to_owned()),
        };
        assert_eq!(cells(&row), ["2", "64", "f16", "none"], "what it would have been");
    }
}
