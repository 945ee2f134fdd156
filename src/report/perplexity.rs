//! The report of `eval perplexity`.

use std::fmt;

use serde::Serialize;

use super::run_tables::cache;
use super::table::{Align, block, counted, table};
use super::{DeviceReport, ModelReport, Program};
use crate::eval::perplexity::Perplexity;

/// Perplexity of a text over caches.
#[derive(Clone, Debug, Serialize)]
pub struct PerplexityReport {
    /// The program.
    pub program: Program,
    /// The device.
    pub device: DeviceReport,
    /// The model.
    pub model: ModelReport,
    /// Path of the text, as given.
    pub text: String,
    /// Tokens of the text.
    pub text_tokens: usize,
    /// On the device, every compression in the order given.
    pub results: Vec<PerplexityRow>,
    /// The full cache on the CPU in f64, where asked for.
    pub reference: Option<Perplexity>,
    /// Time of the windows on the device, reading the logits back included.
    pub elapsed_s: f64,
}

/// One compression.
#[derive(Clone, Debug, Serialize)]
pub struct PerplexityRow {
    /// What was done to the cache, in the form that `--compress` reads.
    pub compression: String,
    /// What was measured.
    #[serde(flatten)]
    pub measured: Perplexity,
}

impl fmt::Display for PerplexityReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Align::{Left, Right};
        let columns = [("\ncache", Left), ("nll\nnats", Right), ("\nperplexity", Right), ("less\nthe first", Right)];
        let on_device = self.results.iter().map(|row| (cache(&row.compression), &row.measured));
        let on_cpu = self.reference.iter().map(|measured| ("full, f64 on the CPU".to_owned(), measured));
        let first = self.results.first().map_or(f64::NAN, |row| row.measured.perplexity);
        let rows = on_device.chain(on_cpu).map(|(name, measured)| {
            let Perplexity { mean_nll, perplexity, .. } = measured;
            vec![name, format!("{mean_nll:.5}"), format!("{perplexity:.4}"), format!("{:+.4}", perplexity - first)]
        });
        writeln!(f, "{}", table(&columns, rows))?;
        let (n_windows, window) =
            self.results.first().map_or((0, 0), |row| (row.measured.window_nll.len(), row.measured.window));
        let windows = counted(n_windows as u64, "window");
        let tokens = counted(self.text_tokens as u64, "token");
        let lines = [
            ("text", format!("{}: {tokens}, {windows} of {window}", self.text)),
            ("predicted", format!("{} of each window, behind as many of context", window - window / 2)),
            ("time", format!("{:.2} s", self.elapsed_s)),
        ];
        f.write_str(&block("perplexity", &lines))
    }
}
