//! Sessions whose prompts begin alike share pages.
//!
//! ```text
//! what   a codec alone   full pages of the tokens that both begin with
//!        an eviction     of the same document: all that it kept, and full pages of what both read after it
//! who    a session that holds pages under the same compression, as they would be if the other had read the tokens itself
//! when   at admission; reading begins at the first token that is in no shared page, the last of a prompt at the latest
//! wait   while a session of no lower priority reads tokens that would then be shared, rather than read them beside it
//! ```
//!
//! A row's result depends on its place alone, so pages of the same tokens are the same bit by bit, whoever read them, and a
//! session that shares answers as one that does not. Rows of a prompt and of an answer add in different orders. So only tokens
//! that were read as a prompt are taken over, except by a session that is forked from another: its answers are part of it.
//!
//! A document is in f16 until it is evicted from, and what was observed of its rows is in one session's slot. So it is read once
//! and compressed once, and the others take what stayed. Policies whose sums go on with the tokens that stayed (`every N`) are
//! left alone, since a slot is one session's; so are those that turn kept keys.
//!
//! **Who waits.** The session waited for has a seat and its pages, so every step takes it further, and it stands before the
//! other in every step: that one could not read the same tokens sooner. Nobody who waits is waited for. So it begins when the
//! other has read its prompt, loses its place, or ends.
//!
//! **Who inherits.** A session that waits for room and would begin with pages of one that leaves, because it is over or gives up
//! its place, takes them over as that one goes: it needs no more room than the other had, and reads nothing again.
//!
//! A prefix is found by a chain of hashes, one per page of a prompt: where two chains first differ is a search in their length's
//! logarithm. What is found is compared token by token before it is used, so equal hashes decide nothing.

use super::caches::{Caches, Needs, Plan};
use super::{Phase, Place, Request, Scheduler, SessionId, SubmitError};
use crate::compression::Compression;
use crate::compression::token::{Rows, Score};
use crate::geometry::Bytes;
use crate::pool::PoolError;
use crate::pool::page_table::{Capacity, PageTable, TableShape};

/// How a session begins with pages of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shared {
    /// Whose pages these are.
    pub donor: SessionId,
    /// Tokens of the sequence that need not be read.
    pub tokens: u32,
    /// Of these, those after the last eviction.
    pub(super) tail: u32,
}

/// What a session can take over from another.
#[derive(Clone, Copy, Debug)]
struct Offer {
    now: Shared,
    /// Tokens that it could take over once the other has read its prompt.
    coming: u32,
}

/// Hashes of a prompt up to each page's edge (FNV-1a over 32 bits at a time).
pub(super) fn edges(prompt: &[u32], page_size: u32) -> Vec<u64> {
    let hash = |before: u64, token: &u32| (before ^ u64::from(*token)).wrapping_mul(0x0100_0000_01b3);
    let pages = prompt.chunks_exact(page_size as usize);
    let chain = pages.scan(0xcbf2_9ce4_8422_2325, |last, page| {
        *last = page.iter().fold(*last, hash);
        Some(*last)
    });
    chain.collect()
}

/// Entries that two chains have in common: none follow one that differs.
fn common(a: &[u64], b: &[u64]) -> usize {
    let (mut same, mut end) = (0, a.len().min(b.len()));
    while same < end {
        let at = usize::midpoint(same, end);
        if a[at] == b[at] {
            same = at + 1;
        } else {
            end = at;
        }
    }
    same
}

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("sequences are counted in 32 bits")
}

impl Scheduler {
    /// A session that goes on from where another is now: its tokens so far, then a question. It shares the other's pages if that
    /// one still holds them when this one is admitted, as it read them itself; compression, sampling and priority are the other's.
    ///
    /// # Errors
    /// [`SubmitError`], as [`Self::submit`]; [`SubmitError::Unknown`] where there is no such session.
    pub fn fork(&mut self, from: SessionId, question: &[u32], max_new: u32) -> Result<SessionId, SubmitError> {
        let parent = self.sessions.get(&from).ok_or(SubmitError::Unknown(from))?;
        let (request, read_as_prompt) = (&parent.request, parent.read_as_prompt);
        let request = Request {
            prompt: parent.without_stop().iter().chain(question).copied().collect(),
            max_new,
            rounds: Vec::new(),
            document: Some(request.document_tokens()),
            ladder: request.ladder[parent.rungs..].to_vec(),
            ..request.clone()
        };
        let id = self.submit(request)?;
        let session = self.session_mut(id);
        session.parent = Some(from);
        if read_as_prompt > 0 {
            session.read_as_prompt = read_as_prompt;
        }
        Ok(id)
    }

    /// What spares a session the most of what it would read, and whether it should wait, because another is reading more.
    pub(super) fn prefix(&self, id: SessionId) -> (Option<Shared>, bool) {
        let (mut best, mut coming): (Option<Shared>, u32) = (None, 0);
        for donor in self.admitted.iter().filter(|donor| self.begin_alike(id, **donor)) {
            let better = |offer: &Offer, best: Option<Shared>, coming: u32| {
                (offer.now.tokens > best.map_or(0, |best| best.tokens), offer.coming > coming)
            };
            let guess = self.offer(id, *donor, self.likely(id, *donor));
            if guess.is_none_or(|offer| better(&offer, best, coming) == (false, false)) {
                continue;
            }
            // Equal hashes are no proof.
            let Some(offer) = self.offer(id, *donor, self.equal(id, *donor)) else { continue };
            let (now, later) = better(&offer, best, coming);
            best = if now { Some(offer.now) } else { best };
            coming = if later { offer.coming } else { coming };
        }
        (best, coming > best.map_or(0, |best| best.tokens))
    }

    /// Whether two sessions have a whole page in common, by its hash, or one is a fork of the other.
    fn begin_alike(&self, id: SessionId, donor: SessionId) -> bool {
        let (session, from) = (&self.sessions[&id], &self.sessions[&donor]);
        let first = session.edges.first();
        id != donor && (session.parent == Some(donor) || (first.is_some() && first == from.edges.first()))
    }

    /// Lets a session leave. Where the first in line that needs pages would begin with some of its, that one names them before
    /// they return, and is admitted if the rest of what it needs then fits.
    pub(super) fn hand_over<T>(
        &mut self,
        donor: SessionId,
        leave: impl FnOnce(&mut Caches) -> Result<T, PoolError>,
    ) -> Result<T, PoolError> {
        let needy = |id: &SessionId| !self.sessions[id].is_admitted();
        let first = self.waiting.iter().map(|(_, _, id)| *id).find(needy);
        let first = first.filter(|id| *id != donor && self.sessions[id].place == Place::Nowhere);
        let (shared, waits) = first.map_or((None, false), |id| self.prefix(id));
        let shared = shared.filter(|shared| shared.donor == donor && !waits);
        let Some((id, shared)) = first.zip(shared) else { return leave(&mut self.caches) };
        let request = &self.sessions[&id].request;
        let Some(own) = self.caches.alone_after(request) else { return leave(&mut self.caches) };
        let table = &self.caches.tables[&donor];
        let successor = PageTable::succeed(&mut self.caches.pool, table, own, shared.tail)?;
        let left = leave(&mut self.caches)?;
        match successor.admit(&mut self.caches.pool, &mut self.caches.ranges) {
            Ok(table) => {
                self.caches.tables.insert(id, table);
                self.begin(id, Some(shared));
            }
            Err(PoolError::DoesNotFit { .. } | PoolError::TablesFull { .. }) => {}
            Err(other) => return Err(other),
        }
        Ok(left)
    }

    /// Tokens of a session that another may take over, as far as they were read as they would be by that one.
    fn trusted(&self, id: SessionId, donor: SessionId) -> &[u32] {
        let (session, from) = (&self.sessions[&id], &self.sessions[&donor]);
        if session.parent == Some(donor) {
            return &from.tokens;
        }
        // Where prompts skip layers, their last row does not.
        let last = usize::from(self.caches.skip_from(&from.request.compression).is_some());
        &from.request.prompt[..from.read_as_prompt.saturating_sub(last)]
    }

    /// Tokens that two sessions begin with, at most, by their hashes.
    fn likely(&self, id: SessionId, donor: SessionId) -> u32 {
        let (session, from) = (&self.sessions[&id], &self.sessions[&donor]);
        if session.parent == Some(donor) {
            return self.equal(id, donor);
        }
        let size = self.caches.full.page.page_size as usize;
        let pages = common(&session.edges, &from.edges);
        count(((pages + 1) * size - 1).min(session.request.prompt.len()).min(self.trusted(id, donor).len()))
    }

    /// Tokens that two sessions begin with.
    fn equal(&self, id: SessionId, donor: SessionId) -> u32 {
        let (tokens, trusted) = (&self.sessions[&id].request.prompt, self.trusted(id, donor));
        count(tokens.iter().zip(trusted).take_while(|(a, b)| a == b).count())
    }

    /// What a session can take over from another, if they begin with `common` equal tokens.
    fn offer(&self, id: SessionId, donor: SessionId, common: u32) -> Option<Offer> {
        let (session, from) = (&self.sessions[&id], &self.sessions[&donor]);
        let compression = &session.request.compression;
        // What was compressed later is not what it would be from the start; nor, maybe, is what came from a file.
        let alike = from.rungs == 0 && from.read_as_prompt > 0 && from.request.compression == *compression;
        if !alike || !matches!(from.place, Place::Device | Place::Leaving(_)) {
            return None;
        }
        let table = &self.caches.tables[&donor];
        // Whoever asks wants what follows the last token.
        let limit = common.min(count(session.prompt_end) - 1);
        let is_ahead = from.runs() && from.request.priority >= session.request.priority;
        let reads = is_ahead && matches!(from.phase, Phase::Prefill(_));
        let (seen, at) = (table.n_tokens(), table.n_tokens() - table.tail());
        let whole = |from: u32, until: u32| table.shape().whole(until - from);
        let offer = |at: u32, tail: u32, coming: u32| {
            (at + tail > 0 || coming > 0).then_some(Offer { now: Shared { donor, tokens: at + tail, tail }, coming })
        };
        if !Caches::evicts(compression) {
            return offer(0, whole(0, limit.min(seen)), if reads { whole(0, limit) } else { 0 });
        }
        let document = session.request.document_tokens();
        let same = from.request.document_tokens() == document && document <= limit;
        let worth_it = document >= table.shape().page.page_size;
        let turns = Caches::turns(compression, document, session.request.cache_tokens()).is_some();
        if !worth_it || !Caches::shares_kept(compression, turns) {
            return None;
        }
        if at == 0 {
            // The eviction comes with the step after the document's last token.
            return if same && is_ahead { offer(0, 0, document) } else { None };
        }
        let kept = (same && at == document) || (session.parent == Some(donor) && at <= limit);
        match (kept, turns) {
            (false, _) => None,
            // Rows of the tail are observed for the next eviction.
            (true, true) => offer(at, 0, 0),
            (true, false) => offer(at, whole(at, limit.min(seen)), if reads { at + whole(at, limit) } else { 0 }),
        }
    }
}

impl Caches {
    /// After how many tokens a session is evicted from again, where it is.
    pub(super) fn turns(compression: &Compression, document: u32, max_tokens: u32) -> Option<u32> {
        let every = compression.token.eviction().and_then(|eviction| eviction.every);
        every.filter(|every| max_tokens.saturating_sub(document) > *every)
    }

    /// Whether another session can go on with what an eviction kept, and be evicted from again where evictions take turns.
    fn shares_kept(compression: &Compression, turns: bool) -> bool {
        let Some(eviction) = compression.token.eviction() else { return true };
        let goes_on = matches!(
            eviction.rule(u32::MAX).score,
            Score::Attention { rows: Rows::All, .. } | Score::Expected { .. } | Score::Reconstruction
        );
        !(eviction.rerotate || turns && goes_on)
    }

    /// Admits a session that begins with pages of another: commits the pages that it needs besides.
    ///
    /// # Errors
    /// [`PoolError`]; nothing is held then.
    ///
    /// # Panics
    /// For a compression that [`Self::serves`] refuses, or pages that the other does not have.
    pub fn adopt(&mut self, id: SessionId, shared: Shared, request: &Request) -> Result<(), PoolError> {
        let (compression, document, max_tokens) =
            (&request.compression, request.document_tokens(), request.cache_tokens());
        let needs = self.needs(compression, document, max_tokens);
        let Needs { first, targets, layers, .. } = needs.expect("a session that is served has its tables");
        // The document itself is gone; evictions that are still to come need the tables after the first.
        let mut tables = if targets.is_empty() { vec![first] } else { targets }.into_iter();
        let own = tables.next().expect("a session has a table");
        let slot = if tables.len() > 0 && Self::observes(compression) { Some(self.free_slot()?) } else { None };
        let donor = &self.tables[&shared.donor];
        let (pool, ranges) = (&mut self.pool, &mut self.ranges);
        let table = PageTable::adopt(pool, ranges, donor, own, shared.tail)?;
        if let Some((shape, capacity)) = tables.next() {
            let target = match PageTable::admit(pool, ranges, shape, &layers, capacity) {
                Ok(target) => target,
                Err(error) => {
                    table.release(pool, ranges)?;
                    return Err(error);
                }
            };
            let due = Self::turns(compression, document, max_tokens).expect("two tables take turns");
            self.plan(id, Plan { compression: compression.clone(), due, slot, targets: vec![target] });
        }
        self.tables.insert(id, table);
        Ok(())
    }

    /// The only table of a session that begins with pages of another, where no evictions follow.
    fn alone_after(&self, request: &Request) -> Option<(TableShape, Capacity)> {
        let needs = self.needs(&request.compression, request.document_tokens(), request.cache_tokens()).ok()?;
        let own = needs.targets.first().copied().unwrap_or(needs.first);
        (!own.1.turns).then_some(own)
    }

    /// Bytes of a session's pages that others name too.
    ///
    /// # Panics
    /// When it is not admitted.
    pub fn shared_bytes(&self, id: SessionId) -> Bytes {
        self.tables[&id].shared_bytes(&self.pool)
    }

    /// Bytes that others could commit if a session left: not those of pages that others name too.
    ///
    /// # Panics
    /// When it is not admitted.
    pub fn returning_bytes(&self, id: SessionId) -> Bytes {
        let targets = self.plans.get(&id).into_iter().flat_map(|plan| &plan.targets);
        self.tables[&id].returning_bytes(&self.pool) + targets.map(PageTable::promised_bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_of_hashes_part_where_the_tokens_do() {
        let prompt: Vec<u32> = (0..100).collect();
        let chain = edges(&prompt, 16);
        assert_eq!(chain.len(), 6, "whole pages alone");
        for at in 0..100 {
            let mut other = prompt.clone();
            other[at] += 1;
            assert_eq!(common(&chain, &edges(&other, 16)), (at / 16).min(6), "a token that differs at {at}");
        }
        assert_eq!(common(&chain, &edges(&prompt[..50], 16)), 3, "a shorter one");
        assert_eq!(common(&chain, &[]), 0, "none");
        // Pages are chained: the same page behind another is not the same.
        let moved: Vec<u32> = (16..32).chain(16..32).collect();
        assert_eq!(common(&chain, &edges(&moved, 16)), 0, "another place");
        assert_ne!(edges(&moved, 16)[1], chain[1], "what came before counts");
    }
}
