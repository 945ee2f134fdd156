//! The report of `bench kernels`.

use std::fmt;

use serde::Serialize;

use super::table::{Align, block, number, table};
use super::{DeviceReport, Program};
use crate::eval::kernels::{Figures, KernelRow, Outcome, Roof, Sizes};

/// Kernels measured one by one.
#[derive(Clone, Debug, Serialize)]
pub struct KernelsReport {
    /// `bench kernels`.
    pub kind: &'static str,
    /// The program.
    pub program: Program,
    /// The device, and the clock of its kernels.
    pub device: DeviceReport,
    /// How large the cases are.
    pub sizes: Sizes,
    /// Whether pages that follow each other in a list follow each other in memory.
    pub in_order: bool,
    /// What the device reaches at best, measured before the kernels.
    pub roof: Roof,
    /// Every kernel, case and candidate, in the order of measuring.
    pub rows: Vec<KernelRow>,
    /// Time of all, checks and fillings included.
    pub elapsed_s: f64,
}

impl KernelsReport {
    /// Rows without a figure.
    pub fn without_figure(&self) -> usize {
        self.rows.iter().filter(|row| !matches!(row.outcome, Outcome::Measured(_))).count()
    }

    /// A roofline of each kernel, as one picture.
    pub fn svg(&self) -> String {
        super::roofline::svg(&self.rows, &self.roof, &self.device.adapter.name)
    }
}

/// A number with three digits that count, however small it is: a slow device's figures are far below a GPU's.
fn figure(value: f64) -> String {
    match value.abs() {
        x if x >= 0.1 || x == 0.0 => number(Some(value)),
        x => {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to a few decimals")]
            let decimals = (2.0 - x.log10().floor()).clamp(2.0, 9.0) as usize;
            format!("{value:.decimals$}")
        }
    }
}

/// One row as a line, to be shown as soon as it is measured.
pub fn kernel_line(row: &KernelRow) -> String {
    let name = format!("{} [{}]", row.case, row.candidate);
    match &row.outcome {
        Outcome::Wrong(why) => format!("{name:<48} WRONG: {why}\n"),
        Outcome::Failed(why) => format!("{name:<48} failed: {why}\n"),
        Outcome::Measured(figures) => {
            let Figures { seconds, bytes_per_s, pairs_per_s, to_f16, error_over_bound, .. } = figures;
            let (memory, part) = figures.memory();
            let pairs = pairs_per_s.map_or_else(String::new, |pairs| format!(" {:>9} Gtok/s", figure(pairs * 1e-9)));
            let to_f16 = to_f16.map_or_else(String::new, |ratio| format!("  {ratio:>5.2} x f16"));
            format!(
                "{name:<48} {:>9} µs {:>7} GB/s {:>5.1} % of {memory}{pairs}{to_f16}  error/bound {error_over_bound:.3}\n",
                number(Some(seconds.median * 1e6)),
                figure(bytes_per_s * 1e-9),
                part * 100.0,
            )
        }
    }
}

/// The cells of a row behind its name.
fn cells(outcome: &Outcome) -> Vec<String> {
    let figures = match outcome {
        Outcome::Measured(figures) => figures,
        Outcome::Wrong(_) => return vec!["wrong".to_owned()],
        Outcome::Failed(_) => return vec!["failed".to_owned()],
    };
    let in_units = |value: f64, unit: f64| figure(value * unit);
    let seconds = figures.seconds.scaled(1e6);
    let unsettled = if figures.settled { "" } else { " ~" };
    vec![
        format!("{}{unsettled}", number(Some(seconds.median))),
        number(Some(seconds.p10)),
        number(Some(seconds.p90)),
        in_units(figures.bytes, 1e-6),
        in_units(figures.bytes_per_s, 1e-9),
        format!("{:.1} % {}", figures.memory().1 * 100.0, figures.memory().0),
        in_units(figures.flop_per_s, 1e-9),
        figures.pairs_per_s.map_or_else(|| "-".to_owned(), |pairs| figure(pairs * 1e-9)),
        number(figures.to_f16),
        format!("{:.3}", figures.error_over_bound),
        format!("{:.0e}", figures.nmse),
    ]
}

impl fmt::Display for KernelsReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Align::{Left, Right};
        let columns = [
            ("case", Left),
            ("candidate", Left),
            ("µs", Right),
            ("p10", Right),
            ("p90", Right),
            ("MB", Right),
            ("GB/s", Right),
            ("of ceiling", Right),
            ("GFLOP/s", Right),
            ("Gtok/s", Right),
            ("x f16", Right),
            ("error/bound", Right),
            ("NMSE", Right),
        ];
        let rows = self.rows.iter().map(|row| {
            let mut all = vec![row.case.clone(), row.candidate.clone()];
            all.extend(cells(&row.outcome));
            all.resize(columns.len(), String::new());
            all
        });
        writeln!(f, "{}", table(&columns, rows))?;
        let Roof { read_bytes_per_s, copy_bytes_per_s, flop_per_s } = self.roof;
        let clock = self.device.clock.clone().unwrap_or_default();
        let pages = if self.in_order { "in the pool's order" } else { "in random order" };
        let settled = "a ~ marks times that had not settled within 3 % when the warm-up ended";
        let lines = [
            ("read ceiling", format!("{} GB/s", number(Some(read_bytes_per_s * 1e-9)))),
            ("copy ceiling", format!("{} GB/s, read and written", number(Some(copy_bytes_per_s * 1e-9)))),
            ("FLOP ceiling", format!("{} GFLOP/s of matrix products", number(Some(flop_per_s * 1e-9)))),
            ("timed by", format!("{clock}; {settled}")),
            ("pages", pages.to_owned()),
            ("checked", "outputs are poisoned, then compared with f64 before and after timing".to_owned()),
            ("Gtok/s", "billions of (token, KV head) pairs that are read per second".to_owned()),
        ];
        f.write_str(&block("kernels", &lines))?;
        let above = |row: &KernelRow| matches!(&row.outcome, Outcome::Measured(figures) if figures.memory().1 > 1.0);
        if self.rows.iter().any(above) {
            writeln!(f, "  what moves more than the ceiling reads from a cache: its part of the ceiling says nothing")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_figures_keep_their_digits() {
        let shown = [0.0, 3110.4, 12.34, 0.5, 0.01234, 0.000_123_4].map(figure);
        assert_eq!(shown, ["0.00", "3110", "12.3", "0.50", "0.0123", "0.000123"], "three digits");
    }
}
