//! What people see of a plan: one table on the command line, and a page of one file.

use std::fmt;

use super::html::{self, Html};
use super::plan::{ContextRow, PlanReport, PlanRow};
use super::table::{Align, block, count, number, table};
use crate::theory::challenges::{Challenges, Scene};
use crate::theory::quality::Quality;
use crate::theory::search::{Factor, Found, KEEPS_QUALITY, Limit, Metric, Search};
use crate::theory::throughput::Rate;

/// Stacks of a search that are shown.
const SHOWN: usize = 12;

/// A line of the table: a name, and a value for each compression.
struct Line {
    name: String,
    value: Box<dyn Fn(&PlanRow) -> String>,
}

fn line(name: impl Into<String>, value: impl Fn(&PlanRow) -> String + 'static) -> Line {
    Line { name: name.into(), value: Box::new(value) }
}

fn borrowed(columns: &[(String, Align)]) -> Vec<(&str, Align)> {
    columns.iter().map(|(name, align)| (name.as_str(), *align)).collect()
}

fn percent(part: f64) -> String {
    format!("{:.0} %", 100.0 * part)
}

fn rate(rate: Option<Rate>) -> String {
    rate.map_or_else(
        || "-".to_owned(),
        |rate| format!("{} ({})", number(Some(rate.sessions_per_hour)), rate.bound.name()),
    )
}

fn quality(quality: &Option<Quality>) -> String {
    let Some(quality) = quality else { return "unknown".to_owned() };
    let kl = match quality.compression.as_str() {
        "full" => Some("the reference".to_owned()),
        _ => quality.mean_kl.map(|kl| format!("KL {kl:.4}")),
    };
    let found = quality.needles.map(|[found, of]| format!("{found} of {of} needles"));
    [kl, found].into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// A part of the four challenges with its lines.
type Section = (&'static str, Vec<Line>);

impl PlanReport {
    fn sections(&self) -> Vec<Section> {
        let Scene { batch, .. } = self.settings.scene;
        let rounds = self.settings.rounds;
        let answer = f64::from(rounds.answer_tokens);
        let cache = vec![
            line("bytes behind the document", |row| row.challenges.cache.held_bytes.to_string()),
            line("times smaller", |row| number(Some(row.times_smaller))),
            line("while it is compressed", |row| row.challenges.cache.peak_bytes.to_string()),
        ];
        let concurrency = vec![
            line("sessions that fit", |row| count(row.challenges.concurrency)),
            line("with all their answers", |row| count(row.throughput.resident)),
        ];
        let prefill = vec![
            line("to the first token, s", |row| number(Some(row.challenges.prefill.seconds))),
            line("of this attention", |row| {
                percent(row.challenges.prefill.attention_s / row.challenges.prefill.seconds)
            }),
            line("bound by", |row| row.challenges.prefill.bound.name().to_owned()),
        ];
        let decode = vec![
            line("a token alone, ms", |row| number(Some(1e3 * row.challenges.decode.seconds))),
            line(format!("{} tokens alone, s", rounds.answer_tokens), move |row| {
                number(Some(answer * row.challenges.decode.seconds))
            }),
            line(format!("a token of {batch} together, ms"), |row| number(Some(1e3 * row.challenges.batched.seconds))),
            line("of this over caches", |row| {
                percent(row.challenges.batched.attention_s / row.challenges.batched.seconds)
            }),
            line("bound by", |row| row.challenges.batched.bound.name().to_owned()),
        ];
        let switch = vec![
            line("out and back, s", |row| match row.challenges.switch_s {
                Some(seconds) => number(Some(seconds)),
                None => "no link".to_owned(),
            }),
            line("computing it again takes", |row| {
                row.challenges
                    .recompute_ratio
                    .map_or_else(|| "-".to_owned(), |ratio| format!("{} times as long", number(Some(ratio))))
            }),
        ];
        let mut hour = vec![line("caches stay", |row| rate(Some(row.throughput.resident_rate)))];
        if self.results.iter().any(|row| row.throughput.swapping_rate.is_some()) {
            hour.push(line("caches swapped", |row| rate(row.throughput.swapping_rate)));
        }
        if self.settings.price_per_hour.is_some() {
            hour.push(line("price of a session", |row| {
                row.price_per_session.map_or_else(|| "-".to_owned(), |price| format!("{price:.4}"))
            }));
        }
        let known = vec![line("measured", |row| quality(&row.quality))];
        vec![
            ("KV cache", cache),
            ("concurrency (device memory)", concurrency),
            ("prefill", prefill),
            ("decode", decode),
            ("context switch (host link)", switch),
            ("sessions per hour, at best", hour),
            ("quality", known),
        ]
    }

    /// The table's columns, long names in several lines.
    fn columns(&self) -> Vec<(String, Align)> {
        let names = self.results.iter().map(|row| (row.compression.replace(',', ",\n"), Align::Right));
        std::iter::once((String::new(), Align::Left)).chain(names).collect()
    }

    fn rows(&self) -> Vec<Vec<String>> {
        let of = |line: &Line| {
            std::iter::once(format!("  {}", line.name))
                .chain(self.results.iter().map(|row| (line.value)(row)))
                .collect()
        };
        let title =
            |name: &str| std::iter::once(name.to_owned()).chain(self.results.iter().map(|_| String::new())).collect();
        self.sections()
            .iter()
            .flat_map(|(name, lines)| std::iter::once(title(name)).chain(lines.iter().map(of)).collect::<Vec<_>>())
            .collect()
    }

    /// What is planned for, as names and texts.
    fn given(&self) -> Vec<(&'static str, String)> {
        let settings = &self.settings;
        let giga = |value: f64| number(Some(value / 1e9));
        let link = match self.machine.link_bytes_per_s {
            Some(link) => format!("host link {} GB/s each way", giga(link)),
            None => "one memory for host and device".to_owned(),
        };
        let decimal = |bytes: crate::geometry::Bytes| format!("{} GB ({bytes})", giga(bytes.0 as f64));
        let Scene { context_tokens, memory_bytes, .. } = settings.scene;
        let rounds = settings.rounds;
        vec![
            (
                "gpu",
                format!(
                    "{}: {}, {} TFLOP/s, {} GB/s, {link}; critical intensity {} FLOP/byte",
                    self.hardware(),
                    decimal(settings.memory_bytes),
                    number(Some(self.machine.flops_per_s / 1e12)),
                    giga(self.machine.memory_bytes_per_s),
                    number(Some(self.machine.critical_intensity)),
                ),
            ),
            (
                "achieved",
                format!(
                    "{} of FLOP/s, {} of bandwidth, {} of the link, from {}",
                    settings.achieved.flops,
                    settings.achieved.bandwidth,
                    settings.achieved.link,
                    settings.achieved_from
                ),
            ),
            (
                "model",
                format!(
                    "{}: weights {}, a token of cache {}, which leaves {} for caches",
                    self.model.name,
                    decimal(settings.weights_bytes),
                    self.model.kv_per_token_bytes,
                    memory_bytes
                ),
            ),
            (
                "session",
                format!(
                    "{} tokens, then {} questions of {} tokens, {} tokens of answer each, {} s apart",
                    count(u64::from(context_tokens)),
                    rounds.rounds,
                    rounds.question_tokens,
                    rounds.answer_tokens,
                    rounds.think_s
                ),
            ),
        ]
    }

    fn context_table(&self) -> (Vec<(String, Align)>, Vec<Vec<String>>) {
        let columns = std::iter::once(("tokens".to_owned(), Align::Right))
            .chain(self.results.iter().map(|row| (row.compression.replace(',', ",\n"), Align::Right)))
            .collect();
        let of = |figures: &Option<Challenges>| match figures {
            None => "-".to_owned(),
            Some(f) => format!(
                "{} | {} | {} | {}",
                count(f.concurrency),
                number(Some(f.prefill.seconds)),
                number(Some(1e3 * f.batched.seconds)),
                number(f.switch_s)
            ),
        };
        let row = |row: &ContextRow| {
            std::iter::once(count(u64::from(row.context_tokens))).chain(row.results.iter().map(of)).collect()
        };
        (columns, self.contexts.iter().map(row).collect())
    }

    fn compression_rows(&self) -> (Vec<(&'static str, Align)>, Vec<Vec<String>>) {
        use Align::{Left, Right};
        let columns = vec![
            ("compression", Left),
            ("cache", Right),
            ("times smaller", Right),
            ("fit", Right),
            ("prefill, s", Right),
            ("token together, ms", Right),
            ("switch, s", Right),
            ("per hour", Right),
            ("quality", Left),
        ];
        let row = |row: &PlanRow| {
            vec![
                row.compression.clone(),
                row.challenges.cache.held_bytes.to_string(),
                number(Some(row.times_smaller)),
                count(row.challenges.concurrency),
                number(Some(row.challenges.prefill.seconds)),
                number(Some(1e3 * row.challenges.batched.seconds)),
                number(row.challenges.switch_s),
                number(Some(row.throughput.best().sessions_per_hour)),
                quality(&row.quality),
            ]
        };
        (columns, self.compressions.iter().map(row).collect())
    }

    /// The page of one file.
    pub fn page(&self) -> String {
        let given: Vec<String> = self.given().into_iter().map(|(name, text)| format!("{name}: {text}")).collect();
        let mut sections = vec![
            html::section("What is planned for", [html::list(&given)]),
            html::section("The four challenges", [html::table(&borrowed(&self.columns()), self.rows())]),
            html::section("What binds, and what to change", [html::list(&self.advice)]),
        ];
        if let Some(curves) = self.context_curves() {
            let (columns, rows) = self.context_table();
            let columns = borrowed(&columns);
            let words = "Each cell: sessions that fit | prefill, s | a token of all together, ms | switch, s.";
            let parts = [
                html::curves(&curves, "The four challenges over the context."),
                html::note(words),
                html::table(&columns, rows),
            ];
            sections.push(html::section("Over the context", parts));
        }
        if !self.compressions.is_empty() {
            let (columns, rows) = self.compression_rows();
            let plot = self.quality_plot().map(|plot| html::plot(&plot, "What was measured, over the bytes here."));
            sections.push(html::section("Over compressions", plot.into_iter().chain([html::table(&columns, rows)])));
        }
        if let Some(search) = &self.search {
            sections.push(search_section(search));
        }
        let (model, gpus) = (&self.model.name, self.hardware());
        let about = "Predicted from shapes, bytes and rates: nothing here was run. Times are those of kernels that reach the \
                     stated parts of the peaks; norms, sampling, launches, scoring and the decoding of codecs are left out.";
        html::page(&format!("{model} on {gpus}"), about, sections)
    }
}

impl fmt::Display for PlanReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let given = self.given();
        let width = given.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        for (name, text) in &given {
            writeln!(f, "{name:width$}  {text}")?;
        }
        writeln!(f, "\n{}", table(&borrowed(&self.columns()), self.rows()))?;
        for advice in &self.advice {
            writeln!(f, "{advice}")?;
        }
        if !self.contexts.is_empty() {
            let (columns, rows) = self.context_table();
            let columns = borrowed(&columns);
            writeln!(f, "\nsessions that fit | prefill, s | a token of all together, ms | switch, s")?;
            writeln!(f, "{}", table(&columns, rows))?;
        }
        if !self.compressions.is_empty() {
            let (columns, rows) = self.compression_rows();
            writeln!(f, "\n{}", table(&columns, rows))?;
        }
        match &self.search {
            Some(search) => write!(f, "\n{search}"),
            None => Ok(()),
        }
    }
}

fn with_unit(metric: Metric, value: f64) -> String {
    match metric {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bytes of a cache or of a goal")]
        Metric::Cost => crate::geometry::Bytes(value as u64).to_string(),
        Metric::Users => format!("{value} sessions"),
        Metric::Prefill | Metric::Decode | Metric::Switch => format!("{value:.4} s"),
    }
}

impl Search {
    /// What came out, in a sentence or two each.
    fn words(&self) -> Vec<String> {
        let metric = self.goal.metric;
        let ratio = if metric == Metric::Users { self.limit / self.full } else { self.full / self.limit };
        let limit = with_unit(metric, self.limit);
        let limit = match self.goal.limit {
            Limit::Full(_, context) => format!("{limit} at {} tokens", count(u64::from(context))),
            Limit::Number(_) => format!("{limit} are wanted"),
        };
        let mut all = vec![format!(
            "The full cache: {} at {} tokens, {limit}: {ratio:.1} times. {} of {} stacks reach it; those that no other beats \
             are listed.",
            with_unit(metric, self.full),
            count(u64::from(self.goal.context_tokens)),
            count(self.reached as u64),
            count(self.tried as u64)
        )];
        let keeping =
            |found: &&Found| found.quality.as_ref().and_then(|q| q.mean_kl).is_some_and(|kl| kl <= KEEPS_QUALITY);
        let known = self.found.iter().filter(keeping).count();
        all.push(match known {
            0 => format!(
                "Known to keep quality (measured as a whole, mean KL at most {KEEPS_QUALITY}): none of them. What costs \
                 each dimension alone is below; what they cost together nobody measured."
            ),
            n => format!("Known to keep quality (measured as a whole, mean KL at most {KEEPS_QUALITY}): {n}."),
        });
        if let (0, Some(smallest)) = (known, &self.smallest_known) {
            all.push(format!(
                "The smallest that is known to: {}, {:.1} times smaller.",
                smallest.compression, smallest.times_smaller
            ));
        }
        all.push(
            "Quality is that of a model of 135 million parameters over 2,048 tokens, and a low KL does not mean that single \
             facts are found, which needles count; for longer contexts and other models measure it with `eval` (--quality)."
                .to_owned(),
        );
        all
    }

    fn table_rows(&self) -> (Vec<(&'static str, Align)>, Vec<Vec<String>>) {
        use Align::{Left, Right};
        let columns = vec![
            ("stack", Left),
            ("value", Right),
            ("times smaller", Right),
            ("each dimension alone", Left),
            ("together", Left),
        ];
        let factor = |factor: &Factor| {
            let kl = factor.quality.as_ref().and_then(|q| q.mean_kl);
            let known = kl.map_or_else(|| "unknown".to_owned(), |kl| format!("KL {kl:.3}"));
            format!("{} {:.1}x {known}", factor.compression, factor.times_smaller)
        };
        let row = |found: &Found| {
            vec![
                found.compression.clone(),
                with_unit(self.goal.metric, found.value),
                number(Some(found.times_smaller)),
                found.factors.iter().map(factor).collect::<Vec<_>>().join("; "),
                quality(&found.quality),
            ]
        };
        (columns, self.found.iter().take(SHOWN).map(row).collect())
    }
}

fn search_section(search: &Search) -> Html {
    let (columns, rows) = search.table_rows();
    html::section(&format!("Find: {}", search.goal.text), [html::list(search.words()), html::table(&columns, rows)])
}

impl fmt::Display for Search {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = self.words();
        let lines: Vec<(&str, String)> = words.into_iter().map(|text| ("", text)).collect();
        f.write_str(&block(&format!("find {}", self.goal.text), &lines))?;
        // Factors stand below their stack, so that a line is no wider than a screen.
        for found in self.found.iter().take(SHOWN) {
            writeln!(
                f,
                "\n  {}: {}, {:.1} times smaller; together: {}",
                found.compression,
                with_unit(self.goal.metric, found.value),
                found.times_smaller,
                quality(&found.quality)
            )?;
            for factor in &found.factors {
                let alone = quality(&factor.quality);
                writeln!(f, "    {:<44} {:>6.1} times, {alone}", factor.compression, factor.times_smaller)?;
            }
        }
        match self.found.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => writeln!(f, "\n  and {} more (--json has all)", count(more as u64)),
        }
    }
}
