//! Sessions that outlive the engine: into a file between two steps, and back.

use super::host_cache::{HostCache, HostPages};
use super::{Engine, EngineError};
use crate::disk::session_file::{Origin, SavedSession, Turn};
use crate::disk::{SessionFile, SessionFileError};
use crate::schedule::{Place, Request, Scheduler, SessionId, Store, SubmitError};

/// Why a session can not go on.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Its file is of something else.
    #[error(transparent)]
    File(#[from] SessionFileError),
    /// It can not be queued.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// The engine does not take its cache.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl Engine<'_> {
    /// Puts a session, as it is between two steps, into the form that is written to a file; it stays as it is. A session without a
    /// cache, or one whose document is still being read, has none in the file either.
    ///
    /// # Errors
    /// [`EngineError`].
    ///
    /// # Panics
    /// For an unknown session.
    pub fn save(
        &mut self,
        scheduler: &Scheduler,
        id: SessionId,
        name: String,
        origin: Origin,
        turns: Vec<Turn>,
    ) -> Result<SavedSession, EngineError> {
        let record = scheduler.record(id);
        let place = scheduler.session(id).map(|session| session.place);
        let (mut pages, mut slot) = (Vec::new(), Vec::new());
        if record.cache.is_some() {
            (pages, slot) = match place {
                Some(Place::Host | Place::Coming(_)) => {
                    let kept = self.host_cache(id)?;
                    let kept = kept.ok_or_else(|| EngineError::Input(format!("session {} is not kept", id.0)))?;
                    (kept.pages.all()?, kept.slot.clone())
                }
                _ => self.read_cache(id, scheduler.caches())?,
            };
        }
        Ok(SavedSession { name, origin, turns, record, pages, slot })
    }

    /// Queues a session from a file. Its prompt is that of the file and then `more`: the next question, or nothing where the last
    /// one is still to be answered. The rest of `request` says how it is answered. Pages stay in the file until they are
    /// wanted.
    ///
    /// # Errors
    /// [`RestoreError`]; nothing is queued then.
    pub fn restore(
        &mut self,
        scheduler: &mut Scheduler,
        file: SessionFile,
        more: &[u32],
        request: Request,
    ) -> Result<SessionId, RestoreError> {
        let record = file.record().clone();
        let (mut prompt, mut produced) = (record.prompt, record.produced);
        if !more.is_empty() {
            // A question ends the answer before it.
            prompt.append(&mut produced);
            prompt.extend_from_slice(more);
        }
        let (compression, document) = (record.compression, Some(record.document));
        let request = Request { prompt, compression, document, ..request };
        let Some(cache) = record.cache else {
            return Ok(scheduler.restore(request, &produced, 0, None)?);
        };
        if request.all_tokens() > u64::from(u32::MAX) {
            return Err(SessionFileError::Inconsistent(format!("{} tokens", request.all_tokens())).into());
        }
        let caches = scheduler.caches();
        let suspended = caches.restore(&request.compression, cache, record.cached, request.max_tokens());
        let suspended = suspended.map_err(SessionFileError::Inconsistent)?;
        let found = file.page_bytes();
        if suspended.page_bytes() != found {
            let expected = suspended.page_bytes();
            return Err(
                SessionFileError::Inconsistent(format!("{found} of pages where its cache has {expected}")).into()
            );
        }
        let (slot, pages) = file.into_pages()?;
        let id = scheduler.restore(request, &produced, record.cached, Some((suspended, Store::Disk)))?;
        if let Err(error) = self.insert_cache(id, HostCache::new(HostPages::File(pages), slot)) {
            scheduler.cancel(id).map_err(EngineError::from)?;
            return Err(error.into());
        }
        Ok(id)
    }
}
