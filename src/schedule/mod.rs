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
//! fails: take back the rows that were planned; smaller steps where memory was short ([`recovery`])
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
//! The scheduler has no clock: time is the sum of what the backend says its steps took, and jumps to the next question, or to
//! the next session that is expected ([`arrivals`]), where nobody has anything to compute. With the same requests and the same
//! backend it makes the same plans.
//!
//! Accepted downside: committing the worst case keeps bytes idle that a session may never use.

pub mod admission;
pub mod arrivals;
pub mod batch;
pub mod caches;
pub mod one_list;
pub mod preemption;
pub mod record;
pub mod recovery;
pub mod selection;
pub mod session;
pub mod sharing;
pub mod simulation;
pub mod suspension;
pub mod virtual_device;
pub mod workload;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::geometry::Bytes;

use crate::pool::{PoolError, PoolReport};
pub use admission::SubmitError;
pub use arrivals::PlaceInLine;
pub use batch::{Direction, PlannedRows, StepPlan, Store, Transfer};
pub use caches::{Caches, REPEAT_ROOM};
pub use one_list::OneList;
pub use preemption::{HostConfig, Method, Rates};
pub use record::SessionRecord;
use recovery::Limit;
pub use recovery::{BackendError, Fault, Loss, Shortage};
pub use selection::{Abilities, Merging, Observation, Observed, Selection};
pub use session::{Answer, Finish, Moves, Phase, Place, Request, Round, Session, SessionId, SessionTimes};
pub use sharing::Shared;
pub use suspension::{CacheRecord, SuspendedCache};

/// What executes a plan: the engine on a device, or a simulation.
pub trait Backend {
    /// What can go wrong.
    type Error: BackendError;

    /// Executes one step. The page tables already hold room for the planned rows, and pages for what comes back. Returns one
    /// token for each planned segment that samples, in order, and how long the step took. Pages that leave can be overwritten
    /// from the next step on; a copy in host memory lasts until its last page is back, or it is forgotten.
    ///
    /// # Errors
    /// Whatever the backend runs into. What was there before the step is as it was, unless the device was lost: cached tokens,
    /// slots, copies in host memory. What was planned may be there in part; it is written again by a later step.
    fn execute(&mut self, plan: &StepPlan, caches: &mut Caches) -> Result<StepResult, Self::Error>;

    /// Evicts from the cache of a session that is due, which has seen `tokens` and nothing after them, and swaps its table; how
    /// long that took.
    ///
    /// # Errors
    /// Whatever the backend runs into. The cache is as it was, and its eviction still due, unless the device was lost.
    fn evict(&mut self, session: SessionId, tokens: &[u32], caches: &mut Caches) -> Result<Duration, Self::Error>;
}

/// What a step gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepResult {
    /// One token per sampling segment of the plan.
    pub tokens: Vec<u32>,
    /// How long it took.
    pub elapsed: Duration,
    /// Sessions whose copies away from the device could not be kept.
    pub lost: Vec<SessionId>,
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
    /// How long the moves took that ended: from the step that began each to the end of this one.
    pub moves: Vec<Duration>,
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
    /// That the device had no memory for its rows, so that none were computed; the next step is smaller.
    pub shortage: Option<Shortage>,
}

/// Bytes that a store holds.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    held: Bytes,
    peak: Bytes,
}

impl Held {
    fn take(&mut self, bytes: Bytes) {
        self.held += bytes;
        self.peak = self.peak.max(self.held);
    }

    const fn give_back(&mut self, bytes: Bytes) {
        self.held = self.held.saturating_sub(bytes);
    }
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
    /// Bytes of caches that are away, of each [`Store`].
    away: [Held; 2],
    /// Whether a file could not be written.
    disk_full: bool,
    rates: Rates,
    /// Copies in host memory that the backend may drop.
    forgotten: Vec<SessionId>,
    limit: Limit,
    /// What happened since the last report, or in a step that ended in an error.
    unreported: StepReport,
    next_id: u32,
    next_ticket: u64,
    /// When the next session comes, where that is known.
    next_arrival: Option<Duration>,
    /// Sessions that asked since the last step.
    asked: Vec<SessionId>,
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
            away: Default::default(),
            disk_full: false,
            rates: config.host.rates,
            forgotten: Vec::new(),
            limit: Limit::new(config.max_rows),
            unreported: StepReport::default(),
            next_id: 0,
            next_ticket: 0,
            next_arrival: None,
            asked: Vec::new(),
            now: Duration::ZERO,
        }
    }

    /// Queues a session.
    ///
    /// # Errors
    /// [`SubmitError`] when it is empty, longer than the context, or larger than the pool will ever be.
    pub fn submit(&mut self, request: Request) -> Result<SessionId, SubmitError> {
        let place = self.take_place(self.now);
        self.submit_in(place, request)
    }

    const fn draw_ticket(&mut self) -> u64 {
        self.next_ticket += 1;
        self.next_ticket - 1
    }

    /// Puts a session behind those of its priority.
    fn stand_in_line(&mut self, id: SessionId) {
        self.session_mut(id).ticket = self.draw_ticket();
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

    /// Ends a session; every byte of it returns. One that is over gives up the cache that it kept; an unknown one stays as it
    /// is.
    ///
    /// # Errors
    /// [`PoolError`], which would be a defect.
    pub fn cancel(&mut self, id: SessionId) -> Result<(), PoolError> {
        match self.sessions.get(&id).map(|s| s.phase) {
            None => Ok(()),
            Some(Phase::Finished(_)) => self.let_go(id),
            Some(_) => self.finish(id, Finish::Cancelled),
        }
    }

    fn finish(&mut self, id: SessionId, why: Finish) -> Result<(), PoolError> {
        self.leave_queue(id);
        if let Phase::Thinking(until) = self.sessions[&id].phase {
            self.thinking.remove(&(until, id));
        }
        let now = self.now;
        let session = self.session_mut(id);
        session.phase = Phase::Finished(why);
        session.seated = false;
        session.idle_since = now;
        session.times.finished = Some(now - session.submitted);
        if session.request.keep && why != Finish::Cancelled { Ok(()) } else { self.let_go(id) }
    }

    /// Returns everything that a session holds.
    fn let_go(&mut self, id: SessionId) -> Result<(), PoolError> {
        // What was copied to the host is not wanted any more.
        let (copied, held) = match (self.sessions[&id].place, self.hosted.remove(&id)) {
            (Place::Leaving(pages), _) => (pages > 0, self.caches.suspended_bytes(id)),
            (_, Some(suspended)) => (true, suspended.bytes()),
            (_, None) => (false, Bytes::ZERO),
        };
        self.away[self.sessions[&id].store as usize].give_back(held);
        self.forgotten.extend(copied.then_some(id));
        self.hand_over(id, |caches| caches.release(id))?;
        self.admitted.retain(|a| *a != id);
        self.session_mut(id).place = Place::Nowhere;
        Ok(())
    }

    fn session_mut(&mut self, id: SessionId) -> &mut Session {
        self.sessions.get_mut(&id).expect("a scheduled session exists")
    }

    /// Whether every session is over, and no cache is on its way or due to be evicted from.
    pub fn is_idle(&self) -> bool {
        let kept = |id: &SessionId| {
            let session = &self.sessions[id];
            session.is_finished() && session.place == Place::Device && !self.caches.is_due(*id)
        };
        self.waiting.is_empty() && self.thinking.is_empty() && self.admitted.iter().all(kept)
    }

    /// Sessions whose time to think was over by then ask their next question.
    fn wake(&mut self, by: Duration) -> Vec<SessionId> {
        let mut asked = Vec::new();
        while let Some((until, id)) = self.thinking.first().copied().filter(|(until, _)| *until <= by) {
            self.thinking.remove(&(until, id));
            self.session_mut(id).ask(until);
            self.stand_in_line(id);
            asked.push(id);
        }
        asked
    }

    /// One step: wake, admit, evict, plan, execute, apply. Where nobody has anything to compute, time passes until the next
    /// question or the next session that is expected; where there is none, nothing happens. Where the device has no memory for
    /// the rows, they are taken back and the next step is smaller, as the report says.
    ///
    /// # Errors
    /// The backend's; the schedule is as before the rows, and could go on.
    pub fn step<B: Backend>(&mut self, backend: &mut B) -> Result<StepReport, B::Error> {
        let mut report = std::mem::take(&mut self.unreported);
        let failed = match self.try_step(backend, &mut report) {
            Err(error) if error.fault() != Fault::OutOfMemory || !self.shrink(&mut report)? => Some(error),
            _ => None,
        };
        report.admitted.append(&mut self.unreported.admitted);
        report.shared.append(&mut self.unreported.shared);
        match failed {
            Some(error) => {
                self.unreported = report;
                Err(error)
            }
            None => Ok(report),
        }
    }

    fn try_step<B: Backend>(&mut self, backend: &mut B, report: &mut StepReport) -> Result<(), B::Error> {
        report.asked.append(&mut self.asked);
        report.asked.extend(self.wake(self.now));
        self.admit(backend, report)?;
        let here = |id: &SessionId| self.sessions[id].place == Place::Device && self.caches.is_due(*id);
        let due: Vec<_> = self.admitted.iter().copied().filter(here).collect();
        for id in due {
            let session = &self.sessions[&id];
            let tokens = &session.tokens[..session.cached() as usize];
            let elapsed = backend.evict(id, tokens, &mut self.caches)?;
            self.spend(elapsed, report);
            report.evicted.push(id);
        }
        let admitted = self.admitted.iter().map(|id| (*id, &self.sessions[id]));
        let mut plan = batch::plan(self.limit.rows, &self.caches, admitted.filter(|(_, session)| session.runs()));
        plan.transfers = self.plan_transfers();
        plan.forgotten = std::mem::take(&mut self.forgotten);
        if plan.is_empty() {
            if let Some(until) = self.next_event() {
                report.idle = until.saturating_sub(self.now);
                self.now += report.idle;
            }
            return Ok(());
        }
        let fresh = self.caches.fresh();
        let grown = self.caches.grow(&plan).map_err(B::Error::from);
        let result = match grown.and_then(|()| backend.execute(&plan, &mut self.caches)) {
            Ok(result) => result,
            Err(error) => {
                self.caches.ungrow(&plan)?;
                self.caches.forget_fresh();
                self.caches.begin_slots(fresh.into_iter());
                self.forgotten = plan.forgotten;
                return Err(error);
            }
        };
        self.caches.retire(&plan);
        if plan.n_rows() > 0 {
            self.limit.went_well(self.config.max_rows);
        }
        self.spend(result.elapsed, report);
        report.decode_rows = plan.decode_rows();
        report.prefill_rows = plan.n_rows() - plan.decode_rows();
        self.moved(&plan, &result.lost, report)?;
        self.lose(&result.lost, report)?;
        self.learn(report, result.elapsed);
        self.apply(&plan, &result, report)?;
        Ok(())
    }

    fn spend(&mut self, elapsed: Duration, report: &mut StepReport) {
        self.now += elapsed;
        report.elapsed += elapsed;
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

    /// Bytes of caches that are in a store, those on their way included, and the most that ever were.
    pub const fn away_bytes(&self, store: Store) -> (Bytes, Bytes) {
        let Held { held, peak } = self.away[store as usize];
        (held, peak)
    }

    /// What the pool holds.
    pub fn report(&self) -> PoolReport {
        self.caches.pool.report()
    }
}
