//! Records of `bench kernels`: CSV, one line per figure, to be kept and to be compared with.

use std::fmt;
use std::fmt::Write as _;

use super::table::{Align, number, table};
use super::{KernelsReport, Origin};
use crate::eval::kernels::{KernelRow, Outcome};

/// A line of a record.
#[derive(Clone, Debug, PartialEq)]
pub struct RecordFigure {
    /// Name of the case.
    pub case: String,
    /// Variant of the kernel.
    pub candidate: String,
    /// What one in ten runs does not exceed, in microseconds; the median; what nine in ten do not exceed.
    pub us: [f64; 3],
    /// Useful bytes of a run.
    pub bytes: f64,
    /// FLOP of a run.
    pub flop: f64,
    /// The ceiling that it comes nearer to: `read`, `copy` or `flop`.
    pub bound: String,
    /// That ceiling, per second.
    pub ceiling: f64,
    /// The part of it that is reached.
    pub fraction: f64,
    /// Largest observed error as a part of its bound.
    pub error_over_bound: f64,
    /// The adapter.
    pub device: String,
    /// Its driver.
    pub driver: String,
    /// The program's source.
    pub commit: String,
    /// When it was measured.
    pub date: String,
    /// Where times come from.
    pub timed_by: String,
}

const HEADER: [&str; 16] = [
    "case",
    "candidate",
    "us_p10",
    "us_median",
    "us_p90",
    "bytes",
    "flop",
    "bound",
    "ceiling_per_s",
    "fraction",
    "error_over_bound",
    "device",
    "driver",
    "commit",
    "date",
    "timed_by",
];

/// An adapter's name as the name of a folder.
pub fn device_slug(name: &str) -> String {
    let words = name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_ascii_lowercase).collect::<Vec<_>>().join("-")
}

impl KernelsReport {
    /// The figures as a record; rows without one are left out.
    pub fn record(&self, origin: &Origin) -> Vec<RecordFigure> {
        let figure = |row: &KernelRow| {
            let Outcome::Measured(figures) = &row.outcome else { return None };
            let us = figures.seconds.scaled(1e6);
            let (bound, fraction) = figures.bound();
            let ceiling = self.roof.of(bound);
            Some(RecordFigure {
                case: row.case.clone(),
                candidate: row.candidate.clone(),
                us: [us.p10, us.median, us.p90],
                bytes: figures.bytes,
                flop: figures.flop,
                bound: bound.to_owned(),
                ceiling,
                fraction,
                error_over_bound: figures.error_over_bound,
                device: self.device.adapter.name.clone(),
                driver: self.device.adapter.driver.clone(),
                commit: origin.commit.clone(),
                date: origin.date.clone(),
                timed_by: self.device.clock.clone().unwrap_or_default(),
            })
        };
        self.rows.iter().filter_map(figure).collect()
    }
}

impl RecordFigure {
    /// A record as text.
    pub fn write(figures: &[Self]) -> String {
        let mut text = HEADER.join(",") + "\n";
        for f in figures {
            let [p10, median, p90] = f.us;
            let numbers = format!(
                "{p10:.3},{median:.3},{p90:.3},{:.0},{:.0},{},{:.5e},{:.6},{:.4e}",
                f.bytes, f.flop, f.bound, f.ceiling, f.fraction, f.error_over_bound
            );
            let ends = [&f.device, &f.driver, &f.commit, &f.date, &f.timed_by].map(|word| quoted(word)).join(",");
            let _ = writeln!(text, "{},{},{numbers},{ends}", quoted(&f.case), quoted(&f.candidate));
        }
        text
    }

    /// Reads what [`Self::write`] wrote.
    ///
    /// # Errors
    /// A sentence with the line that is not one.
    pub fn read(text: &str) -> Result<Vec<Self>, String> {
        let mut lines = text.lines();
        if lines.next() != Some(HEADER.join(",").as_str()) {
            return Err(format!("it does not begin with '{}'", HEADER.join(",")));
        }
        let figures = (2..).zip(lines).map(|(n, line)| Self::parse(line).map_err(|e| format!("line {n}: {e}")));
        figures.collect()
    }

    fn parse(line: &str) -> Result<Self, String> {
        let words = split(line)?;
        let [case, candidate, numbers @ .., device, driver, commit, date, timed_by] = &words[..] else {
            return Err(format!("{} fields", words.len()));
        };
        let [p10, median, p90, bytes, flop, bound, ceiling, fraction, error] = numbers else {
            return Err(format!("{} fields rather than {}", words.len(), HEADER.len()));
        };
        let number = |word: &String| -> Result<f64, String> {
            let value = word.parse::<f64>().ok().filter(|x| x.is_finite() && *x >= 0.0);
            value.ok_or_else(|| format!("'{word}' is not a number of at least 0"))
        };
        Ok(Self {
            case: case.clone(),
            candidate: candidate.clone(),
            us: [number(p10)?, number(median)?, number(p90)?],
            bytes: number(bytes)?,
            flop: number(flop)?,
            bound: bound.clone(),
            ceiling: number(ceiling)?,
            fraction: number(fraction)?,
            error_over_bound: number(error)?,
            device: device.clone(),
            driver: driver.clone(),
            commit: commit.clone(),
            date: date.clone(),
            timed_by: timed_by.clone(),
        })
    }
}

/// A field, in quotes where it needs them; line breaks have no place in a record.
fn quoted(word: &str) -> String {
    let word = word.replace(['\n', '\r'], " ");
    if word.contains([',', '"']) { format!("\"{}\"", word.replace('"', "\"\"")) } else { word }
}

/// The fields of a line.
fn split(line: &str) -> Result<Vec<String>, String> {
    let mut fields = vec![String::new()];
    let mut inside = false;
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        let last = fields.last_mut().expect("there is one");
        match c {
            '"' if inside && chars.peek() == Some(&'"') => {
                chars.next();
                last.push('"');
            }
            '"' => inside = !inside,
            ',' if !inside => fields.push(String::new()),
            c => last.push(c),
        }
    }
    if inside { Err("a quote is not closed".to_owned()) } else { Ok(fields) }
}

/// Figures beside those of a record.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// The record's, then this run's.
    pairs: Vec<(RecordFigure, RecordFigure)>,
    /// Figures of the record that this run did not measure.
    only_then: usize,
    /// Figures of this run that are not in the record.
    only_now: usize,
    /// How much smaller a part of the ceiling may be.
    tolerance: f64,
}

impl Comparison {
    /// Joins by case and candidate.
    ///
    /// # Errors
    /// A sentence where nothing is in both.
    pub fn new(then: Vec<RecordFigure>, now: &[RecordFigure], tolerance: f64) -> Result<Self, String> {
        let n_then = then.len();
        let same = |a: &RecordFigure, b: &RecordFigure| a.case == b.case && a.candidate == b.candidate;
        let with_now = |old: RecordFigure| Some((old.clone(), now.iter().find(|new| same(&old, new))?.clone()));
        let pairs: Vec<_> = then.into_iter().filter_map(with_now).collect();
        if pairs.is_empty() {
            return Err(format!(
                "none of the {n_then} figures of the record was measured now; measure with the same sizes and candidates"
            ));
        }
        let (only_then, only_now) = (n_then - pairs.len(), now.len() - pairs.len().min(now.len()));
        Ok(Self { pairs, only_then, only_now, tolerance })
    }

    /// The part of the ceiling that is reached, as a multiple of the record's.
    fn ratio((then, now): &(RecordFigure, RecordFigure)) -> f64 {
        now.fraction / then.fraction
    }

    /// Figures that are worse than the tolerance allows.
    pub fn worse(&self) -> usize {
        self.pairs.iter().filter(|pair| self.is_worse(pair)).count()
    }

    fn is_worse(&self, pair: &(RecordFigure, RecordFigure)) -> bool {
        let ratio = Self::ratio(pair);
        ratio.is_nan() || ratio < 1.0 - self.tolerance
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Align::{Left, Right};
        let columns = [
            ("case", Left),
            ("candidate", Left),
            ("µs then", Right),
            ("µs now", Right),
            ("of ceiling then", Right),
            ("now", Right),
            ("ratio", Right),
            ("", Left),
        ];
        let rows = self.pairs.iter().map(|pair| {
            let (then, now) = pair;
            let percent = |part: f64| format!("{:.1} %", part * 100.0);
            let verdict = if self.is_worse(pair) { "worse" } else { "" };
            vec![
                now.case.clone(),
                now.candidate.clone(),
                number(Some(then.us[1])),
                number(Some(now.us[1])),
                percent(then.fraction),
                percent(now.fraction),
                format!("{:.3}", Self::ratio(pair)),
                verdict.to_owned(),
            ]
        });
        f.write_str(&table(&columns, rows))?;
        let (n, worse, percent) = (self.pairs.len(), self.worse(), self.tolerance * 100.0);
        writeln!(f, "\n{worse} of {n} are worse than {percent:.0} % below the record")?;
        if let Some((then, now)) = self.pairs.first() {
            writeln!(f, "record  {}, {}, commit {} of {}", then.device, then.driver, then.commit, then.date)?;
            writeln!(f, "now     {}, {}, commit {} of {}", now.device, now.driver, now.commit, now.date)?;
        }
        writeln!(f, "{} only in the record, {} only now", self.only_then, self.only_now)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::eval::kernels::Figures;
    use crate::eval::spread::Spread;

    /// A row at a part of a read ceiling of 1 TB/s and of 10 TFLOP/s.
    pub(in crate::report) fn row(kernel: &'static str, shape: &str, of_read: f64) -> KernelRow {
        let (bytes, flop) = (1e9, 2e9);
        let bytes_per_s = of_read * 1e12;
        let median = bytes / bytes_per_s;
        let seconds = Spread { median, p10: median, p90: median, n: 3 };
        let flop_per_s = flop / median;
        let (pairs_per_s, to_f16) = (None, None);
        let figures = Figures {
            seconds,
            settled: true,
            bytes,
            flop,
            bytes_per_s,
            of_read,
            of_copy: None,
            flop_per_s,
            of_flop: flop_per_s / 1e13,
            pairs_per_s,
            to_f16,
            error_over_bound: 0.1,
            nmse: 1e-12,
        };
        KernelRow {
            case: format!("{kernel}/{shape}"),
            kernel,
            shape: shape.to_owned(),
            codec: None,
            candidate: "only".to_owned(),
            chosen: true,
            outcome: Outcome::Measured(figures),
        }
    }

    fn figure(case: &str, fraction: f64) -> RecordFigure {
        RecordFigure {
            case: case.to_owned(),
            candidate: "64 lanes, 2 tokens".to_owned(),
            us: [1.5, 2.25, 3.125],
            bytes: 4096.0,
            flop: 8192.0,
            bound: "read".to_owned(),
            ceiling: 3.11e12,
            fraction,
            error_over_bound: 0.25,
            device: "a \"quick\" GPU".to_owned(),
            driver: "driver 1, patched".to_owned(),
            commit: "abc".to_owned(),
            date: "2026-01-31".to_owned(),
            timed_by: "device timestamps".to_owned(),
        }
    }

    #[test]
    fn a_record_comes_back_as_it_was_written() {
        let figures = vec![figure("decode/a", 0.5), figure("decode/b", 0.25)];
        assert_eq!(RecordFigure::read(&RecordFigure::write(&figures)), Ok(figures.clone()), "round trip");
        let text = RecordFigure::write(&figures);
        assert!(text.starts_with("case,candidate,us_p10"), "{text}");
        for (from, to, says) in [
            ("case,candidate", "case;candidate", "does not begin with"),
            ("0.500000", "half", "line 2: 'half' is not a number"),
            ("0.250000", "-1", "line 3: '-1'"),
            (",abc,", ",", "fields"),
            ("patched\"", "patched", "quote"),
        ] {
            let error = RecordFigure::read(&text.replacen(from, to, 1)).expect_err("it is damaged");
            assert!(error.contains(says), "{from} -> {to}: {error}");
        }
    }

    #[test]
    fn a_smaller_part_of_the_ceiling_is_worse_and_a_slower_device_is_not() {
        let then = vec![figure("a", 0.8), figure("b", 0.8), figure("gone", 0.8)];
        // Half the speed at half the ceiling is as good.
        let slow = RecordFigure { us: [9.0; 3], ceiling: 1e12, ..figure("a", 0.8) };
        let now = [slow, figure("b", 0.71), figure("new", 0.1)];
        let compared = Comparison::new(then.clone(), &now, 0.1).expect("two are in both");
        assert_eq!((compared.worse(), compared.only_then, compared.only_now), (1, 1, 1), "{compared}");
        assert_eq!(compared.to_string().matches("worse\n").count(), 1, "{compared}");
        assert_eq!(Comparison::new(then.clone(), &now, 0.2).map(|c| c.worse()), Ok(0), "a wider tolerance");
        let nothing = Comparison::new(then, &[figure("new", 1.0)], 0.1).expect_err("nothing in common");
        assert!(nothing.contains("none of the 3 figures"), "{nothing}");
    }

    #[test]
    fn names_of_devices_are_names_of_folders() {
        assert_eq!(device_slug("NVIDIA H100 80GB HBM3"), "nvidia-h100-80gb-hbm3", "a GPU");
        assert_eq!(device_slug("llvmpipe (LLVM 15.0.6, 256 bits)"), "llvmpipe-llvm-15-0-6-256-bits", "a processor");
    }
}
