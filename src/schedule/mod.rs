//! The schedule: which sessions compute what in the next step, within the byte budget.
//!
//! # Algorithm
//!
//! ```text
//! step:  admit    waiting sessions in order of arrival, as long as the pool can commit all pages that each can need
//!        evict    from caches that are due: a document is cached whole, or N tokens have come since the last time
//!        plan     one decode row for every session in decode, then prompt chunks for those in prefill, in order of
//!                 arrival, until the step has `max_rows` rows
//!        grow     page tables by the rows planned (from the commitments, so it can not fail); full pages get a sealed one
//!        execute  on the backend: one submission
//!        apply    the tokens it returned; sealed pages lose their open form; finished sessions return every byte
//! ```
//!
//! * *Continuous batching*: sessions in different phases share every step.
//! * *Chunked prefill*: a long prompt is cut into chunks that fit beside the decode rows, so decoding sessions get a token in
//!   every step.
//! * *Compressed caches*: a session names its [`Compression`](crate::compression::Compression). A prompt chunk that leaves a
//!   page ends on a page's edge, so that every page it fills is sealed in the same step; and one that reaches the end of the
//!   document ends there, so that the question that follows reads the compressed cache ([`caches`]).
//! * *Admission is by bytes*: a session is admitted when the pool can promise all pages for its prompt and `max_new` tokens. One that
//!   could never fit is refused when it is submitted, with the numbers; one that does not fit now waits. The queue is
//!   strictly first come, first served: a short session does not overtake a long one, so none starves.
//!
//! The scheduler has no clock: time is the sum of what the backend says its steps took. With the same requests and the
//! same backend it makes the same plans.
//!
//! Accepted downside: committing the worst case keeps bytes idle that a session may never use. Preemption can lift that.

pub mod admission;
pub mod batch;
pub mod caches;
pub mod selection;
pub mod session;
pub mod simulation;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::pool::{PoolError, PoolReport};
pub use admission::SubmitError;
pub use batch::{PlannedRows, StepPlan};
pub use caches::{Caches, REPEAT_ROOM};
pub use selection::{Abilities, Merging, Observation, Observed, Selection};
pub use session::{Finish, Phase, Request, Session, SessionId, SessionTimes};

/// What executes a plan: the engine on a device, or a simulation.
pub trait Backend {
    /// What can go wrong.
    type Error: From<PoolError>;

    /// Executes one step. The page tables already hold room for the planned rows. Returns one token for each planned
    /// segment that samples, in order, and how long the step took.
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScheduleConfig {
    /// Rows of one step at most; at least `max_sessions`, so that every decode row fits.
    pub max_rows: u32,
    /// Sessions admitted at once at most.
    pub max_sessions: u32,
    /// Longest context of the model, in tokens.
    pub context_length: u32,
}

/// What happened in a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepReport {
    /// Sessions admitted.
    pub admitted: Vec<SessionId>,
    /// Sessions whose caches were evicted from before the rows.
    pub evicted: Vec<SessionId>,
    /// Tokens produced.
    pub produced: Vec<(SessionId, u32)>,
    /// Sessions that ended.
    pub finished: Vec<(SessionId, Finish)>,
    /// Decode rows computed.
    pub decode_rows: u32,
    /// Prompt rows computed.
    pub prefill_rows: u32,
    /// How long the step took.
    pub elapsed: Duration,
}

/// Sessions, waiting and admitted, and their caches.
#[derive(Clone, Debug)]
pub struct Scheduler {
    config: ScheduleConfig,
    caches: Caches,
    sessions: BTreeMap<SessionId, Session>,
    waiting: VecDeque<SessionId>,
    /// Admitted sessions in order of arrival.
    admitted: Vec<SessionId>,
    next_id: u32,
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
            waiting: VecDeque::new(),
            admitted: Vec::new(),
            next_id: 0,
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
        let session = Session {
            request,
            phase: Phase::Waiting,
            produced: Vec::new(),
            submitted: self.now,
            times: SessionTimes::default(),
        };
        self.sessions.insert(id, session);
        self.waiting.push_back(id);
        Ok(id)
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
        self.waiting.retain(|w| *w != id);
        self.admitted.retain(|a| *a != id);
        self.caches.release(id)?;
        let now = self.now;
        let session = self.session_mut(id);
        session.phase = Phase::Finished(why);
        session.times.finished = Some(now - session.submitted);
        Ok(())
    }

    fn session_mut(&mut self, id: SessionId) -> &mut Session {
        self.sessions.get_mut(&id).expect("a scheduled session exists")
    }

    /// Whether every session is over.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.admitted.is_empty()
    }

    /// One step: admit, plan, execute, apply. Does nothing when idle.
    ///
    /// # Errors
    /// The backend's.
    pub fn step<B: Backend>(&mut self, backend: &mut B) -> Result<StepReport, B::Error> {
        let mut report = StepReport { admitted: self.admit()?, ..StepReport::default() };
        let due: Vec<_> = self.admitted.iter().copied().filter(|id| self.caches.is_due(*id)).collect();
        for id in due {
            let tokens = self.sessions[&id].cached();
            report.elapsed += backend.evict(id, &tokens, &mut self.caches)?;
            report.evicted.push(id);
        }
        self.now += report.elapsed;
        let admitted = self.admitted.iter().map(|id| (*id, &self.sessions[id]));
        let plan = batch::plan(&self.config, &self.caches, admitted);
        if plan.segments.is_empty() {
            return Ok(report);
        }
        self.caches.grow(&plan)?;
        let result = backend.execute(&plan, &mut self.caches)?;
        self.caches.retire(&plan);
        self.now += result.elapsed;
        report.elapsed += result.elapsed;
        report.decode_rows = plan.decode_rows();
        report.prefill_rows = plan.n_rows() - plan.decode_rows();
        self.apply(&plan, &result, &mut report)?;
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
            let session = self.session_mut(id);
            if rows.sample.is_none() {
                continue;
            }
            let token = *tokens.next().expect("a backend should return a token for each sampling segment");
            session.phase = Phase::Decode;
            session.produced.push(token);
            session.times.first_token.get_or_insert(now - session.submitted);
            report.produced.push((id, token));
            let why = if session.request.stop.contains(&token) {
                Finish::Stop
            } else if session.produced.len() >= session.request.max_new as usize {
                Finish::Length
            } else {
                continue;
            };
            self.finish(id, why)?;
            report.finished.push((id, why));
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

    /// Sessions that wait, in order.
    pub fn waiting(&self) -> impl ExactSizeIterator<Item = SessionId> + '_ {
        self.waiting.iter().copied()
    }

    /// Sessions that hold pages.
    pub const fn n_admitted(&self) -> usize {
        self.admitted.len()
    }

    /// Pool and page tables.
    pub const fn caches(&self) -> &Caches {
        &self.caches
    }

    /// What the pool holds.
    pub fn report(&self) -> PoolReport {
        self.caches.pool.report()
    }
}
