//! Sessions that come while others run: places in line before there is a request, and times that are known ahead.
//!
//! A session has its place in line from the time at which it comes. Its request may follow later, as long as it is there before
//! the line comes to it: of thousands that wait, only the next few need to have their prompts in memory. A schedule is the same
//! either way.

use std::time::Duration;

use super::{Request, Scheduler, Session, SessionId, SubmitError, admission};

/// A place in line that a session came for.
#[derive(Debug)]
pub struct PlaceInLine {
    at: Duration,
    ticket: u64,
}

impl Scheduler {
    /// Takes the next place in line for a session that came at a time, which is not before that of the place taken last.
    /// Sessions whose next question came before it stand before it.
    ///
    /// # Panics
    /// When that time is still to come.
    pub fn take_place(&mut self, at: Duration) -> PlaceInLine {
        assert!(at <= self.now, "a session can not take its place before it comes");
        let asked = self.wake(at);
        self.asked.extend(asked);
        PlaceInLine { at, ticket: self.draw_ticket() }
    }

    /// Queues a session in a place that was taken for it.
    ///
    /// # Errors
    /// As [`Self::submit`]; the place is left empty then.
    pub fn submit_in(&mut self, place: PlaceInLine, request: Request) -> Result<SessionId, SubmitError> {
        admission::check(&request, &self.config, &self.caches)?;
        let id = SessionId(self.next_id);
        self.next_id += 1;
        let page_size = self.caches.full.page.page_size;
        let session = Session { ticket: place.ticket, ..Session::new(request, page_size, place.at) };
        self.sessions.insert(id, session);
        self.enqueue(id);
        Ok(id)
    }

    /// Says when the next session comes: where nobody has anything to compute, time passes no further.
    pub const fn expect(&mut self, arrival: Option<Duration>) {
        self.next_arrival = arrival;
    }

    /// When somebody next asks or comes who has not yet.
    pub(super) fn next_event(&self) -> Option<Duration> {
        let question = self.thinking.first().map(|(until, _)| *until);
        question.into_iter().chain(self.next_arrival).min()
    }

    /// Drops the tokens of a session that is over, which a long simulation has no use for. Its times, its moves and the lengths
    /// of its answers stay. What it keeps of its cache is shared with nobody any more.
    pub fn shed(&mut self, id: SessionId) {
        if let Some(session) = self.sessions.get_mut(&id).filter(|session| session.is_finished()) {
            (session.request.prompt, session.request.rounds) = (Vec::new(), Vec::new());
            (session.tokens, session.produced, session.prompt_end) = (Vec::new(), Vec::new(), 0);
            (session.edges, session.read_as_prompt) = (Vec::new(), 0);
        }
    }
}
