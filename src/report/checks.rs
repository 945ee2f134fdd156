//! The report of `verify`.

use std::fmt;

use serde::Serialize;

use super::table::{Align, count, counted, table};
use super::{DeviceReport, Program};
use crate::eval::verify::Check;

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
