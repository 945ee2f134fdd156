//! One arena: a buffer cut into slabs, each serving one page size while any of its pages is in use.
//!
//! Taking and releasing a page is O(1): free slabs are a stack; partly used slabs of a class are a vector in which each
//! slab knows its place; free pages of a slab are a stack; a count per page tells how many tables name it.

use crate::geometry::{Bytes, CELL_BYTES};

#[derive(Clone, Debug, Default)]
struct Slab {
    /// The page class that it serves, while it serves one.
    class: Option<usize>,
    /// Indices of free pages, next on top.
    free: Vec<u32>,
    /// Tables that name each page.
    holders: Vec<u32>,
    /// Place in the class's list of partly used slabs.
    place: usize,
}

#[derive(Clone, Debug)]
struct Class {
    page_cells: u32,
    pages_per_slab: u32,
    /// Slabs with at least one free page.
    partial: Vec<u32>,
    free_in_partial: u32,
}

/// Slabs of one buffer.
#[derive(Clone, Debug)]
pub struct Arena {
    slabs: Vec<Slab>,
    free_slabs: Vec<u32>,
    classes: Vec<Class>,
    slab_cells: u32,
}

impl Arena {
    /// An empty arena of whole slabs.
    ///
    /// # Panics
    /// When it exceeds 2^32 cells (64 GiB).
    pub fn new(bytes: Bytes, slab: Bytes) -> Self {
        let slab_cells = u32::try_from(slab.0 / CELL_BYTES).expect("a slab should have fewer than 2^32 cells");
        let n = u32::try_from(bytes.0 / slab.0).expect("an arena should have fewer than 2^32 slabs");
        assert!(n.checked_mul(slab_cells).is_some(), "an arena should have fewer than 2^32 cells");
        let slabs = vec![Slab::default(); n as usize];
        Self { slabs, free_slabs: (0..n).rev().collect(), classes: Vec::new(), slab_cells }
    }

    /// Bytes of the arena.
    pub fn bytes(&self) -> Bytes {
        Bytes(self.slabs.len() as u64 * u64::from(self.slab_cells) * CELL_BYTES)
    }

    /// Slabs that serve no page size.
    pub fn free_slabs(&self) -> u32 {
        u32::try_from(self.free_slabs.len()).expect("slabs are counted in 32 bits")
    }

    /// Free pages in slabs that already serve class `class`.
    pub fn free_in_partial_slabs(&self, class: usize) -> u32 {
        self.classes[class].free_in_partial
    }

    /// Bytes of slabs that serve some page size.
    pub fn bytes_in_used_slabs(&self) -> Bytes {
        let used = self.slabs.len() - self.free_slabs.len();
        Bytes(used as u64 * u64::from(self.slab_cells) * CELL_BYTES)
    }

    pub(super) fn add_class(&mut self, page: Bytes) {
        let page_cells = u32::try_from(page.0 / CELL_BYTES).expect("a page is smaller than a slab");
        let pages_per_slab = self.slab_cells / page_cells;
        self.classes.push(Class { page_cells, pages_per_slab, partial: Vec::new(), free_in_partial: 0 });
    }

    /// Takes a page of `class`; its first cell.
    pub(super) fn take(&mut self, class: usize) -> Option<u32> {
        if self.classes[class].partial.is_empty() {
            let index = self.free_slabs.pop()?;
            let c = &mut self.classes[class];
            let slab = &mut self.slabs[index as usize];
            slab.class = Some(class);
            slab.free.clear();
            slab.free.extend((0..c.pages_per_slab).rev());
            slab.holders.clear();
            slab.holders.resize(c.pages_per_slab as usize, 0);
            slab.place = c.partial.len();
            c.partial.push(index);
            c.free_in_partial += c.pages_per_slab;
        }
        let c = &mut self.classes[class];
        let index = *c.partial.last()?;
        let slab = &mut self.slabs[index as usize];
        let page = slab.free.pop()?;
        slab.holders[page as usize] = 1;
        c.free_in_partial -= 1;
        if slab.free.is_empty() {
            c.partial.pop();
        }
        Some(index * self.slab_cells + page * c.page_cells)
    }

    /// The slab, the class and the place in the slab of a page that is in use.
    fn locate(&self, cell: u32) -> Option<(usize, usize, usize)> {
        let index = (cell / self.slab_cells) as usize;
        let slab = self.slabs.get(index)?;
        let class = slab.class?;
        let (offset, page_cells) = (cell % self.slab_cells, self.classes[class].page_cells);
        let page = (offset / page_cells) as usize;
        let in_use = slab.holders.get(page).is_some_and(|holders| *holders > 0);
        (in_use && offset.is_multiple_of(page_cells)).then_some((index, class, page))
    }

    /// Tables that name the page that begins at `cell`.
    pub(super) fn holders(&self, cell: u32) -> u32 {
        self.locate(cell).map_or(0, |(index, _, page)| self.slabs[index].holders[page])
    }

    /// One table more names the page that begins at `cell`; its class, and how many do now, or `None` when no such page is in
    /// use.
    pub(super) fn share(&mut self, cell: u32) -> Option<(usize, u32)> {
        let (index, class, page) = self.locate(cell)?;
        let holders = &mut self.slabs[index].holders[page];
        *holders += 1;
        Some((class, *holders))
    }

    /// One table less names the page that begins at `cell`, which is free when none does; its class, and how many still do, or
    /// `None` when no such page is in use.
    pub(super) fn release(&mut self, cell: u32) -> Option<(usize, u32)> {
        let (index, class, page) = self.locate(cell)?;
        let c = &mut self.classes[class];
        let slab = &mut self.slabs[index];
        slab.holders[page] -= 1;
        let left = slab.holders[page];
        if left > 0 {
            return Some((class, left));
        }
        let index = u32::try_from(index).expect("slabs are counted in 32 bits");
        if slab.free.is_empty() {
            slab.place = c.partial.len();
            c.partial.push(index);
        }
        slab.free.push(u32::try_from(page).expect("pages of a slab are counted in 32 bits"));
        c.free_in_partial += 1;
        if slab.free.len() == c.pages_per_slab as usize {
            // The last page came back: the slab serves anyone again.
            slab.class = None;
            let place = slab.place;
            c.free_in_partial -= c.pages_per_slab;
            c.partial.swap_remove(place);
            if let Some(&moved) = c.partial.get(place) {
                self.slabs[moved as usize].place = place;
            }
            self.free_slabs.push(index);
        }
        Some((class, 0))
    }
}
