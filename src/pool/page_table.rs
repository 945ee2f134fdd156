//! Page tables: for each session its pages per (layer, KV head), and the region of the device's table buffer where
//! these lists lie.
//!
//! ```text
//! list     = sealed pages, oldest first, then open pages        region = lists one after another, [layer][KV head]
//! sealed   = full, in the session's codec                       open   = f16; the last one still fills
//! ```
//!
//! A page is sealed in the step that fills it. A row of that step reads its own page open and every page before it
//! sealed, so for the length of the step a page has both forms; then its open form is gone. That makes a row's
//! result depend on its place alone: not on how a prompt was cut, nor on what else was in the batch.
//!
//! A session whose pages are sealed holds one open page per list, for good. Prompt rows of one step can fill more: those
//! pass through the [`Window`], f16 pages that all layers and sessions share, because a page that is filled and sealed
//! in one step is open only while its layer computes. Rows that leave the open page end on a page's edge
//! ([`TableShape::cut`]), so that nothing stays in the window.
//!
//! In CSR terms the table buffer is `indices`, a list's first entry its `indptr`, and the last page's fill its
//! `last_page_len`. Each list has room for all pages that the session can need, so lists never move; a region is
//! uploaded whole when it changed, which for a session in decode is once per `page_size` tokens.

use std::ops::Range;

pub use super::table_ranges::TableRanges;
pub use super::table_shape::{Sealing, TableShape, Window};
use super::{PageId, PagePool, PoolError};
use crate::compression::hidden::HiddenCodec;
use crate::geometry::Bytes;

/// Consecutive pages of a list that lie in one arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PageRun {
    arena: u16,
    /// First page, counted from the start of the sealed or of the open pages.
    first: u32,
    pages: u32,
}

/// Pages in order, and their runs, kept as pages are added: a plan is made in every step, but a page is added only once per
/// `page_size` tokens.
#[derive(Clone, Debug, Default)]
struct Pages {
    pages: Vec<PageId>,
    runs: Vec<PageRun>,
}

impl Pages {
    fn push(&mut self, page: PageId) {
        match self.runs.last_mut() {
            Some(run) if run.arena == page.arena => run.pages += 1,
            _ => self.runs.push(PageRun { arena: page.arena, first: to_u32(self.pages.len()), pages: 1 }),
        }
        self.pages.push(page);
    }

    /// The runs of a range of pages.
    fn clipped(&self, range: Range<u32>) -> impl Iterator<Item = PageRun> + '_ {
        self.runs.iter().filter_map(move |run| {
            let first = run.first.max(range.start);
            let end = (run.first + run.pages).min(range.end);
            (first < end).then(|| PageRun { arena: run.arena, first, pages: end - first })
        })
    }
}

/// The pages of one (layer, KV head).
#[derive(Clone, Debug, Default)]
struct PageList {
    sealed: Pages,
    open: Pages,
}

/// Pages that one item can read: consecutive in the table, in one arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// How they are encoded.
    pub codec: HiddenCodec,
    /// The arena; [`PageId::WINDOW`] for the window.
    pub arena: u16,
    /// Table entry of the first page in layer 0.
    pub entry: u32,
    /// Table entries between one layer and the next.
    pub layer_stride: u32,
    /// First page, counted from the session's start.
    pub first: u32,
    /// Pages.
    pub pages: u32,
}

/// The pages of one session.
#[derive(Clone, Debug)]
pub struct PageTable {
    shape: TableShape,
    /// First entry of the session's region in the table buffer.
    region: u32,
    /// Tokens that the region has room for.
    max_tokens: u32,
    /// Entries of each list: open, sealed.
    capacity: (u32, u32),
    /// `[layer][kv_head]` lists.
    lists: Vec<PageList>,
    /// Tokens in each list.
    n_tokens: u32,
    /// Pages of each list that are sealed, those of this step included.
    sealed: u32,
    /// Pages of each list whose open form is gone.
    retired: u32,
    /// First slot of the window in this step, and the window's slots per KV head.
    window: (u32, u32),
    /// Commitments left: open, sealed.
    committed: (u32, u32),
    dirty: bool,
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
        let capacity = shape.pages_of_list(max_tokens);
        // Saturating: no pool has so many pages, so the commitment is refused.
        let pages = |per_list: u32| shape.num_lists().saturating_mul(per_list);
        let committed = (pages(capacity.0), pages(capacity.1));
        pool.commit(shape.open_page(), committed.0)?;
        if let Err(error) = pool.commit(shape.sealed_page(), committed.1) {
            pool.uncommit(shape.open_page(), committed.0)?;
            return Err(error);
        }
        let entries = committed.0.saturating_add(committed.1);
        let Some(region) = ranges.reserve(entries) else {
            pool.uncommit(shape.open_page(), committed.0)?;
            pool.uncommit(shape.sealed_page(), committed.1)?;
            return Err(PoolError::TablesFull { wanted: entries, total: ranges.total() });
        };
        Ok(Self {
            shape,
            region,
            max_tokens,
            capacity,
            lists: vec![PageList::default(); shape.num_lists() as usize],
            n_tokens: 0,
            sealed: 0,
            retired: 0,
            window: (0, 0),
            committed,
            dirty: false,
        })
    }

    /// Tokens held.
    pub const fn n_tokens(&self) -> u32 {
        self.n_tokens
    }

    /// Its shape.
    pub const fn shape(&self) -> &TableShape {
        &self.shape
    }

    /// Pages of each list that this step seals.
    pub const fn sealing_pages(&self) -> Range<u32> {
        self.retired..self.sealed
    }

    /// Bytes of pages held.
    pub fn held_bytes(&self) -> Bytes {
        let (open, sealed) = (self.shape.open_page(), self.shape.sealed_page());
        let list = |l: &PageList| l.open.pages.len() as u64 * open.0 + l.sealed.pages.len() as u64 * sealed.0;
        Bytes(self.lists.iter().map(list).sum())
    }

    /// Makes room for `n` more tokens in every list, and takes a sealed page for every page that they fill.
    ///
    /// # Errors
    /// [`PoolError::NotCommitted`] beyond what was admitted.
    ///
    /// # Panics
    /// When the rows are more than [`TableShape::cut`] allows, or the window is too small for the step.
    pub fn grow(&mut self, pool: &mut PagePool, window: &mut Window, n: u32) -> Result<(), PoolError> {
        let shape = self.shape;
        // The pool counts commitments of all sessions together, so it would give this one the pages of another.
        let tokens = self.n_tokens.checked_add(n).filter(|tokens| *tokens <= self.max_tokens);
        let tokens = tokens.ok_or(PoolError::NotCommitted(shape.open_page()))?;
        assert_eq!(shape.cut(self.n_tokens, n), n, "rows that leave a page should end on an edge");
        let passing = shape.window_pages(self.n_tokens, n);
        let slot = window.take(passing).expect("the window should hold the pages of a step");
        self.window = (slot, window.slots());
        self.n_tokens = tokens;
        let open = tokens.div_ceil(shape.page.page_size) - self.retired - passing;
        self.fill(pool, open, self.sealed)?;
        if shape.seals_when_full() { self.seal(pool, u32::MAX) } else { Ok(()) }
    }

    /// Takes a sealed page for full pages that have none yet, for at most `max_pages` per list. The step that follows
    /// encodes them.
    ///
    /// # Errors
    /// [`PoolError::NotCommitted`], which would be a defect.
    pub fn seal(&mut self, pool: &mut PagePool, max_pages: u32) -> Result<(), PoolError> {
        if self.shape.codec.seals() {
            self.sealed = (self.n_tokens / self.shape.page.page_size).min(self.sealed.saturating_add(max_pages));
            self.fill(pool, 0, self.sealed)?;
        }
        Ok(())
    }

    /// Takes pages until every list has so many open and sealed ones.
    fn fill(&mut self, pool: &mut PagePool, open: u32, sealed: u32) -> Result<(), PoolError> {
        let (open_page, sealed_page) = (self.shape.open_page(), self.shape.sealed_page());
        let arenas = pool.arena_bytes().count();
        for (index, list) in self.lists.iter_mut().enumerate() {
            let layer = index / self.shape.num_kv_heads as usize;
            let preferred = layer * arenas / self.shape.num_layers as usize;
            while list.open.pages.len() < open as usize {
                list.open.push(pool.take(open_page, preferred)?);
                self.committed.0 -= 1;
                self.dirty = true;
            }
            while list.sealed.pages.len() < sealed as usize {
                list.sealed.push(pool.take(sealed_page, preferred)?);
                self.committed.1 -= 1;
                self.dirty = true;
            }
        }
        Ok(())
    }

    /// Ends a step: pages that it sealed are read in their codec from now on. Open pages of a session that seals on request
    /// return to the pool.
    ///
    /// # Errors
    /// [`PoolError`] when the pool disagrees, which would be a defect.
    pub fn retire(&mut self, pool: &mut PagePool) -> Result<(), PoolError> {
        let done = (self.sealed - self.retired) as usize;
        self.retired = self.sealed;
        self.window = (0, 0);
        if self.shape.sealing == Sealing::WhenFull || done == 0 {
            return Ok(());
        }
        for list in &mut self.lists {
            let open = std::mem::take(&mut list.open);
            for (index, page) in open.pages.into_iter().enumerate() {
                if index < done { pool.release(page)? } else { list.open.push(page) }
            }
        }
        self.dirty = true;
        Ok(())
    }

    /// From now on pages are sealed in the step that fills them; commitments that only [`Sealing::OnRequest`] needed return.
    ///
    /// # Errors
    /// [`PoolError`] when the pool disagrees, which would be a defect.
    ///
    /// # Panics
    /// When a full page is not sealed yet.
    pub fn seal_when_full(&mut self, pool: &mut PagePool) -> Result<(), PoolError> {
        let full = self.n_tokens / self.shape.page.page_size;
        assert!(!self.shape.codec.seals() || self.retired == full, "every full page should be sealed");
        self.shape.sealing = Sealing::WhenFull;
        if self.shape.codec.seals() {
            let held = to_u32(self.lists.first().map_or(0, |list| list.open.pages.len()));
            let keep = (self.shape.num_lists() * 1_u32.saturating_sub(held)).min(self.committed.0);
            pool.uncommit(self.shape.open_page(), self.committed.0 - keep)?;
            self.committed.0 = keep;
        }
        Ok(())
    }

    /// Returns every page, commitment and table entry.
    ///
    /// # Errors
    /// [`PoolError`] when the pool disagrees about any of them, which would be a defect.
    pub fn release(self, pool: &mut PagePool, ranges: &mut TableRanges) -> Result<(), PoolError> {
        for page in self.lists.iter().flat_map(|list| list.sealed.pages.iter().chain(&list.open.pages)) {
            pool.release(*page)?;
        }
        pool.uncommit(self.shape.open_page(), self.committed.0)?;
        pool.uncommit(self.shape.sealed_page(), self.committed.1)?;
        let entries = self.shape.num_lists() * self.list_capacity();
        if entries > 0 {
            ranges.release(self.region, entries);
        }
        Ok(())
    }

    const fn list_capacity(&self) -> u32 {
        self.capacity.0 + self.capacity.1
    }

    const fn layer_stride(&self) -> u32 {
        self.shape.num_kv_heads * self.list_capacity()
    }

    fn list_at(&self, layer: u32, kv_head: u32) -> &PageList {
        &self.lists[(layer * self.shape.num_kv_heads + kv_head) as usize]
    }

    /// Pages of a list: sealed, then open ones that it holds itself.
    pub fn list(&self, layer: u32, kv_head: u32) -> (&[PageId], &[PageId]) {
        let list = self.list_at(layer, kv_head);
        (&list.sealed.pages, &list.open.pages)
    }

    /// Sealed pages of a list, as items can read them.
    pub fn sealed_extents(&self, layer: u32, kv_head: u32, pages: Range<u32>) -> impl Iterator<Item = Extent> + '_ {
        let list = self.region + kv_head * self.list_capacity();
        let (codec, layer_stride) = (self.shape.codec, self.layer_stride());
        self.list_at(layer, kv_head).sealed.clipped(pages).map(move |run| Extent {
            codec,
            arena: run.arena,
            entry: list + run.first,
            layer_stride,
            first: run.first,
            pages: run.pages,
        })
    }

    /// Open pages of a list, as items can read them: its own, then those in the window.
    pub fn open_extents(&self, layer: u32, kv_head: u32, pages: Range<u32>) -> impl Iterator<Item = Extent> + '_ {
        let codec = HiddenCodec::F16;
        let (retired, layer_stride) = (self.retired, self.layer_stride());
        let pages = pages.start - retired..pages.end - retired;
        let first_open = self.region + kv_head * self.list_capacity() + self.capacity.1;
        let own = &self.list_at(layer, kv_head).open;
        let n_own = to_u32(own.pages.len());
        let (slot, slots) = self.window;
        let passing = pages.start.max(n_own)..pages.end;
        let window = (!passing.is_empty()).then(|| Extent {
            codec,
            arena: PageId::WINDOW,
            entry: kv_head * slots + slot + passing.start - n_own,
            layer_stride: 0,
            first: retired + passing.start,
            pages: passing.end - passing.start,
        });
        let own = own.clipped(pages.start..pages.end.min(n_own)).map(move |run| Extent {
            codec,
            arena: run.arena,
            entry: first_open + run.first,
            layer_stride,
            first: retired + run.first,
            pages: run.pages,
        });
        own.chain(window)
    }

    /// What a row in page `page` reads: every sealed page before it, then the others up to its own.
    pub fn seen_extents(&self, layer: u32, kv_head: u32, page: u32) -> impl Iterator<Item = Extent> + '_ {
        let sealed = self.sealed.min(page);
        self.sealed_extents(layer, kv_head, 0..sealed).chain(self.open_extents(layer, kv_head, sealed..page + 1))
    }

    /// Whether two layers have their pages in the same arenas, so that they can share work lists.
    pub fn spread_alike(&self, a: u32, b: u32) -> bool {
        (0..self.shape.num_kv_heads).all(|head| {
            let (a, b) = (self.list_at(a, head), self.list_at(b, head));
            a.sealed.runs == b.sealed.runs && a.open.runs == b.open.runs
        })
    }

    /// Whether the device's copy of the region is out of date.
    pub const fn is_dirty(&self) -> bool {
        self.dirty
    }

    /// Appends the region's entries to `out`, unused ones as zero, and marks it as uploaded; its first entry.
    pub fn write_region(&mut self, out: &mut Vec<u32>) -> u32 {
        let (open, sealed) = self.capacity;
        for list in &self.lists {
            for (pages, capacity) in [(&list.sealed.pages, sealed), (&list.open.pages, open)] {
                let start = out.len();
                out.extend(pages.iter().map(|page| page.cell));
                out.resize(start + capacity as usize, 0);
            }
        }
        self.dirty = false;
        self.region
    }
}

fn to_u32(n: usize) -> u32 {
    u32::try_from(n).expect("pages of a list are counted in 32 bits")
}
