//! Caches that leave the pool whole, and come back as they were.

use super::SessionId;
use super::batch::{Direction, Transfer};
use super::caches::{Caches, Plan};
use crate::compression::Compression;
use crate::geometry::Bytes;
use crate::pool::PoolError;
use crate::pool::page_table::PageTable;
use crate::pool::suspended::SuspendedTable;

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

impl SuspendedCache {
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
        let mut transfer = Transfer { session: id, direction, pages: from..from, bytes: Bytes::ZERO, last: true };
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
        let plan = self.plans.get(&id).map(|plan| SuspendedPlan {
            compression: plan.compression.clone(),
            due: plan.due,
            observes: plan.slot.is_some(),
            targets: plan.targets.iter().map(PageTable::suspended).collect(),
        });
        let (table, slot) = (self.tables[&id].suspended(), self.slot_bytes(id));
        self.release(id)?;
        Ok(SuspendedCache { table, slot, plan })
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
}
