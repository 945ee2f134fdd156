//! Sessions on record: all that is needed to go on with one later, in another schedule.
//!
//! ```text
//! between questions     sequence = prompt                    cache of all of it but, at most, the last token
//! reading a prompt      sequence = prompt                    cache of its beginning
//! in an answer          sequence = prompt, produced          cache of all but the last token
//! ```
//!
//! The cache is what it was, so what follows is what would have followed, bit by bit. A session without one, because it was
//! dropped or its document was still being read, reads its sequence again.

use super::session::{Phase, Place, Request, Session, SessionId};
use super::suspension::{CacheRecord, SuspendedCache};
use super::{Scheduler, Store, SubmitError, admission};
use crate::compression::Compression;

/// A session on record.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionRecord {
    /// The sequence, without the answer under way.
    pub prompt: Vec<u32>,
    /// The answer under way, as far as it is there.
    pub produced: Vec<u32>,
    /// Whether the last question has been answered: the prompt then has to go on before there is anything to compute.
    pub answered: bool,
    /// Tokens that the answer under way may have.
    pub max_new: u32,
    /// What is done to its cache.
    pub compression: Compression,
    /// Tokens of the document, which are compressed.
    pub document: u32,
    /// Tokens of the sequence that the cache has seen.
    pub cached: u32,
    /// What its cache holds.
    pub cache: Option<CacheRecord>,
}

impl SessionRecord {
    fn of(session: &Session, cache: Option<CacheRecord>) -> Self {
        let answered = matches!(session.phase, Phase::Thinking(_) | Phase::Finished(_));
        let (prompt, produced) = if answered {
            (session.without_stop().to_vec(), Vec::new())
        } else {
            let answer = session.answers.last().expect("a session has a round");
            let (prompt, produced) = session.tokens.split_at(session.tokens.len() - answer.produced.len());
            (prompt.to_vec(), produced.to_vec())
        };
        Self {
            prompt,
            produced,
            answered,
            max_new: session.request.max_new_of(session.round()),
            compression: session.request.compression.clone(),
            document: session.request.document_tokens(),
            cached: if cache.is_some() { session.cached() } else { 0 },
            cache,
        }
    }
}

impl Scheduler {
    /// Puts a session on record, as it is between two steps.
    ///
    /// # Panics
    /// For an unknown session.
    pub fn record(&self, id: SessionId) -> SessionRecord {
        let session = &self.sessions[&id];
        let cache = match session.place {
            Place::Nowhere => None,
            Place::Device | Place::Leaving(_) => self.caches.suspended(id).record(),
            Place::Host | Place::Coming(_) => self.hosted[&id].record(),
        };
        SessionRecord::of(session, cache)
    }

    /// Queues a session that was on record: `request.prompt` goes on behind the first `cached` tokens, which `cache` has seen, and
    /// `produced` is the part of the first answer that is there already. The backend has to hold the pages of the cache
    /// before the next step; `store` says where.
    ///
    /// # Errors
    /// [`SubmitError`] as for any other session, and when the sequence does not go on behind the cache.
    pub fn restore(
        &mut self,
        request: Request,
        produced: &[u32],
        cached: u32,
        cache: Option<(SuspendedCache, Store)>,
    ) -> Result<SessionId, SubmitError> {
        admission::check(&request, &self.config, &self.caches)?;
        let mut session = Session::new(request, self.caches.full.page.page_size, self.now);
        session.tokens.extend_from_slice(produced);
        session.produced = produced.to_vec();
        session.prompt_end = session.tokens.len();
        session.answers[0].produced.end = produced.len();
        let all = session.tokens.len();
        if cached as usize >= all || produced.len() >= session.request.max_new as usize {
            return Err(SubmitError::NothingToCompute { tokens: all, cached });
        }
        if let Some((suspended, store)) = cache {
            session.phase =
                if !produced.is_empty() && cached as usize + 1 == all { Phase::Decode } else { Phase::Prefill(cached) };
            (session.place, session.store) = (Place::Host, store);
            // Of its prompt, a part may have been produced as an answer.
            session.read_as_prompt = 0;
            self.away[store as usize].take(suspended.bytes());
            self.hosted.insert(SessionId(self.next_id), suspended);
        }
        let id = SessionId(self.next_id);
        self.next_id += 1;
        self.sessions.insert(id, session);
        self.stand_in_line(id);
        Ok(id)
    }
}
