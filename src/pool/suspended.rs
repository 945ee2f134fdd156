//! Page tables whose pages are elsewhere: in host memory, or in a file.
//!
//! Suspending a table returns its pages, commitments and table entries and keeps everything else: which tokens each list
//! holds, where its tail begins, how much of it is sealed. Resuming takes as many pages and commitments again, so that a
//! session that comes back has exactly the room that it had; the bytes move between the two, page by page, in the order of
//! [`PageTable::page_ids`].

use super::page_table::{Capacity, Layers, PARTS, PageList, PageTable, Part, TableRanges, TableShape};
use super::{PageId, PagePool, PoolError};
use crate::geometry::Bytes;

/// Which tokens a table holds: all that is needed to make it again, for a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableRecord {
    /// Tokens that the session had seen when it was last evicted from.
    pub tail_start: u32,
    /// Tokens appended since.
    pub tail: u32,
    /// What stayed, `[layer][KV head]`.
    pub lists: Vec<ListRecord>,
    /// Neighbouring layers of lists that have tokens in common.
    pub pairs: Vec<(u32, u32)>,
}

/// What stayed in one list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListRecord {
    /// Positions of its own tokens.
    pub kept: Vec<u32>,
    /// Positions of tokens that it has in common with the list of the next layer.
    pub merged: Vec<u32>,
    /// Whether it takes no more tokens.
    pub closed: bool,
}

impl TableRecord {
    /// A table of so many lists without tokens.
    pub fn empty(shape: &TableShape) -> Self {
        Self { lists: vec![ListRecord::default(); shape.num_lists() as usize], ..Self::default() }
    }

    /// Pages for exactly what stayed, and room for `tail_tokens` more behind it.
    pub fn capacity(&self, shape: &TableShape, tail_tokens: u32) -> Capacity {
        let pages = |tokens: &[u32]| pages_of(tokens, shape);
        let (kept, merged) = (self.lists.iter().map(|l| pages(&l.kept)), self.lists.iter().map(|l| pages(&l.merged)));
        Capacity {
            tail_tokens,
            kept_pages: kept.clone().sum(),
            kept_pages_of_list: kept.max().unwrap_or(0),
            merged_pages: merged.clone().sum(),
            merged_pages_of_list: merged.max().unwrap_or(0),
            turns: false,
        }
    }

    fn check(&self, shape: &TableShape, admitted: &Capacity) -> Result<(), String> {
        let (found, lists) = (self.lists.len(), shape.num_lists());
        if found != lists as usize {
            return Err(format!("{found} lists where the model's cache has {lists}"));
        }
        if self.tail > admitted.tail_tokens || self.tail_start.checked_add(self.tail).is_none() {
            let room = admitted.tail_tokens;
            return Err(format!("a tail of {} tokens from {} on, with room for {room}", self.tail, self.tail_start));
        }
        let rises = |tokens: &[u32]| {
            tokens.windows(2).all(|w| w[0] < w[1]) && tokens.last().is_none_or(|last| *last < self.tail_start)
        };
        for (at, list) in self.lists.iter().enumerate() {
            if !rises(&list.kept) || !rises(&list.merged) {
                return Err(format!("list {at} keeps positions that do not rise below {}", self.tail_start));
            }
            if list.closed && !list.kept.is_empty() {
                return Err(format!("list {at} is closed and keeps {} tokens", list.kept.len()));
            }
        }
        let needed = self.capacity(shape, self.tail);
        if needed.kept_pages > admitted.kept_pages || needed.kept_pages_of_list > admitted.kept_pages_of_list {
            return Err(format!("{} pages stayed, with room for {}", needed.kept_pages, admitted.kept_pages));
        }
        if needed.merged_pages > admitted.merged_pages || needed.merged_pages_of_list > admitted.merged_pages_of_list {
            return Err(format!("{} merged pages, with room for {}", needed.merged_pages, admitted.merged_pages));
        }
        let mut paired = vec![false; shape.num_layers as usize];
        for (lower, upper) in &self.pairs {
            let free = |layer: u32| paired.get(layer as usize) == Some(&false);
            if lower >= upper || !free(*lower) || !free(*upper) {
                return Err(format!("layers {lower} and {upper} can not have tokens in common"));
            }
            paired[*lower as usize] = true;
            paired[*upper as usize] = true;
        }
        let heads = shape.num_kv_heads as usize;
        let lower = |at: usize| self.pairs.iter().any(|(lower, _)| *lower as usize == at / heads);
        match self.lists.iter().enumerate().position(|(at, list)| !list.merged.is_empty() && !lower(at)) {
            Some(at) => Err(format!("list {at} has tokens in common with nobody")),
            None => Ok(()),
        }
    }
}

fn pages_of(tokens: &[u32], shape: &TableShape) -> u32 {
    u32::try_from(tokens.len().div_ceil(shape.page.page_size as usize)).unwrap_or(u32::MAX)
}

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

    /// Pages that it had.
    pub fn n_pages(&self) -> u32 {
        self.pages.iter().flatten().sum()
    }

    /// Its shape.
    pub const fn shape(&self) -> &TableShape {
        &self.table.shape
    }

    /// Which tokens it holds.
    pub fn record(&self) -> TableRecord {
        let table = &self.table;
        let list = |list: &PageList| ListRecord {
            kept: list.positions.clone(),
            merged: list.merged_positions.clone(),
            closed: list.closed,
        };
        let upper = |(layer, lower): (u32, &Option<u32>)| lower.filter(|lower| *lower != layer).map(|l| (l, layer));
        TableRecord {
            tail_start: table.tail_start,
            tail: table.tail,
            lists: table.lists.iter().map(list).collect(),
            pairs: (0..).zip(&table.merged_with).filter_map(upper).collect(),
        }
    }

    /// The table of a record, with room for what `admitted` says.
    ///
    /// # Errors
    /// A sentence when the record can not be of such a table.
    pub fn restore(
        shape: TableShape,
        layers: &Layers,
        record: TableRecord,
        admitted: Capacity,
    ) -> Result<Self, String> {
        record.check(&shape, &admitted)?;
        let size = shape.page.page_size;
        let mut table = PageTable::empty(shape, layers, admitted);
        let TableRecord { tail_start, tail, lists, pairs } = record;
        (table.tail_start, table.tail) = (tail_start, tail);
        table.sealed = if shape.codec.seals() { tail / size } else { 0 };
        table.retired = table.sealed;
        let open = if shape.codec.seals() { tail.min(1) } else { tail.div_ceil(size) };
        let tail_pages = [0, 0, table.sealed, open, shape.bounds_of_list(tail)];
        let [_, _, sealed_room, open_room, bounds_room] = table.capacity;
        let still_open = lists.iter().filter(|list| !list.closed).count();
        let still_open = u32::try_from(still_open).expect("lists are counted in 32 bits");
        // What stayed of each list is committed no more; nor are tails of closed lists.
        let open_pages = still_open.saturating_mul(open_room.saturating_add(bounds_room));
        let in_codec = still_open.saturating_mul(sealed_room).saturating_add(admitted.kept_pages);
        table.committed = [open_pages, in_codec, 0];
        let mut pages = Vec::with_capacity(lists.len());
        for (list, ListRecord { kept, merged, closed }) in table.lists.iter_mut().zip(lists) {
            let mut held = if closed { [0; PARTS.len()] } else { tail_pages };
            held[Part::Kept as usize] = pages_of(&kept, &shape);
            held[Part::Merged as usize] = pages_of(&merged, &shape);
            table.committed[2] += held[Part::Merged as usize];
            list.kept = u32::try_from(kept.len()).expect("positions are counted in 32 bits");
            list.merged = u32::try_from(merged.len()).expect("positions are counted in 32 bits");
            (list.positions, list.merged_positions, list.closed) = (kept, merged, closed);
            pages.push(held);
        }
        for (lower, upper) in pairs {
            table.merged_with[lower as usize] = Some(lower);
            table.merged_with[upper as usize] = Some(lower);
        }
        Ok(Self { table, pages })
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
