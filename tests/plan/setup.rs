//! Sequences in the middle of a session, their page tables, and what the device's table buffer would hold.

use std::collections::BTreeMap;
use std::ops::Range;

use concertina::compression::hidden::HiddenCodec;
use concertina::geometry::{Bytes, HeadGeometry, PageGeometry};
use concertina::kernels::attention::CacheShape;
use concertina::kernels::plan::{ScoredRows, Segment};
use concertina::pool::page_table::{Capacity, Layers, PageTable, TableRanges, TableShape, Window};
use concertina::pool::{PagePool, PoolLayout};
use proptest::prelude::*;

pub(crate) const LAYERS: u32 = 4;
pub(crate) const KV_HEADS: u32 = 2;
/// Scores of a list.
pub(crate) const CAPACITY: u32 = 4096;

/// What an eviction left of a document.
#[derive(Clone, Debug)]
pub(crate) struct Evicted {
    /// Positions of each list; `None` where it is closed.
    pub(crate) kept: Vec<Option<Vec<u32>>>,
    /// Tokens of the document.
    pub(crate) n_tokens: u32,
}

/// One sequence: what an eviction left it, tokens cached since, and new rows.
#[derive(Clone, Debug)]
pub(crate) struct Sequence {
    pub(crate) codec: HiddenCodec,
    /// Of each layer, whose cache it reads.
    pub(crate) owners: Vec<u32>,
    pub(crate) evicted: Option<Evicted>,
    /// Tokens of the tail before the step.
    pub(crate) cached: u32,
    pub(crate) rows: u32,
    pub(crate) decode: bool,
    pub(crate) attend: bool,
    /// First row that is scored, and whether the largest counts.
    pub(crate) scores: Vec<(u32, bool)>,
}

impl Sequence {
    /// Nothing evicted, shared or scored.
    pub(crate) fn full(cached: u32, rows: u32, decode: bool) -> Self {
        let (codec, owners, evicted, scores) = (HiddenCodec::F16, (0..LAYERS).collect(), None, Vec::new());
        Self { codec, owners, evicted, cached, rows, decode, attend: true, scores }
    }

    pub(crate) fn own_layers(&self) -> Vec<u32> {
        (0..LAYERS).filter(|layer| self.owns(*layer)).collect()
    }

    pub(crate) fn owns(&self, layer: u32) -> bool {
        self.owners[layer as usize] == layer
    }

    /// The list that a layer's head reads.
    pub(crate) fn list(&self, layer: u32, head: u32) -> u32 {
        let owner = self.owners[layer as usize];
        let at = self.own_layers().iter().position(|own| *own == owner).expect("an owner owns its cache");
        u32::try_from(at).expect("few layers") * KV_HEADS + head
    }

    /// Kept positions of what a layer's head reads; `None` where the list is closed.
    pub(crate) fn kept(&self, layer: u32, head: u32) -> Option<&[u32]> {
        let Some(evicted) = &self.evicted else { return Some(&[]) };
        evicted.kept[self.list(layer, head) as usize].as_deref()
    }

    pub(crate) fn n_kept(&self, layer: u32, head: u32) -> u32 {
        self.kept(layer, head).map_or(0, |kept| u32::try_from(kept.len()).expect("few tokens"))
    }

    /// Position of the tail's first token.
    pub(crate) fn start(&self) -> u32 {
        self.evicted.as_ref().map_or(0, |evicted| evicted.n_tokens)
    }

    /// Tokens of a list that the row at `place` of the tail reads.
    pub(crate) fn seen(&self, layer: u32, head: u32, place: u32) -> u32 {
        self.n_kept(layer, head) + if self.kept(layer, head).is_some() { place + 1 } else { 0 }
    }

    /// Pages of each list's tail whose open form was gone before the step, and those that are sealed after it.
    pub(crate) fn sealed(&self, page_size: u32) -> Range<u32> {
        if self.codec.seals() { self.cached / page_size..(self.cached + self.rows) / page_size } else { 0..0 }
    }

    /// Whether a layer reads another's rows after a third has filled the window with its own.
    pub(crate) fn interleaves(&self) -> bool {
        (0..LAYERS).any(|layer| {
            let last = (0..=layer).rev().find(|before| self.owns(*before));
            last != Some(self.owners[layer as usize])
        })
    }

    /// The first raw score of one of its scores, in the place of the sequence.
    pub(crate) fn scores_at(sequence: usize, score: usize) -> u32 {
        u32::try_from(sequence * 2 + score).expect("few") * LAYERS * KV_HEADS * CAPACITY
    }
}

pub(crate) fn codecs(page_size: u32) -> Vec<HiddenCodec> {
    let page = PageGeometry { page_size, head_dim: 64 };
    let all = ["f16", "rot3", "kivi4", "lowrank:48"].map(|text| text.parse::<HiddenCodec>().expect("a codec"));
    all.into_iter().filter(|codec| codec.check(page).is_ok()).collect()
}

/// Every layer its own, or some map.
fn owners() -> impl Strategy<Value = Vec<u32>> {
    let maps = [vec![0, 0, 2, 2], vec![0, 0, 0, 0], vec![0, 1, 1, 3], vec![0, 1, 0, 1]];
    prop_oneof![2 => Just((0..LAYERS).collect()), 1 => prop::sample::select(maps.to_vec())]
}

/// What is left of a document: in each list something else, in each layer the same, or everywhere as much.
fn evicted(own: usize) -> impl Strategy<Value = Option<Evicted>> {
    (100_u32..900).prop_flat_map(move |n_tokens| {
        let all: Vec<u32> = (0..n_tokens).collect();
        let some = prop::sample::subsequence(all, 0..=n_tokens as usize).prop_map(Some);
        let list = prop_oneof![5 => some, 1 => Just(None)];
        let layer = prop::collection::vec(list, KV_HEADS as usize);
        let lists = prop_oneof![
            prop::collection::vec(layer.clone(), own).prop_map(|layers| layers.concat()),
            layer.prop_map(move |layer| vec![layer; own].concat()),
        ];
        prop_oneof![1 => Just(None), 1 => lists.prop_map(move |kept| Some(Evicted { kept, n_tokens }))]
    })
}

pub(crate) fn sequences(page_size: u32) -> impl Strategy<Value = Vec<Sequence>> {
    let one = owners().prop_flat_map(move |owners| {
        let own = (0_u32..).zip(&owners).filter(|(layer, owner)| *layer == **owner).count();
        let scores = prop::collection::vec((0_u32..90, any::<bool>()), 0..3);
        let attend = prop::bool::weighted(0.9);
        let rows = (0_u32..1200, 1_u32..90, any::<bool>());
        (prop::sample::select(codecs(page_size)), Just(owners), evicted(own), rows, attend, scores).prop_map(
            |(codec, owners, evicted, (cached, rows, decode), attend, scores)| {
                let rows = if decode { 1 } else { rows };
                Sequence { codec, owners, evicted, cached, rows, decode, attend: attend || decode, scores }
            },
        )
    });
    proptest::collection::vec(one, 1..5)
}

/// The part of a list that a page belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Kept,
    Sealed,
    Open,
}

/// What a page is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) sequence: usize,
    /// The layer that owns the list.
    pub(crate) layer: u32,
    pub(crate) head: u32,
    pub(crate) part: Part,
    /// Counted in the kept part, or in the tail.
    pub(crate) page: u32,
}

pub(crate) struct Setup {
    pub(crate) shape: CacheShape,
    /// Rows that were cut are left out.
    pub(crate) sequences: Vec<Sequence>,
    pub(crate) tables: Vec<PageTable>,
    /// What the device's table buffer holds.
    pub(crate) buffer: Vec<u32>,
    /// The window's slots.
    pub(crate) slots: u32,
    /// Pages by arena and cell.
    pub(crate) owners: BTreeMap<(u16, u32), Owner>,
}

fn capacity(s: &Sequence, page_size: u32) -> Capacity {
    let pages = |kept: &Option<Vec<u32>>| {
        let n = kept.as_ref().map_or(0, Vec::len).div_ceil(page_size as usize);
        u32::try_from(n).expect("few pages")
    };
    let lists = s.evicted.iter().flat_map(|evicted| &evicted.kept);
    let (kept_pages, kept_pages_of_list) = (lists.clone().map(pages).sum(), lists.map(pages).max().unwrap_or(0));
    Capacity { tail_tokens: s.cached + s.rows, kept_pages, kept_pages_of_list }
}

/// Grows the sequences in turns, so that with small arenas their pages interleave, then for the step to be planned.
pub(crate) fn setup(sequences: &[Sequence], group: u32, page_size: u32, arena_slabs: u64) -> Setup {
    let heads = HeadGeometry { num_qo_heads: KV_HEADS * group, num_kv_heads: KV_HEADS, head_dim: 64 };
    let shape = CacheShape { heads, page_size };
    let table_shape = |s: &Sequence| {
        let num_layers = u32::try_from(s.own_layers().len()).expect("few layers");
        TableShape { num_layers, num_kv_heads: KV_HEADS, page: shape.page(), codec: s.codec }
    };
    let mut sequences = sequences.to_vec();
    for s in &mut sequences {
        s.rows = table_shape(s).cut(s.cached, s.rows);
        if s.codec.seals() && s.interleaves() {
            s.rows = s.rows.min(page_size - s.cached % page_size);
        }
    }
    let page = HiddenCodec::F16.page_bytes(shape.page());
    let smallest = codecs(page_size).iter().map(|codec| codec.page_bytes(shape.page())).min().expect("some codec");
    let slab = Bytes(page.0 * 16);
    let filling = Window::new(shape.page(), KV_HEADS, 40, true);
    // As tight as the engine's: whole pages of all rows together.
    let mut window = Window::new(shape.page(), KV_HEADS, sequences.iter().map(|s| s.rows).sum(), true);
    let layout = PoolLayout {
        budget: Bytes::mib(48),
        staging: Bytes::ZERO,
        scratch: Bytes::ZERO,
        max_binding: Bytes(slab.0 * arena_slabs),
        slab,
        smallest_page: smallest,
        fixed_entries: window.entries(),
    };
    let mut pool = PagePool::new(&layout).expect("48 MiB hold slabs");
    let mut ranges = TableRanges::new(u32::try_from(pool.tables().0 / 4).expect("32 bits"));
    if window.entries() > 0 {
        assert_eq!(ranges.reserve(window.entries()), Some(0), "the window's entries come first");
    }
    let mut admit = |s: &Sequence| {
        let layers = Layers::new(&s.owners);
        PageTable::admit(&mut pool, &mut ranges, table_shape(s), &layers, capacity(s, page_size)).expect("all fit")
    };
    let mut tables: Vec<_> = sequences.iter().map(&mut admit).collect();
    for (s, table) in sequences.iter().zip(&mut tables) {
        if let Some(evicted) = &s.evicted {
            table.keep(&mut pool, evicted.kept.clone(), evicted.n_tokens).expect("committed");
        }
    }
    let mut left: Vec<u32> = sequences.iter().map(|s| s.cached).collect();
    while left.iter().any(|n| *n > 0) {
        for (table, left) in tables.iter_mut().zip(&mut left) {
            let n = table.cut((*left).min(40));
            table.grow(&mut pool, &mut filling.clone(), n).expect("committed");
            table.retire();
            *left -= n;
        }
    }
    window.clear();
    for (s, table) in sequences.iter().zip(&mut tables) {
        assert_eq!(table.cut(s.rows), s.rows, "what a step may hold");
        table.grow(&mut pool, &mut window, s.rows).expect("committed");
    }
    let slots = window.entries() / KV_HEADS;
    let mut buffer = window.write_entries();
    for table in &mut tables {
        let mut entries = Vec::new();
        let region = table.write_region(&mut entries) as usize;
        buffer.resize(buffer.len().max(region + entries.len()), 0);
        buffer[region..region + entries.len()].copy_from_slice(&entries);
    }
    let owners = owners_of_pages(&sequences, &tables, page_size);
    Setup { shape, sequences, tables, buffer, slots, owners }
}

fn owners_of_pages(sequences: &[Sequence], tables: &[PageTable], page_size: u32) -> BTreeMap<(u16, u32), Owner> {
    let mut owners = BTreeMap::new();
    for (sequence, (s, table)) in sequences.iter().zip(tables).enumerate() {
        let sealed = s.sealed(page_size);
        let all = (s.cached + s.rows).div_ceil(page_size);
        let lists = s.own_layers().into_iter().flat_map(|layer| (0..KV_HEADS).map(move |head| (layer, head)));
        for (layer, head) in lists {
            let (in_codec, open) = table.list(layer, head);
            let kept = s.n_kept(layer, head).div_ceil(page_size);
            let of_tail = if s.kept(layer, head).is_some() { sealed.end } else { 0 };
            assert_eq!(in_codec.len(), (kept + of_tail) as usize, "a page for all that stayed and for all sealed ones");
            let most = if s.codec.seals() { 1 } else { usize::MAX };
            assert!(open.len() <= most, "a list whose pages are sealed as they fill holds one open page");
            let codes = (0..kept).map(|page| (Part::Kept, page)).chain((0..of_tail).map(|page| (Part::Sealed, page)));
            let own = (sealed.start..all.max(sealed.start + 1)).map(|page| (Part::Open, page));
            for ((part, page), id) in codes.zip(in_codec).chain(own.zip(open.iter().copied())) {
                let owner = Owner { sequence, layer, head, part, page };
                assert!(owners.insert((id.arena, id.cell), owner).is_none(), "a page is in one list");
            }
        }
    }
    owners
}

pub(crate) fn segments(setup: &Setup) -> Vec<Segment<'_>> {
    let mut row_lo = 0;
    let mut segments = Vec::new();
    for (at, (s, table)) in setup.sequences.iter().zip(&setup.tables).enumerate() {
        let (n_rows, first_index) = (s.rows, s.start() + s.cached);
        let score = |(i, (first, largest)): (usize, &(u32, bool))| {
            let (at, capacity) = (Sequence::scores_at(at, i), CAPACITY);
            ScoredRows { first: *first, at, capacity, largest: *largest }
        };
        let scores = s.scores.iter().enumerate().map(score).collect();
        segments.push(Segment { table, row_lo, n_rows, first_index, decode: s.decode, attend: s.attend, scores });
        row_lo += n_rows;
    }
    segments
}
