//! The report of `tune`.

use std::fmt;

use serde::Serialize;

use super::table::{Align, block, counted, table};
use super::{DeviceReport, Program};
use crate::eval::kernels::Sizes;
use crate::eval::spread::Spread;
use crate::eval::tune::TuneRow;

/// What a search has found.
#[derive(Clone, Debug, Serialize)]
pub struct TuneReport {
    /// `tune`.
    pub kind: &'static str,
    /// The program.
    pub program: Program,
    /// The device.
    pub device: DeviceReport,
    /// Where the result is kept.
    pub file: String,
    /// How large cases were.
    pub sizes: Sizes,
    /// Cases that were asked for; those beyond the rows were not reached.
    pub cases: usize,
    /// One per case that was reached.
    pub rows: Vec<TuneRow>,
    /// Seconds of it all.
    pub elapsed_s: f64,
}

impl TuneReport {
    /// Cases that have a winner.
    pub fn settled(&self) -> usize {
        self.rows.iter().filter(|row| row.winner.is_some()).count()
    }
}

/// A row as it is shown when it is there: its case, and what is refused in it.
pub fn tune_line(row: &TuneRow) -> String {
    let mut line = match &row.winner {
        Some(winner) => format!("{}  {winner}, {}\n", row.case, gain(row)),
        None => format!("{}  no variant is right\n", row.case),
    };
    for refused in &row.refused {
        line.push_str(&format!("  refused: {}: {}\n", refused.candidate, refused.reason));
    }
    line
}

fn gain(row: &TuneRow) -> String {
    match row.gain {
        _ if row.winner.as_ref() == Some(&row.default) => "the default".to_owned(),
        Some(gain) => format!("{:.0} % less time", 100.0 * gain),
        None => "the default does not run".to_owned(),
    }
}

impl fmt::Display for TuneReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Align::{Left, Right};
        let columns = [
            ("\ncase", Left),
            ("\ndefault", Left),
            ("\nms", Right),
            ("\nwinner", Left),
            ("\nms", Right),
            ("\ngain", Right),
            ("\nmeasured", Right),
            ("\nrefused", Right),
            ("not\ntried", Right),
        ];
        let ms = |times: Option<Spread>| times.map_or("-".to_owned(), |times| format!("{:.3}", times.median * 1e3));
        let rows = self.rows.iter().map(|row| {
            vec![
                row.case.clone(),
                row.default.clone(),
                ms(row.default_s),
                row.winner.clone().unwrap_or_else(|| "-".to_owned()),
                ms(row.winner_s),
                row.gain.map_or("-".to_owned(), |gain| format!("{:.0} %", 100.0 * gain)),
                row.measured.to_string(),
                row.refused.len().to_string(),
                row.untried.to_string(),
            ]
        });
        writeln!(f, "{}", table(&columns, rows))?;
        let changed = self.rows.iter().filter(|row| row.winner.as_ref().is_some_and(|winner| *winner != row.default));
        let mut lines = vec![
            ("file", self.file.clone()),
            ("changed", format!("{} of {}", changed.count(), counted(self.rows.len() as u64, "case"))),
            ("time", format!("{:.0} s", self.elapsed_s)),
        ];
        let missed = self.cases - self.rows.len();
        if missed > 0 {
            let cases = counted(missed as u64, "case");
            lines.push(("not reached", format!("{cases}; give more --seconds, or --only")));
        }
        f.write_str(&block("tuning", &lines))
    }
}
