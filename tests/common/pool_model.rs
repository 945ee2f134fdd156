//! A model of the page pool that is too simple to be wrong: a map of pages, and counts.

use std::collections::BTreeMap;

use concertina::geometry::{Bytes, CELL_BYTES};
use concertina::pool::{PageId, PoolLayout, PoolReport};

pub(crate) const KIB: u64 = 1 << 10;
pub(crate) const SLAB: Bytes = Bytes(64 * KIB);

/// Slabs of [`SLAB`], and pages of at least 2 KiB.
pub(crate) fn layout(budget: Bytes, max_binding: Bytes) -> PoolLayout {
    let (staging, scratch) = (Bytes(96 * KIB), Bytes(40 * KIB));
    PoolLayout { budget, staging, scratch, max_binding, slab: SLAB, smallest_page: Bytes(2 * KIB), fixed_entries: 0 }
}

pub(crate) fn pages_per_slab(page: Bytes) -> u64 {
    SLAB.0 / page.0
}

/// What the pool should say, from pages and counts alone.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub(crate) budget: Bytes,
    pub(crate) fixed: Bytes,
    pub(crate) arenas: Vec<Bytes>,
    pub(crate) pages: BTreeMap<PageId, Bytes>,
    /// Tables that name each page.
    pub(crate) holders: BTreeMap<PageId, u64>,
    pub(crate) peak_spared: Bytes,
    /// Page size and pages in use of every slab that serves someone.
    pub(crate) slabs: BTreeMap<(u16, u64), (Bytes, u64)>,
    pub(crate) committed: BTreeMap<Bytes, u64>,
    pub(crate) peak_pages: Bytes,
    pub(crate) released: u64,
}

impl Model {
    pub(crate) fn new(layout: &PoolLayout, sizes: &[Bytes]) -> Self {
        let (arenas, tables) = layout.split().expect("the test's layout should fit its budget");
        let fixed = layout.staging + layout.scratch + tables;
        let committed = sizes.iter().map(|page| (*page, 0)).collect();
        let (pages, holders, slabs) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let (budget, released) = (layout.budget, 0);
        let [peak_pages, peak_spared] = [Bytes::ZERO; 2];
        Self { budget, fixed, arenas, pages, holders, peak_spared, slabs, committed, peak_pages, released }
    }

    pub(crate) fn in_use(&self) -> Bytes {
        self.slabs.values().map(|(page, n)| Bytes(page.0 * n)).sum()
    }

    pub(crate) fn free_in_partial(&self, page: Bytes) -> u64 {
        self.slabs.values().filter(|(served, _)| *served == page).map(|(_, n)| pages_per_slab(page) - n).sum()
    }

    /// Pages of `page` bytes that can still be promised when all earlier promises are kept.
    pub(crate) fn available(&self, page: Bytes) -> u64 {
        let all: u64 = self.arenas.iter().map(|arena| arena.0 / SLAB.0).sum();
        let others = self.committed.iter().filter(|(other, _)| **other != page);
        let promised: u64 =
            others.map(|(o, n)| n.saturating_sub(self.free_in_partial(*o)).div_ceil(pages_per_slab(*o))).sum();
        let free = all - self.slabs.len() as u64 - promised;
        self.free_in_partial(page) + free * pages_per_slab(page) - self.committed[&page]
    }

    pub(crate) fn commit(&mut self, page: Bytes, n: u64) {
        *self.committed.get_mut(&page).expect("the page size should be known") += n;
    }

    pub(crate) fn uncommit(&mut self, page: Bytes, n: u64) {
        *self.committed.get_mut(&page).expect("the page size should be known") -= n;
    }

    /// Notes a page that the pool gave; an error where it could not be the session's alone.
    pub(crate) fn take(&mut self, id: PageId, page: Bytes) -> Result<(), String> {
        let start = u64::from(id.cell) * CELL_BYTES;
        let arena = self.arenas.get(usize::from(id.arena)).ok_or(format!("{id:?} lies in no arena"))?;
        if start + page.0 > arena.0 {
            return Err(format!("{id:?} of {page} ends after its arena of {arena}"));
        }
        let before = self.pages.range(..=id).next_back().filter(|(other, _)| other.arena == id.arena);
        if let Some((other, size)) = before.filter(|(o, size)| u64::from(o.cell) * CELL_BYTES + size.0 > start) {
            return Err(format!("{id:?} begins inside {other:?} of {size}"));
        }
        let after = self.pages.range(id..).next().filter(|(other, _)| other.arena == id.arena);
        if let Some((other, _)) = after.filter(|(o, _)| start + page.0 > u64::from(o.cell) * CELL_BYTES) {
            return Err(format!("{id:?} of {page} reaches into {other:?}"));
        }
        let (served, n) = self.slabs.entry((id.arena, start / SLAB.0)).or_insert((page, 0));
        if *served != page {
            return Err(format!("{id:?} of {page} lies in a slab that serves {served}"));
        }
        *n += 1;
        self.uncommit(page, 1);
        self.pages.insert(id, page);
        self.holders.insert(id, 1);
        self.peak_pages = self.peak_pages.max(self.in_use());
        Ok(())
    }

    /// One table more names a page.
    pub(crate) fn share(&mut self, id: PageId) {
        *self.holders.get_mut(&id).expect("the model should hold the page") += 1;
        self.peak_spared = self.peak_spared.max(self.spared());
    }

    /// Bytes of pages that several tables name.
    pub(crate) fn shared(&self) -> Bytes {
        self.holders.iter().filter(|(_, n)| **n > 1).map(|(id, _)| self.pages[id]).sum()
    }

    /// What tables would hold more if each had pages of its own.
    pub(crate) fn spared(&self) -> Bytes {
        Bytes(self.holders.iter().map(|(id, n)| (n - 1) * self.pages[id].0).sum())
    }

    /// One table less names a page; whether none does any more.
    pub(crate) fn release(&mut self, id: PageId) -> bool {
        let holders = self.holders.get_mut(&id).expect("the model should hold the page");
        *holders -= 1;
        if *holders > 0 {
            return false;
        }
        self.holders.remove(&id);
        self.pages.remove(&id).expect("the model should hold the page");
        let slab = (id.arena, u64::from(id.cell) * CELL_BYTES / SLAB.0);
        let (_, n) = self.slabs.get_mut(&slab).expect("the page's slab should be in use");
        *n -= 1;
        if *n == 0 {
            self.slabs.remove(&slab);
        }
        self.released += 1;
        true
    }

    /// Compares every number of a report; the first that differs.
    pub(crate) fn compare(&self, report: &PoolReport) -> Result<(), String> {
        let capacity: Bytes = self.arenas.iter().copied().sum();
        let pages = self.in_use();
        let committed: Bytes = self.committed.iter().map(|(page, n)| Bytes(page.0 * n)).sum();
        let tables = self.fixed - report.staging_bytes - report.scratch_bytes;
        for (what, expected, found) in [
            ("budget", self.budget, report.budget_bytes),
            ("tables", tables, report.tables_bytes),
            ("arenas", capacity, report.arenas_bytes),
            ("allocated", self.fixed + capacity, report.allocated_bytes),
            ("pages in use", pages, report.pages_in_use_bytes),
            ("peak of pages", self.peak_pages, report.pages_peak_bytes),
            ("in use", self.fixed + pages, report.in_use_bytes),
            ("peak", self.fixed + self.peak_pages, report.peak_bytes),
            ("slack", Bytes(self.slabs.len() as u64 * SLAB.0) - pages, report.slack_bytes),
            ("committed", committed, report.committed_bytes),
            ("released pages", Bytes(self.released), Bytes(report.released_pages)),
            ("shared", self.shared(), report.shared_bytes),
            ("spared", self.spared(), report.spared_bytes),
            ("most spared", self.peak_spared, report.spared_peak_bytes),
            ("arena count", Bytes(self.arenas.len() as u64), Bytes(report.arenas as u64)),
        ] {
            if expected != found {
                return Err(format!("{what}: the model has {}, the pool reports {}", expected.0, found.0));
            }
        }
        for (what, bytes) in [("in use", report.in_use_bytes), ("allocated", report.allocated_bytes)] {
            if bytes > self.budget {
                return Err(format!("{what}: {bytes} exceed the budget of {}", self.budget));
            }
        }
        Ok(())
    }
}
