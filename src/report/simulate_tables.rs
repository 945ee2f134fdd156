//! What people see of a simulation: compressions side by side.

use std::fmt;

use super::Percentiles;
use super::run_tables::cache;
use super::simulate::{SimulateReport, SimulateRow};
use super::table::{Align, block, count, counted, number, table};
use crate::compression::Compression;
use crate::geometry::Bytes;

/// A line of the table: a name, and a value for each compression.
type Line = (&'static str, fn(&SimulateRow) -> String);

const CONCURRENCY: [Line; 4] = [
    ("sessions finished", |row| count(row.metrics.service.sessions_finished as u64)),
    ("refused", |row| count(u64::from(row.sessions_refused()))),
    ("most at once", |row| count(row.metrics.concurrency.resident_max as u64)),
    ("of the median context fit, by theory", |row| count(row.predicted.fit)),
];
const PREFILL: [Line; 3] = [
    ("first token, s: half within", |row| spread(&row.metrics.service.first_token_s, |p| p.p50)),
    ("95 % | 99 % within", |row| {
        let of = |percentile| spread(&row.metrics.service.first_token_s, percentile);
        format!("{} | {}", of(|p| p.p95), of(|p| p.p99))
    }),
    ("prompt of the median alone, by theory, s", |row| number(Some(row.predicted.prefill_s))),
];
const DECODE: [Line; 3] = [
    ("per token, ms: half within", |row| spread(&row.metrics.service.per_token_ms, |p| p.p50)),
    ("95 % | 99 % within", |row| {
        let of = |percentile| spread(&row.metrics.service.per_token_ms, percentile);
        format!("{} | {}", of(|p| p.p95), of(|p| p.p99))
    }),
    ("token of the median alone, by theory, ms", |row| number(Some(row.predicted.token_ms))),
];
const SWITCH: [Line; 6] = [
    ("one way, s: half within", |row| spread(&row.move_s, |p| p.p50)),
    ("95 % | 99 % within", |row| {
        let of = |percentile| spread(&row.move_s, percentile);
        format!("{} | {}", of(|p| p.p95), of(|p| p.p99))
    }),
    ("both ways for the median, by theory, s", |row| number(Some(row.predicted.switch_s))),
    ("out | back", |row| {
        format!("{} | {}", count(row.metrics.context_switch.swapped_out), count(row.metrics.context_switch.swapped_in))
    }),
    ("computed again | compressed harder", |row| {
        let switch = &row.metrics.context_switch;
        format!("{} | {}", count(switch.recomputed), count(switch.compressed))
    }),
    ("preempted", |row| count(row.metrics.context_switch.preempted)),
];
const MACHINE: [Line; 7] = [
    ("sessions per hour", |row| number(row.metrics.service.sessions_per_hour)),
    ("simulated time, h", |row| number(Some(row.simulated_s / 3600.0))),
    ("busy", |row| percent(row.usage.busy_part)),
    ("bytes for pages", |row| row.pool.arenas_bytes.to_string()),
    ("of these in use, mean | peak", |row| {
        let peak = part(row.pool.pages_peak_bytes, row.pool.arenas_bytes);
        format!("{} | {}", percent(row.usage.pages_part), percent(peak))
    }),
    ("on the host, mean | peak", |row| format!("{} | {}", row.usage.host_bytes, row.host_peak_bytes)),
    ("trace hash", |row| row.trace_hash.clone()),
];

const SECTIONS: [(&str, &[Line]); 5] = [
    ("concurrency", &CONCURRENCY),
    ("prefill", &PREFILL),
    ("decode", &DECODE),
    ("context switch", &SWITCH),
    ("the machine", &MACHINE),
];

fn spread(values: &Option<Percentiles>, of: fn(&Percentiles) -> f64) -> String {
    number(values.as_ref().map(of))
}

fn part(bytes: Bytes, of: Bytes) -> f64 {
    if of > Bytes::ZERO { bytes.0 as f64 / of.0 as f64 } else { 0.0 }
}

fn percent(part: f64) -> String {
    format!("{:.1} %", 100.0 * part)
}

impl fmt::Display for SimulateReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.results.iter().map(|row| cache(&row.compression)).collect();
        let columns: Vec<(&str, Align)> =
            std::iter::once(("", Align::Left)).chain(names.iter().map(|name| (name.as_str(), Align::Right))).collect();
        let row = |(name, value): &Line| {
            std::iter::once(format!("  {name}")).chain(self.results.iter().map(value)).collect::<Vec<_>>()
        };
        let title = |title: &str| {
            std::iter::once(title.to_owned()).chain(self.results.iter().map(|_| String::new())).collect::<Vec<_>>()
        };
        let rows = SECTIONS.iter().flat_map(|(name, lines)| std::iter::once(title(name)).chain(lines.iter().map(row)));
        writeln!(f, "{}", table(&columns, rows))?;
        for (row, name) in self.results.iter().zip(&names) {
            for refused in &row.refused {
                let sessions = counted(u64::from(refused.sessions), "session");
                writeln!(f, "{name}: {sessions} refused ({}), the first: {}", refused.kind, refused.first)?;
            }
        }
        let settings = &self.settings;
        if self.results.iter().any(|row| !row.refused.is_empty()) {
            writeln!(f, "budgets are what the memory leaves beside weights of {}\n", settings.weights_bytes)?;
        }
        let compressions: Vec<String> = self.results.iter().map(|row| short(&row.compression)).collect();
        let compressions: Vec<&str> = compressions.iter().map(String::as_str).collect();
        let steps = counted(self.results.iter().map(|row| row.steps).sum(), "step");
        let lines = [
            ("achieved", {
                let achieved = settings.achieved;
                format!(
                    "{} of FLOP/s, {} of memory bandwidth, {} of the host link",
                    achieved.flops, achieved.bandwidth, achieved.link
                )
            }),
            ("time", format!("{:.1} s for {steps}", self.elapsed_s)),
            ("again", settings.command(&self.gpu, &compressions)),
        ];
        f.write_str(&block("the simulation", &lines))
    }
}

/// A compression as it is written shortest.
fn short(compression: &str) -> String {
    compression.parse::<Compression>().map_or_else(|_| compression.to_owned(), |compression| compression.short())
}
