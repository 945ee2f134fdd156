//! Page tables: for each session a list of pages per (layer, KV head), and the region of the device's table buffer
//! where these lists lie.
//!
//! In CSR terms the table buffer is `indices`, a list's first entry its `indptr`, and the last page's fill its
//! `last_page_len`. Each list has room for all pages that the session can need, so lists never move; a region is
//! uploaded whole when it changed, which for a session in decode is once per `page_size` tokens.

use super::{PageId, PagePool, PoolError};
use crate::geometry::Bytes;

/// First-fit ranges of table entries.
#[derive(Clone, Debug)]
pub struct TableRanges {
    /// Free ranges (start, length), ascending, never adjacent.
    free: Vec<(u32, u32)>,
    total: u32,
}

impl TableRanges {
    /// `total` free entries.
    pub fn new(total: u32) -> Self {
        Self { free: vec![(0, total)], total }
    }

    /// Entries in all.
    pub const fn total(&self) -> u32 {
        self.total
    }

    /// Reserves `length` adjacent entries.
    pub fn reserve(&mut self, length: u32) -> Option<u32> {
        let at = self.free.iter().position(|(_, free)| *free >= length)?;
        let (start, free) = self.free[at];
        if free == length {
            self.free.remove(at);
        } else {
            self.free[at] = (start + length, free - length);
        }
        Some(start)
    }

    /// Returns entries that [`Self::reserve`] gave.
    ///
    /// # Panics
    /// When any of them is already free.
    pub fn release(&mut self, start: u32, length: u32) {
        let at = self.free.partition_point(|(s, _)| *s < start);
        let before_end = if at > 0 { self.free[at - 1].0 + self.free[at - 1].1 } else { 0 };
        assert!(before_end <= start, "table entries from {start} should not be released twice");
        if let Some((next, _)) = self.free.get(at) {
            assert!(start + length <= *next, "table entries up to {} should not be released twice", start + length);
        }
        self.free.insert(at, (start, length));
        if at + 1 < self.free.len() && start + length == self.free[at + 1].0 {
            self.free[at].1 += self.free[at + 1].1;
            self.free.remove(at + 1);
        }
        if at > 0 && before_end == start {
            self.free[at - 1].1 += self.free[at].1;
            self.free.remove(at);
        }
    }
}

/// Consecutive pages of a list that lie in one arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// The arena.
    pub arena: u16,
    /// First page.
    pub first: u32,
    /// Pages.
    pub pages: u32,
}

/// The pages of one (layer, KV head), and their runs, kept as pages are added: a plan is made in every step, but a
/// page is added only once per `page_size` tokens.
#[derive(Clone, Debug, Default)]
struct PageList {
    pages: Vec<PageId>,
    runs: Vec<PageRun>,
}

impl PageList {
    fn push(&mut self, page: PageId) {
        match self.runs.last_mut() {
            Some(run) if run.arena == page.arena => run.pages += 1,
            _ => self.runs.push(PageRun { arena: page.arena, first: to_u32(self.pages.len()), pages: 1 }),
        }
        self.pages.push(page);
    }
}

/// The pages of one session.
#[derive(Clone, Debug)]
pub struct PageTable {
    /// First entry of the session's region in the table buffer.
    region: u32,
    /// Entries of each list.
    list_capacity: u32,
    num_layers: u32,
    num_kv_heads: u32,
    page_size: u32,
    page: Bytes,
    /// `[layer][kv_head]` lists.
    lists: Vec<PageList>,
    /// Tokens in each list.
    n_tokens: u32,
    /// Commitments left.
    committed: u32,
    dirty: bool,
}

/// The shape of a session's page table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableShape {
    /// Layers.
    pub num_layers: u32,
    /// KV heads.
    pub num_kv_heads: u32,
    /// Tokens of a page.
    pub page_size: u32,
    /// Bytes of a page.
    pub page: Bytes,
}

impl TableShape {
    /// Pages that a session of `n_tokens` tokens needs over all lists.
    pub const fn pages_for(&self, n_tokens: u32) -> u32 {
        // Saturating: no pool has so many pages, so the commitment is refused.
        (self.num_layers * self.num_kv_heads).saturating_mul(n_tokens.div_ceil(self.page_size))
    }

    /// Their bytes.
    pub const fn bytes_for(&self, n_tokens: u32) -> Bytes {
        Bytes(self.pages_for(n_tokens) as u64 * self.page.0)
    }
}

impl PageTable {
    /// Commits all pages that `max_tokens` tokens can need and reserves table entries for them.
    ///
    /// # Errors
    /// [`PoolError::DoesNotFit`]; nothing is held then.
    pub fn admit(
        pool: &mut PagePool,
        ranges: &mut TableRanges,
        shape: TableShape,
        max_tokens: u32,
    ) -> Result<Self, PoolError> {
        let pages = shape.pages_for(max_tokens);
        pool.commit(shape.page, pages)?;
        let Some(region) = ranges.reserve(pages) else {
            pool.uncommit(shape.page, pages)?;
            let needed = Bytes(u64::from(pages) * shape.page.0);
            let capacity = pool.capacity();
            return Err(PoolError::DoesNotFit { pages, page: shape.page, needed, available: Bytes::ZERO, capacity });
        };
        let num_lists = shape.num_layers * shape.num_kv_heads;
        let list_capacity = max_tokens.div_ceil(shape.page_size);
        Ok(Self {
            region,
            list_capacity,
            num_layers: shape.num_layers,
            num_kv_heads: shape.num_kv_heads,
            page_size: shape.page_size,
            page: shape.page,
            lists: vec![PageList::default(); num_lists as usize],
            n_tokens: 0,
            committed: pages,
            dirty: false,
        })
    }

    /// Tokens held.
    pub const fn n_tokens(&self) -> u32 {
        self.n_tokens
    }

    /// Tokens of a page.
    pub const fn page_size(&self) -> u32 {
        self.page_size
    }

    /// Makes room for `n` more tokens in every list.
    ///
    /// # Errors
    /// [`PoolError::NotCommitted`] beyond what was admitted.
    pub fn grow(&mut self, pool: &mut PagePool, n: u32) -> Result<(), PoolError> {
        let tokens = self.n_tokens.checked_add(n).ok_or(PoolError::NotCommitted(self.page))?;
        let wanted = tokens.div_ceil(self.page_size) as usize;
        // The pool counts commitments of all sessions together, so it would give this one the pages of another.
        if wanted > self.list_capacity as usize {
            return Err(PoolError::NotCommitted(self.page));
        }
        let arenas = pool.arena_bytes().count();
        for (index, list) in self.lists.iter_mut().enumerate() {
            let layer = index / self.num_kv_heads as usize;
            let preferred = layer * arenas / self.num_layers as usize;
            while list.pages.len() < wanted {
                list.push(pool.take(self.page, preferred)?);
                self.committed -= 1;
                self.dirty = true;
            }
        }
        self.n_tokens += n;
        Ok(())
    }

    /// Returns every page, commitment and table entry.
    ///
    /// # Errors
    /// [`PoolError`] when the pool disagrees about any of them, which would be a defect.
    pub fn release(self, pool: &mut PagePool, ranges: &mut TableRanges) -> Result<(), PoolError> {
        for page in self.lists.iter().flat_map(|list| &list.pages) {
            pool.release(*page)?;
        }
        pool.uncommit(self.page, self.committed)?;
        let entries = self.list_capacity * self.num_layers * self.num_kv_heads;
        if entries > 0 {
            ranges.release(self.region, entries);
        }
        Ok(())
    }

    /// Entry of the first page of a list in the table buffer.
    pub const fn list_entry(&self, layer: u32, kv_head: u32) -> u32 {
        self.region + (layer * self.num_kv_heads + kv_head) * self.list_capacity
    }

    /// Entries between a list and the same head's list in the next layer.
    pub const fn layer_stride(&self) -> u32 {
        self.num_kv_heads * self.list_capacity
    }

    /// Pages of a list.
    pub fn list(&self, layer: u32, kv_head: u32) -> &[PageId] {
        &self.lists[(layer * self.num_kv_heads + kv_head) as usize].pages
    }

    /// Whether the device's copy of the region is out of date.
    pub const fn is_dirty(&self) -> bool {
        self.dirty
    }

    /// Appends the region's entries to `out`, unused ones as zero, and marks it as uploaded; its first entry.
    pub fn write_region(&mut self, out: &mut Vec<u32>) -> u32 {
        for list in &self.lists {
            let start = out.len();
            out.extend(list.pages.iter().map(|page| page.cell));
            out.resize(start + self.list_capacity as usize, 0);
        }
        self.dirty = false;
        self.region
    }

    /// Runs of consecutive pages of a list that lie in one arena.
    pub fn runs(&self, layer: u32, kv_head: u32) -> &[PageRun] {
        &self.lists[(layer * self.num_kv_heads + kv_head) as usize].runs
    }
}

fn to_u32(n: usize) -> u32 {
    u32::try_from(n).expect("pages of a list are counted in 32 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_join_again_whatever_the_order_of_release() {
        let mut ranges = TableRanges::new(100);
        let a = ranges.reserve(30).expect("30 of 100");
        let b = ranges.reserve(30).expect("60 of 100");
        let c = ranges.reserve(40).expect("all");
        assert_eq!(ranges.reserve(1), None, "full");
        ranges.release(a, 30);
        ranges.release(c, 40);
        assert_eq!(ranges.reserve(70), None, "in two pieces");
        ranges.release(b, 30);
        assert_eq!(ranges.reserve(100), Some(0), "in one piece again");
    }

    #[test]
    #[should_panic(expected = "should not be released twice")]
    fn entries_can_not_be_released_twice() {
        let mut ranges = TableRanges::new(10);
        let a = ranges.reserve(4).expect("4 of 10");
        ranges.release(a, 4);
        ranges.release(a, 4);
    }
}
