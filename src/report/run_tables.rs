//! What people see of a run: answers, sessions, the four metrics, the pool.

use std::fmt;
use std::path::Path;

use super::table::{Align, block, count, counted, number, table};
use super::{FaultsReport, FourMetrics, Percentiles, RunReport, SessionReport};
use crate::compression::Compression;
use crate::pool::PoolReport;

/// Widest name of a document in a table.
const NAME_CHARS_MAX: usize = 32;

impl fmt::Display for RunReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = short_names(self.sessions.iter().map(|s| s.document.as_str()));
        for (session, name) in self.sessions.iter().zip(&names) {
            let rule = "─".repeat(72_usize.saturating_sub(name.chars().count() + 4));
            writeln!(f, "── {name} {rule}")?;
            for round in &session.rounds {
                writeln!(f, "question  {}", round.question)?;
                let answer = if round.answer.trim().is_empty() { "(nothing)" } else { round.answer.trim() };
                // Later lines begin below the first one.
                writeln!(f, "answer    {}\n", answer.replace('\n', "\n          "))?;
            }
        }
        writeln!(f, "{}", sessions_table(&self.sessions, &names))?;
        writeln!(f, "{}", four_metrics(&self.metrics, self.settings.max_sessions))?;
        if self.faults != FaultsReport::default() {
            writeln!(f, "{}", faults_block(&self.faults))?;
        }
        write!(f, "{}", pool_block(&self.pool))
    }
}

/// File names, or whole paths where two files have the same name; long ones lose their beginning.
fn short_names<'a>(documents: impl Iterator<Item = &'a str> + Clone) -> Vec<String> {
    let file_name = |path: &'a str| Path::new(path).file_name().and_then(|name| name.to_str()).unwrap_or(path);
    let mut files: Vec<&str> = documents.clone().map(file_name).collect();
    files.sort_unstable();
    let distinct = files.windows(2).all(|pair| pair[0] != pair[1]);
    documents
        .map(|path| {
            let name = if distinct { file_name(path) } else { path };
            match name.chars().count() {
                n if n > NAME_CHARS_MAX => {
                    let rest: String = name.chars().skip(n - NAME_CHARS_MAX + 1).collect();
                    format!("…{rest}")
                }
                _ => name.to_owned(),
            }
        })
        .collect()
}

fn sessions_table(sessions: &[SessionReport], names: &[String]) -> String {
    use Align::{Left, Right};
    let columns = [
        ("\ndocument", Left),
        ("\ncache", Left),
        ("document\ntokens", Right),
        ("prompt\ntokens", Right),
        ("new\ntokens", Right),
        ("waited\ns", Right),
        ("first\ntoken s", Right),
        ("ms per\ntoken", Right),
        ("KV at\nthe end", Right),
        ("\nended by", Left),
    ];
    let rows = sessions.iter().zip(names).map(|(s, name)| {
        let document = if s.used_tokens < s.document_tokens {
            format!("{} of {}", count(s.used_tokens as u64), count(s.document_tokens as u64))
        } else {
            count(s.document_tokens as u64)
        };
        vec![
            name.clone(),
            cache(&s.compression),
            document,
            count(s.prompt_tokens as u64),
            count(s.new_tokens as u64),
            number(s.waited_s),
            number(s.first_token_s),
            number(s.per_token_ms),
            s.kv_bytes.to_string(),
            s.ended_by.to_owned(),
        ]
    });
    let mut text = table(&columns, rows);
    let cut = sessions.iter().filter(|s| s.used_tokens < s.document_tokens).count();
    if cut > 0 {
        text.push_str(&format!(" {} cut: only the first tokens were read\n", counted(cut as u64, "document")));
    }
    text
}

/// A compression without the dimensions that keep everything, a codec alone by its name.
pub(super) fn cache(compression: &str) -> String {
    match compression.parse::<Compression>() {
        Ok(full) if full == Compression::default() => full.hidden.to_string(),
        Ok(compression) => compression.short().trim_start_matches("hidden=").to_owned(),
        Err(_) => compression.to_owned(),
    }
}

fn four_metrics(metrics: &FourMetrics, max_sessions: u32) -> String {
    let FourMetrics { concurrency: c, prefill: p, decode: d, context_switch: w, service } = metrics;
    let steps = |n: u64| counted(n, "step");
    let sessions = counted(c.sessions as u64, "session");
    let mut concurrency = format!(
        "{} of {sessions} at once; the pool's {} hold {} of the largest ({})",
        c.resident_max, c.capacity_bytes, c.fit, c.largest_session_bytes
    );
    if c.resident_max < c.sessions && c.resident_max >= max_sessions as usize {
        concurrency.push_str(&format!("; more than {max_sessions} were not allowed"));
    }
    let mut prefill = format!(
        "{} in {} s, {} tokens/s ({} with prompt rows)",
        counted(p.prompt_tokens, "token"),
        number(Some(p.elapsed_s)),
        number(p.tokens_per_s),
        steps(p.steps)
    );
    if p.shared_tokens > 0 {
        prefill.push_str(&format!("; {} were in pages of other sessions", counted(p.shared_tokens, "token")));
    }
    let decode = format!(
        "{} in {} s, {} ms per step, {} tokens/s ({} without prompt rows)",
        counted(d.decode_tokens, "token"),
        number(Some(d.elapsed_s)),
        number(d.step_ms),
        number(d.tokens_per_s),
        steps(d.steps)
    );
    let waited = match w.sessions_waited {
        0 => "no session had to wait".to_owned(),
        n => format!("{n} of {} waited, {} s in all", c.sessions, number(Some(w.waited_s))),
    };
    let switch = if w.switches == 0 {
        format!("none; {waited}")
    } else {
        format!(
            "{} out and {} back ({} and {}), {} to be computed again, {} compressed harder; {waited}",
            w.swapped_out, w.swapped_in, w.out_bytes, w.in_bytes, w.recomputed, w.compressed
        )
    };
    let lines = [("concurrency", concurrency), ("prefill", prefill), ("decode", decode), ("context switch", switch)];
    let spread = |values: &Option<Percentiles>, unit: &str| match values {
        Some(Percentiles { p50, p95, p99 }) => {
            let [p50, p95, p99] = [p50, p95, p99].map(|value| number(Some(*value)));
            format!("{p50} {unit} in the middle, {p95} at 95 %, {p99} at 99 %")
        }
        None => "none".to_owned(),
    };
    let throughput = format!(
        "{} finished, {} per hour",
        counted(service.sessions_finished as u64, "session"),
        number(service.sessions_per_hour)
    );
    let seen = [
        ("sessions", throughput),
        ("first token", spread(&service.first_token_s, "s")),
        ("per token", spread(&service.per_token_ms, "ms")),
        ("switch", spread(&service.switch_s, "s")),
    ];
    block("the four challenges of long context", &lines) + "\n" + &block("what users see", &seen)
}

/// What went wrong, where something did.
fn faults_block(faults: &FaultsReport) -> String {
    let FaultsReport { device_losses, caches_restored, caches_recomputed, steps_shrunk } = faults;
    let lost = format!(
        "{}: {} from host memory, {} computed again",
        counted(*device_losses as u64, "device"),
        counted(*caches_restored as u64, "cache"),
        counted(*caches_recomputed as u64, "cache")
    );
    let short = format!("{} taken back and made smaller", counted(*steps_shrunk as u64, "step"));
    block("faults", &[("lost", lost), ("out of memory", short)])
}

/// The lines of a pool.
pub(super) fn pool_block(pool: &PoolReport) -> String {
    let arenas = counted(pool.arenas as u64, "arena");
    let lines = [
        ("budget", pool.budget_bytes.to_string()),
        ("allocated", format!("{}, pages in {arenas} of {}", pool.allocated_bytes, pool.arenas_bytes)),
        ("peak in use", format!("{}, of which pages {}", pool.peak_bytes, pool.pages_peak_bytes)),
        ("shared", format!("{} of pages at most were not held again", pool.spared_peak_bytes)),
        (
            "at the end",
            format!(
                "{}: staging {}, scratch {}, tables {}, pages {}",
                pool.in_use_bytes, pool.staging_bytes, pool.scratch_bytes, pool.tables_bytes, pool.pages_in_use_bytes
            ),
        ),
    ];
    block("the pool", &lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_short_and_distinct() {
        assert_eq!(short_names(["a/x.txt", "b/y.txt"].into_iter()), ["x.txt", "y.txt"], "file names");
        assert_eq!(short_names(["a/x.txt", "b/x.txt"].into_iter()), ["a/x.txt", "b/x.txt"], "same file name");
        let long = "n".repeat(40);
        let short = &short_names([long.as_str()].into_iter())[0];
        assert_eq!((short.chars().count(), short.starts_with('…')), (NAME_CHARS_MAX, true), "{short}");
    }
}
