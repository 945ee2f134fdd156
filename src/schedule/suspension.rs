//! Caches that leave the pool whole and come back as they were, or stay and get smaller.

use super::SessionId;
use super::batch::{Direction, Store, Transfer};
use super::caches::{Caches, Plan};
use crate::compression::Compression;
use crate::compression::token::{Score, TokenPolicy};
use crate::geometry::Bytes;
use crate::pool::PoolError;
use crate::pool::page_table::{Capacity, PageTable, Quest};
use crate::pool::suspended::{SuspendedTable, TableRecord};

/// A session's cache without its pages.
#[derive(Clone, Debug)]
pub struct SuspendedCache {
    table: SuspendedTable,
    /// Bytes of what its slot held.
    slot: Bytes,
    plan: Option<SuspendedPlan>,
}

/// What is still to happen to it.
#[derive(Clone, Debug)]
struct SuspendedPlan {
    compression: Compression,
    due: u32,
    /// Whether it holds a slot.
    observes: bool,
    /// Tables of coming evictions, empty ones.
    targets: Vec<SuspendedTable>,
}

/// What a cache holds and what is still to happen to it: all that is needed to make it again, for a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheRecord {
    /// Which tokens.
    pub table: TableRecord,
    /// Pages that a decode row chooses at most, where rows choose.
    pub chosen_pages: Option<u32>,
    /// Length of the tail at which the next eviction is due, where one is to come.
    pub due: Option<u32>,
    /// Bytes of what its slot holds, where it has one.
    pub slot: Option<Bytes>,
}

impl SuspendedCache {
    /// Its pages.
    pub fn n_pages(&self) -> u32 {
        self.table.n_pages()
    }

    /// Bytes of its pages.
    pub fn page_bytes(&self) -> Bytes {
        self.table.bytes()
    }

    /// What it is on record; `None` while its document is being read for an eviction, when it is as well read again.
    pub fn record(&self) -> Option<CacheRecord> {
        let table = self.table.record();
        if self.plan.is_some() && table.tail_start == 0 {
            return None;
        }
        let observes = self.plan.as_ref().is_some_and(|plan| plan.observes);
        Some(CacheRecord {
            table,
            chosen_pages: self.table.shape().quest.map(|quest| quest.pages),
            due: self.plan.as_ref().map(|plan| plan.due),
            slot: observes.then_some(self.slot),
        })
    }

    /// Bytes of what is kept of it: its pages, and its slot.
    pub fn bytes(&self) -> Bytes {
        self.table.bytes() + self.slot
    }

    /// Tokens that it has seen.
    pub const fn n_tokens(&self) -> u32 {
        self.table.n_tokens()
    }
}

impl Caches {
    /// Bytes that a session's cache takes where it is suspended: of its pages, and of its slot.
    ///
    /// # Panics
    /// When it is not admitted.
    pub fn suspended_bytes(&self, id: SessionId) -> Bytes {
        self.tables[&id].held_bytes() + self.slot_bytes(id)
    }

    fn slot_bytes(&self, id: SessionId) -> Bytes {
        self.slot(id).map_or(Bytes::ZERO, |_| self.abilities.slot_bytes)
    }

    /// The slot that a session's rows are observed into.
    pub fn slot(&self, id: SessionId) -> Option<u32> {
        self.plans.get(&id)?.slot
    }

    /// The pages of a session that move next, page `from` first, in at most `most` bytes.
    ///
    /// # Panics
    /// When it is not admitted.
    pub fn transfer(&self, id: SessionId, direction: Direction, from: u32, most: Bytes) -> Transfer {
        let (pages, store) = (from..from, Store::Host);
        let mut transfer = Transfer { session: id, direction, store, pages, bytes: Bytes::ZERO, last: true };
        for (_, page) in self.tables[&id].page_ids().skip(from as usize) {
            if transfer.bytes + page > most {
                transfer.last = false;
                break;
            }
            transfer.pages.end += 1;
            transfer.bytes += page;
        }
        transfer
    }

    /// Returns everything that a session holds, between two steps, and says what takes it back.
    ///
    /// # Errors
    /// [`PoolError`] when the pool disagrees, which would be a defect.
    ///
    /// # Panics
    /// When it is not admitted.
    pub fn suspend(&mut self, id: SessionId) -> Result<SuspendedCache, PoolError> {
        let suspended = self.suspended(id);
        self.release(id)?;
        Ok(suspended)
    }

    /// What a session's cache is without its pages; it stays as it is.
    ///
    /// # Panics
    /// When it is not admitted.
    pub fn suspended(&self, id: SessionId) -> SuspendedCache {
        let plan = self.plans.get(&id).map(|plan| SuspendedPlan {
            compression: plan.compression.clone(),
            due: plan.due,
            observes: plan.slot.is_some(),
            targets: plan.targets.iter().map(PageTable::suspended).collect(),
        });
        SuspendedCache { table: self.tables[&id].suspended(), slot: self.slot_bytes(id), plan }
    }

    /// The cache of a record, which has seen `cached` tokens, with room for a sequence of `max_tokens`.
    ///
    /// # Errors
    /// A sentence when this engine does not serve its compression, or the record can not be of such a cache.
    pub fn restore(
        &self,
        compression: &Compression,
        record: CacheRecord,
        cached: u32,
        max_tokens: u32,
    ) -> Result<SuspendedCache, String> {
        self.serves(compression)?;
        let CacheRecord { table, chosen_pages, due, slot } = record;
        let mut shape = self.shape(compression)?;
        if let TokenPolicy::Quest { dense_layers, .. } = compression.token {
            let pages = chosen_pages.filter(|pages| (1..=max_tokens).contains(pages));
            let pages = pages.ok_or_else(|| format!("{chosen_pages:?} is no number of pages that rows choose"))?;
            shape.quest = Some(Quest { pages, dense_layers });
        }
        if table.tail_start == 0 && Self::evicts(compression) {
            return Err(format!("nothing was evicted from a cache of {}", compression.short()));
        }
        // Positions are fewer than tokens where kept keys were turned to their places in the cache.
        let rerotates = compression.token.eviction().is_some_and(|eviction| eviction.rerotate);
        let positions = u64::from(table.tail_start) + u64::from(table.tail);
        if positions > u64::from(cached) || (positions < u64::from(cached) && !rerotates) {
            return Err(format!("a cache of {positions} positions has seen {cached} tokens"));
        }
        let layers = self.layers(compression)?;
        let every = compression.token.eviction().and_then(|eviction| eviction.every);
        let Some(due) = due else {
            let capacity = table.capacity(&shape, table.tail.saturating_add(max_tokens.saturating_sub(cached)));
            let capacity = Capacity { turns: every.is_some(), ..capacity };
            let table = SuspendedTable::restore(shape, &layers, table, capacity)?;
            return Ok(SuspendedCache { table, slot: Bytes::ZERO, plan: None });
        };
        let every = every.filter(|every| *every == due);
        let every = every.ok_or_else(|| format!("an eviction after {due} tokens is not of {}", compression.short()))?;
        let observes = Self::observes(compression);
        if slot != observes.then_some(self.abilities.slot_bytes) {
            let expected = observes.then_some(self.abilities.slot_bytes);
            return Err(format!("a slot of {slot:?} where one of {expected:?} is scored into"));
        }
        let capacity = Capacity { turns: true, ..self.capacity_of_turns(compression, every)? };
        let next = SuspendedTable::restore(shape, &layers, TableRecord::empty(&shape), capacity)?;
        let table = SuspendedTable::restore(shape, &layers, table, capacity)?;
        let (compression, targets) = (compression.clone(), vec![next]);
        let plan = Some(SuspendedPlan { compression, due, observes, targets });
        Ok(SuspendedCache { table, slot: slot.unwrap_or_default(), plan })
    }

    /// Takes pages, commitments, table entries and a slot for a session that was suspended. What its pages and its slot hold has
    /// still to be copied into them.
    ///
    /// # Errors
    /// [`PoolError`] when there is no room; nothing is held then.
    pub fn resume(&mut self, id: SessionId, suspended: &SuspendedCache) -> Result<(), PoolError> {
        let observes = suspended.plan.as_ref().is_some_and(|plan| plan.observes);
        let slot = if observes { Some(self.free_slot()?) } else { None };
        let targets = suspended.plan.iter().flat_map(|plan| &plan.targets);
        let mut taken: Vec<PageTable> = Vec::new();
        for table in std::iter::once(&suspended.table).chain(targets) {
            match table.resume(&mut self.pool, &mut self.ranges) {
                Ok(table) => taken.push(table),
                Err(error) => {
                    for table in taken {
                        table.release(&mut self.pool, &mut self.ranges)?;
                    }
                    return Err(error);
                }
            }
        }
        let targets = taken.split_off(1);
        self.tables.extend(taken.into_iter().map(|table| (id, table)));
        if let Some(plan) = &suspended.plan {
            if let Some(slot) = slot {
                self.slots[slot as usize] = Some(id);
            }
            self.plans.insert(id, Plan { compression: plan.compression.clone(), due: plan.due, slot, targets });
        }
        Ok(())
    }

    /// Whether a cache of one compression can become one of another later, when nobody remembers what attended to it.
    ///
    /// # Errors
    /// A sentence with the reason.
    pub fn serves_later(&self, before: &Compression, after: &Compression) -> Result<(), String> {
        self.serves(after)?;
        let rung = after.short();
        if self.abilities.slots.is_none() {
            return Err(format!("{rung} is a rung of a ladder, and this engine was made without evictions"));
        }
        if before.layer != after.layer {
            return Err(format!("{rung} has other layers than {}: a ladder keeps them", before.short()));
        }
        if matches!(after.token, TokenPolicy::Quest { .. }) {
            return Err(format!("{rung} frees no pages: it is no rung of a ladder"));
        }
        let Some(eviction) = after.token.eviction() else { return Ok(()) };
        if eviction.every.is_some() {
            return Err(format!(
                "{rung} evicts again and again, which begins with a session: it is no rung of a ladder"
            ));
        }
        match eviction.rule(u32::MAX).score {
            Score::Attention { .. } | Score::Expected { .. } | Score::Reconstruction => Err(format!(
                "{rung} ranks tokens by what attended to them, which is not known any more when there is no room; a ladder \
                 has keydiff, knorm, streaming or random"
            )),
            _ => Ok(()),
        }
    }

    /// Readies a table for what a session's cache keeps under another compression, and room for `tail_tokens` more: its eviction
    /// is due at once. `false`, and nothing changed, where there is no room for both, where an eviction is to come anyway, and
    /// where it would take no less than returns: pages that others name too do not.
    ///
    /// # Errors
    /// [`PoolError`] when the pool disagrees, which would be a defect.
    ///
    /// # Panics
    /// For a compression that [`Self::serves_later`] refuses.
    pub fn harden(&mut self, id: SessionId, compression: &Compression, tail_tokens: u32) -> Result<bool, PoolError> {
        if self.plans.contains_key(&id) {
            return Ok(false);
        }
        let table = &self.tables[&id];
        let (due, promised) = (table.tail(), table.returning_bytes(&self.pool));
        let n_tokens = self.longest_list(id);
        let slot = match Self::observes(compression).then(|| self.free_slot()).transpose() {
            Ok(slot) => slot,
            Err(_) => return Ok(false),
        };
        // A ratio can leave less than what always stays.
        if self.domains(compression, n_tokens).is_err() {
            return Ok(false);
        }
        let target = match self.admit_target(compression, n_tokens, tail_tokens) {
            Ok(target) => target,
            Err(PoolError::DoesNotFit { .. } | PoolError::TablesFull { .. }) => return Ok(false),
            Err(other) => return Err(other),
        };
        if target.promised_bytes() >= promised {
            target.release(&mut self.pool, &mut self.ranges)?;
            return Ok(false);
        }
        if let Some(slot) = slot {
            self.slots[slot as usize] = Some(id);
        }
        self.plans.insert(id, Plan { compression: compression.clone(), due, slot, targets: vec![target] });
        Ok(true)
    }
}
