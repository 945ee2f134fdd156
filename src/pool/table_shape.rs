//! What a session's page table needs: how many pages of which size, and the window that prompt rows pass through while their
//! pages are sealed.

use crate::compression::hidden::HiddenCodec;
use crate::geometry::{Bytes, CELL_BYTES, PageGeometry};

/// The shape of a session's page table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableShape {
    /// Layers that own a cache.
    pub num_layers: u32,
    /// KV heads.
    pub num_kv_heads: u32,
    /// A page of one (layer, KV head).
    pub page: PageGeometry,
    /// How full pages become bytes.
    pub codec: HiddenCodec,
    /// What a decode row reads of a list, where it does not read all.
    pub quest: Option<Quest>,
}

/// Decode rows read a few pages of each list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quest {
    /// Full pages read of a list, besides the one that is open.
    pub pages: u32,
    /// First layers that read everything.
    pub dense_layers: u32,
}

impl TableShape {
    /// Lists of pages.
    pub const fn num_lists(&self) -> u32 {
        self.num_layers * self.num_kv_heads
    }

    /// Bytes of an open page.
    pub fn open_page(&self) -> Bytes {
        HiddenCodec::F16.page_bytes(self.page)
    }

    /// Bytes of a sealed page.
    pub fn sealed_page(&self) -> Bytes {
        self.codec.page_bytes(self.page)
    }

    /// Bytes of a page of what two layers have in common.
    pub fn merged_page(&self) -> Bytes {
        self.codec.for_pairs().page_bytes(self.page)
    }

    /// Open and sealed pages that one list of `n_tokens` tokens needs at most, none of them evicted.
    pub fn pages_of_list(&self, n_tokens: u32) -> (u32, u32) {
        let (all, full) = (n_tokens.div_ceil(self.page.page_size), n_tokens / self.page.page_size);
        if self.codec.seals() { (all.min(1), full) } else { (all, 0) }
    }

    /// Pages of bounds that one list of `n_tokens` tokens needs: each holds those of `page_size` pages.
    pub fn bounds_of_list(&self, n_tokens: u32) -> u32 {
        let size = self.page.page_size;
        if self.quest.is_some() { (n_tokens / size).div_ceil(size) } else { 0 }
    }

    /// Bytes that a session of `n_tokens` tokens needs over all lists at most.
    pub fn bytes_for(&self, n_tokens: u32) -> Bytes {
        let (open, sealed) = self.pages_of_list(n_tokens);
        let open = open + self.bounds_of_list(n_tokens);
        let list = u64::from(open) * self.open_page().0 + u64::from(sealed) * self.sealed_page().0;
        Bytes(u64::from(self.num_lists()) * list)
    }

    /// How many of `n` rows after a tail of `tail` tokens a step may hold: rows that leave the page that is open end on an
    /// edge where pages are sealed.
    pub fn cut(&self, tail: u32, n: u32) -> u32 {
        let size = self.page.page_size;
        let end = tail + n;
        if !self.codec.seals() || end.is_multiple_of(size) || end / size == tail / size {
            return n;
        }
        end / size * size - tail
    }

    /// Pages of the window that `n` rows after a tail of `tail` tokens pass through.
    pub(super) fn window_pages(&self, tail: u32, n: u32) -> u32 {
        let size = self.page.page_size;
        if n == 0 || !self.codec.seals() { 0 } else { (tail + n - 1) / size - tail / size }
    }
}

/// How many tokens and pages a table is admitted for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    /// Tokens appended, at most.
    pub tail_tokens: u32,
    /// Pages of tokens that an eviction kept, over all lists.
    pub kept_pages: u32,
    /// The most of them in one list.
    pub kept_pages_of_list: u32,
    /// Pages of what two layers have in common, over all lists.
    pub merged_pages: u32,
    /// The most of them in one list.
    pub merged_pages_of_list: u32,
    /// Whether evictions go on, in tables that take turns: then what a table returns is committed again at once. So each of its
    /// pages that another table names too is backed by a commitment, which returns with whoever lets go of the page first.
    pub turns: bool,
}

impl Capacity {
    /// Room for appended tokens alone.
    pub const fn tokens(tail_tokens: u32) -> Self {
        Self {
            tail_tokens,
            kept_pages: 0,
            kept_pages_of_list: 0,
            merged_pages: 0,
            merged_pages_of_list: 0,
            turns: false,
        }
    }
}

/// f16 pages that a step's prompt rows pass through, `[KV head][slot]`, in a buffer of their own, with fixed entries at the
/// start of the table buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    slots: u32,
    num_kv_heads: u32,
    page: Bytes,
    used: u32,
}

impl Window {
    /// A window for steps of at most `max_rows` rows; without slots where no page is ever sealed.
    pub fn new(page: PageGeometry, num_kv_heads: u32, max_rows: u32, seals: bool) -> Self {
        let slots = if seals { (max_rows / page.page_size).max(2) } else { 0 };
        Self { slots, num_kv_heads, page: HiddenCodec::F16.page_bytes(page), used: 0 }
    }

    /// Bytes of its pages.
    pub fn bytes(&self) -> Bytes {
        Bytes(u64::from(self.entries()) * self.page.0)
    }

    /// Its entries in the table buffer, from entry 0 on.
    pub const fn entries(&self) -> u32 {
        self.slots * self.num_kv_heads
    }

    /// What these entries hold.
    pub fn write_entries(&self) -> Vec<u32> {
        let cells = u32::try_from(self.page.0 / CELL_BYTES).expect("a page is counted in 32 bits");
        (0..self.entries()).map(|i| i * cells).collect()
    }

    /// Begins a step: everything is free.
    pub const fn clear(&mut self) {
        self.used = 0;
    }

    /// Slots for each KV head.
    pub const fn slots(&self) -> u32 {
        self.slots
    }

    /// Takes slots for some pages; the first of them.
    pub(super) fn take(&mut self, pages: u32) -> Option<u32> {
        let first = self.used;
        self.used = first.checked_add(pages).filter(|used| *used <= self.slots)?;
        Some(first)
    }
}
