//! Page tables: for each session its pages per (layer, KV head), and the region of the device's table buffer where
//! these lists lie.
//!
//! ```text
//! list   = what an eviction kept, then the tail: tokens appended since       region = lists one after another,
//! merged = what two layers have in common, held by the lower one's list and read by both
//! kept   = in the session's codec; its last page may be partly used                   [layer][KV head] of parts
//! sealed = full pages of the tail, in the session's codec
//! bounds = smallest and largest keys of full pages, where decode rows choose what they read
//! open   = f16 pages of the tail; the last one still fills
//! ```
//!
//! Lists differ in how many tokens an eviction left them; their tails are equally long. So a step's rows have the same
//! place in every list's tail, and whatever an eviction did, appending and sealing are the same for all heads. A list that
//! keeps nothing for good is *closed*: it has no tail either.
//!
//! A page is sealed in the step that fills it. A row of that step reads its own page open and every page before it
//! sealed, so for the length of the step a page has both forms; then its open form is gone. That makes a row's
//! result depend on its place alone: not on how a prompt was cut, nor on what else was in the batch.
//!
//! A session whose pages are sealed holds one open page per list, for good. Prompt rows of one step can fill more: those
//! pass through the [`Window`], f16 pages that all layers and sessions share, because a page that is filled and sealed
//! in one step is open only while its layer computes. Rows that leave the open page end on a page's edge
//! ([`PageTable::cut`]), so that nothing stays in the window.
//!
//! Layers may share lists: [`Layers`] names the list of every layer of the model. Where one reads a list after a third layer's
//! rows have passed through the window, no rows of that session pass through it.
//!
//! In CSR terms the table buffer is `indices`, a list's first entry its `indptr`, and the last page's fill its
//! `last_page_len`. Each part of a list has room for all pages that the session can need, so lists never move; a region is
//! uploaded whole when it changed, which for a session in decode is once per `page_size` tokens.

use std::ops::Range;

use smallvec::SmallVec;

pub use super::table_layers::Layers;
pub use super::table_ranges::TableRanges;
pub use super::table_runs::Run;
pub use super::table_shape::{Capacity, Quest, TableShape, Window};
use super::{PageId, PagePool, PoolError};
use crate::geometry::Bytes;

/// Pages that a choice may be larger by, because each run of pages chooses in proportion.
pub(super) const CHOSEN_SPARE: u32 = 16;

/// Consecutive pages of a part that lie in one arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageRun {
    pub(super) arena: u16,
    /// First page, counted from the part's start.
    pub(super) first: u32,
    pub(super) pages: u32,
}

/// Pages in order, and their runs, kept as pages are added: a plan is made in every step, but a page is added only once per
/// `page_size` tokens.
#[derive(Clone, Debug, Default)]
pub(super) struct Pages {
    pub(super) pages: Vec<PageId>,
    /// Mostly one, which then lies here: a plan reads those of every list.
    pub(super) runs: SmallVec<[PageRun; 1]>,
}

impl Pages {
    pub(super) fn push(&mut self, page: PageId) {
        match self.runs.last_mut() {
            Some(run) if run.arena == page.arena => run.pages += 1,
            _ => self.runs.push(PageRun { arena: page.arena, first: self.len(), pages: 1 }),
        }
        self.pages.push(page);
    }

    /// Takes back what was pushed last.
    fn pop(&mut self) -> Option<PageId> {
        let page = self.pages.pop()?;
        let run = self.runs.last_mut().expect("a page lies in a run");
        run.pages -= 1;
        if run.pages == 0 {
            self.runs.pop();
        }
        Some(page)
    }

    pub(super) fn len(&self) -> u32 {
        to_u32(self.pages.len())
    }

    /// The runs of a range of pages.
    #[inline]
    pub(super) fn clipped(&self, range: Range<u32>) -> impl Iterator<Item = PageRun> + '_ {
        self.runs.iter().filter_map(move |run| {
            let first = run.first.max(range.start);
            let end = (run.first + run.pages).min(range.end);
            (first < end).then(|| PageRun { arena: run.arena, first, pages: end - first })
        })
    }
}

/// A part of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Merged,
    Kept,
    Sealed,
    Open,
    Bounds,
}

impl Part {
    /// Which of [`PageTable::page_sizes`] its pages have.
    pub(super) const fn size(self) -> usize {
        match self {
            Self::Open | Self::Bounds => 0,
            Self::Kept | Self::Sealed => 1,
            Self::Merged => 2,
        }
    }
}

/// Parts that rows fill, in this order; of every list that is not closed alike.
const GROWING: [Part; 3] = [Part::Open, Part::Sealed, Part::Bounds];

pub(super) const PARTS: [Part; 5] = [Part::Merged, Part::Kept, Part::Sealed, Part::Open, Part::Bounds];

/// What an eviction leaves of a list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeptTokens {
    /// Positions of the tokens that the list holds itself; a list without any for good is closed.
    pub own: Option<Vec<u32>>,
    /// Positions of tokens that it has in common with the list of the next layer.
    pub merged: Vec<u32>,
}

impl From<Option<Vec<u32>>> for KeptTokens {
    /// Nothing in common with another list.
    fn from(own: Option<Vec<u32>>) -> Self {
        Self { own, merged: Vec::new() }
    }
}

/// The pages of one (layer, KV head).
#[derive(Clone, Debug, Default)]
pub(super) struct PageList {
    pub(super) parts: [Pages; PARTS.len()],
    /// Tokens of the kept part.
    pub(super) kept: u32,
    /// Their positions.
    pub(super) positions: Vec<u32>,
    /// Tokens of the merged part.
    pub(super) merged: u32,
    /// Their positions.
    pub(super) merged_positions: Vec<u32>,
    pub(super) closed: bool,
}

impl PageList {
    pub(super) const fn part(&self, part: Part) -> &Pages {
        &self.parts[part as usize]
    }
}

/// The pages of one session.
#[derive(Clone, Debug)]
pub struct PageTable {
    pub(super) shape: TableShape,
    pub(super) layers: Layers,
    /// First entry of the session's region in the table buffer.
    pub(super) region: u32,
    pub(super) admitted: Capacity,
    /// Entries of each part of a list.
    pub(super) capacity: [u32; PARTS.len()],
    /// Entries before each part of a list, and of a whole list.
    pub(super) starts: [u32; PARTS.len() + 1],
    /// `[layer][kv_head]` lists.
    pub(super) lists: Vec<PageList>,
    /// Position of the tail's first token.
    pub(super) tail_start: u32,
    /// Tokens of the tail.
    pub(super) tail: u32,
    /// Pages of each list's tail that are sealed, those of this step included.
    pub(super) sealed: u32,
    /// Pages of each list's tail whose open form is gone.
    pub(super) retired: u32,
    /// Pages of each list's tail that this step fills.
    pub(super) filled: Range<u32>,
    /// Before this step: tokens of the tail, and pages of the parts that grow.
    pub(super) before: Option<(u32, [u32; GROWING.len()])>,
    /// First slot of the window in this step, and the window's slots per KV head.
    pub(super) window: (u32, u32),
    /// Of each layer of lists, the lower layer that it has tokens in common with.
    pub(super) merged_with: Vec<Option<u32>>,
    /// Commitments left: open, in the codec, merged.
    pub(super) committed: [u32; 3],
    pub(super) dirty: bool,
}

impl PageTable {
    /// Commits all pages that `capacity` can need and reserves table entries for them.
    ///
    /// # Errors
    /// [`PoolError::DoesNotFit`]; nothing is held then.
    pub fn admit(
        pool: &mut PagePool,
        ranges: &mut TableRanges,
        shape: TableShape,
        layers: &Layers,
        capacity: Capacity,
    ) -> Result<Self, PoolError> {
        let mut table = Self::empty(shape, layers, capacity);
        table.reserve(pool, ranges)?;
        Ok(table)
    }

    /// A table that holds nothing yet, with everything that it can need still to be committed.
    pub(super) fn empty(shape: TableShape, layers: &Layers, capacity: Capacity) -> Self {
        let (open, sealed) = shape.pages_of_list(capacity.tail_tokens);
        let admitted = capacity;
        let bounds = shape.bounds_of_list(capacity.tail_tokens);
        let capacity = [capacity.merged_pages_of_list, capacity.kept_pages_of_list, sealed, open, bounds];
        // Saturating: no pool has so many pages, so the commitment is refused.
        let pages = |per_list: u32| shape.num_lists().saturating_mul(per_list);
        let committed =
            [pages(open + bounds), pages(sealed).saturating_add(admitted.kept_pages), admitted.merged_pages];
        let mut starts = [0_u32; PARTS.len() + 1];
        for (part, n) in capacity.iter().enumerate() {
            // Saturating: no buffer has so many entries.
            starts[part + 1] = starts[part].saturating_add(*n);
        }
        Self {
            shape,
            layers: layers.clone(),
            region: 0,
            admitted,
            capacity,
            starts,
            lists: vec![PageList::default(); shape.num_lists() as usize],
            tail_start: 0,
            tail: 0,
            sealed: 0,
            retired: 0,
            filled: 0..0,
            before: None,
            window: (0, 0),
            merged_with: vec![None; shape.num_layers as usize],
            committed,
            dirty: false,
        }
    }

    /// Commits the pages that [`Self::committed`] counts and reserves table entries; nothing is held where that fails.
    pub(super) fn reserve(&mut self, pool: &mut PagePool, ranges: &mut TableRanges) -> Result<(), PoolError> {
        let (sizes, committed) = (Self::page_sizes(&self.shape), self.committed);
        let undo = |pool: &mut PagePool, done: usize| {
            sizes.iter().zip(committed).take(done).try_for_each(|(page, n)| pool.uncommit(*page, n))
        };
        for (done, (page, n)) in sizes.iter().zip(committed).enumerate() {
            if let Err(error) = pool.commit(*page, n) {
                undo(pool, done)?;
                return Err(error);
            }
        }
        let wanted = self.entries();
        let Some(region) = ranges.reserve(wanted) else {
            undo(pool, sizes.len())?;
            return Err(PoolError::TablesFull { wanted, total: ranges.total() });
        };
        self.region = region;
        Ok(())
    }

    /// Entries of the table's region.
    fn entries(&self) -> u32 {
        // Saturating: no buffer has so many entries.
        self.shape.num_lists().saturating_mul(self.list_capacity()).saturating_add(Self::chosen_entries(&self.shape))
    }

    /// Entries behind the lists for what decode rows choose: of each KV head the pages, and one more for every arena that they
    /// may lie in.
    pub(super) fn chosen_entries(shape: &TableShape) -> u32 {
        shape.quest.map_or(0, |quest| shape.num_kv_heads * (quest.pages + CHOSEN_SPARE))
    }

    /// Bytes of an open page, of one in the codec, and of a merged one.
    pub(super) fn page_sizes(shape: &TableShape) -> [Bytes; 3] {
        [shape.open_page(), shape.sealed_page(), shape.merged_page()]
    }

    /// Tokens that the session has seen, evicted ones included: the position of the next.
    pub const fn n_tokens(&self) -> u32 {
        self.tail_start + self.tail
    }

    /// Tokens appended since an eviction, or since the start.
    pub const fn tail(&self) -> u32 {
        self.tail
    }

    /// Tokens that a list of the model's `layer` holds.
    pub fn n_held(&self, layer: u32, kv_head: u32) -> u32 {
        self.held_of(self.layers.list(layer), kv_head)
    }

    /// Tokens that a list holds, those in common with another counted for both.
    pub(super) fn held_of(&self, list_layer: u32, kv_head: u32) -> u32 {
        let list = &self.lists[(list_layer * self.shape.num_kv_heads + kv_head) as usize];
        let tail = if list.closed { 0 } else { self.tail };
        list.kept + tail + self.merged_list(list_layer, kv_head).map_or(0, |(list, _)| list.merged)
    }

    /// Tokens held over all lists.
    pub fn held_tokens(&self) -> u64 {
        let lists = (0..self.shape.num_layers).flat_map(|l| (0..self.shape.num_kv_heads).map(move |h| (l, h)));
        lists.map(|(layer, head)| u64::from(self.held_of(layer, head))).sum()
    }

    /// The list whose merged part a list reads, and which of the two it is.
    pub(super) fn merged_list(&self, list_layer: u32, kv_head: u32) -> Option<(&PageList, u32)> {
        let lower = self.merged_with[list_layer as usize]?;
        let list = &self.lists[(lower * self.shape.num_kv_heads + kv_head) as usize];
        Some((list, u32::from(lower != list_layer)))
    }

    /// Its shape.
    pub const fn shape(&self) -> &TableShape {
        &self.shape
    }

    /// Which layers share lists.
    pub const fn layers(&self) -> &Layers {
        &self.layers
    }

    /// What it was admitted for.
    pub const fn admitted(&self) -> Capacity {
        self.admitted
    }

    /// How many of `n` rows its next step may hold: where a layer reads another's cache after a third has filled the window,
    /// no more than the open page takes.
    pub fn cut(&self, n: u32) -> u32 {
        let size = self.shape.page.page_size;
        let n = self.shape.cut(self.tail, n);
        if self.shape.codec.seals() && !self.layers.follow() { n.min(size - self.tail % size) } else { n }
    }

    /// Pages of each list's tail that this step seals.
    pub const fn sealing_pages(&self) -> Range<u32> {
        self.retired..self.sealed
    }

    /// Position of the first token of a page of the tail.
    pub const fn page_position(&self, page: u32) -> u32 {
        self.tail_start + page * self.shape.page.page_size
    }

    /// Bytes of pages held.
    pub fn held_bytes(&self) -> Bytes {
        let sizes = Self::page_sizes(&self.shape);
        let list =
            |l: &PageList| PARTS.iter().map(|part| u64::from(l.part(*part).len()) * sizes[part.size()].0).sum::<u64>();
        Bytes(self.lists.iter().map(list).sum())
    }

    /// Bytes of pages held, and of those that are committed to it.
    pub fn promised_bytes(&self) -> Bytes {
        let committed = Self::page_sizes(&self.shape).into_iter().zip(self.committed);
        let committed = committed.map(|(page, n)| page.0 * u64::from(n));
        self.held_bytes() + Bytes(committed.sum())
    }

    /// Makes room for `n` more tokens in every list, and takes a sealed page for every page that they fill.
    ///
    /// # Errors
    /// [`PoolError::NotCommitted`] beyond what was admitted.
    ///
    /// # Panics
    /// When the rows are more than [`Self::cut`] allows, or the window is too small for the step.
    pub fn grow(&mut self, pool: &mut PagePool, window: &mut Window, n: u32) -> Result<(), PoolError> {
        let shape = self.shape;
        // The pool counts commitments of all sessions together, so it would give this one the pages of another.
        let tail = self.tail.checked_add(n).filter(|tail| *tail <= self.admitted.tail_tokens);
        let tail = tail.ok_or(PoolError::NotCommitted(shape.open_page()))?;
        assert_eq!(self.cut(n), n, "rows that leave a page should end on an edge");
        assert!(n == 0 || self.writes_its_own(pool), "pages that another table names too are not written");
        let passing = shape.window_pages(self.tail, n);
        let slot = window.take(passing).expect("the window should hold the pages of a step");
        self.filled = self.tail / shape.page.page_size..tail / shape.page.page_size;
        self.window = (slot, window.slots());
        let pages = |list: &PageList| GROWING.map(|part| list.part(part).len());
        self.before = Some((self.tail, self.lists.iter().find(|list| !list.closed).map_or([0; 3], pages)));
        self.tail = tail;
        let open = tail.div_ceil(shape.page.page_size) - self.retired - passing;
        if shape.codec.seals() {
            self.sealed = tail / shape.page.page_size;
        }
        let arenas = pool.arena_bytes().count();
        for index in 0..self.lists.len() {
            if !self.lists[index].closed {
                self.fill(pool, index, Part::Open, open, arenas)?;
                self.fill(pool, index, Part::Sealed, self.sealed, arenas)?;
                let bounds = shape.bounds_of_list(tail);
                self.fill(pool, index, Part::Bounds, bounds, arenas)?;
            }
        }
        Ok(())
    }

    /// Takes back the last [`Self::grow`], where its step failed: pages and commitments are as they were before, and so is
    /// what the pool gives next.
    ///
    /// # Errors
    /// [`PoolError`] when the pool disagrees, which would be a defect.
    pub fn ungrow(&mut self, pool: &mut PagePool) -> Result<(), PoolError> {
        let Some((tail, before)) = self.before.take() else { return Ok(()) };
        for list in self.lists.iter_mut().rev().filter(|list| !list.closed) {
            for (part, n) in GROWING.into_iter().zip(before).rev() {
                let pages = &mut list.parts[part as usize];
                while pages.len() > n {
                    pool.untake(pages.pop().expect("there are more"))?;
                    self.committed[part.size()] += 1;
                }
            }
        }
        (self.tail, self.sealed) = (tail, self.retired);
        self.retire();
        // Nobody knows whether the device has what it was given.
        self.dirty = true;
        Ok(())
    }

    /// Takes pages until a part of a list has so many.
    pub(super) fn fill(
        &mut self,
        pool: &mut PagePool,
        index: usize,
        part: Part,
        pages: u32,
        arenas: usize,
    ) -> Result<(), PoolError> {
        let layer = index / self.shape.num_kv_heads as usize;
        let preferred = layer * arenas / self.shape.num_layers as usize;
        let class = part.size();
        let page = Self::page_sizes(&self.shape)[class];
        let committed = &mut self.committed[class];
        let list = &mut self.lists[index].parts[part as usize];
        while list.len() < pages {
            list.push(pool.take(page, preferred)?);
            *committed -= 1;
            self.dirty = true;
        }
        Ok(())
    }

    /// Takes pages for what an eviction keeps of each list, `[layer][KV head]`, of a session that has seen `n_tokens`. `pairs`
    /// are layers that have tokens in common. Commitments that this eviction does not need return.
    ///
    /// # Errors
    /// [`PoolError::NotCommitted`] beyond what was admitted.
    ///
    /// # Panics
    /// When the table holds tokens or pages, or the lists are not as many.
    pub fn keep(
        &mut self,
        pool: &mut PagePool,
        kept: Vec<KeptTokens>,
        pairs: &[(u32, u32)],
        n_tokens: u32,
    ) -> Result<(), PoolError> {
        assert!(self.n_tokens() == 0 && self.held_bytes() == Bytes::ZERO, "kept tokens come first");
        assert_eq!(kept.len(), self.lists.len(), "every list keeps something or nothing");
        let size = self.shape.page.page_size;
        let own = |tokens: &KeptTokens| tokens.own.as_ref().map_or(0, |t| to_u32(t.len())).div_ceil(size);
        let merged = |tokens: &KeptTokens| to_u32(tokens.merged.len()).div_ceil(size);
        let most = |pages: &dyn Fn(&KeptTokens) -> u32| kept.iter().map(pages).max().unwrap_or(0);
        let (all, all_merged): (u32, u32) = (kept.iter().map(own).sum(), kept.iter().map(merged).sum());
        let admitted = self.admitted;
        if most(&own) > admitted.kept_pages_of_list || all > admitted.kept_pages {
            return Err(PoolError::NotCommitted(self.shape.sealed_page()));
        }
        if most(&merged) > admitted.merged_pages_of_list || all_merged > admitted.merged_pages {
            return Err(PoolError::NotCommitted(self.shape.merged_page()));
        }
        let arenas = pool.arena_bytes().count();
        let closed = to_u32(kept.iter().filter(|tokens| tokens.own.is_none()).count());
        for (index, tokens) in kept.into_iter().enumerate() {
            let (own, merged) = (own(&tokens), merged(&tokens));
            let list = &mut self.lists[index];
            list.merged = to_u32(tokens.merged.len());
            list.merged_positions = tokens.merged;
            list.closed = tokens.own.is_none();
            list.positions = tokens.own.unwrap_or_default();
            list.kept = to_u32(list.positions.len());
            self.fill(pool, index, Part::Merged, merged, arenas)?;
            self.fill(pool, index, Part::Kept, own, arenas)?;
        }
        for (lower, upper) in pairs {
            let (lower, upper) = (self.layers.list(*lower), self.layers.list(*upper));
            self.merged_with[lower as usize] = Some(lower);
            self.merged_with[upper as usize] = Some(lower);
        }
        let [_, _, sealed, open, bounds] = self.capacity;
        let unused =
            [closed * (open + bounds), closed * sealed + admitted.kept_pages - all, admitted.merged_pages - all_merged];
        for ((page, n), committed) in Self::page_sizes(&self.shape).iter().zip(unused).zip(&mut self.committed) {
            pool.uncommit(*page, n)?;
            *committed -= n;
        }
        self.tail_start = n_tokens;
        Ok(())
    }

    /// Commits once more the pages for kept tokens that [`Self::keep`] gave back, for a table that is to stand ready in place of
    /// this one.
    ///
    /// # Errors
    /// [`PoolError::DoesNotFit`] when others have them by now.
    pub fn commit_rest(&mut self, pool: &mut PagePool) -> Result<(), PoolError> {
        let kept: u32 = self.lists.iter().map(|list| list.part(Part::Kept).len()).sum();
        let rest = self.admitted.kept_pages - kept;
        pool.commit(self.shape.sealed_page(), rest)?;
        self.committed[1] += rest;
        Ok(())
    }

    /// Takes back the last tokens of a tail in f16; their pages stay for what comes next.
    ///
    /// # Panics
    /// When pages are sealed, or the tail is not so long.
    pub fn rewind(&mut self, n: u32) {
        assert!(!self.shape.codec.seals() && n <= self.tail, "only open tokens can be taken back");
        self.tail -= n;
    }

    /// Ends a step: pages that it sealed are read in their codec from now on.
    pub fn retire(&mut self) {
        self.filled = 0..0;
        self.before = None;
        self.retired = self.sealed;
        self.window = (0, 0);
    }

    /// Returns every page, commitment and table entry.
    ///
    /// # Errors
    /// [`PoolError`] when the pool disagrees about any of them, which would be a defect.
    pub fn release(self, pool: &mut PagePool, ranges: &mut TableRanges) -> Result<(), PoolError> {
        for (page, bytes) in self.page_ids() {
            let returned = pool.release(page)?;
            if self.admitted.turns && !returned {
                pool.uncommit(bytes, 1)?;
            }
        }
        for (page, n) in Self::page_sizes(&self.shape).iter().zip(self.committed) {
            pool.uncommit(*page, n)?;
        }
        let entries = self.entries();
        if entries > 0 {
            ranges.release(self.region, entries);
        }
        Ok(())
    }
}

fn to_u32(n: usize) -> u32 {
    u32::try_from(n).expect("pages of a list are counted in 32 bits")
}
