//! The reports of `eval perplexity` and `verify`.

use std::fmt;

use serde::Serialize;

use super::table::{Align, block, count, counted, table};
use super::{DeviceReport, ModelReport, Program};
use crate::eval::perplexity::Perplexity;
use crate::eval::verify::Check;

/// Perplexity of a text.
#[derive(Clone, Debug, Serialize)]
pub struct PerplexityReport {
    /// The program.
    pub program: Program,
    /// The device.
    pub device: DeviceReport,
    /// The model.
    pub model: ModelReport,
    /// What was done to the cache, in the form that `--compress` reads.
    pub compression: String,
    /// Path of the text, as given.
    pub text: String,
    /// Tokens of the text.
    pub text_tokens: usize,
    /// On the device.
    pub engine: Perplexity,
    /// On the CPU in f64, where asked for.
    pub reference: Option<Perplexity>,
    /// `|engine - reference| / reference` of the two perplexities.
    pub relative_difference: Option<f64>,
    /// Time of the windows on the device, reading the logits back included.
    pub elapsed_s: f64,
}

impl fmt::Display for PerplexityReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut columns = vec![("window", Align::Right), ("nll", Align::Right)];
        if self.reference.is_some() {
            columns.push(("reference", Align::Right));
        }
        let rows = self.engine.window_nll.iter().enumerate().map(|(i, nll)| {
            let mut row = vec![i.to_string(), format!("{nll:.5}")];
            row.extend(self.reference.as_ref().map(|r| format!("{:.5}", r.window_nll[i])));
            row
        });
        writeln!(f, "{}", table(&columns, rows))?;
        let windows = counted(self.engine.window_nll.len() as u64, "window");
        let tokens = counted(self.text_tokens as u64, "token");
        let mut lines = vec![
            ("text", format!("{}: {tokens}, {windows} of {}", self.text, self.engine.window)),
            ("mean nll", format!("{:.5} nats per token", self.engine.mean_nll)),
            ("perplexity", format!("{:.4}", self.engine.perplexity)),
        ];
        if let (Some(reference), Some(difference)) = (&self.reference, self.relative_difference) {
            let text = format!("{:.4} on the CPU, relative difference {difference:.1e}", reference.perplexity);
            lines.push(("reference", text));
        }
        lines.push(("time", format!("{:.2} s", self.elapsed_s)));
        f.write_str(&block("perplexity", &lines))
    }
}

/// Kernels against their oracles.
#[derive(Clone, Debug, Serialize)]
pub struct VerifyReport {
    /// The program.
    pub program: Program,
    /// The device.
    pub device: DeviceReport,
    /// `full` or `quick`.
    pub extent: &'static str,
    /// Every check.
    pub checks: Vec<Check>,
    /// Whether all of them passed, and there were any.
    pub passed: bool,
    /// Time of all checks, the oracle's included.
    pub elapsed_s: f64,
}

impl VerifyReport {
    /// The checks that did not pass.
    pub fn failed(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|check| !check.passed())
    }

    /// The check that came closest to its bound.
    fn worst(&self) -> Option<&Check> {
        self.checks.iter().max_by(|a, b| a.error_over_bound.total_cmp(&b.error_over_bound))
    }
}

/// A check in one line.
pub(super) fn describe(check: &Check) -> String {
    format!("{} ({}) with {:.2} of its bound", check.kernel, check.case, check.error_over_bound)
}

impl fmt::Display for VerifyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Align::{Left, Right};
        let columns = [
            ("kernel", Left),
            ("case", Left),
            ("compared", Right),
            ("error/bound", Right),
            ("NMSE", Right),
            ("", Left),
        ];
        let mut checks: Vec<&Check> = self.checks.iter().collect();
        // Stable: the cases of a kernel stay in the order in which they ran.
        checks.sort_by_key(|check| check.kernel);
        let mut before = "";
        let rows = checks.into_iter().map(|check| {
            let kernel = if check.kernel == before { "" } else { check.kernel };
            before = check.kernel;
            vec![
                kernel.to_owned(),
                check.case.clone(),
                count(check.compared as u64),
                format!("{:.3}", check.error_over_bound),
                check.nmse.map_or_else(|| "-".to_owned(), |nmse| format!("{nmse:.1e}")),
                if check.passed() { "ok" } else { "FAILED" }.to_owned(),
            ]
        });
        writeln!(f, "{}", table(&columns, rows))?;
        let failed = self.failed().count();
        let compared: usize = self.checks.iter().map(|check| check.compared).sum();
        write!(f, "{}, {} failed, ", counted(self.checks.len() as u64, "check"), failed)?;
        write!(f, "{} compared in {:.1} s", counted(compared as u64, "number"), self.elapsed_s)?;
        match self.worst() {
            Some(worst) => writeln!(f, "; closest to its bound: {}", describe(worst)),
            None => writeln!(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_is_described_with_its_numbers() {
        let check =
            Check { kernel: "decode", case: "head_dim 64".into(), compared: 3, error_over_bound: 1.5, nmse: None };
        assert_eq!(describe(&check), "decode (head_dim 64) with 1.50 of its bound", "one line");
        assert!(!check.passed(), "over its bound");
    }
}
