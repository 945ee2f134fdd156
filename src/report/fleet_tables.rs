//! What people see of a fleet: a design in each line, and a page of one file.

use std::fmt;

use super::fleet::{DesignFigures, DesignRow, FleetReport, gigabytes};
use super::html;
use super::run_tables::cache;
use super::table::{Align, block, count, counted, number, table};
use crate::eval::simulate::Refused;

/// A column: its heading and what stands in it.
type Column<'a> = (&'static str, Align, Box<dyn Fn(&DesignRow) -> String + 'a>);

/// A column of what became of the workload; a dash where it could not begin.
fn figure<'a>(name: &'static str, value: impl Fn(&DesignFigures) -> String + 'a) -> Column<'a> {
    let of = move |row: &DesignRow| row.served.as_ref().map_or_else(|| "-".to_owned(), &value);
    (name, Align::Right, Box::new(of))
}

/// A small price with as many digits as tell it from others.
fn money(value: Option<f64>) -> String {
    value
        .map_or_else(|| "-".to_owned(), |value| if value < 1.0 { format!("{value:.4}") } else { format!("{value:.2}") })
}

impl FleetReport {
    fn columns(&self) -> Vec<Column<'_>> {
        use Align::{Left, Right};
        let mut columns: Vec<Column<'_>> = vec![
            ("\nGPUs", Right, Box::new(|row| row.gpus.to_string())),
            ("replicas\nx share", Right, Box::new(|row| format!("{} x {}", row.replicas, row.share))),
        ];
        if self.settings.memory_bytes.len() > 1 {
            columns.push(("memory\nof each", Right, Box::new(|row| gigabytes(row.memory_bytes))));
        }
        columns.push(("\ncache", Left, Box::new(|row| cache(&row.compression))));
        columns.push((
            "sessions\nper hour",
            Right,
            Box::new(|row| match &row.served {
                Some(served) => number(served.sessions_per_hour),
                None => "does not fit".to_owned(),
            }),
        ));
        columns.extend([
            figure("first token, s\nhalf | 95 %", |served| {
                let of = served.first_token_s.as_ref();
                format!("{} | {}", number(of.map(|p| p.p50)), number(of.map(|p| p.p95)))
            }),
            figure("token, ms\n95 %", |served| number(served.per_token_ms.as_ref().map(|p| p.p95))),
            figure("\nbusy", |served| format!("{:.0} %", 100.0 * served.busy_part)),
            figure("most\nat once", |served| count(served.resident_max as u64)),
            (
                "\nrefused",
                Right,
                Box::new(|row| match row.served {
                    Some(_) => count(u64::from(row.sessions_refused())),
                    None => "-".to_owned(),
                }),
            ),
            figure("keeps up\n(behind)", |served| match served.keeps_up {
                Some(true) if served.never_fit > 0 => format!("the rest ({})", served.behind),
                Some(true) => format!("yes ({})", served.behind),
                Some(false) => format!("no ({})", served.behind),
                None => "-".to_owned(),
            }),
        ]);
        columns.push(if self.has_prices() {
            figure("price\na session", |served| money(served.price_per_session))
        } else {
            figure("GPU seconds\na session", |served| number(self.cost(served)))
        });
        columns
    }

    /// Headings and rows.
    fn table(&self) -> (Vec<(&'static str, Align)>, Vec<Vec<String>>) {
        let columns = self.columns();
        let rows = self.designs.iter().map(|row| columns.iter().map(|(_, _, value)| value(row)).collect()).collect();
        (columns.into_iter().map(|(name, align, _)| (name, align)).collect(), rows)
    }

    /// What to take, and what is not in the table, in sentences.
    fn words(&self) -> Vec<String> {
        let mut all = vec![self.on_cheapest()];
        if !self.left_out.is_empty() {
            let pairs: Vec<String> = self.left_out.iter().map(|l| format!("{} over {}", l.share, l.gpus)).collect();
            let pairs = pairs.join(", ");
            all.push(format!("Left out, because GPUs that share each layer do not divide GPUs in all: {pairs}."));
        }
        all.extend(self.on_what_does_not_fit());
        all.extend(self.on_refused());
        all
    }

    /// Each reason once, of the first design that has it.
    fn on_what_does_not_fit(&self) -> Vec<String> {
        let mut told: Vec<&str> = Vec::new();
        let mut all = Vec::new();
        for row in &self.designs {
            let Some(why) = row.does_not_fit.as_deref().filter(|why| !told.contains(why)) else { continue };
            told.push(why);
            all.push(format!("{} does not fit: {why}.", self.label(row)));
        }
        all
    }

    /// Each kind once, of the first design that has it.
    fn on_refused(&self) -> Vec<String> {
        let mut told: Vec<&str> = Vec::new();
        let mut all = Vec::new();
        let rows = self.designs.iter().flat_map(|row| row.served.iter().map(move |served| (row, served)));
        for (row, refused) in rows.flat_map(|(row, served)| served.refused.iter().map(move |refused| (row, refused))) {
            let Refused { kind, sessions, first } = refused;
            if told.contains(kind) {
                continue;
            }
            told.push(kind);
            let sessions = counted(u64::from(*sessions), "session");
            all.push(format!("{}: {sessions} refused ({kind}), the first: {first}.", self.label(row)));
        }
        if !told.is_empty() {
            all.push("Budgets are what the memory of a replica leaves beside the weights.".to_owned());
        }
        all
    }

    fn on_cheapest(&self) -> String {
        let target = self.settings.first_token_within_s;
        let within =
            target.map_or_else(String::new, |limit| format!(", 95 of a hundred answers begun within {limit} s"));
        let Some(row) = self.cheapest.and_then(|place| self.designs.get(place)) else {
            let fastest = self.designs.iter().filter(|row| row.serves(None));
            let p95 =
                |row: &DesignRow| row.served.as_ref().and_then(|s| s.first_token_s).map_or(f64::INFINITY, |p| p.p95);
            let nearest = fastest.min_by(|a, b| p95(a).total_cmp(&p95(b))).map_or_else(
                || "more GPUs, more of them to a layer, or smaller caches".to_owned(),
                |row| format!("the fastest that keeps up is {} with {} s", self.label(row), number(Some(p95(row)))),
            );
            return format!("No design serves this load{within}; {nearest}.");
        };
        let cost = match row.price_per_hour {
            Some(price) => format!("{} an hour", money(Some(price))),
            None => counted(u64::from(row.gpus), "GPU"),
        };
        let session = row.served.as_ref().map_or(String::new(), |served| {
            let first = number(served.first_token_s.map(|p| p.p95));
            let unit =
                if self.has_prices() { money(self.cost(served)) } else { number(self.cost(served)) + " GPU seconds" };
            format!(", {unit} a session, the first token within {first} s at 95 %")
        });
        format!("The cheapest that serves this load{within}: {} ({cost}{session}).", self.label(row))
    }

    /// What is served, as names and texts.
    fn given(&self) -> Vec<(&'static str, String)> {
        let (settings, workload) = (&self.settings, &self.settings.workload);
        let memory: Vec<String> = settings.memory_bytes.iter().map(|memory| gigabytes(*memory)).collect();
        let mut all = vec![
            ("gpu", format!("{}, {}", self.gpu.gpu, memory.join(" or "))),
            ("model", self.model.to_string()),
            (
                "load",
                format!(
                    "{}, {}; documents {} tokens; {} of {} tokens, answers {} tokens, think {} s; seed {}",
                    counted(u64::from(workload.sessions), "session"),
                    workload.arrival,
                    workload.context,
                    counted(u64::from(workload.rounds), "question"),
                    workload.question,
                    workload.answer,
                    workload.think,
                    workload.seed
                ),
            ),
            ("achieved", {
                let achieved = settings.achieved;
                format!(
                    "{} of FLOP/s, {} of memory bandwidth, {} of the host link",
                    achieved.flops, achieved.bandwidth, achieved.link
                )
            }),
        ];
        if self.has_prices() {
            let prices: Vec<String> = settings.price_per_hour.iter().map(|price| money(Some(*price))).collect();
            all.push(("price", format!("{} for a GPU and an hour", prices.join(" or "))));
        }
        all
    }

    /// The page of one file.
    pub fn page(&self) -> String {
        let given: Vec<String> = self.given().into_iter().map(|(name, text)| format!("{name}: {text}")).collect();
        let (columns, rows) = self.table();
        let hashes = self.designs.iter().filter_map(|row| Some((row, row.served.as_ref()?)));
        let hashes = hashes.map(|(row, served)| vec![self.label(row), served.trace_hash.clone()]);
        let caption = "Lower is better in both directions; the line joins designs that no other beats in both.";
        let sections = [
            html::section("The load", [html::list(&given)]),
            html::section("What to take", [html::list(self.words())]),
            html::section("Designs", [html::plot(&self.plot(), caption), html::table(&columns, rows)]),
            html::section(
                "Again",
                [
                    html::paragraph(&self.settings.command(&self.gpu)),
                    html::table(&[("design", Align::Left), ("trace hash", Align::Left)], hashes),
                ],
            ),
        ];
        let about = "Simulated: the schedule is the one that runs sessions, steps take the time that FLOP and bytes take at the \
                     stated parts of the peaks. Sessions are dealt out to replicas in turn. Norms, sampling, launches and the \
                     decoding of codecs are left out.";
        html::page(&format!("A fleet for {} on {}", self.model.name, self.gpu.gpu), about, sections)
    }
}

impl fmt::Display for FleetReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (columns, rows) = self.table();
        writeln!(f, "{}", table(&columns, rows))?;
        for words in self.words() {
            writeln!(f, "{words}")?;
        }
        let simulated = self.designs.iter().filter(|row| row.served.is_some()).count() as u64;
        let mut lines = self.given();
        lines.push(("time", format!("{:.1} s for {}", self.elapsed_s, counted(simulated, "design"))));
        lines.push(("again", self.settings.command(&self.gpu)));
        write!(f, "\n{}", block("the fleet", &lines))
    }
}
