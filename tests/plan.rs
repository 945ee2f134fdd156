//! The attention plan, without a device: every row sees every token that it may see exactly once and in the form that
//! it should have, every state is written once and merged once, every new token is appended once, every page that is
//! sealed is sealed once.
//!
//! The check knows pages by what the table buffer would hold, as a shader does: an item's entry gives a cell, and the
//! cell in the dispatch's arena is the page of some sequence, or a slot of the window.

use std::collections::BTreeMap;
use std::ops::Range;

use concertina::compression::hidden::{HiddenCodec, Transform};
use concertina::geometry::{Bytes, HeadGeometry, PageGeometry};
use concertina::kernels::attention::CacheShape;
use concertina::kernels::decode::DecodeSpec;
use concertina::kernels::plan::{AttentionPlan, Dispatch, Place, Segment};
use concertina::kernels::prefill::PrefillSpec;
use concertina::pool::page_table::{PageTable, Sealing, TableRanges, TableShape, Window};
use concertina::pool::{PageId, PagePool, PoolLayout};
use proptest::prelude::*;

const LAYERS: u32 = 3;
const KV_HEADS: u32 = 2;

/// One sequence: tokens cached before, new rows, and how its pages are sealed.
#[derive(Clone, Debug)]
struct Sequence {
    codec: HiddenCodec,
    sealing: Sealing,
    cached: u32,
    /// None where only pages are sealed.
    rows: u32,
    decode: bool,
    /// On request only: full pages per list that were sealed before this step, and that this step seals.
    requested: (u32, u32),
}

impl Sequence {
    const fn full(cached: u32, rows: u32, decode: bool) -> Self {
        Self { codec: HiddenCodec::F16, sealing: Sealing::WhenFull, cached, rows, decode, requested: (0, 0) }
    }

    /// Pages of each list whose open form was gone before the step, and those that are sealed after it.
    fn sealed(&self, page_size: u32) -> Range<u32> {
        match self.sealing {
            _ if !self.codec.seals() => 0..0,
            Sealing::WhenFull => self.cached / page_size..(self.cached + self.rows) / page_size,
            Sealing::OnRequest => {
                let before = self.requested.0.min(self.cached / page_size);
                before..((self.cached + self.rows) / page_size).min(before + self.requested.1)
            }
        }
    }
}

fn codecs(page_size: u32) -> Vec<HiddenCodec> {
    let page = PageGeometry { page_size, head_dim: 64 };
    let all = ["f16", "rot3", "kivi4", "lowrank:48"].map(|text| text.parse::<HiddenCodec>().expect("a codec"));
    all.into_iter().filter(|codec| codec.check(page).is_ok()).collect()
}

fn sequences(page_size: u32) -> impl Strategy<Value = Vec<Sequence>> {
    let codec = prop::sample::select(codecs(page_size));
    let sealing = prop_oneof![3 => Just(Sealing::WhenFull), 1 => Just(Sealing::OnRequest)];
    let one = (codec, sealing, 0_u32..1200, 0_u32..90, any::<bool>(), (0_u32..30, 0_u32..4));
    let one = one.prop_map(|(codec, sealing, cached, rows, decode, requested)| {
        // Only a session that seals on request has steps without rows.
        let least = u32::from(sealing == Sealing::WhenFull);
        let rows = if decode { 1 } else { rows.max(least) };
        Sequence { codec, sealing, cached, rows, decode, requested }
    });
    proptest::collection::vec(one, 1..5)
}

/// What a page is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Owner {
    sequence: usize,
    layer: u32,
    head: u32,
    page: u32,
    sealed: bool,
}

struct Setup {
    shape: CacheShape,
    /// Rows that were cut are left out.
    sequences: Vec<Sequence>,
    tables: Vec<PageTable>,
    /// What the device's table buffer holds.
    buffer: Vec<u32>,
    /// The window's slots.
    slots: u32,
    /// Pages by arena and cell.
    owners: BTreeMap<(u16, u32), Owner>,
}

/// Grows the sequences in turns, so that with small arenas their pages interleave, then for the step to be planned.
fn setup(sequences: &[Sequence], group: u32, page_size: u32, arena_slabs: u64) -> Setup {
    let heads = HeadGeometry { num_qo_heads: KV_HEADS * group, num_kv_heads: KV_HEADS, head_dim: 64 };
    let shape = CacheShape { heads, page_size };
    let table_shape = |s: &Sequence| TableShape {
        num_layers: LAYERS,
        num_kv_heads: KV_HEADS,
        page: shape.page(),
        codec: s.codec,
        sealing: s.sealing,
    };
    let mut sequences = sequences.to_vec();
    for s in &mut sequences {
        s.rows = table_shape(s).cut(s.cached, s.rows);
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
    let mut admit = |s: &Sequence| PageTable::admit(&mut pool, &mut ranges, table_shape(s), s.cached + s.rows);
    let mut tables: Vec<_> = sequences.iter().map(|s| admit(s).expect("all fit")).collect();
    let mut left: Vec<u32> = sequences.iter().map(|s| s.cached).collect();
    while left.iter().any(|n| *n > 0) {
        for (table, left) in tables.iter_mut().zip(&mut left) {
            let n = table.shape().cut(table.n_tokens(), (*left).min(40));
            table.grow(&mut pool, &mut filling.clone(), n).expect("committed");
            table.retire(&mut pool).expect("the pool should agree");
            *left -= n;
        }
    }
    for (s, table) in sequences.iter().zip(&mut tables) {
        if s.sealing == Sealing::OnRequest && s.requested.0 > 0 {
            table.seal(&mut pool, s.requested.0).expect("committed");
            table.retire(&mut pool).expect("the pool should agree");
        }
    }
    window.clear();
    for (s, table) in sequences.iter().zip(&mut tables) {
        table.grow(&mut pool, &mut window, s.rows).expect("committed");
        if s.sealing == Sealing::OnRequest {
            table.seal(&mut pool, s.requested.1).expect("committed");
        }
    }
    let slots = window.entries() / KV_HEADS;
    let mut buffer = window.write_entries();
    for table in &mut tables {
        let mut entries = Vec::new();
        let region = table.write_region(&mut entries) as usize;
        buffer.resize(buffer.len().max(region + entries.len()), 0);
        buffer[region..region + entries.len()].copy_from_slice(&entries);
    }
    let owners = owners(&sequences, &tables, page_size);
    Setup { shape, sequences, tables, buffer, slots, owners }
}

fn owners(sequences: &[Sequence], tables: &[PageTable], page_size: u32) -> BTreeMap<(u16, u32), Owner> {
    let mut owners = BTreeMap::new();
    for (sequence, (s, table)) in sequences.iter().zip(tables).enumerate() {
        let sealed = s.sealed(page_size);
        let all = (s.cached + s.rows).div_ceil(page_size);
        let lists = (0..LAYERS).flat_map(|layer| (0..KV_HEADS).map(move |head| (layer, head)));
        for (layer, head) in lists {
            let (codes, open) = table.list(layer, head);
            assert_eq!(codes.len(), sealed.end as usize, "a list has a sealed page for all that are sealed");
            let most = if s.codec.seals() && s.sealing == Sealing::WhenFull { 1 } else { usize::MAX };
            assert!(open.len() <= most, "a list whose pages are sealed as they fill holds one open page");
            let own = (sealed.start..all.max(sealed.start + 1)).zip(open).map(|(page, id)| (page, id, false));
            for (page, id, sealed) in (0..).zip(codes).map(|(page, id)| (page, id, true)).chain(own) {
                let owner = Owner { sequence, layer, head, page, sealed };
                assert!(owners.insert((id.arena, id.cell), owner).is_none(), "a page is in one list");
            }
        }
    }
    owners
}

fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise()) }
}

/// The plan of one layer, compared with what the rows need.
struct Checker<'s> {
    setup: &'s Setup,
    plan: &'s AttentionPlan,
    layer: u32,
    /// Sequence and cache index of each row.
    rows: Vec<(usize, u32)>,
    /// What each slot of the window, `(KV head, slot)`, holds in this step: sequence and page.
    window: BTreeMap<(u32, u32), (usize, u32)>,
    /// For every state: its `row * KV_HEADS + head`, and the tokens behind it.
    states: BTreeMap<u32, (u32, Range<u32>)>,
}

impl<'s> Checker<'s> {
    fn new(setup: &'s Setup, plan: &'s AttentionPlan, layer: u32) -> Self {
        let mut rows = Vec::new();
        for (sequence, s) in setup.sequences.iter().enumerate() {
            rows.extend((s.cached..s.cached + s.rows).map(|index| (sequence, index)));
        }
        Self { setup, plan, layer, rows, window: BTreeMap::new(), states: BTreeMap::new() }
    }

    fn page_size(&self) -> u32 {
        self.setup.shape.page_size
    }

    fn group(&self) -> u32 {
        self.setup.shape.heads.group_size()
    }

    fn run(mut self) -> Result<(), String> {
        let dispatches = &self.plan.plans[self.plan.of_layer[self.layer as usize]];
        self.append(&dispatches.append)?;
        self.seal(&dispatches.seal)?;
        self.decode(&dispatches.decode)?;
        self.prefill(&dispatches.prefill)?;
        self.merge(dispatches.merge.clone())
    }

    /// The page that an entry names in an arena.
    fn owner(&self, arena: u16, entry: u32) -> Result<Owner, String> {
        let cell = *self.setup.buffer.get(entry as usize).ok_or(format!("entry {entry} is outside the tables"))?;
        if arena != PageId::WINDOW {
            let owner = self.setup.owners.get(&(arena, cell)).copied();
            return owner.ok_or(format!("entry {entry} names cell {cell} of arena {arena}, where no page begins"));
        }
        let (head, slot) = (entry / self.setup.slots.max(1), entry % self.setup.slots.max(1));
        ensure(entry < self.setup.slots * KV_HEADS, || format!("entry {entry} is outside the window"))?;
        let holds = self.window.get(&(head, slot)).copied();
        let (sequence, page) = holds.ok_or(format!("slot {slot} of head {head} is used before it is appended to"))?;
        Ok(Owner { sequence, layer: self.layer, head, page, sealed: false })
    }

    /// Every row goes to the open form of its page, which is in the window unless the list holds it.
    fn append(&mut self, dispatches: &[Dispatch]) -> Result<(), String> {
        let size = self.page_size();
        let mut left: Vec<(u32, u32)> =
            (0..).zip(&self.rows).flat_map(|(row, _)| (0..KV_HEADS).map(move |head| (row, head))).collect();
        for (place, range) in dispatches {
            ensure(place.codec == HiddenCodec::F16, || format!("rows are appended as {}", place.codec))?;
            for item in &self.plan.append[range.start as usize..range.end as usize] {
                let entry = item.page_entry + self.layer * item.layer_stride;
                let (sequence, first) = self.rows[item.row_lo as usize];
                let page = first / size;
                let retired = self.setup.sequences[sequence].sealed(size).start;
                let own = self.setup.tables[sequence].list(self.layer, item.kv_head).1.len();
                let passes = page >= retired + u32::try_from(own).expect("few pages");
                ensure(passes == (place.arena == PageId::WINDOW), || format!("page {page} is in {place:?}"))?;
                if passes {
                    let at = (entry / self.setup.slots.max(1), entry % self.setup.slots.max(1));
                    let before = self.window.insert(at, (sequence, page));
                    ensure(before.is_none_or(|b| b == (sequence, page)), || format!("slot {at:?} is used twice"))?;
                }
                let owner = Owner { sequence, layer: self.layer, head: item.kv_head, page, sealed: false };
                let found = self.owner(place.arena, entry)?;
                ensure(found == owner, || format!("row {} of {owner:?} goes to {found:?}", item.row_lo))?;
                for r in 0..item.n_rows {
                    let row = item.row_lo + r;
                    let slot = item.slot_in_page + r;
                    let here = self.rows.get(row as usize) == Some(&(sequence, page * size + slot)) && slot < size;
                    ensure(here, || format!("row {row} does not belong to slot {slot} of page {page}"))?;
                    let at = left.iter().position(|l| *l == (row, item.kv_head));
                    left.swap_remove(at.ok_or(format!("row {row} is appended twice"))?);
                }
            }
        }
        ensure(left.is_empty(), || format!("{left:?} are not appended"))
    }

    /// Every page that becomes full is sealed once, from its open to its sealed form.
    fn seal(&self, dispatches: &[Dispatch]) -> Result<(), String> {
        let size = self.page_size();
        let mut left = Vec::new();
        for (sequence, s) in self.setup.sequences.iter().enumerate() {
            for head in 0..KV_HEADS {
                left.extend(s.sealed(size).map(|page| (sequence, head, page)));
            }
        }
        for (place, range) in dispatches {
            for item in &self.plan.seal[range.start as usize..range.end as usize] {
                let from = self.owner(place.arena, item.open_entry + self.layer * item.open_stride)?;
                let to = self.owner(place.sealed_arena, item.sealed_entry + self.layer * item.sealed_stride)?;
                ensure(!from.sealed, || format!("{from:?} is sealed twice"))?;
                ensure(to == Owner { sealed: true, ..from }, || format!("{from:?} is sealed to {to:?}"))?;
                ensure(from.layer == self.layer && from.head == item.kv_head, || format!("{from:?} in {item:?}"))?;
                let codec = self.setup.sequences[from.sequence].codec;
                ensure(place.codec == codec, || format!("{from:?} of {codec} is sealed as {}", place.codec))?;
                if matches!(codec.k.transform, Transform::LowRank { .. }) {
                    let first = self.plan.turned_pages.get(item.angles as usize);
                    ensure(first == Some(&(from.page * size)), || format!("{from:?} is turned back by {first:?}"))?;
                }
                let at = left.iter().position(|l| *l == (from.sequence, from.head, from.page));
                left.swap_remove(at.ok_or(format!("{from:?} is sealed, but should not be"))?);
            }
        }
        ensure(left.is_empty(), || format!("{left:?} are not sealed"))
    }

    /// That a run of tokens for the row at `index` lies in the pages and forms that the row reads.
    fn reads(&self, place: Place, (entry, stride): (u32, u32), q_row: u32, tokens: Range<u32>) -> Result<(), String> {
        let size = self.page_size();
        let (row, head) = (q_row / KV_HEADS, q_row % KV_HEADS);
        let (sequence, index) = self.rows[row as usize];
        let s = &self.setup.sequences[sequence];
        ensure(!tokens.is_empty(), || format!("a run of row {row} is empty"))?;
        ensure(tokens.start.is_multiple_of(size), || format!("a run of row {row} begins inside a page"))?;
        ensure(place.sealed_arena == place.arena, || format!("{place:?} is read in two arenas"))?;
        for page in tokens.start / size..tokens.end.div_ceil(size) {
            let sealed = page < s.sealed(size).end.min(index / size);
            let codec = if sealed { s.codec } else { HiddenCodec::F16 };
            ensure(place.codec == codec, || format!("row {row} reads page {page} of {codec} as {}", place.codec))?;
            let expected = Owner { sequence, layer: self.layer, head, page, sealed };
            let found = self.owner(place.arena, entry + self.layer * stride + page - tokens.start / size)?;
            ensure(found == expected, || format!("row {row} should read {expected:?}, not {found:?}"))?;
        }
        Ok(())
    }

    fn write(&mut self, state: u32, q_row: u32, tokens: Range<u32>) -> Result<(), String> {
        ensure(state < self.plan.n_states, || format!("state {state} is beyond {}", self.plan.n_states))?;
        let before = self.states.insert(state, (q_row, tokens));
        ensure(before.is_none(), || format!("state {state} is written twice"))
    }

    fn decode(&mut self, dispatches: &[Dispatch]) -> Result<(), String> {
        for (place, range) in dispatches {
            for item in &self.plan.decode[range.start as usize..range.end as usize] {
                ensure(item.n_tokens <= DecodeSpec::KV_CHUNK, || format!("{item:?} is too long"))?;
                let tokens = item.first_token..item.first_token + item.n_tokens;
                self.reads(*place, (item.page_lo, item.layer_stride), item.q_row, tokens.clone())?;
                for g in 0..self.group() {
                    self.write(item.slot + g, item.q_row, tokens.clone())?;
                }
            }
        }
        Ok(())
    }

    fn prefill(&mut self, dispatches: &[Dispatch]) -> Result<(), String> {
        let group = self.group();
        for (place, range) in dispatches {
            for item in &self.plan.prefill[range.start as usize..range.end as usize] {
                let tile = PrefillSpec::tile_rows(&self.setup.shape);
                ensure(item.n_rows * group <= tile, || format!("{item:?} has more rows than a tile"))?;
                for r in 0..item.n_rows {
                    let row = item.row_lo + r;
                    let q_row = row * KV_HEADS + item.kv_head;
                    let index = item.first_index + r;
                    let here = self.rows.get(row as usize).is_some_and(|(_, i)| *i == index);
                    ensure(here, || format!("row {row} is not at index {index}"))?;
                    // The mask leaves out what comes after the row.
                    let end = (item.first_token + item.n_tokens).min(index + 1);
                    let tokens = item.first_token..end;
                    if item.first_token < end {
                        self.reads(*place, (item.page_lo, item.layer_stride), q_row, tokens.clone())?;
                    }
                    for g in 0..group {
                        self.write(item.slot + r * group + g, q_row, tokens.clone())?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Every state is merged once, into its own row; the tokens of a row are all up to its own, each once.
    fn merge(mut self, range: Range<u32>) -> Result<(), String> {
        let group = self.group();
        let mut merged = BTreeMap::new();
        for item in &self.plan.merge[range.start as usize..range.end as usize] {
            for g in 0..group {
                let mut runs = Vec::new();
                for i in 0..item.n_states {
                    let state = item.state_lo + g + i * item.stride;
                    let (q_row, tokens) = self.states.remove(&state).ok_or(format!("state {state} is not there"))?;
                    ensure(q_row == item.q_row, || format!("state {state} of {q_row} in {item:?}"))?;
                    runs.push(tokens);
                }
                runs.retain(|tokens| !tokens.is_empty());
                runs.sort_by_key(|tokens| tokens.start);
                let joined = runs.windows(2).all(|w| w[0].end == w[1].start);
                ensure(joined && runs.first().is_some_and(|r| r.start == 0), || format!("{item:?} has {runs:?}"))?;
                let before = merged.insert((item.q_row, g), runs.last().map_or(0, |r| r.end));
                ensure(before.is_none(), || format!("row {} is merged twice", item.q_row))?;
            }
        }
        ensure(self.states.is_empty(), || format!("{:?} are not merged", self.states))?;
        for (row, (_, index)) in (0..).zip(&self.rows) {
            for (head, g) in (0..KV_HEADS).flat_map(|head| (0..group).map(move |g| (head, g))) {
                let seen = merged.remove(&(row * KV_HEADS + head, g));
                ensure(seen == Some(index + 1), || format!("row {row} at index {index} sees {seen:?} tokens"))?;
            }
        }
        ensure(merged.is_empty(), || format!("{merged:?} were not asked for"))
    }
}

fn check(setup: &Setup, plan: &AttentionPlan, layer: u32) -> Result<(), String> {
    Checker::new(setup, plan, layer).run()
}

fn segments(setup: &Setup) -> Vec<Segment<'_>> {
    let mut row_lo = 0;
    let segment = |(s, table): (&Sequence, _)| {
        let Sequence { cached, rows, decode, .. } = *s;
        let segment = Segment { table, row_lo, n_rows: rows, first_index: cached, decode, attend: rows > 0 };
        row_lo += rows;
        segment
    };
    setup.sequences.iter().zip(&setup.tables).map(segment).collect()
}

fn batches() -> impl Strategy<Value = (u32, Vec<Sequence>)> {
    prop::sample::select(vec![16_u32, 64])
        .prop_flat_map(|page_size| sequences(page_size).prop_map(move |sequences| (page_size, sequences)))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_row_sees_every_token_once_in_its_form(
        (page_size, sequences) in batches(),
        group in prop::sample::select(vec![1_u32, 3, 7, 8, 20]),
        arena_slabs in prop::sample::select(vec![1_u64, 4, 4096]),
    ) {
        let setup = setup(&sequences, group, page_size, arena_slabs);
        let segments = segments(&setup);
        let plan = AttentionPlan::new(&setup.shape, LAYERS, &segments);
        prop_assert_eq!(plan.of_layer.len(), LAYERS as usize);
        if arena_slabs == 4096 {
            prop_assert_eq!(plan.plans.len(), 1, "with one arena all layers share their lists");
        }
        for layer in 0..LAYERS {
            check(&setup, &plan, layer).map_err(TestCaseError::fail)?;
        }
        let again = AttentionPlan::new(&setup.shape, LAYERS, &segments);
        prop_assert_eq!((again.append, again.seal), (plan.append, plan.seal));
        prop_assert_eq!((again.decode, again.prefill, again.merge), (plan.decode, plan.prefill, plan.merge));
    }

    #[test]
    fn rows_that_leave_a_page_end_on_an_edge_and_as_late_as_possible(
        page_size in prop::sample::select(vec![16_u32, 64]),
        (first, n) in (0_u32..1000, 0_u32..300),
        codec in 0_usize..3,
    ) {
        let codec = codecs(page_size)[codec % codecs(page_size).len()];
        let page = PageGeometry { page_size, head_dim: 64 };
        for sealing in [Sealing::WhenFull, Sealing::OnRequest] {
            let shape = TableShape { num_layers: 1, num_kv_heads: 1, page, codec, sealing };
            let allowed = |rows: u32| {
                let end = first + rows;
                !codec.seals()
                    || sealing == Sealing::OnRequest
                    || end.is_multiple_of(page_size)
                    || end / page_size == first / page_size
            };
            let longest = (0..=n).rev().find(|rows| allowed(*rows));
            prop_assert_eq!(Some(shape.cut(first, n)), longest, "{} {:?}", codec, sealing);
            prop_assert_eq!(shape.cut(first, n) == 0, n == 0, "a step should always make progress");
        }
    }
}

/// Two sequences that pass pages through the window, one that decodes into a full page, and one without compression.
fn mixed() -> Vec<Sequence> {
    let codec = |text: &str| text.parse::<HiddenCodec>().expect("a codec");
    vec![
        Sequence { codec: codec("kivi4"), ..Sequence::full(700, 200, false) },
        Sequence { codec: codec("rot3"), ..Sequence::full(127, 1, true) },
        Sequence { codec: codec("lowrank:48"), ..Sequence::full(30, 162, false) },
        Sequence::full(600, 1, true),
    ]
}

#[test]
fn a_step_seals_through_the_window_and_plans_codecs_apart() {
    let setup = setup(&mixed(), 3, 64, 4096);
    let plan = AttentionPlan::new(&setup.shape, LAYERS, &segments(&setup));
    check(&setup, &plan, 0).unwrap_or_else(|e| panic!("{e}"));
    let count = |dispatches: &[Dispatch], arena: u16| -> u32 {
        dispatches.iter().filter(|(place, _)| place.arena == arena).map(|(_, range)| range.end - range.start).sum()
    };
    let layer = &plan.plans[0];
    // 700 to 896 leaves page 10 and fills 11 to 13; 127 fills page 1; 30 to 192 fills pages 0 to 2.
    assert_eq!(setup.sequences[0].rows, 196, "the rows are cut where a page ends");
    assert_eq!(plan.seal.len(), 2 * (4 + 1 + 3), "full pages per KV head");
    assert_eq!(count(&layer.seal, PageId::WINDOW), 2 * (3 + 2), "all but the first were filled in the window");
    assert_eq!(plan.turned_pages, [0, 64, 128], "pages whose keys become latents");
    let codecs: Vec<_> = layer.decode.iter().map(|(place, _)| place.codec.to_string()).collect();
    assert_eq!(codecs, ["f16", "rot3"], "sealed and open pages in dispatches of their own");
}

#[test]
fn a_wrong_plan_is_noticed() {
    let setup = setup(&mixed(), 3, 64, 4096);
    let good = AttentionPlan::new(&setup.shape, LAYERS, &segments(&setup));
    let at = |dispatches: &[Dispatch], codec: &str| {
        let found = dispatches.iter().position(|(place, _)| place.codec.to_string() == codec);
        found.unwrap_or_else(|| panic!("no dispatch of {codec}"))
    };
    let layer = &good.plans[0];
    let in_window = layer.append.iter().find(|(place, _)| place.arena == PageId::WINDOW).expect("rows pass through it");
    let (window, sealed) = (in_window.1.start as usize, at(&layer.decode, "rot3"));
    let first_sealed = layer.decode[sealed].1.start as usize;
    type Change<'c> = Box<dyn Fn(&mut AttentionPlan) + 'c>;
    let changes: Vec<(&str, Change<'_>)> = vec![
        ("a page that is not sealed", Box::new(|p| p.plans[0].seal[0].1.start += 1)),
        ("a page sealed twice", Box::new(|p| p.seal[1] = p.seal[0])),
        ("a page sealed as another", Box::new(|p| p.seal[0].sealed_entry += 1)),
        ("a page sealed for another layer", Box::new(|p| p.seal[0].sealed_stride += 1)),
        ("sealing in another codec", Box::new(|p| p.plans[0].seal[0].0.codec = HiddenCodec::F16)),
        ("keys turned back by another page's positions", Box::new(|p| p.turned_pages.swap(0, 1))),
        (
            "a slot of the window used twice",
            Box::new(move |p| p.append[window + 1].page_entry = p.append[window].page_entry),
        ),
        ("rows in another slot", Box::new(|p| p.append[0].slot_in_page ^= 1)),
        ("codes read as f16", Box::new(move |p| p.plans[0].decode[sealed].0.codec = HiddenCodec::F16)),
        ("a page read twice", Box::new(move |p| p.decode[first_sealed].n_tokens += 64)),
        ("another sequence's page", Box::new(move |p| p.decode[first_sealed].page_lo += 1)),
        ("a token left out", Box::new(|p| p.prefill[0].n_tokens -= 1)),
        ("a state written twice", Box::new(|p| p.prefill[1].slot = p.prefill[0].slot)),
        ("a row that is not merged", Box::new(|p| p.plans[0].merge.start += 1)),
    ];
    for (wrong, change) in changes {
        let mut plan = good.clone();
        change(&mut plan);
        let found = (0..LAYERS).map(|layer| check(&setup, &plan, layer)).find_map(Result::err);
        assert!(found.is_some(), "{wrong} should be noticed");
    }
}

#[test]
fn a_split_depends_on_the_sequence_alone() {
    let kivi4: HiddenCodec = "kivi4".parse().expect("a codec");
    let other = Sequence::full(37, 1, true);
    // The runs of the sequence at `place`, in the order of its tokens.
    let lengths = |sequences: &[Sequence], place: u32| -> Vec<u32> {
        let setup = setup(sequences, 3, 64, 4096);
        let plan = AttentionPlan::new(&setup.shape, 1, &segments(&setup));
        let mut items: Vec<_> = plan.decode.iter().filter(|i| i.q_row == place * KV_HEADS).collect();
        items.sort_by_key(|item| item.first_token);
        items.into_iter().map(|item| item.n_tokens).collect()
    };
    // Page 17 begins at 1088; what is before it is sealed.
    for (codec, expected) in [(HiddenCodec::F16, vec![512, 512, 77]), (kivi4, vec![512, 512, 64, 13])] {
        let long = Sequence { codec, ..Sequence::full(1100, 1, true) };
        assert_eq!(lengths(std::slice::from_ref(&long), 0), expected, "{codec}: runs of at most a chunk");
        for place in 0..4 {
            let mut company = vec![other.clone(), Sequence { codec: kivi4, ..other.clone() }, other.clone()];
            company.insert(place, long.clone());
            let place = u32::try_from(place).expect("small");
            assert_eq!(lengths(&company, place), expected, "{codec} in company, at place {place}");
        }
    }
}
