//! The report of `eval needle`: what is still found in compressed documents.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::plot::{Guide, Plot, Point, Scale};
use super::run_tables::cache;
use super::table::{Align, block, counted, number, table};
use super::{DeviceReport, ModelReport, Program};
use crate::eval::needle::{NeedleOutcome, NeedleStyle};
use crate::geometry::Bytes;

/// What compressed caches still answer.
#[derive(Clone, Debug, Serialize)]
pub struct NeedleReport {
    /// The program.
    pub program: Program,
    /// The device.
    pub device: DeviceReport,
    /// The model.
    pub model: ModelReport,
    /// Path of the prose, as given; `null` for the built-in one.
    pub text: Option<String>,
    /// What is hidden.
    pub style: NeedleStyle,
    /// Whether caches were compressed behind the question.
    pub query_aware: bool,
    /// Seed of what is hidden.
    pub seed: u64,
    /// Depths of the needle, as parts of the document.
    pub depths: Vec<f64>,
    /// Tokens of a page.
    pub page_tokens: u32,
    /// Device bytes for caches, tables, scratch and staging.
    pub kv_budget_bytes: Bytes,
    /// The full cache, then every compression in the order given.
    pub results: Vec<NeedleRow>,
    /// Every question.
    pub cases: Vec<NeedleCase>,
    /// Time of all questions that this run has asked, reading logits back included.
    pub elapsed_s: f64,
}

/// One question.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NeedleCase {
    /// The length that was asked for.
    pub length_tokens: u32,
    /// Depth of the needle.
    pub depth: f64,
    /// Tokens of the whole prompt.
    pub prompt_tokens: usize,
    /// Tokens that were read before caches were compressed.
    pub prefix_tokens: usize,
    /// The right answer.
    pub answer: String,
    /// What each cache answered, the full one first.
    pub outcomes: Vec<CaseOutcome>,
}

/// What one cache answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CaseOutcome {
    /// The answer's text.
    pub text: String,
    /// The outcome.
    #[serde(flatten)]
    pub outcome: NeedleOutcome,
}

/// One compression.
#[derive(Clone, Debug, Serialize)]
pub struct NeedleRow {
    /// What was done to the cache, in the form that `--compress` reads.
    pub compression: String,
    /// Right answers.
    pub right: usize,
    /// Of so many.
    pub asked: usize,
    /// The part that was right.
    pub accuracy: f64,
    /// Bytes held over tokens that were compressed, over all questions.
    pub per_token_bytes: f64,
    /// Bytes that the full cache held over those that this one did.
    pub times_smaller: f64,
    /// The same for each length.
    pub lengths: Vec<LengthReport>,
}

/// One compression at one length.
#[derive(Clone, Debug, Serialize)]
pub struct LengthReport {
    /// The length that was asked for.
    pub length_tokens: u32,
    /// Right answers.
    pub right: usize,
    /// Of so many.
    pub asked: usize,
    /// Bytes held over tokens that were compressed.
    pub per_token_bytes: f64,
    /// Bytes that the full cache held over those that this one did.
    pub times_smaller: f64,
}

/// Sums over questions.
#[derive(Default)]
struct Sums {
    right: usize,
    asked: usize,
    tokens: usize,
    held: u64,
    full: u64,
}

impl Sums {
    fn of<'a>(cases: impl Iterator<Item = &'a NeedleCase>, at: usize) -> Self {
        cases.fold(Self::default(), |sums, case| Self {
            right: sums.right + usize::from(case.outcomes[at].outcome.right),
            asked: sums.asked + 1,
            tokens: sums.tokens + case.prefix_tokens,
            held: sums.held + case.outcomes[at].outcome.held_bytes.0,
            full: sums.full + case.outcomes[0].outcome.held_bytes.0,
        })
    }

    fn per_token(&self) -> f64 {
        self.held as f64 / self.tokens as f64
    }

    fn times_smaller(&self) -> f64 {
        self.full as f64 / self.held as f64
    }
}

impl NeedleRow {
    /// A row for each cache of the questions, which all had the same caches.
    pub fn of_cases(cases: &[NeedleCase]) -> Vec<Self> {
        let Some(first) = cases.first() else { return Vec::new() };
        let mut lengths: Vec<u32> = cases.iter().map(|case| case.length_tokens).collect();
        lengths.dedup();
        let row = |at: usize| {
            let sums = Sums::of(cases.iter(), at);
            let of_length = |length: &u32| {
                let sums = Sums::of(cases.iter().filter(|case| case.length_tokens == *length), at);
                LengthReport {
                    length_tokens: *length,
                    right: sums.right,
                    asked: sums.asked,
                    per_token_bytes: sums.per_token(),
                    times_smaller: sums.times_smaller(),
                }
            };
            Self {
                compression: first.outcomes[at].outcome.compression.clone(),
                right: sums.right,
                asked: sums.asked,
                accuracy: sums.right as f64 / sums.asked as f64,
                per_token_bytes: sums.per_token(),
                times_smaller: sums.times_smaller(),
                lengths: lengths.iter().map(of_length).collect(),
            }
        };
        (0..first.outcomes.len()).map(row).collect()
    }
}

impl NeedleReport {
    /// Wrong answers against bytes per token; the full cache is where it ends.
    pub fn plot(&self) -> Plot {
        let point =
            |row: &NeedleRow| Point { x: row.per_token_bytes, y: 1.0 - row.accuracy, label: cache(&row.compression) };
        let asked = self.results.first().map_or(0, |row| row.asked);
        let when = if self.query_aware { "the question is known" } else { "the question is not known" };
        let full = |row: &NeedleRow| {
            let label = format!("full: {} of {} right", row.right, row.asked);
            Guide { x: row.per_token_bytes, label }
        };
        Plot {
            title: format!(
                "{}: {} about needles, compressed while {when}",
                self.model.name,
                counted(asked as u64, "question")
            ),
            x_title: "bytes of cache per token of the document (log scale)".to_owned(),
            y_title: "wrong answers".to_owned(),
            y_scale: Scale::Part,
            guide: self.results.first().map(full),
            points: self.results.iter().skip(1).map(point).collect(),
        }
    }
}

impl fmt::Display for NeedleReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Align::{Left, Right};
        let lengths: Vec<String> = self.results.first().map_or(Vec::new(), |row| {
            row.lengths.iter().map(|length| format!("right at\n{}", length.length_tokens)).collect()
        });
        let before = [("\ncache", Left), ("bytes\nper token", Right), ("times\nsmaller", Right)];
        let after = [("\nright", Right), ("\naccuracy", Right)];
        let lengths = lengths.iter().map(|title| (title.as_str(), Right));
        let columns: Vec<_> = before.into_iter().chain(lengths).chain(after).collect();
        let rows = self.results.iter().enumerate().map(|(i, row)| {
            let name = if i == 0 { "full".to_owned() } else { cache(&row.compression) };
            let mut line = vec![name, format!("{:.0}", row.per_token_bytes), number(Some(row.times_smaller))];
            line.extend(row.lengths.iter().map(|length| format!("{} of {}", length.right, length.asked)));
            line.push(format!("{} of {}", row.right, row.asked));
            line.push(format!("{:.0} %", 100.0 * row.accuracy));
            line
        });
        writeln!(f, "{}", table(&columns, rows))?;
        let depths: Vec<String> = self.depths.iter().map(ToString::to_string).collect();
        let compressed = if self.query_aware { "behind the question" } else { "before the question is known" };
        let lines = [
            ("prose", self.text.clone().unwrap_or_else(|| "built in".to_owned())),
            ("needles", format!("{:?} at depths {}", self.style, depths.join(", ")).to_lowercase()),
            ("pages", format!("{} tokens, compressed {compressed}", self.page_tokens)),
            ("time", format!("{:.1} s", self.elapsed_s)),
        ];
        f.write_str(&block("needles in prose", &lines))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_sum_up_questions() {
        let outcome = |right: bool, held: u64| CaseOutcome {
            text: String::new(),
            outcome: NeedleOutcome {
                compression: "full".to_owned(),
                answer: Vec::new(),
                right,
                held_bytes: Bytes(held),
                held_tokens: 0,
            },
        };
        let case = |length_tokens: u32, right: bool| NeedleCase {
            length_tokens,
            depth: 0.5,
            prompt_tokens: 120,
            prefix_tokens: 100,
            answer: "1".to_owned(),
            outcomes: vec![outcome(true, 800), outcome(right, 200)],
        };
        let rows = NeedleRow::of_cases(&[case(512, true), case(512, false), case(1024, false)]);
        let [full, compressed] = &rows[..] else { panic!("two caches: {rows:?}") };
        assert_eq!((full.right, full.asked, full.accuracy), (3, 3, 1.0), "the full cache");
        assert_eq!((compressed.right, compressed.asked), (1, 3), "one of three");
        assert_eq!((compressed.per_token_bytes, compressed.times_smaller), (2.0, 4.0), "bytes");
        let right: Vec<_> = compressed.lengths.iter().map(|l| (l.length_tokens, l.right, l.asked)).collect();
        assert_eq!(right, [(512, 1, 2), (1024, 0, 1)], "by length");
        let text = serde_json::to_string(&case(512, true)).expect("written");
        assert_eq!(serde_json::from_str::<NeedleCase>(&text).expect("read"), case(512, true), "round trip");
        assert!(NeedleRow::of_cases(&[]).is_empty(), "no question");
    }
}
