//! Page tables whose pages are elsewhere: in host memory, or in a file.
//!
//! Suspending a table returns its pages, commitments and table entries and keeps everything else: which tokens each list
//! holds, where its tail begins, how much of it is sealed. Resuming takes as many pages and commitments again, so that a
//! session that comes back has exactly the room that it had; the bytes move between the two, page by page, in the order of
//! [`PageTable::page_ids`].

use super::page_table::{PARTS, PageTable, TableRanges};
use super::{PageId, PagePool, PoolError};
use crate::geometry::Bytes;

/// A page table without its pages.
#[derive(Clone, Debug)]
pub struct SuspendedTable {
    /// With lists that name no pages.
    table: PageTable,
    /// Pages of each part of each list.
    pages: Vec<[u32; PARTS.len()]>,
}

impl PageTable {
    /// Every page that the table holds, with its bytes: list after list, part after part.
    pub fn page_ids(&self) -> impl Iterator<Item = (PageId, Bytes)> + '_ {
        let sizes = Self::page_sizes(&self.shape);
        self.lists.iter().flat_map(move |list| {
            PARTS.iter().flat_map(move |part| list.part(*part).pages.iter().map(move |id| (*id, sizes[part.size()])))
        })
    }

    /// What the table is without its pages; it stays as it is.
    pub fn suspended(&self) -> SuspendedTable {
        let pages = self.lists.iter().map(|list| PARTS.map(|part| list.part(part).len())).collect();
        let mut table = self.clone();
        table.lists.iter_mut().for_each(|list| list.parts = Default::default());
        for (size, committed) in table.committed.iter_mut().enumerate() {
            *committed += self.pages_of_size(size);
        }
        SuspendedTable { table, pages }
    }
}

impl SuspendedTable {
    /// Bytes of the pages that it had.
    pub fn bytes(&self) -> Bytes {
        let sizes = PageTable::page_sizes(&self.table.shape);
        let of_list = |pages: &[u32; PARTS.len()]| {
            PARTS.iter().map(|p| u64::from(pages[*p as usize]) * sizes[p.size()].0).sum::<u64>()
        };
        Bytes(self.pages.iter().map(of_list).sum())
    }

    /// Tokens that the session has seen.
    pub const fn n_tokens(&self) -> u32 {
        self.table.n_tokens()
    }

    /// Takes pages, commitments and table entries again. What the pages hold has still to be copied into them.
    ///
    /// # Errors
    /// [`PoolError::DoesNotFit`], [`PoolError::TablesFull`]; nothing is held then.
    pub fn resume(&self, pool: &mut PagePool, ranges: &mut TableRanges) -> Result<PageTable, PoolError> {
        let mut table = self.table.clone();
        table.reserve(pool, ranges)?;
        // The device has never seen this region.
        table.dirty = true;
        let arenas = pool.arena_bytes().count();
        for (index, pages) in self.pages.iter().enumerate() {
            for part in PARTS {
                table.fill(pool, index, part, pages[part as usize], arenas)?;
            }
        }
        Ok(table)
    }
}
