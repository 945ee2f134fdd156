//! One bar per session.

use concertina::geometry::Bytes;
use concertina::report::finish_name;
use concertina::schedule::{Phase, Place, Scheduler, Session, SessionId};
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

    /// Shows where every session stands before the next step.
    pub(super) fn update(&self, scheduler: &Scheduler) {
        let pool = scheduler.report();
        let mut free = pool.arenas_bytes.saturating_sub(pool.pages_in_use_bytes + pool.committed_bytes);
        let mut nobody_waits = true;
        for (id, bar) in &self.bars {
            let Some(session) = scheduler.session(*id) else { continue };
            let (position, length) = position(session);
            bar.set_length(length);
            bar.set_position(position);
            bar.set_message(match session.phase {
                Phase::Waiting => {
                    let needed = scheduler.caches().needed(&session.request).unwrap_or_default();
                    // Sessions begin in order, when the step begins; the first that does not fit holds up the others.
                    nobody_waits &= needed <= free;
                    let shown = free;
                    free = if nobody_waits { free.saturating_sub(needed) } else { free };
                    waiting(needed, shown, nobody_waits)
                }
                _ => describe(session),
            });
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
    let prompt = session.prompt_end as u64;
    match session.phase {
        Phase::Waiting => (0, prompt),
        Phase::Prefill(done) => (u64::from(done), prompt),
        Phase::Decode => (answered(session), u64::from(session.request.max_new_of(session.round()))),
        Phase::Thinking(_) | Phase::Finished(_) => (1, 1),
    }
}

/// Tokens of the answer under way.
fn answered(session: &Session) -> u64 {
    session.answers.last().map_or(0, |answer| answer.produced.len() as u64)
}

/// One line about a session that has no pages yet.
fn waiting(needed: Bytes, free: Bytes, begins: bool) -> String {
    match (begins, needed > free) {
        (true, _) => "begins".to_owned(),
        (false, true) => format!("waits: needs {needed}, {free} free"),
        (false, false) => format!("waits for its turn: needs {needed}, {free} free"),
    }
}

/// One line about a session that has, or had, pages.
fn describe(session: &Session) -> String {
    let produced = session.produced.len();
    let (round, rounds) = (session.round() + 1, 1 + session.request.rounds.len());
    let of = if rounds > 1 { format!("question {round} of {rounds}: ") } else { String::new() };
    let place = match session.place {
        Place::Leaving(_) => ", leaves for the host",
        Place::Host => ", in host memory",
        Place::Coming(_) => ", comes back",
        Place::Nowhere if !session.is_finished() => ", to be computed again",
        Place::Nowhere | Place::Device => "",
    };
    match session.phase {
        Phase::Waiting => String::new(),
        Phase::Prefill(done) => format!("{of}prefill {done} of {} tokens{place}", session.prompt_end),
        Phase::Decode => {
            let most = session.request.max_new_of(session.round());
            format!("{of}decode {} of at most {most} tokens{place}", answered(session))
        }
        Phase::Thinking(_) => format!("{of}answered{place}"),
        Phase::Finished(_) => {
            let s = if produced == 1 { "" } else { "s" };
            format!("done: {produced} token{s}, ended by {}", finish_name(session.phase))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waiting_session_says_what_it_waits_for() {
        let said = |needed, free, begins| waiting(Bytes::mib(needed), Bytes::mib(free), begins);
        assert_eq!(said(4, 1, false), "waits: needs 4.00 MiB, 1.00 MiB free", "for bytes");
        assert_eq!(said(1, 2, false), "waits for its turn: needs 1.00 MiB, 2.00 MiB free", "for others");
        assert_eq!(said(1, 2, true), "begins", "for nothing");
    }
}
