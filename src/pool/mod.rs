//! The pool: one byte budget of device memory, and who holds what of it.
//!
//! ```text
//! budget = staging + scratch + tables + arenas
//! arena  = one buffer of at most the adapter's binding limit, cut into slabs
//! slab   = pages of one byte size while any is in use; whole again when the last returns
//! page   = page_size tokens of one (layer, KV head), open in f16 or sealed in a codec
//! ```
//!
//! [`PagePool`] is the accounting: pure data, no device, the same code in the engine, in the simulator and in tests.
//! [`device::PoolBuffers`] is the device side: the buffers that the accounting speaks of, byte for byte.
//!
//! Pages are *committed* before they are *taken*: admission commits what a session can need at most, so that no step
//! ever finds the pool empty half-way; taking and releasing single pages is O(1) in the number of pages.
//!
//! A page can be named by several tables. It is held once, however many name it, and returns when the last lets go.
//!
//! A layer prefers one arena, chosen by its index, so that a layer's attention is normally one dispatch; when that
//! arena is full its pages come from others, and the plan groups its work by arena.
//!
//! Accepted downsides: a slab belongs to one page size at a time, so with several codecs at once a partly used slab
//! per (arena, page size) is lost to the others; the report shows it as slack. Commitments assume the worst case, so
//! a session that ends early leaves bytes unused until it ends.

pub mod arena;
pub mod arena_map;
pub mod budget;
pub mod device;
pub mod page_table;
pub mod suspended;
pub mod table_layers;
pub mod table_ranges;
pub mod table_runs;
pub mod table_shape;
pub mod table_sharing;

use serde::Serialize;

use crate::geometry::{Bytes, CELL_BYTES};
use arena::Arena;
pub use budget::{Budget, Kind};

/// A page: which arena, and where in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageId {
    /// Arena.
    pub arena: u16,
    /// First 16-byte cell of the page in its arena: what shaders read from page tables.
    pub cell: u32,
}

impl PageId {
    /// Stands for the [`page_table::Window`] where an arena is named.
    pub const WINDOW: u16 = u16::MAX;
}

/// What the pool can not do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// The fixed parts alone exceed the budget, or leave no room for a slab.
    #[error(
        "a budget of {budget} is too small: staging, scratch and tables take {fixed} and one slab of pages {slab}; \
         give at least {} B", fixed.0 + slab.0
    )]
    BudgetTooSmall {
        /// The whole budget.
        budget: Bytes,
        /// What is held besides pages.
        fixed: Bytes,
        /// The smallest useful amount of pages.
        slab: Bytes,
    },
    /// A slab does not fit a buffer, whatever the budget.
    #[error("a slab of pages takes {slab}, but one binding of this adapter shows at most {max_binding}")]
    SlabExceedsBinding {
        /// The smallest useful amount of pages.
        slab: Bytes,
        /// Largest buffer that one binding can show.
        max_binding: Bytes,
    },
    /// More pages are wanted than can ever or can now be given.
    #[error("{pages} pages of {page} ({needed} in all) do not fit: {available} of {capacity} for pages are free")]
    DoesNotFit {
        /// Pages wanted.
        pages: u32,
        /// Bytes of each.
        page: Bytes,
        /// Bytes of all.
        needed: Bytes,
        /// Bytes of such pages that could be committed now.
        available: Bytes,
        /// Bytes of all arenas.
        capacity: Bytes,
    },
    /// The page tables have no range of entries for a session.
    #[error("the page tables have no {wanted} entries in a row free, of {total} in all")]
    TablesFull {
        /// Entries wanted.
        wanted: u32,
        /// Entries of the buffer.
        total: u32,
    },
    /// As many sessions are scored as there is room for.
    #[error("all {0} slots for the scores of sessions are taken")]
    SlotsTaken(u32),
    /// A page was taken beyond what was committed.
    #[error("no page of {0} is committed; commit before taking")]
    NotCommitted(Bytes),
    /// A page was released twice, or never taken.
    #[error("page {page:?} is not in use")]
    NotInUse {
        /// The page.
        page: PageId,
    },
}

/// How the arenas are cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolLayout {
    /// Everything the pool may hold on the device.
    pub budget: Bytes,
    /// Held for staging, both directions.
    pub staging: Bytes,
    /// Held for activations, attention states and logits.
    pub scratch: Bytes,
    /// Largest buffer that one binding can show.
    pub max_binding: Bytes,
    /// Bytes of a slab; at least one page of every size in use.
    pub slab: Bytes,
    /// Smallest page in use; decides how many table entries can be needed.
    pub smallest_page: Bytes,
    /// Table entries besides those of sessions: the window's.
    pub fixed_entries: u32,
}

impl PoolLayout {
    /// Table entries per page: twice one entry, so that regions of ended sessions can be reused without moving any; and twice
    /// that, since tables that share pages each have entries for them.
    pub const ENTRIES_PER_PAGE: u64 = 4;

    /// Bytes of arenas, and of tables to address them, within the budget.
    ///
    /// # Errors
    /// [`PoolError::BudgetTooSmall`].
    pub fn split(&self) -> Result<(Vec<Bytes>, Bytes), PoolError> {
        let entries = Bytes(u64::from(self.fixed_entries) * 4);
        let fixed = self.staging + self.scratch + entries;
        let tables_per_slab = Bytes(self.slab.0.div_ceil(self.smallest_page.0) * Self::ENTRIES_PER_PAGE * 4);
        let needed = Bytes(tables_per_slab.0 + 256);
        // Rounding the tables up to a whole allocation costs less than the 256 bytes that `needed` set aside.
        let left = self.budget.saturating_sub(fixed + Bytes(256));
        let slabs = left.0 / (self.slab.0 + tables_per_slab.0);
        let slabs_per_arena = self.max_binding.0 / self.slab.0;
        if slabs_per_arena == 0 {
            return Err(PoolError::SlabExceedsBinding { slab: self.slab, max_binding: self.max_binding });
        }
        if slabs == 0 {
            let fixed = fixed + needed;
            return Err(PoolError::BudgetTooSmall { budget: self.budget, fixed, slab: self.slab });
        }
        let mut arenas = Vec::new();
        let mut rest = slabs;
        while rest > 0 {
            let here = rest.min(slabs_per_arena);
            arenas.push(Bytes(here * self.slab.0));
            rest -= here;
        }
        Ok((arenas, Bytes(slabs * tables_per_slab.0 + entries.0).align_up(256)))
    }
}

/// The counts of one page size.
#[derive(Clone, Debug)]
struct PageClass {
    page: Bytes,
    /// Committed and not yet taken.
    committed: u32,
    in_use: u32,
}

/// Page accounting over arenas.
#[derive(Clone, Debug)]
pub struct PagePool {
    arenas: Vec<Arena>,
    classes: Vec<PageClass>,
    slab: Bytes,
    budget: Budget,
    released_pages: u64,
    /// Bytes of pages that several tables name, and what these would hold more if each had pages of its own.
    shared: Bytes,
    spared: Bytes,
    spared_peak: Bytes,
}

/// What the pool holds, for people and for `--json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PoolReport {
    /// The byte budget.
    pub budget_bytes: Bytes,
    /// Device buffers that exist under it, whether or not pages in them are in use.
    pub allocated_bytes: Bytes,
    /// Of these, bytes for upload and read-back.
    pub staging_bytes: Bytes,
    /// Of these, bytes for activations, states and logits.
    pub scratch_bytes: Bytes,
    /// Of these, bytes for page tables.
    pub tables_bytes: Bytes,
    /// Of these, bytes of arenas.
    pub arenas_bytes: Bytes,
    /// Number of arenas.
    pub arenas: usize,
    /// Bytes of pages in use.
    pub pages_in_use_bytes: Bytes,
    /// Most bytes of pages ever in use.
    pub pages_peak_bytes: Bytes,
    /// Staging, scratch, tables and pages in use.
    pub in_use_bytes: Bytes,
    /// Most bytes ever in use.
    pub peak_bytes: Bytes,
    /// Bytes of slabs in use that no page of theirs uses.
    pub slack_bytes: Bytes,
    /// Bytes promised to admitted sessions and not yet taken.
    pub committed_bytes: Bytes,
    /// Pages returned so far.
    pub released_pages: u64,
    /// Of the bytes of pages in use, those that several tables name.
    pub shared_bytes: Bytes,
    /// Bytes that tables would hold more if each had pages of its own.
    pub spared_bytes: Bytes,
    /// Most bytes ever spared so.
    pub spared_peak_bytes: Bytes,
}

impl PagePool {
    /// A pool of empty arenas.
    ///
    /// # Errors
    /// [`PoolError::BudgetTooSmall`].
    ///
    /// # Panics
    /// When the slab size is not a multiple of a cell.
    pub fn new(layout: &PoolLayout) -> Result<Self, PoolError> {
        assert!(layout.slab.0 > 0 && layout.slab.0.is_multiple_of(CELL_BYTES), "a slab should be whole cells");
        let (arenas, tables) = layout.split()?;
        let mut budget = Budget::new(layout.budget);
        budget.hold(Kind::Staging, layout.staging);
        budget.hold(Kind::Scratch, layout.scratch);
        budget.hold(Kind::Tables, tables);
        let arenas = arenas.into_iter().map(|bytes| Arena::new(bytes, layout.slab)).collect();
        let (classes, slab) = (Vec::new(), layout.slab);
        let [shared, spared, spared_peak] = [Bytes::ZERO; 3];
        Ok(Self { arenas, classes, slab, budget, released_pages: 0, shared, spared, spared_peak })
    }

    /// Arena sizes, in order.
    pub fn arena_bytes(&self) -> impl Iterator<Item = Bytes> + '_ {
        self.arenas.iter().map(Arena::bytes)
    }

    /// Bytes of all arenas.
    pub fn capacity(&self) -> Bytes {
        self.arena_bytes().sum()
    }

    /// Bytes of page tables.
    pub const fn tables(&self) -> Bytes {
        self.budget.held(Kind::Tables)
    }

    fn class(&mut self, page: Bytes) -> usize {
        assert!(
            page.0 > 0 && page.0.is_multiple_of(CELL_BYTES) && page <= self.slab,
            "a page of {page} should fit a slab"
        );
        if let Some(at) = self.classes.iter().position(|c| c.page == page) {
            return at;
        }
        self.classes.push(PageClass { page, committed: 0, in_use: 0 });
        for arena in &mut self.arenas {
            arena.add_class(page);
        }
        self.classes.len() - 1
    }

    /// Pages of class `at` that could be committed now, beside all commitments made before.
    fn available(&self, at: usize) -> u32 {
        let class = &self.classes[at];
        let slabs = self.free_slabs().saturating_sub(self.slabs_promised_to_others(at));
        (self.partial(at) + slabs * self.pages_per_slab(class)).saturating_sub(class.committed)
    }

    /// Promises `pages` pages of `page` bytes: each can then be taken without failing.
    ///
    /// # Errors
    /// [`PoolError::DoesNotFit`] with the numbers; nothing changes then.
    pub fn commit(&mut self, page: Bytes, pages: u32) -> Result<(), PoolError> {
        // Sizes that nobody wants need not fit a slab.
        if pages == 0 {
            return Ok(());
        }
        let at = self.class(page);
        let available = self.available(at);
        if pages > available {
            return Err(PoolError::DoesNotFit {
                pages,
                page,
                needed: Bytes(u64::from(pages) * page.0),
                available: Bytes(u64::from(available) * page.0),
                capacity: self.capacity(),
            });
        }
        self.classes[at].committed += pages;
        Ok(())
    }

    /// Bytes of the whole slabs that an empty pool would need for pages of several sizes, since a slab serves one size at a
    /// time.
    pub fn slabs_for(&self, pages: &[(Bytes, u32)]) -> Bytes {
        let mut sizes: Vec<(Bytes, u64)> = Vec::new();
        for (page, n) in pages.iter().filter(|(_, n)| *n > 0) {
            match sizes.iter_mut().find(|(size, _)| size == page) {
                Some((_, all)) => *all += u64::from(*n),
                None => sizes.push((*page, u64::from(*n))),
            }
        }
        let slabs: u64 = sizes.iter().map(|(page, n)| n.div_ceil(self.slab.0 / page.0)).sum();
        Bytes(slabs * self.slab.0)
    }

    /// Gives back `pages` commitments that were not taken.
    ///
    /// # Errors
    /// [`PoolError::NotCommitted`] when there are not so many.
    pub fn uncommit(&mut self, page: Bytes, pages: u32) -> Result<(), PoolError> {
        if pages == 0 {
            return Ok(());
        }
        let at = self.class(page);
        let left = self.classes[at].committed.checked_sub(pages).ok_or(PoolError::NotCommitted(page))?;
        self.classes[at].committed = left;
        Ok(())
    }

    /// Takes one committed page, from the arena `preferred` where it has room.
    ///
    /// # Errors
    /// [`PoolError::NotCommitted`].
    ///
    /// # Panics
    /// Never, as long as commitments are kept; the check is an assertion.
    pub fn take(&mut self, page: Bytes, preferred: usize) -> Result<PageId, PoolError> {
        let at = self.class(page);
        if self.classes[at].committed == 0 {
            return Err(PoolError::NotCommitted(page));
        }
        let n = self.arenas.len();
        let from_preferred =
            |has: &dyn Fn(&Arena) -> bool| (0..n).map(|i| (preferred + i) % n).find(|&i| has(&self.arenas[i]));
        let partial = from_preferred(&|a| a.free_in_partial_slabs(at) > 0);
        let whole = from_preferred(&|a| a.free_slabs() > 0);
        // Breaking a whole slab while another arena has a page to spare is worth it for affinity, as long as no other
        // page size was promised that slab.
        let may_break = self.free_slabs() > self.slabs_promised_to_others(at);
        let chosen = match (partial, whole) {
            (Some(p), Some(w)) if p != preferred % n && w == preferred % n && may_break => w,
            (Some(p), _) => p,
            (None, Some(w)) => w,
            (None, None) => unreachable!("a committed page should exist"),
        };
        let cell = self.arenas[chosen].take(at).expect("the chosen arena should have a page");
        self.classes[at].committed -= 1;
        self.classes[at].in_use += 1;
        self.budget.take_pages(page);
        Ok(PageId { arena: u16::try_from(chosen).expect("arenas are few"), cell })
    }

    /// Takes back what [`Self::take`] gave last, where it was not used: the page is free and its commitment there again.
    ///
    /// # Errors
    /// [`PoolError::NotInUse`].
    ///
    /// # Panics
    /// When another table names it too.
    pub fn untake(&mut self, page: PageId) -> Result<(), PoolError> {
        let (class, left) = self.let_go(page)?;
        assert_eq!(left, 0, "a page that was taken just now is nobody else's");
        self.classes[class].committed += 1;
        Ok(())
    }

    /// Pages that one slab gives class `c`.
    fn pages_per_slab(&self, c: &PageClass) -> u32 {
        u32::try_from(self.slab.0 / c.page.0).expect("pages of a slab fit in 32 bits")
    }

    /// Free pages of class `at` in slabs that already serve it.
    fn partial(&self, at: usize) -> u32 {
        self.arenas.iter().map(|a| a.free_in_partial_slabs(at)).sum()
    }

    fn free_slabs(&self) -> u32 {
        self.arenas.iter().map(Arena::free_slabs).sum()
    }

    /// Whole slabs that the commitments of all classes but `at` need.
    fn slabs_promised_to_others(&self, at: usize) -> u32 {
        (self.classes.iter().enumerate())
            .filter(|(other, _)| *other != at)
            .map(|(other, c)| c.committed.saturating_sub(self.partial(other)).div_ceil(self.pages_per_slab(c)))
            .sum()
    }

    /// One table more names a page; nothing is taken for it.
    ///
    /// # Errors
    /// [`PoolError::NotInUse`].
    pub fn share(&mut self, page: PageId) -> Result<(), PoolError> {
        let arena = self.arenas.get_mut(usize::from(page.arena));
        let (class, holders) = arena.and_then(|a| a.share(page.cell)).ok_or(PoolError::NotInUse { page })?;
        let bytes = self.classes[class].page;
        self.shared += if holders == 2 { bytes } else { Bytes::ZERO };
        self.spared += bytes;
        self.spared_peak = self.spared_peak.max(self.spared);
        Ok(())
    }

    /// Bytes of pages that several tables name, each counted once.
    pub const fn shared_bytes(&self) -> Bytes {
        self.shared
    }

    /// Tables that name a page.
    pub fn holders(&self, page: PageId) -> u32 {
        self.arenas.get(usize::from(page.arena)).map_or(0, |arena| arena.holders(page.cell))
    }

    /// One table less names a page, which returns when none does: then its commitment is spent. Whether it returned.
    ///
    /// # Errors
    /// [`PoolError::NotInUse`].
    pub fn release(&mut self, page: PageId) -> Result<bool, PoolError> {
        let (_, left) = self.let_go(page)?;
        self.released_pages += u64::from(left == 0);
        Ok(left == 0)
    }

    /// One table less names a page, which is free when none does; its class, and how many still do.
    fn let_go(&mut self, page: PageId) -> Result<(usize, u32), PoolError> {
        let arena = self.arenas.get_mut(usize::from(page.arena));
        let (class, left) = arena.and_then(|a| a.release(page.cell)).ok_or(PoolError::NotInUse { page })?;
        let bytes = self.classes[class].page;
        if left > 0 {
            self.shared -= if left == 1 { bytes } else { Bytes::ZERO };
            self.spared -= bytes;
        } else {
            self.classes[class].in_use -= 1;
            self.budget.release_pages(bytes);
        }
        Ok((class, left))
    }

    /// What the pool holds now.
    pub fn report(&self) -> PoolReport {
        let b = &self.budget;
        let fixed = b.held(Kind::Staging) + b.held(Kind::Scratch) + b.held(Kind::Tables);
        let slack = self.arenas.iter().map(Arena::bytes_in_used_slabs).sum::<Bytes>() - b.held(Kind::Pages);
        PoolReport {
            budget_bytes: b.limit(),
            allocated_bytes: fixed + self.capacity(),
            staging_bytes: b.held(Kind::Staging),
            scratch_bytes: b.held(Kind::Scratch),
            tables_bytes: b.held(Kind::Tables),
            arenas_bytes: self.capacity(),
            arenas: self.arenas.len(),
            pages_in_use_bytes: b.held(Kind::Pages),
            pages_peak_bytes: b.pages_peak(),
            in_use_bytes: b.in_use(),
            peak_bytes: b.peak(),
            slack_bytes: slack,
            committed_bytes: Bytes(self.classes.iter().map(|c| u64::from(c.committed) * c.page.0).sum()),
            released_pages: self.released_pages,
            shared_bytes: self.shared,
            spared_bytes: self.spared,
            spared_peak_bytes: self.spared_peak,
        }
    }
}
