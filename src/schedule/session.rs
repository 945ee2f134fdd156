//! One session: a prompt, what it has produced, and where it stands.

use std::time::Duration;

use crate::compression::Compression;
use crate::kernels::sample::Sampling;

/// A session's number, in order of submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u32);

/// What a session asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Prompt, at least one token.
    pub prompt: Vec<u32>,
    /// Tokens to produce at most, at least one.
    pub max_new: u32,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens that end the session.
    pub stop: Vec<u32>,
    /// What is done to its cache.
    pub compression: Compression,
    /// Tokens of the prompt that are compressed before the rest of it is read: a document, without the question about it.
    /// The whole prompt where `None`; the first token is always one of them.
    pub document: Option<u32>,
}

impl Request {
    /// Tokens of the prompt that are compressed before the rest is read; the first always.
    pub fn document_tokens(&self) -> u32 {
        let prompt = u32::try_from(self.prompt.len()).expect("prompts are counted in 32 bits");
        self.document.unwrap_or(prompt).min(prompt).max(1)
    }

    /// Tokens that the cache must be able to hold. The last token produced is never fed back.
    pub fn max_tokens(&self) -> u32 {
        let prompt = u32::try_from(self.prompt.len()).expect("prompts are counted in 32 bits");
        prompt + self.max_new.saturating_sub(1)
    }
}

/// Where a session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Waits for bytes.
    Waiting,
    /// Admitted; this many prompt tokens are cached.
    Prefill(u32),
    /// Produces tokens.
    Decode,
    /// Over.
    Finished(Finish),
}

/// Why a session is over.
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

/// A session as the scheduler keeps it.
#[derive(Clone, Debug)]
pub struct Session {
    /// What was asked for.
    pub request: Request,
    /// Where it stands.
    pub phase: Phase,
    /// Tokens produced, a stop token included.
    pub produced: Vec<u32>,
    /// Submission on the clock of the schedule.
    pub submitted: Duration,
    /// Later times, from submission.
    pub times: SessionTimes,
}

impl Session {
    /// Tokens that its cache has seen: of the prompt those that are computed, without a question that is still to come; of
    /// those produced all but the last, which is fed back in the next step.
    pub fn cached(&self) -> Vec<u32> {
        let mut tokens = self.request.prompt.clone();
        match self.phase {
            Phase::Prefill(done) => tokens.truncate(done as usize),
            _ => tokens.extend(self.produced.split_last().map_or(&[][..], |(_, before)| before)),
        }
        tokens
    }

    /// Whether pages are held for it.
    pub const fn is_admitted(&self) -> bool {
        matches!(self.phase, Phase::Prefill(_) | Phase::Decode)
    }
}
