//! One bar per session.

use concertina::geometry::Bytes;
use concertina::pool::PoolReport;
use concertina::report::finish_name;
use concertina::schedule::{Phase, Scheduler, Session, SessionId};
use indicatif::{MultiProgress, ProgressBar};

use super::progress::style;

/// Widest name beside a bar.
const NAME_CHARS_MAX: usize = 24;

/// The bars of a run.
#[derive(Debug)]
pub(super) struct SessionBars {
    multi: MultiProgress,
    bars: Vec<(SessionId, ProgressBar)>,
}

impl SessionBars {
    /// A bar for each session, named.
    pub(super) fn new<'n>(sessions: impl Iterator<Item = (SessionId, &'n str)> + Clone) -> Self {
        let multi = MultiProgress::new();
        let short = |name: &str| -> String {
            let skip = name.chars().count().saturating_sub(NAME_CHARS_MAX);
            name.chars().skip(skip).collect()
        };
        let width = sessions.clone().map(|(_, name)| short(name).chars().count()).max().unwrap_or(0);
        let bars = sessions
            .map(|(id, name)| {
                let bar = multi.add(ProgressBar::new(1));
                bar.set_style(style("{prefix} {bar:24.cyan/dim} {wide_msg}"));
                bar.set_prefix(format!("{:width$}", short(name)));
                (id, bar)
            })
            .collect();
        Self { multi, bars }
    }

    /// Shows where every session stands.
    pub(super) fn update(&self, scheduler: &Scheduler) {
        let pool = scheduler.report();
        for (id, bar) in &self.bars {
            let Some(session) = scheduler.session(*id) else { continue };
            let (position, length) = position(session);
            bar.set_length(length);
            bar.set_position(position);
            let needed = scheduler.caches().shape.bytes_for(session.request.max_tokens());
            bar.set_message(describe(session, needed, &pool));
        }
    }

    /// Removes the bars: the tables that follow say it all.
    pub(super) fn clear(&self) {
        // Progress that can not be cleared is no reason to lose the results.
        let _ = self.multi.clear();
    }
}

/// Where the bar of a session stands, and its length.
fn position(session: &Session) -> (u64, u64) {
    let prompt = session.request.prompt.len() as u64;
    match session.phase {
        Phase::Waiting => (0, prompt),
        Phase::Prefill(done) => (u64::from(done), prompt),
        Phase::Decode => (session.produced.len() as u64, u64::from(session.request.max_new)),
        Phase::Finished(_) => (1, 1),
    }
}

/// One line about a session.
fn describe(session: &Session, needed: Bytes, pool: &PoolReport) -> String {
    let produced = session.produced.len();
    match session.phase {
        Phase::Waiting => {
            let free = pool.arenas_bytes.saturating_sub(pool.pages_in_use_bytes + pool.committed_bytes);
            if needed > free {
                format!("waits: needs {needed}, {free} free")
            } else {
                format!("waits for its turn: needs {needed}, {free} free")
            }
        }
        Phase::Prefill(done) => format!("prefill {done} of {} tokens", session.request.prompt.len()),
        Phase::Decode => format!("decode {produced} of at most {} tokens", session.request.max_new),
        Phase::Finished(_) => {
            format!("{produced} token{}, {}", if produced == 1 { "" } else { "s" }, finish_name(session.phase))
        }
    }
}
