//! What is read of a page table: runs of tokens that lie in one arena, in pages that follow each other in the table.

use std::ops::Range;

use super::PageId;
use super::arena_map::ArenaMap;
use super::page_table::{CHOSEN_SPARE, PARTS, PageList, PageTable, Part};
use crate::compression::hidden::HiddenCodec;

/// Tokens that one item can read: consecutive in a list, in one arena, in pages that are consecutive in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// How the pages are encoded.
    pub codec: HiddenCodec,
    /// The arena; [`PageId::WINDOW`] for the window.
    pub arena: u16,
    /// Table entry of the first page.
    pub entry: u32,
    /// Table entries between one layer's list and the next.
    pub layer_stride: u32,
    /// Tokens before it in its part: in what was kept, or in the tail. A multiple of the page size.
    pub offset: u32,
    /// Tokens before it in the list.
    pub index: u32,
    /// A position that the first token does not exceed; its own in the tail.
    pub position: u32,
    /// Tokens.
    pub n_tokens: u32,
    /// Which of two layers reads them, where they are merged: 0 or 1.
    pub member: u32,
}

impl PageTable {
    pub(super) const fn list_capacity(&self) -> u32 {
        self.starts[PARTS.len()]
    }

    pub(super) const fn layer_stride(&self) -> u32 {
        self.shape.num_kv_heads * self.list_capacity()
    }

    /// First entry of a part of the list that a layer of the model reads.
    #[inline]
    pub(super) fn entry(&self, layer: u32, kv_head: u32, part: Part) -> u32 {
        self.entry_of(self.layers.list(layer), kv_head, part)
    }

    pub(super) const fn entry_of(&self, list_layer: u32, kv_head: u32, part: Part) -> u32 {
        let list = list_layer * self.shape.num_kv_heads + kv_head;
        self.region + list * self.list_capacity() + self.starts[part as usize]
    }

    #[inline]
    pub(super) fn list_at(&self, layer: u32, kv_head: u32) -> &PageList {
        &self.lists[(self.layers.list(layer) * self.shape.num_kv_heads + kv_head) as usize]
    }

    /// Whether a list has no tail.
    #[inline]
    pub fn is_closed(&self, layer: u32, kv_head: u32) -> bool {
        self.list_at(layer, kv_head).closed
    }

    /// Pages of a list in the codec: kept ones, then sealed ones of the tail; and its own open ones.
    pub fn list(&self, layer: u32, kv_head: u32) -> (Vec<PageId>, &[PageId]) {
        let list = self.list_at(layer, kv_head);
        let in_codec = list.part(Part::Kept).pages.iter().chain(&list.part(Part::Sealed).pages);
        (in_codec.copied().collect(), &list.part(Part::Open).pages)
    }

    /// Positions of the tokens that a list has in common with that of the layer beside it.
    pub fn merged_positions(&self, layer: u32, kv_head: u32) -> &[u32] {
        let found = self.merged_list(self.layers.list(layer), kv_head);
        found.map_or(&[], |(list, _)| &list.merged_positions)
    }

    /// Pages of these tokens, which the lower layer's list holds.
    pub fn merged_pages(&self, layer: u32, kv_head: u32) -> &[PageId] {
        let found = self.merged_list(self.layers.list(layer), kv_head);
        found.map_or(&[], |(list, _)| &list.part(Part::Merged).pages)
    }

    /// Pages that a list holds by itself between two steps, in order, each with its codec and tokens.
    pub fn held_pages(&self, layer: u32, kv_head: u32) -> Vec<(PageId, HiddenCodec, u32)> {
        let (list, size) = (self.list_at(layer, kv_head), self.shape.page.page_size);
        let pages = |part: Part, codec: HiddenCodec, tokens: u32| {
            let left = (0..).map(move |page| tokens.saturating_sub(page * size).min(size));
            list.part(part).pages.iter().zip(left).filter(|(_, n)| *n > 0).map(move |(id, n)| (*id, codec, n))
        };
        let tail = if list.closed { 0 } else { self.tail };
        let sealed = self.retired * size;
        let kept = pages(Part::Kept, self.shape.codec, list.kept);
        let in_tail = pages(Part::Sealed, self.shape.codec, sealed);
        kept.chain(in_tail).chain(pages(Part::Open, HiddenCodec::F16, tail.saturating_sub(sealed))).collect()
    }

    /// Tokens of a list that an eviction kept.
    pub fn n_kept(&self, layer: u32, kv_head: u32) -> u32 {
        self.list_at(layer, kv_head).kept
    }

    /// Position of a token of a list.
    pub fn position_of(&self, layer: u32, kv_head: u32, index: u32) -> u32 {
        let list = self.list_at(layer, kv_head);
        list.positions.get(index as usize).copied().unwrap_or_else(|| self.tail_start + index - list.kept)
    }

    /// What a list has in common with that of the layer beside it.
    pub fn merged_runs(&self, layer: u32, kv_head: u32) -> impl Iterator<Item = Run> + '_ {
        let own = self.layers.list(layer);
        let found = self.merged_list(own, kv_head);
        let entry = self.merged_with[own as usize].map_or(0, |lower| self.entry_of(lower, kv_head, Part::Merged));
        let (size, codec) = (self.shape.page.page_size, self.shape.codec.for_pairs());
        found.into_iter().flat_map(move |(list, member)| {
            list.part(Part::Merged).clipped(0..u32::MAX).map(move |run| {
                let offset = run.first * size;
                let n_tokens = (run.pages * size).min(list.merged - offset);
                let (arena, entry) = (run.arena, entry + run.first);
                // Items of these are made layer by layer.
                Run { codec, arena, entry, layer_stride: 0, offset, index: offset, position: offset, n_tokens, member }
            })
        })
    }

    /// What an eviction kept of a list.
    #[inline]
    pub fn kept_runs(&self, layer: u32, kv_head: u32) -> impl Iterator<Item = Run> + '_ {
        let entry = self.entry(layer, kv_head, Part::Kept);
        let list = self.list_at(layer, kv_head);
        let (size, layer_stride, kept) = (self.shape.page.page_size, self.layer_stride(), list.kept);
        list.part(Part::Kept).clipped(0..u32::MAX).map(move |run| {
            let offset = run.first * size;
            let n_tokens = (run.pages * size).min(kept - offset);
            let (codec, arena, entry) = (self.shape.codec, run.arena, entry + run.first);
            Run { codec, arena, entry, layer_stride, offset, index: offset, position: offset, n_tokens, member: 0 }
        })
    }

    /// Tokens of pages of the tail as a run.
    #[inline]
    fn tail_run(&self, codec: HiddenCodec, arena: u16, entry: u32, pages: Range<u32>, kept: u32) -> Run {
        let size = self.shape.page.page_size;
        let offset = pages.start * size;
        let n_tokens = (pages.end * size).min(self.tail) - offset;
        let (index, position) = (kept + offset, self.tail_start + offset);
        let layer_stride = if arena == PageId::WINDOW { 0 } else { self.layer_stride() };
        Run { codec, arena, entry, layer_stride, offset, index, position, n_tokens, member: 0 }
    }

    /// Pages of the tail in their codec.
    #[inline]
    pub fn sealed_runs(&self, layer: u32, kv_head: u32, pages: Range<u32>) -> impl Iterator<Item = Run> + '_ {
        let entry = self.entry(layer, kv_head, Part::Sealed);
        let list = self.list_at(layer, kv_head);
        let (codec, kept) = (self.shape.codec, list.kept);
        list.part(Part::Sealed)
            .clipped(pages)
            .map(move |run| self.tail_run(codec, run.arena, entry + run.first, run.first..run.first + run.pages, kept))
    }

    /// Open pages of the tail: a list's own, then those in the window.
    #[inline]
    pub fn open_runs(&self, layer: u32, kv_head: u32, pages: Range<u32>) -> impl Iterator<Item = Run> + '_ {
        let (codec, retired) = (HiddenCodec::F16, self.retired);
        let pages = pages.start - retired..pages.end - retired;
        let first_open = self.entry(layer, kv_head, Part::Open);
        let list = self.list_at(layer, kv_head);
        let (own, kept) = (list.part(Part::Open), list.kept);
        let n_own = own.len();
        let (slot, slots) = self.window;
        let passing = pages.start.max(n_own)..pages.end;
        let window = (!passing.is_empty()).then(|| {
            let entry = kv_head * slots + slot + passing.start - n_own;
            self.tail_run(codec, PageId::WINDOW, entry, retired + passing.start..retired + passing.end, kept)
        });
        let own = own.clipped(pages.start..pages.end.min(n_own)).map(move |run| {
            let pages = retired + run.first..retired + run.first + run.pages;
            self.tail_run(codec, run.arena, first_open + run.first, pages, kept)
        });
        own.chain(window)
    }

    /// Passes to `f` what a row reads, by its place in the tail: what is in common with another list, what was kept, every
    /// sealed page before its own, then the others up to itself. Of a closed list there is no tail.
    ///
    /// Not an iterator: four that are joined are half of what a plan of many lists costs.
    pub fn each_seen(&self, layer: u32, kv_head: u32, place: u32, mut f: impl FnMut(Run)) {
        if self.merged_with[self.layers.list(layer) as usize].is_some() {
            self.merged_runs(layer, kv_head).for_each(&mut f);
        }
        self.kept_runs(layer, kv_head).for_each(&mut f);
        if self.is_closed(layer, kv_head) {
            return;
        }
        let page = place / self.shape.page.page_size;
        let sealed = self.sealed.min(page);
        let mut seen = |run: Run| f(Run { n_tokens: run.n_tokens.min(place + 1 - run.offset), ..run });
        self.sealed_runs(layer, kv_head, 0..sealed).for_each(&mut seen);
        self.open_runs(layer, kv_head, sealed..page + 1).for_each(&mut seen);
    }

    /// What [`Self::each_seen`] passes on.
    pub fn seen_runs(&self, layer: u32, kv_head: u32, place: u32) -> Vec<Run> {
        let mut runs = Vec::new();
        self.each_seen(layer, kv_head, place, |run| runs.push(run));
        runs
    }

    /// Everything that a list holds by itself between two steps, in order.
    pub fn held_runs(&self, layer: u32, kv_head: u32) -> impl Iterator<Item = Run> + '_ {
        let all = self.tail.div_ceil(self.shape.page.page_size).max(self.retired);
        let (sealed, open) = if self.is_closed(layer, kv_head) {
            (0..0, self.retired..self.retired)
        } else {
            (0..self.retired, self.retired..all)
        };
        let tail = self.sealed_runs(layer, kv_head, sealed).chain(self.open_runs(layer, kv_head, open));
        self.kept_runs(layer, kv_head).chain(tail)
    }

    /// Pages of each list's tail that this step fills.
    pub fn filled_pages(&self) -> Range<u32> {
        self.filled.clone()
    }

    /// Where the bounds of a full page lie: arena, table entry, entries between layers, and which token they are.
    pub fn bounds_of(&self, layer: u32, kv_head: u32, page: u32) -> (u16, u32, u32, u32) {
        let size = self.shape.page.page_size;
        let pages = self.list_at(layer, kv_head).part(Part::Bounds);
        let entry = self.entry(layer, kv_head, Part::Bounds) + page / size;
        (pages.pages[(page / size) as usize].arena, entry, self.layer_stride(), page % size)
    }

    /// First table entry of what a decode row chooses of a KV head, and how many there are.
    pub fn chosen(&self, kv_head: u32) -> (u32, u32) {
        let of_head = self.shape.quest.map_or(0, |quest| quest.pages + CHOSEN_SPARE);
        (self.region + self.shape.num_lists() * self.list_capacity() + kv_head * of_head, of_head)
    }

    /// Full pages that a row reads before its own, by its place in the tail, where it may choose among them.
    pub fn full_runs(&self, layer: u32, kv_head: u32, place: u32) -> Vec<Run> {
        let page = place / self.shape.page.page_size;
        let sealed = self.sealed.min(page);
        self.sealed_runs(layer, kv_head, 0..sealed).chain(self.open_runs(layer, kv_head, sealed..page)).collect()
    }

    /// The page of a row, up to itself.
    pub fn own_run(&self, layer: u32, kv_head: u32, place: u32) -> impl Iterator<Item = Run> + '_ {
        let page = place / self.shape.page.page_size;
        let runs = self.open_runs(layer, kv_head, page..page + 1);
        runs.map(move |run| Run { n_tokens: run.n_tokens.min(place + 1 - run.offset), ..run })
    }

    /// Whether two layers that follow each other can share work lists: their lists follow each other, are equally long, and are
    /// spread over arenas alike, `b` in the one that takes the place of `a`'s. `arenas` learns which that are.
    pub fn alike(&self, a: u32, b: u32, arenas: &mut ArenaMap) -> bool {
        self.layers.owns(a)
            && self.layers.owns(b)
            && self.layers.list(a) + 1 == self.layers.list(b)
            && [a, b].iter().all(|layer| self.merged_with[self.layers.list(*layer) as usize].is_none())
            && (0..self.shape.num_kv_heads).all(|head| {
                let (a, b) = (self.list_at(a, head), self.list_at(b, head));
                (a.kept, a.closed) == (b.kept, b.closed)
                    && a.parts.iter().zip(&b.parts).all(|(a, b)| arenas.takes(&a.runs, &b.runs))
            })
    }

    /// Whether the device's copy of the region is out of date.
    pub const fn is_dirty(&self) -> bool {
        self.dirty
    }

    /// Appends the region's entries to `out`, unused ones as zero, and marks it as uploaded; its first entry.
    pub fn write_region(&mut self, out: &mut Vec<u32>) -> u32 {
        for list in &self.lists {
            for (part, capacity) in list.parts.iter().zip(self.capacity) {
                let start = out.len();
                out.extend(part.pages.iter().map(|page| page.cell));
                out.resize(start + capacity as usize, 0);
            }
        }
        self.dirty = false;
        self.region
    }
}
