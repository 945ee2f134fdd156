//! One session: a prompt, what it has produced, and where it stands.

use std::cmp::Reverse;
use std::ops::Range;
use std::time::Duration;

use super::batch::Store;
use super::sharing;
use crate::compression::Compression;
use crate::kernels::sample::Sampling;

/// A session's number, in order of submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u32);

/// What a session asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Prompt, at least one token: a document and the first question about it.
    pub prompt: Vec<u32>,
    /// Tokens to produce at most, at least one.
    pub max_new: u32,
    /// What is asked after the first answer, in order.
    pub rounds: Vec<Round>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens that end an answer.
    pub stop: Vec<u32>,
    /// What is done to its cache.
    pub compression: Compression,
    /// Harder compressions that its cache may move to when there is no room for it, the mildest first.
    pub ladder: Vec<Compression>,
    /// Tokens of the prompt that are compressed before the rest of it is read: a document, without the question about it.
    /// The whole prompt where `None`; the first token is always one of them.
    pub document: Option<u32>,
    /// Sessions of a higher priority come first, and take the place of lower ones.
    pub priority: i32,
    /// Whether its cache stays after its last answer, as that of a session that thinks does, until it is cancelled.
    pub keep: bool,
}

/// A question after an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Round {
    /// What follows the answer, without the token that ended it: the end of a turn, and the next question.
    pub tokens: Vec<u32>,
    /// Tokens to produce at most, at least one.
    pub max_new: u32,
    /// Time between the answer before and this question.
    pub think: Duration,
}

impl Request {
    /// A greedy answer over a full cache.
    pub fn new(prompt: Vec<u32>, max_new: u32) -> Self {
        Self {
            prompt,
            max_new,
            rounds: Vec::new(),
            sampling: Sampling::GREEDY,
            stop: Vec::new(),
            compression: Compression::default(),
            ladder: Vec::new(),
            document: None,
            priority: 0,
            keep: false,
        }
    }

    /// Tokens of the prompt that are compressed before the rest is read; the first always.
    pub fn document_tokens(&self) -> u32 {
        let prompt = u32::try_from(self.prompt.len()).expect("prompts are counted in 32 bits");
        self.document.unwrap_or(prompt).min(prompt).max(1)
    }

    /// Tokens of all prompts and answers.
    pub fn all_tokens(&self) -> u64 {
        let later = |round: &Round| round.tokens.len() as u64 + u64::from(round.max_new);
        self.prompt.len() as u64 + u64::from(self.max_new) + self.rounds.iter().map(later).sum::<u64>()
    }

    /// Tokens that the cache must be able to hold. The last token produced is never fed back.
    ///
    /// # Panics
    /// When they are not counted in 32 bits, which [`Scheduler::submit`](super::Scheduler::submit) refuses.
    pub fn max_tokens(&self) -> u32 {
        u32::try_from(self.all_tokens().saturating_sub(1)).expect("sessions are counted in 32 bits")
    }

    /// Tokens that the cache is made for. That of a session that is kept may go on later, so that one which is evicted from
    /// again and again stands ready for that.
    ///
    /// # Panics
    /// As [`Self::max_tokens`].
    pub fn cache_tokens(&self) -> u32 {
        let every = self.compression.token.eviction().and_then(|eviction| eviction.every).filter(|_| self.keep);
        every.map_or(self.max_tokens(), |every| self.max_tokens().max(self.document_tokens() + every + 1))
    }

    /// Tokens that a round, counted from 0, may produce.
    pub fn max_new_of(&self, round: usize) -> u32 {
        round.checked_sub(1).map_or(self.max_new, |later| self.rounds[later].max_new)
    }
}

/// Where a session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Has not begun.
    Waiting,
    /// Reads a prompt; this many tokens of the sequence are cached.
    Prefill(u32),
    /// Produces tokens.
    Decode,
    /// Has answered; its next question comes at this time.
    Thinking(Duration),
    /// Over.
    Finished(Finish),
}

/// Where a session's cache is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Place {
    /// Nowhere: it has not begun, is over, or is to be computed again.
    #[default]
    Nowhere,
    /// In the pool.
    Device,
    /// On its way to the host; this many pages have been copied.
    Leaving(u32),
    /// Away, in the session's store.
    Host,
    /// On its way back; this many pages have been copied.
    Coming(u32),
}

/// Why an answer, or a session, is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// It produced a stop token.
    Stop,
    /// It produced as many tokens as it may.
    Length,
    /// It was cancelled.
    Cancelled,
}

/// Times of a session on the clock of the schedule, each from submission.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SessionTimes {
    /// Until admitted.
    pub admitted: Option<Duration>,
    /// Until the first token was there.
    pub first_token: Option<Duration>,
    /// Until over.
    pub finished: Option<Duration>,
}

/// One answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Its tokens in [`Session::produced`].
    pub produced: Range<usize>,
    /// When it was asked for, on the clock of the schedule.
    pub asked: Duration,
    /// From then until its first token was there.
    pub first_token: Option<Duration>,
    /// From then until its last.
    pub finished: Option<Duration>,
}

impl Answer {
    /// Milliseconds per token after the first; none where there is no second, or not the last.
    pub fn per_token_ms(&self) -> Option<f64> {
        let after_first = self.produced.len().checked_sub(1).filter(|n| *n > 0)?;
        Some((self.finished? - self.first_token?).as_secs_f64() * 1e3 / after_first as f64)
    }
}

/// How often a session changed places.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moves {
    /// Times that it was copied to the host.
    pub swapped_out: u32,
    /// Times that it was copied back.
    pub swapped_in: u32,
    /// Times that its cache was dropped, to be computed again.
    pub dropped: u32,
    /// Times that its cache was compressed harder.
    pub compressed: u32,
    /// Times that it lost its place in the middle of a round.
    pub preempted: u32,
}

/// A session as the scheduler keeps it.
#[derive(Clone, Debug)]
pub struct Session {
    /// What was asked for.
    pub request: Request,
    /// Where it stands.
    pub phase: Phase,
    /// Where its cache is.
    pub place: Place,
    /// The sequence so far: prompts and answers.
    pub tokens: Vec<u32>,
    /// Of these, those that are read as a prompt before the next one is produced.
    pub prompt_end: usize,
    /// Tokens produced in all rounds, stop tokens included.
    pub produced: Vec<u32>,
    /// Answers so far, the one under way included.
    pub answers: Vec<Answer>,
    /// How often it changed places.
    pub moves: Moves,
    /// Tokens that it did not read, because pages of other sessions held them.
    pub shared_tokens: u64,
    /// Hashes of its prompt up to each page's edge.
    pub(super) edges: Vec<u64>,
    /// Of its prompt, the tokens that were read as one, not as an answer; none where its cache is not as these would leave
    /// it, because it came from a file or was encoded again.
    pub(super) read_as_prompt: usize,
    /// The session that it was forked from.
    pub(super) parent: Option<SessionId>,
    /// Whether it has rows in the next step, or will have as soon as its cache is back.
    pub(super) seated: bool,
    /// Rungs of its ladder that are behind it.
    pub(super) rungs: usize,
    /// Its place in line: in order of questions.
    pub(super) ticket: u64,
    /// How often it lost its place in this round.
    pub(super) preempted_in_round: u32,
    /// Where its cache is kept while it is away.
    pub(super) store: Store,
    /// Since when its cache is on its way, on the clock of the schedule.
    pub(super) moving_since: Duration,
    /// Since when nobody has needed its cache, on the clock of the schedule.
    pub(super) idle_since: Duration,
    /// Submission on the clock of the schedule.
    pub submitted: Duration,
    /// Later times, from submission.
    pub times: SessionTimes,
}

impl Session {
    pub(super) fn new(request: Request, page_size: u32, now: Duration) -> Self {
        Self {
            phase: Phase::Waiting,
            place: Place::Nowhere,
            tokens: request.prompt.clone(),
            prompt_end: request.prompt.len(),
            produced: Vec::new(),
            answers: vec![Answer { produced: 0..0, asked: now, first_token: None, finished: None }],
            moves: Moves::default(),
            shared_tokens: 0,
            edges: sharing::edges(&request.prompt, page_size),
            read_as_prompt: request.prompt.len(),
            parent: None,
            seated: false,
            rungs: 0,
            ticket: 0,
            preempted_in_round: 0,
            store: Store::Host,
            moving_since: now,
            idle_since: now,
            submitted: now,
            times: SessionTimes::default(),
            request,
        }
    }

    /// The round under way, counted from 0.
    pub const fn round(&self) -> usize {
        self.answers.len() - 1
    }

    /// Whether pages are held for it.
    pub const fn is_admitted(&self) -> bool {
        matches!(self.place, Place::Device | Place::Leaving(_) | Place::Coming(_))
    }

    /// Whether it has something to compute.
    pub const fn wants_rows(&self) -> bool {
        matches!(self.phase, Phase::Waiting | Phase::Prefill(_) | Phase::Decode)
    }

    /// Whether it has rows in the next step.
    pub(super) const fn runs(&self) -> bool {
        self.seated && matches!(self.place, Place::Device)
    }

    /// Where it stands in line: higher priorities first, then earlier questions.
    pub(super) const fn line(&self) -> (Reverse<i32>, u64) {
        (Reverse(self.request.priority), self.ticket)
    }

    /// Whether it is over.
    pub const fn is_finished(&self) -> bool {
        matches!(self.phase, Phase::Finished(_))
    }

    /// Takes a token that was produced; how its answer ended, if it did.
    pub(super) fn take(&mut self, token: u32, now: Duration) -> Option<Finish> {
        self.phase = Phase::Decode;
        self.produced.push(token);
        self.tokens.push(token);
        self.times.first_token.get_or_insert(now - self.submitted);
        let limit = self.request.max_new_of(self.round()) as usize;
        let answer = self.answers.last_mut().expect("a session has a round");
        answer.produced.end = self.produced.len();
        answer.first_token.get_or_insert(now - answer.asked);
        let why = if self.request.stop.contains(&token) {
            Finish::Stop
        } else if answer.produced.len() >= limit {
            Finish::Length
        } else {
            return None;
        };
        answer.finished = Some(now - answer.asked);
        Some(why)
    }

    /// The question that follows the answer under way.
    pub(super) fn next_round(&self) -> Option<&Round> {
        self.request.rounds.get(self.round())
    }

    /// Its sequence as a question follows it, without the token that ended an answer: the end of a turn is the template's business,
    /// and the question begins with it.
    pub(super) fn without_stop(&self) -> &[u32] {
        let answers = self.answers.last().is_some_and(|answer| !answer.produced.is_empty());
        match self.tokens.split_last() {
            Some((last, before)) if answers && self.request.stop.contains(last) => before,
            _ => &self.tokens,
        }
    }

    /// Tokens of its sequence that its cache has seen, wherever that is. Positions can be fewer, where an eviction turns kept
    /// keys to their places in the cache.
    ///
    /// # Panics
    /// For more than are counted in 32 bits, which [`Scheduler::submit`](super::Scheduler::submit) refuses.
    pub fn cached(&self) -> u32 {
        match (self.place, self.phase) {
            (Place::Nowhere, _) | (_, Phase::Waiting) => 0,
            (_, Phase::Prefill(done)) => done,
            // The last token that was produced is not fed back until there is another question.
            _ => u32::try_from(self.tokens.len() - 1).expect("sessions are counted in 32 bits"),
        }
    }

    /// Begins the next round: its question follows the answer.
    pub(super) fn ask(&mut self, now: Duration) {
        let cached = self.cached();
        let round = self.next_round().expect("a session that thinks has a round to come").clone();
        self.tokens.truncate(self.without_stop().len());
        self.tokens.extend(round.tokens);
        self.prompt_end = self.tokens.len();
        self.phase = Phase::Prefill(cached);
        let at = self.produced.len();
        self.answers.push(Answer { produced: at..at, asked: now, first_token: None, finished: None });
        self.preempted_in_round = 0;
    }

    /// Loses its cache: everything is read again, answers included.
    pub(super) fn forget(&mut self) {
        self.place = Place::Nowhere;
        if self.wants_rows() {
            self.prompt_end = self.tokens.len();
            self.phase = Phase::Prefill(0);
        }
    }
}
