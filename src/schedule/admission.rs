//! Admission: who may hold pages.

use super::{Caches, Phase, Request, ScheduleConfig, Scheduler, SessionId};
use crate::geometry::Bytes;
use crate::pool::PoolError;

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
        "the prompt has {prompt} tokens and {max_new} are to be produced, {} in all, but the context is {context_length} tokens",
        prompt + u64::from(*max_new)
    )]
    TooLong {
        /// Prompt tokens.
        prompt: u64,
        /// Tokens to produce.
        max_new: u32,
        /// Longest context.
        context_length: u32,
    },
    /// Nothing here can carry out its compression.
    #[error("{0}")]
    NotServed(String),
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
    let (prompt, max_new) = (request.prompt.len(), request.max_new);
    if prompt == 0 || max_new == 0 {
        return Err(SubmitError::Empty { prompt, max_new });
    }
    let context_length = config.context_length;
    let prompt = prompt as u64;
    if prompt + u64::from(max_new) > u64::from(context_length) {
        return Err(SubmitError::TooLong { prompt, max_new, context_length });
    }
    caches.serves(&request.compression).map_err(SubmitError::NotServed)?;
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
        let entries = Bytes(more.0 / smallest * 8);
        let enough = fixed + capacity + (more + entries).align_up(1 << 20);
        return Err(SubmitError::NeverFits { tokens, needed, capacity, enough });
    }
    Ok(())
}

impl Scheduler {
    /// Admits waiting sessions in order, until one does not fit.
    pub(super) fn admit(&mut self) -> Result<Vec<SessionId>, PoolError> {
        let mut admitted = Vec::new();
        while let Some(id) = self.waiting.front().copied() {
            if self.admitted.len() >= self.config.max_sessions as usize {
                break;
            }
            let request = &self.sessions[&id].request;
            let (document, max_tokens) = (request.document_tokens(), request.max_tokens());
            match self.caches.admit(id, &request.compression, document, max_tokens) {
                Ok(()) => {}
                Err(PoolError::DoesNotFit { .. } | PoolError::TablesFull { .. } | PoolError::SlotsTaken(_)) => break,
                Err(other) => return Err(other),
            }
            self.waiting.pop_front();
            self.admitted.push(id);
            let now = self.now;
            let session = self.session_mut(id);
            session.phase = Phase::Prefill(0);
            session.times.admitted = Some(now - session.submitted);
            admitted.push(id);
        }
        Ok(admitted)
    }
}
