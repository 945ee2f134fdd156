//! Page tables that name pages of each other.
//!
//! A table that begins as another does names the other's pages in place of pages of its own: all that an eviction kept, and
//! full pages of the tail. Nobody writes those any more. Rows are appended behind the tail, so into its last, partly used page
//! or a fresh one; the partly used last page of what was kept is never filled up; a page of bounds is written until it holds
//! those of `page_size` pages, and only then shared. [`PageTable::grow`] asserts it, with the counts of the pool.
//!
//! So the copy on write at the first token that differs copies nothing: the last page that is not whole in common is computed
//! again, in a page of its own.

use super::page_table::{PARTS, PageTable, Part, TableRanges, TableShape};
use super::table_shape::Capacity;
use super::{PageId, PagePool, PoolError};
use crate::geometry::Bytes;

impl TableShape {
    /// Of the first `tail` tokens of a tail, those in pages that another table can name too.
    pub const fn whole(&self, tail: u32) -> u32 {
        let size = self.page.page_size;
        // Bounds of as many pages are a page.
        let tokens = if self.quest.is_some() { size * size } else { size };
        tail / tokens * tokens
    }
}

impl PageTable {
    /// A table that begins as `donor` does: with all that an eviction kept there, and `tail` tokens of its tail. Commits what
    /// `capacity` can need besides.
    ///
    /// # Errors
    /// [`PoolError::DoesNotFit`], [`PoolError::TablesFull`]; nothing is held then.
    ///
    /// # Panics
    /// When these tokens are not whole pages of the donor, or more than the capacity has room for.
    pub fn adopt(
        pool: &mut PagePool,
        ranges: &mut TableRanges,
        donor: &Self,
        (shape, capacity): (TableShape, Capacity),
        tail: u32,
    ) -> Result<Self, PoolError> {
        let mut table = Self::like(donor, (shape, capacity), tail);
        table.commit_beside(pool, ranges)?;
        table.name(pool)?;
        Ok(table)
    }

    /// A table that begins as `donor` does, of which the pool knows nothing yet.
    fn like(donor: &Self, (shape, capacity): (TableShape, Capacity), tail: u32) -> Self {
        let pages = tail / shape.page.page_size;
        let whole = shape.whole(tail) == tail && tail <= donor.tail && donor.filled.is_empty();
        assert!(whole && tail <= capacity.tail_tokens, "{tail} tokens should be whole pages of {}", donor.tail);
        let mut table = Self::empty(shape, &donor.layers, capacity);
        let in_tail = if shape.codec.seals() { Part::Sealed } else { Part::Open };
        let taken = [
            (Part::Merged, u32::MAX),
            (Part::Kept, u32::MAX),
            (in_tail, pages),
            (Part::Bounds, shape.bounds_of_list(tail)),
        ];
        for (list, from) in table.lists.iter_mut().zip(&donor.lists) {
            (list.kept, list.merged, list.closed) = (from.kept, from.merged, from.closed);
            list.positions.clone_from(&from.positions);
            list.merged_positions.clone_from(&from.merged_positions);
            for (part, most) in taken {
                let pages = from.part(part).pages.iter().take(most as usize);
                pages.for_each(|page| list.parts[part as usize].push(*page));
                assert!(list.part(part).len() <= table.capacity[part as usize], "what is taken over has its entries");
            }
        }
        table.merged_with.clone_from(&donor.merged_with);
        (table.tail_start, table.tail) = (donor.tail_start, tail);
        if shape.codec.seals() {
            (table.sealed, table.retired) = (pages, pages);
        }
        // The device has never seen this region.
        table.dirty = true;
        table.committed = table.still_to_take([0, 1, 2].map(|size| table.pages_of_size(size)));
        table
    }

    /// Commits what a table can need besides the pages that it takes over, and behind these where evictions take turns.
    fn commit_beside(&mut self, pool: &mut PagePool, ranges: &mut TableRanges) -> Result<(), PoolError> {
        let backing = [0, 1, 2].map(|size| if self.admitted.turns { self.pages_of_size(size) } else { 0 });
        self.committed.iter_mut().zip(backing).for_each(|(n, backing)| *n += backing);
        let reserved = self.reserve(pool, ranges);
        self.committed.iter_mut().zip(backing).for_each(|(n, backing)| *n -= backing);
        reserved
    }

    /// Counts a table among those that name its pages.
    fn name(&self, pool: &mut PagePool) -> Result<(), PoolError> {
        self.page_ids().try_for_each(|(page, _)| pool.share(page))
    }

    /// As [`Self::adopt`], where the donor is about to be released and this table is to have the room: it names the donor's pages
    /// from now on, and its commitments come after. Not where evictions take turns.
    ///
    /// # Errors
    /// [`PoolError`] when the pool disagrees, which would be a defect.
    ///
    /// # Panics
    /// As [`Self::adopt`].
    pub fn succeed(
        pool: &mut PagePool,
        donor: &Self,
        (shape, capacity): (TableShape, Capacity),
        tail: u32,
    ) -> Result<Successor, PoolError> {
        assert!(!capacity.turns, "what a table that takes turns returns is committed again at once");
        let table = Self::like(donor, (shape, capacity), tail);
        table.name(pool)?;
        Ok(Successor(table))
    }

    /// Pages that a table which begins with `held` pages can still take: the rest of its open lists' tails, and where evictions
    /// take turns what a later one may keep more.
    fn still_to_take(&self, held: [u32; 3]) -> [u32; 3] {
        let open_lists = self.lists.iter().map(|list| u32::from(!list.closed)).sum::<u32>();
        let [_, _, sealed, open, bounds] = self.capacity;
        let kept: u32 = self.lists.iter().map(|list| list.part(Part::Kept).len()).sum();
        let kept = if self.admitted.turns { self.admitted.kept_pages } else { kept };
        [open_lists * (open + bounds) - held[0], open_lists * sealed + kept - held[1], 0]
    }

    /// Pages of one of [`Self::page_sizes`].
    pub(super) fn pages_of_size(&self, size: usize) -> u32 {
        let parts = || PARTS.iter().filter(|part| part.size() == size);
        self.lists.iter().flat_map(|list| parts().map(|part| list.part(*part).len())).sum()
    }

    /// Whether no other table names a page that the next rows can change: the open page that they continue, and the bounds of
    /// pages that they fill.
    pub(super) fn writes_its_own(&self, pool: &PagePool) -> bool {
        let full = self.tail / self.shape.page.page_size;
        let first = [(Part::Open, full - self.retired), (Part::Bounds, full / self.shape.page.page_size)];
        let written = self
            .lists
            .iter()
            .flat_map(|list| first.iter().flat_map(|(part, from)| list.part(*part).pages.iter().skip(*from as usize)));
        written.into_iter().all(|page| pool.holders(*page) == 1)
    }

    /// Of each list, the page of the tail that ends before position `index`, where one does; all that was kept where the tail
    /// begins there.
    ///
    /// # Panics
    /// When the lists hold no such tokens.
    pub fn pages_before(&self, index: u32) -> impl Iterator<Item = PageId> + '_ {
        let pages = (index - self.tail_start) / self.shape.page.page_size;
        let in_tail = if self.shape.codec.seals() { Part::Sealed } else { Part::Open };
        let open = self.lists.iter().filter(|list| !list.closed);
        open.flat_map(move |list| match pages.checked_sub(1) {
            None => list.part(Part::Kept).pages.iter(),
            Some(last) => list.part(in_tail).pages[last as usize..=last as usize].iter(),
        })
        .copied()
    }

    /// Bytes of its pages that other tables name too.
    pub fn shared_bytes(&self, pool: &PagePool) -> Bytes {
        // The usual case, and a table has thousands of pages.
        if pool.shared_bytes() == Bytes::ZERO {
            return Bytes::ZERO;
        }
        self.page_ids().filter(|(page, _)| pool.holders(*page) > 1).map(|(_, bytes)| bytes).sum()
    }

    /// Bytes that others could commit if the table were released: of pages that it alone names, and of its commitments.
    pub fn returning_bytes(&self, pool: &PagePool) -> Bytes {
        let backed = if self.admitted.turns { self.shared_bytes(pool) } else { Bytes::ZERO };
        self.promised_bytes() - self.shared_bytes(pool) + backed
    }
}

/// A table that names pages of one that leaves, and waits for its room.
#[derive(Debug)]
pub struct Successor(PageTable);

impl Successor {
    /// Commits what the table needs besides; lets go of the pages where that does not fit.
    ///
    /// # Errors
    /// [`PoolError::DoesNotFit`], [`PoolError::TablesFull`]; nothing is held then.
    pub fn admit(mut self, pool: &mut PagePool, ranges: &mut TableRanges) -> Result<PageTable, PoolError> {
        if let Err(error) = self.0.commit_beside(pool, ranges) {
            for (page, _) in self.0.page_ids() {
                pool.release(page)?;
            }
            return Err(error);
        }
        Ok(self.0)
    }
}
