//! Admission: who may hold pages.

use std::ops::Bound;

use super::{Backend, Caches, Phase, Place, Request, ScheduleConfig, Scheduler, SessionId, Shared, StepReport};
use crate::geometry::Bytes;
use crate::pool::{PoolError, PoolLayout};

/// Why a session can not even wait.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Nothing to read or nothing to produce.
    #[error("a session needs at least one prompt token and one token to produce; this one has {prompt} and {max_new}")]
    Empty {
        /// Prompt tokens.
        prompt: usize,
        /// Tokens to produce.
        max_new: u32,
    },
    /// Longer than the model was made for.
    #[error(
        "prompts of {prompt} tokens and {max_new} to be produced are {} tokens in all, but the context is {context_length} tokens",
        prompt + max_new
    )]
    TooLong {
        /// Tokens of all prompts.
        prompt: u64,
        /// Tokens to produce in all rounds.
        max_new: u64,
        /// Longest context.
        context_length: u32,
    },
    /// Nothing to go on from.
    #[error("there is no session {} to fork", .0.0)]
    Unknown(SessionId),
    /// Nothing here can carry out its compression.
    #[error("{0}")]
    NotServed(String),
    /// On record, with nothing behind what was cached.
    #[error("{cached} of {tokens} tokens are cached already: there is nothing to compute until another question comes")]
    NothingToCompute {
        /// Tokens of the sequence.
        tokens: usize,
        /// Of these, tokens that the cache has seen.
        cached: u32,
    },
    /// Larger than the whole pool.
    #[error(
        "a session of {tokens} tokens needs {needed} for pages, but the budget leaves {capacity} for pages; \
         give a budget of at least {enough}"
    )]
    NeverFits {
        /// Tokens that the session can reach.
        tokens: u32,
        /// Bytes of the slabs that its pages fill.
        needed: Bytes,
        /// Bytes of all arenas.
        capacity: Bytes,
        /// A budget that suffices.
        enough: Bytes,
    },
}

/// Whether the request could be admitted to an empty pool.
pub(super) fn check(request: &Request, config: &ScheduleConfig, caches: &Caches) -> Result<(), SubmitError> {
    let rounds = request.rounds.iter().map(|round| (round.tokens.len(), round.max_new));
    let rounds = std::iter::once((request.prompt.len(), request.max_new)).chain(rounds);
    if let Some((prompt, max_new)) = rounds.clone().find(|(prompt, max_new)| *prompt == 0 || *max_new == 0) {
        return Err(SubmitError::Empty { prompt, max_new });
    }
    let context_length = config.context_length;
    if request.all_tokens() > u64::from(context_length) {
        let max_new = rounds.map(|(_, max_new)| u64::from(max_new)).sum();
        return Err(SubmitError::TooLong { prompt: request.all_tokens() - max_new, max_new, context_length });
    }
    caches.serves(&request.compression).map_err(SubmitError::NotServed)?;
    for rung in &request.ladder {
        caches.serves_later(&request.compression, rung).map_err(SubmitError::NotServed)?;
    }
    let tokens = request.max_tokens();
    let pages = caches.pages_needed(request).map_err(SubmitError::NotServed)?;
    let needed = caches.pool.slabs_for(&pages);
    let capacity = caches.pool.capacity();
    if needed > capacity {
        let report = caches.pool.report();
        let fixed = report.allocated_bytes - capacity;
        // A slab more for rounding, and the table entries that come with the additional pages.
        let more = Bytes(needed.0 - capacity.0 + 16 * caches.full.open_page().0);
        let smallest = pages.iter().map(|(page, _)| page.0).min().unwrap_or(more.0);
        let entries = Bytes(more.0 / smallest * 4 * PoolLayout::ENTRIES_PER_PAGE);
        let enough = fixed + capacity + (more + entries).align_up(1 << 20);
        return Err(SubmitError::NeverFits { tokens, needed, capacity, enough });
    }
    Ok(())
}

impl Scheduler {
    /// Seats sessions that wait, in order. One whose pages are not there waits for them, and so do those behind it that need
    /// pages too; those that hold theirs go on.
    pub(super) fn admit<B: Backend>(&mut self, backend: &mut B, report: &mut StepReport) -> Result<(), B::Error> {
        let mut blocked = false;
        let mut seats = (self.config.max_sessions.min(self.limit.rows) as usize).saturating_sub(self.seated());
        let mut last = None;
        while seats > 0 && !(blocked && self.nobody_waits_here()) {
            let next = match last {
                Some(last) => self.waiting.range((Bound::Excluded(last), Bound::Unbounded)).next(),
                None => self.waiting.first(),
            };
            let Some(&(priority, ticket, id)) = next else { break };
            last = Some((priority, ticket, id));
            let here = match self.sessions[&id].place {
                Place::Device => true,
                Place::Nowhere | Place::Host if !blocked => self.enter(id, backend, report)?,
                _ => false,
            };
            if here {
                self.leave_queue(id);
                self.session_mut(id).seated = true;
                seats -= 1;
            } else {
                blocked = true;
            }
        }
        Ok(())
    }

    /// Whether no session that waits for a seat has its pages.
    fn nobody_waits_here(&self) -> bool {
        !self.admitted.iter().any(|id| {
            let session = &self.sessions[id];
            session.place == Place::Device && !session.seated && session.wants_rows()
        })
    }

    /// Takes pages for a session that has none, from others where there are no more; whether it has them now. One whose tokens
    /// another is reading waits for that.
    fn enter<B: Backend>(&mut self, id: SessionId, backend: &mut B, report: &mut StepReport) -> Result<bool, B::Error> {
        let shared = loop {
            let (shared, waits) = if self.hosted.contains_key(&id) { (None, false) } else { self.prefix(id) };
            let request = &self.sessions[&id].request;
            if waits {
                return Ok(false);
            }
            let taken = match (self.hosted.get(&id), shared) {
                (Some(suspended), _) => self.caches.resume(id, suspended),
                (None, Some(shared)) => self.caches.adopt(id, shared, request),
                (None, None) => {
                    let (document, max_tokens) = (request.document_tokens(), request.cache_tokens());
                    self.caches.admit(id, &request.compression, document, max_tokens)
                }
            };
            match taken {
                Ok(()) => break shared,
                Err(PoolError::DoesNotFit { .. } | PoolError::TablesFull { .. } | PoolError::SlotsTaken(_)) => {
                    if !self.reclaim(id, shared, backend, report)? {
                        return Ok(false);
                    }
                    // It may have inherited what it waited for.
                    if self.sessions[&id].is_admitted() {
                        return Ok(true);
                    }
                }
                Err(other) => return Err(other.into()),
            }
        };
        self.begin(id, shared);
        Ok(true)
    }

    /// A session has pages now.
    pub(super) fn begin(&mut self, id: SessionId, shared: Option<Shared>) {
        self.admitted.push(id);
        let (now, hosted) = (self.now, self.hosted.contains_key(&id));
        let session = self.session_mut(id);
        session.place = if hosted { Place::Coming(0) } else { Place::Device };
        session.moving_since = now;
        let first = session.phase == Phase::Waiting;
        if first {
            session.phase = Phase::Prefill(0);
        }
        session.times.admitted.get_or_insert(now - session.submitted);
        if let Some(shared) = shared {
            session.phase = Phase::Prefill(shared.tokens);
            session.shared_tokens += u64::from(shared.tokens);
        }
        self.unreported.admitted.extend(first.then_some(id));
        self.unreported.shared.extend(shared.map(|shared| (id, shared)));
    }
}
