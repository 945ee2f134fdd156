//! The schedule: which sessions compute what in the next step, within the byte budget.
//!
//! # Algorithm
//!
//! ```text
//! step:  wake     sessions whose next question has come; they stand in line, by priority, then in order of questions
//!        admit    from the line, as long as there are seats and the pool can commit all pages that each can need; where it can
//!                 not, a session that does not run gives up its pages ([`preemption`])
//!        evict    from caches that are due: a document is cached whole, or N tokens have come since the last time
//!        plan     one decode row for every session in decode, then prompt chunks for those in prefill, in order of
//!                 arrival, until the step has `max_rows` rows; a chunk of the pages that move between device and host
//!        grow     page tables by the rows planned (from the commitments, so it can not fail); full pages get a sealed one
//!        execute  on the backend: one submission
//!        apply    the tokens it returned; sealed pages lose their open form; sessions that are over return every byte
//! ```
//!
//! * *Continuous batching*: sessions in different phases share every step.
//! * *Chunked prefill*: a long prompt is cut into chunks that fit beside the decode rows, so decoding sessions get a token in
//!   every step.
//! * *Compressed caches*: a session names its [`Compression`](crate::compression::Compression). A prompt chunk that leaves a
//!   page ends on a page's edge, so that every page it fills is sealed in the same step; and one that reaches the end of the
//!   document ends there, so that the question that follows reads the compressed cache ([`caches`]).
//! * *Rounds*: a session is a document, a question, an answer, time to think, the next question. While it thinks it has no
//!   seat; its cache stays as long as nobody else needs the pages. Then it goes to the host and comes back, or is dropped and
//!   computed again.
//! * *Sharing*: a session that begins with the tokens of another takes over pages of it in place of reading them ([`sharing`]).
//! * *Admission is by bytes*: a session is admitted when the pool can promise all pages for its prompts and answers. One that
//!   could never fit is refused when it is submitted, with the numbers; one that does not fit now waits. The line is strictly
//!   in order: a short session does not overtake a long one, so none starves.
//!
//! The scheduler has no clock: time is the sum of what the backend says its steps took, and jumps to the next question where
//! nobody has anything to compute. With the same requests and the same backend it makes the same plans.
//!
//! Accepted downside: committing the worst case keeps bytes idle that a session may never use.

pub mod admission;
pub mod batch;
pub mod caches;
pub mod preemption;
pub mod selection;
pub mod session;
pub mod sharing;
pub mod simulation;
pub mod suspension;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::geometry::Bytes;

use crate::pool::{PoolError, PoolReport};
pub use admission::SubmitError;
pub use batch::{Direction, PlannedRows, StepPlan, Transfer};
pub use caches::{Caches, REPEAT_ROOM};
pub use preemption::{HostConfig, Method, Rates};
pub use selection::{Abilities, Merging, Observation, Observed, Selection};
pub use session::{Answer, Finish, Moves, Phase, Place, Request, Round, Session, SessionId, SessionTimes};
pub use sharing::Shared;
pub use suspension::SuspendedCache;

/// What executes a plan: the engine on a device, or a simulation.
pub trait Backend {
    /// What can go wrong.
    type Error: From<PoolError>;

    /// Executes one step. The page tables already hold room for the planned rows, and pages for what comes back. Returns one
    /// token for each planned segment that samples, in order, and how long the step took. Pages that leave can be overwritten
    /// from the next step on; a copy in host memory lasts until its last page is back, or it is forgotten.
    ///
    /// # Errors
    /// Whatever the backend runs into; the scheduler's state is unchanged except for the grown page tables.
    fn execute(&mut self, plan: &StepPlan, caches: &mut Caches) -> Result<StepResult, Self::Error>;

    /// Evicts from the cache of a session that is due, which has seen `tokens` and nothing after them, and swaps its table; how
    /// long that took.
    ///
    /// # Errors
    /// Whatever the backend runs into.
    fn evict(&mut self, session: SessionId, tokens: &[u32], caches: &mut Caches) -> Result<Duration, Self::Error>;
}

/// What a step gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepResult {
    /// One token per sampling segment of the plan.
    pub tokens: Vec<u32>,
    /// How long it took.
    pub elapsed: Duration,
}

/// Limits of the schedule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScheduleConfig {
    /// Rows of one step at most; at least `max_sessions`, so that every decode row fits.
    pub max_rows: u32,
    /// Sessions that compute at once at most.
    pub max_sessions: u32,
    /// Longest context of the model, in tokens.
    pub context_length: u32,
    /// Where caches go that do not fit.
    pub host: HostConfig,
}

/// What happened in a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepReport {
    /// Sessions that asked their next question.
    pub asked: Vec<SessionId>,
    /// Sessions that began.
    pub admitted: Vec<SessionId>,
    /// Sessions that got pages of others, and what these spare them.
    pub shared: Vec<(SessionId, Shared)>,
    /// Sessions that lost their place in the middle of a round.
    pub preempted: Vec<SessionId>,
    /// Sessions whose caches were compressed harder.
    pub compressed: Vec<SessionId>,
    /// Sessions whose caches were dropped, to be computed again.
    pub dropped: Vec<SessionId>,
    /// Sessions whose last pages left for the host.
    pub swapped_out: Vec<SessionId>,
    /// Sessions whose last pages came back.
    pub swapped_in: Vec<SessionId>,
    /// Bytes of pages that left.
    pub out_bytes: Bytes,
    /// Bytes of pages that came back.
    pub in_bytes: Bytes,
    /// How long nobody had anything to compute before.
    pub idle: Duration,
    /// Sessions whose caches were evicted from before the rows.
    pub evicted: Vec<SessionId>,
    /// Tokens produced.
    pub produced: Vec<(SessionId, u32)>,
    /// Sessions that ended an answer and have another question to come.
    pub answered: Vec<(SessionId, Finish)>,
    /// Sessions that ended.
    pub finished: Vec<(SessionId, Finish)>,
    /// Decode rows computed.
    pub decode_rows: u32,
    /// Prompt rows computed.
    pub prefill_rows: u32,
    /// How long the step took.
    pub elapsed: Duration,
}

/// Sessions and their caches.
#[derive(Clone, Debug)]
pub struct Scheduler {
    config: ScheduleConfig,
    caches: Caches,
    sessions: BTreeMap<SessionId, Session>,
    /// Sessions that have something to compute and no seat, in line.
    waiting: BTreeSet<(Reverse<i32>, u64, SessionId)>,
    /// Sessions that think, by the time of their next question.
    thinking: BTreeSet<(Duration, SessionId)>,
    /// Sessions that hold pages, in the order in which they got them.
    admitted: Vec<SessionId>,
    /// Caches in host memory.
    hosted: BTreeMap<SessionId, SuspendedCache>,
    host_held: Bytes,
    host_peak: Bytes,
    rates: Rates,
    /// Copies in host memory that the backend may drop.
    forgotten: Vec<SessionId>,
    /// Who has got pages since the last report, whether for the first time, and what of them is another's.
    begun: Vec<(SessionId, bool, Option<Shared>)>,
    next_id: u32,
    next_ticket: u64,
    now: Duration,
}

impl Scheduler {
    /// An empty schedule.
    ///
    /// # Panics
    /// When `max_rows` can not hold a row of every session.
    pub fn new(config: ScheduleConfig, caches: Caches) -> Self {
        assert!(config.max_sessions > 0 && config.max_rows >= config.max_sessions, "every session should have a row");
        Self {
            config,
            caches,
            sessions: BTreeMap::new(),
            waiting: BTreeSet::new(),
            thinking: BTreeSet::new(),
            admitted: Vec::new(),
            hosted: BTreeMap::new(),
            host_held: Bytes::ZERO,
            host_peak: Bytes::ZERO,
            rates: config.host.rates,
            forgotten: Vec::new(),
            begun: Vec::new(),
            next_id: 0,
            next_ticket: 0,
            now: Duration::ZERO,
        }
    }

    /// Queues a session.
    ///
    /// # Errors
    /// [`SubmitError`] when it is empty, longer than the context, or larger than the pool will ever be.
    pub fn submit(&mut self, request: Request) -> Result<SessionId, SubmitError> {
        admission::check(&request, &self.config, &self.caches)?;
        let id = SessionId(self.next_id);
        self.next_id += 1;
        let page_size = self.caches.full.page.page_size;
        self.sessions.insert(id, Session::new(request, page_size, self.now));
        self.stand_in_line(id);
        Ok(id)
    }

    /// Puts a session behind those of its priority.
    fn stand_in_line(&mut self, id: SessionId) {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.session_mut(id).ticket = ticket;
        self.enqueue(id);
    }

    /// Puts a session where its ticket says.
    fn enqueue(&mut self, id: SessionId) {
        let (priority, ticket) = self.sessions[&id].line();
        self.waiting.insert((priority, ticket, id));
    }

    fn leave_queue(&mut self, id: SessionId) {
        let (priority, ticket) = self.sessions[&id].line();
        self.waiting.remove(&(priority, ticket, id));
    }

    /// Sessions with a seat.
    fn seated(&self) -> usize {
        self.admitted.iter().filter(|id| self.sessions[id].seated).count()
    }

    /// Ends a session; every byte of it returns. An unknown or finished session stays as it is.
    ///
    /// # Errors
    /// [`PoolError`], which would be a defect.
    pub fn cancel(&mut self, id: SessionId) -> Result<(), PoolError> {
        match self.sessions.get(&id).map(|s| s.phase) {
            None | Some(Phase::Finished(_)) => Ok(()),
            Some(_) => self.finish(id, Finish::Cancelled),
        }
    }

    fn finish(&mut self, id: SessionId, why: Finish) -> Result<(), PoolError> {
        self.leave_queue(id);
        if let Phase::Thinking(until) = self.sessions[&id].phase {
            self.thinking.remove(&(until, id));
        }
        // What was copied to the host is not wanted any more.
        let (copied, held) = match (self.sessions[&id].place, self.hosted.remove(&id)) {
            (Place::Leaving(pages), _) => (pages > 0, self.caches.suspended_bytes(id)),
            (_, Some(suspended)) => (true, suspended.bytes()),
            (_, None) => (false, Bytes::ZERO),
        };
        self.host_held = self.host_held.saturating_sub(held);
        self.forgotten.extend(copied.then_some(id));
        self.let_go(id, |caches| caches.release(id))?;
        self.admitted.retain(|a| *a != id);
        let now = self.now;
        let session = self.session_mut(id);
        session.phase = Phase::Finished(why);
        session.place = Place::Nowhere;
        session.seated = false;
        session.times.finished = Some(now - session.submitted);
        Ok(())
    }

    fn session_mut(&mut self, id: SessionId) -> &mut Session {
        self.sessions.get_mut(&id).expect("a scheduled session exists")
    }

    /// Whether every session is over.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.admitted.is_empty() && self.thinking.is_empty()
    }

    /// Tokens of a session's sequence that its cache has seen, wherever that is.
    pub fn cached_tokens(&self, id: SessionId) -> u32 {
        let hosted = || self.hosted.get(&id).map_or(0, SuspendedCache::n_tokens);
        self.caches.tables.get(&id).map_or_else(hosted, |table| table.n_tokens())
    }

    /// Sessions whose time to think is over ask their next question.
    fn wake(&mut self) -> Vec<SessionId> {
        let mut asked = Vec::new();
        while let Some((until, id)) = self.thinking.first().copied().filter(|(until, _)| *until <= self.now) {
            self.thinking.remove(&(until, id));
            let cached = self.cached_tokens(id);
            self.session_mut(id).ask(cached, until);
            self.stand_in_line(id);
            asked.push(id);
        }
        asked
    }

    /// One step: wake, admit, evict, plan, execute, apply. Where nobody has anything to compute, time passes until the next
    /// question; where there is none, nothing happens.
    ///
    /// # Errors
    /// The backend's.
    pub fn step<B: Backend>(&mut self, backend: &mut B) -> Result<StepReport, B::Error> {
        let mut report = StepReport { asked: self.wake(), ..StepReport::default() };
        self.admit(backend, &mut report)?;
        self.tell_begun(&mut report);
        let here = |id: &SessionId| self.sessions[id].place == Place::Device && self.caches.is_due(*id);
        let due: Vec<_> = self.admitted.iter().copied().filter(here).collect();
        for id in due {
            let tokens = &self.sessions[&id].tokens[..self.cached_tokens(id) as usize];
            report.elapsed += backend.evict(id, tokens, &mut self.caches)?;
            report.evicted.push(id);
        }
        self.now += report.elapsed;
        let admitted = self.admitted.iter().map(|id| (*id, &self.sessions[id]));
        let mut plan = batch::plan(&self.config, &self.caches, admitted.filter(|(_, session)| session.runs()));
        plan.transfers = self.plan_transfers();
        plan.forgotten = std::mem::take(&mut self.forgotten);
        if plan.is_empty() {
            if let Some((until, _)) = self.thinking.first() {
                report.idle = until.saturating_sub(self.now);
                self.now += report.idle;
            }
            return Ok(report);
        }
        self.caches.grow(&plan)?;
        let result = backend.execute(&plan, &mut self.caches)?;
        self.caches.retire(&plan);
        self.now += result.elapsed;
        report.elapsed += result.elapsed;
        report.decode_rows = plan.decode_rows();
        report.prefill_rows = plan.n_rows() - plan.decode_rows();
        self.moved(&plan, &mut report)?;
        self.learn(&report, result.elapsed);
        self.apply(&plan, &result, &mut report)?;
        self.tell_begun(&mut report);
        Ok(report)
    }

    fn apply(&mut self, plan: &StepPlan, result: &StepResult, report: &mut StepReport) -> Result<(), PoolError> {
        let mut tokens = result.tokens.iter();
        let now = self.now;
        for (id, n_rows) in plan.rows_of_sessions() {
            let session = self.session_mut(id);
            if let Phase::Prefill(done) = session.phase {
                session.phase = Phase::Prefill(done + n_rows);
            }
        }
        for rows in &plan.segments {
            let id = rows.session;
            if rows.sample.is_none() {
                continue;
            }
            let token = *tokens.next().expect("a backend should return a token for each sampling segment");
            report.produced.push((id, token));
            let session = self.session_mut(id);
            let Some(why) = session.take(token, now) else { continue };
            let Some(think) = session.next_round().map(|round| round.think) else {
                self.finish(id, why)?;
                report.finished.push((id, why));
                continue;
            };
            session.phase = Phase::Thinking(now + think);
            session.seated = false;
            session.idle_since = now;
            self.thinking.insert((now + think, id));
            report.answered.push((id, why));
        }
        assert!(tokens.next().is_none(), "a backend should return no more tokens than segments that sample");
        Ok(())
    }

    /// Time on the clock of the schedule.
    pub const fn now(&self) -> Duration {
        self.now
    }

    /// A session.
    pub fn session(&self, id: SessionId) -> Option<&Session> {
        self.sessions.get(&id)
    }

    /// All sessions, in order of submission.
    pub fn sessions(&self) -> impl Iterator<Item = (SessionId, &Session)> {
        self.sessions.iter().map(|(id, s)| (*id, s))
    }

    /// Sessions that have something to compute and no seat, in line.
    pub fn waiting(&self) -> impl ExactSizeIterator<Item = SessionId> + '_ {
        self.waiting.iter().map(|(_, _, id)| *id)
    }

    /// Sessions that hold pages.
    pub const fn n_admitted(&self) -> usize {
        self.admitted.len()
    }

    /// Pool and page tables.
    pub const fn caches(&self) -> &Caches {
        &self.caches
    }

    /// Bytes of host memory that hold caches, those on their way included, and the most that ever did.
    pub const fn host_bytes(&self) -> (Bytes, Bytes) {
        (self.host_held, self.host_peak)
    }

    /// What the pool holds.
    pub fn report(&self) -> PoolReport {
        self.caches.pool.report()
    }
}
