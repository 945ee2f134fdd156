//! Page tables that an eviction filled: which tokens a row finds in them, at which positions and in which form; what they
//! take and what they return.
//!
//! A run is checked as a shader reads it: entry by entry through what the table buffer would hold, down to the page.

use std::collections::BTreeMap;

use concertina::compression::hidden::HiddenCodec;
use concertina::geometry::{Bytes, PageGeometry};
use concertina::pool::arena_map::ArenaMap;
use concertina::pool::page_table::{Capacity, Layers, PageTable, Run, TableRanges, TableShape, Window};
use concertina::pool::{PageId, PagePool, PoolError, PoolLayout};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

/// Slabs of 64 KiB in arenas of so many.
fn pool(budget: Bytes, arena_slabs: u64, window: &Window) -> PagePool {
    let slab = Bytes(1 << 16);
    let layout = PoolLayout {
        budget,
        staging: Bytes::ZERO,
        scratch: Bytes::ZERO,
        max_binding: Bytes(slab.0 * arena_slabs),
        slab,
        smallest_page: Bytes(1 << 9),
        fixed_entries: window.entries(),
    };
    PagePool::new(&layout).expect("the layout should fit its budget")
}

fn roomy() -> PagePool {
    pool(Bytes::mib(5), 16, &no_window())
}

/// Open pages of 2 KiB.
const SHAPE: TableShape = TableShape {
    num_layers: 3,
    num_kv_heads: 2,
    page: PageGeometry { page_size: 16, head_dim: 32 },
    codec: HiddenCodec::F16,
    quest: None,
};

/// A table of layers that each own their cache, for appended tokens alone.
fn admit(
    pool: &mut PagePool,
    ranges: &mut TableRanges,
    shape: TableShape,
    max_tokens: u32,
) -> Result<PageTable, PoolError> {
    PageTable::admit(pool, ranges, shape, &Layers::OWN, Capacity::tokens(max_tokens))
}

/// For sessions whose pages are never sealed.
fn no_window() -> Window {
    Window::new(SHAPE.page, SHAPE.num_kv_heads, 0, false)
}

/// An eviction is worth it only when the bytes are there for others at once.
#[test]
fn a_cache_that_is_evicted_from_returns_its_bytes_and_the_promises_that_it_does_not_need() {
    let (mut pool, mut ranges) = (roomy(), TableRanges::new(10_000));
    let codec: HiddenCodec = "rot2".parse().expect("a codec");
    let (source_shape, shape) = (SHAPE, TableShape { codec, ..SHAPE });
    let lists = u64::from(shape.num_lists());
    // About as long as the pool allows beside what stays: 20 pages of each list, and a tail of three.
    let n_pages = u32::try_from(pool.capacity().0 / (SHAPE.open_page().0 * lists)).expect("few pages") - 60;
    let n_tokens = n_pages * 16 + 5;
    let capacity =
        Capacity { tail_tokens: 48, kept_pages: 20 * shape.num_lists(), kept_pages_of_list: 20, ..Capacity::default() };
    let mut source = admit(&mut pool, &mut ranges, source_shape, n_tokens).expect("as long as the pool allows");
    let mut target = PageTable::admit(&mut pool, &mut ranges, shape, &Layers::OWN, capacity).expect("it was left out");
    source.grow(&mut pool, &mut no_window(), n_tokens).expect("within the admission");
    source.retire();
    let open = Bytes(u64::from(n_pages + 1) * lists * SHAPE.open_page().0);
    assert_eq!(pool.report().pages_in_use_bytes, open, "every page is open");
    let wanted = 16 * (n_pages / 2);
    admit(&mut pool, &mut ranges, SHAPE, wanted).expect_err("the pool is full");

    // Five lists keep 100 tokens, which take 7 pages, and one keeps nothing for good.
    let every_tenth: Vec<u32> = (0..n_tokens).step_by(10).take(100).collect();
    let mut kept = vec![Some(every_tenth); 5];
    kept.insert(2, None);
    target.keep(&mut pool, kept.into_iter().map(Into::into).collect(), &[], n_tokens).expect("committed");
    assert_eq!(pool.report().pages_in_use_bytes, open + Bytes(35 * shape.sealed_page().0), "until it is released");
    assert_eq!((target.n_tokens(), target.tail(), target.held_tokens()), (n_tokens, 0, 500), "what stayed");
    assert!(target.is_closed(1, 0) && !target.is_closed(1, 1), "the third list is the second layer's first");
    source.release(&mut pool, &mut ranges).expect("the pool should agree");
    let report = pool.report();
    assert_eq!(report.pages_in_use_bytes, Bytes(35 * shape.sealed_page().0), "what stayed alone");
    assert_eq!(report.pages_in_use_bytes, target.held_bytes(), "the table knows what it holds");
    let tail = Bytes(5 * (SHAPE.open_page().0 + 3 * shape.sealed_page().0));
    assert_eq!(report.committed_bytes, tail, "the tails of five lists are still to come, and nothing else");
    let other = admit(&mut pool, &mut ranges, SHAPE, wanted).expect("the bytes of the source are there");
    other.release(&mut pool, &mut ranges).expect("the pool should agree");

    let mut window = Window::new(shape.page, shape.num_kv_heads, 48, true);
    target.grow(&mut pool, &mut window, 48).expect("within the admission");
    target.retire();
    assert_eq!((target.n_held(1, 0), target.n_held(1, 1)), (0, 148), "a closed list has no tail");
    assert_eq!((target.n_tokens(), target.held_tokens()), (n_tokens + 48, 5 * 148), "what came since");
    assert_eq!(pool.report().committed_bytes, Bytes::ZERO, "every promise is spent");
    target.release(&mut pool, &mut ranges).expect("the pool should agree");
    assert_eq!(pool.report().pages_in_use_bytes, Bytes::ZERO, "everything returned");
}

#[test]
fn an_eviction_that_keeps_more_than_was_admitted_is_refused_and_takes_nothing_from_others() {
    let (mut pool, mut ranges) = (roomy(), TableRanges::new(4_000));
    let capacity = Capacity { tail_tokens: 16, kept_pages: 8, kept_pages_of_list: 3, ..Capacity::default() };
    let admit_target = |pool: &mut PagePool, ranges: &mut TableRanges| {
        PageTable::admit(pool, ranges, SHAPE, &Layers::OWN, capacity).expect("the pool is roomy")
    };
    let (mut table, mut other) = (admit_target(&mut pool, &mut ranges), admit_target(&mut pool, &mut ranges));
    let tokens = |n: &[u32]| n.iter().map(|n| Some((0..*n).collect())).collect::<Vec<_>>();
    let before = format!("{pool:?}");
    for (wrong, kept) in [("a list", [49, 1, 1, 1, 1, 1]), ("all lists", [48, 48, 17, 16, 0, 0])] {
        let error =
            table.keep(&mut pool, tokens(&kept).into_iter().map(Into::into).collect(), &[], 200).expect_err(wrong);
        assert_eq!(error, PoolError::NotCommitted(SHAPE.sealed_page()), "{wrong}: the page size");
        assert_eq!(format!("{pool:?}"), before, "{wrong}: another table's commitments should be untouched");
    }
    table
        .keep(&mut pool, tokens(&[48, 48, 17, 0, 0, 0]).into_iter().map(Into::into).collect(), &[], 200)
        .expect("eight pages were admitted");
    other
        .keep(&mut pool, tokens(&[33, 33, 16, 1, 0, 0]).into_iter().map(Into::into).collect(), &[], 200)
        .expect("what was admitted can be taken");
    assert_ne!(format!("{pool:?}"), before, "what is kept shows in this comparison");
}

#[test]
#[should_panic(expected = "kept tokens come first")]
fn a_table_that_holds_tokens_can_not_be_filled_by_an_eviction() {
    let (mut pool, mut ranges) = (roomy(), TableRanges::new(4_000));
    let mut table = admit(&mut pool, &mut ranges, SHAPE, 40).expect("the pool is roomy");
    table.grow(&mut pool, &mut no_window(), 1).expect("within the admission");
    let _ = table.keep(&mut pool, vec![None; 6].into_iter().map(Into::into).collect(), &[], 1);
}

#[test]
#[should_panic(expected = "every list keeps something or nothing")]
fn an_eviction_that_forgets_a_list_is_noticed() {
    let (mut pool, mut ranges) = (roomy(), TableRanges::new(4_000));
    let mut table = admit(&mut pool, &mut ranges, SHAPE, 40).expect("the pool is roomy");
    let _ = table.keep(&mut pool, vec![None; 5].into_iter().map(Into::into).collect(), &[], 1);
}

/// A repetition stands behind a document for a while, and again.
#[test]
fn tokens_that_are_taken_back_leave_their_pages_for_those_that_come_next() {
    let (mut pool, mut ranges) = (roomy(), TableRanges::new(4_000));
    let mut table = admit(&mut pool, &mut ranges, SHAPE, 100).expect("the pool is roomy");
    table.grow(&mut pool, &mut no_window(), 50).expect("within the admission");
    for n in [50, 33, 14, 50] {
        table.grow(&mut pool, &mut no_window(), n).expect("within the admission, and what was taken back");
        table.retire();
        assert_eq!(table.n_tokens(), 50 + n, "the document and its repetition");
        table.rewind(n);
        assert_eq!((table.n_tokens(), table.tail(), table.held_tokens()), (50, 50, 6 * 50), "the document");
        assert_eq!(table.held_bytes(), SHAPE.bytes_for(100), "the first was the longest, and its pages stay");
        let seen: u32 = table.held_runs(2, 1).map(|run| run.n_tokens).sum();
        assert_eq!(seen, 50, "what was taken back is not read");
    }
    let error = table.grow(&mut pool, &mut no_window(), 51).expect_err("beyond the admission");
    assert_eq!(error, PoolError::NotCommitted(SHAPE.open_page()), "taking back admits nothing more");
    table.release(&mut pool, &mut ranges).expect("the pool should agree");
    let report = pool.report();
    assert_eq!((report.pages_in_use_bytes, report.committed_bytes), (Bytes::ZERO, Bytes::ZERO), "everything returned");
}

#[test]
#[should_panic(expected = "only open tokens can be taken back")]
fn tokens_whose_page_may_be_sealed_can_not_be_taken_back() {
    let (mut pool, mut ranges) = (roomy(), TableRanges::new(4_000));
    let shape = TableShape { codec: "rot2".parse().expect("a codec"), ..SHAPE };
    let mut table = admit(&mut pool, &mut ranges, shape, 40).expect("the pool is roomy");
    table.grow(&mut pool, &mut Window::new(shape.page, 2, 16, true), 8).expect("within the admission");
    table.rewind(1);
}

/// Pages that hold whole groups of every codec below.
const PAGE: PageGeometry = PageGeometry { page_size: 32, head_dim: 32 };
const ROWS: u32 = 100;

/// A session whose cache an eviction filled, and what came after it.
#[derive(Clone, Debug)]
struct Session {
    codec: HiddenCodec,
    num_kv_heads: u32,
    /// Of each layer, whose cache it reads.
    owners: Vec<u32>,
    /// Kept positions of each list; `None` where it is closed.
    kept: Vec<Option<Vec<u32>>>,
    /// Tokens seen before.
    n_tokens: u32,
    /// Rows of each step since.
    steps: Vec<u32>,
}

impl Session {
    fn num_layers(&self) -> u32 {
        count(self.owners.len())
    }

    fn own_layers(&self) -> Vec<u32> {
        (0..self.num_layers()).filter(|layer| self.owners[*layer as usize] == *layer).collect()
    }

    /// The list that a layer's head reads.
    fn list(&self, layer: u32, head: u32) -> usize {
        let owner = self.owners[layer as usize];
        let at = self.own_layers().iter().position(|own| *own == owner).expect("an owner owns its cache");
        at * self.num_kv_heads as usize + head as usize
    }

    fn shape(&self) -> TableShape {
        let (num_layers, num_kv_heads) = (count(self.own_layers().len()), self.num_kv_heads);
        TableShape { num_layers, num_kv_heads, page: PAGE, codec: self.codec, quest: None }
    }

    fn pages(&self) -> impl Iterator<Item = u32> + '_ {
        self.kept.iter().map(|kept| count(kept.as_ref().map_or(0, Vec::len)).div_ceil(PAGE.page_size))
    }

    fn capacity(&self) -> Capacity {
        // Some more than is needed, which returns.
        let (kept_pages, kept_pages_of_list) = (self.pages().sum::<u32>() + 3, self.pages().max().unwrap_or(0) + 1);
        Capacity {
            tail_tokens: self.steps.iter().sum::<u32>().max(1),
            kept_pages,
            kept_pages_of_list,
            ..Capacity::default()
        }
    }

    /// Bytes that the table may still come to: what stayed, and the tails of lists that have one.
    fn promised(&self) -> u64 {
        let shape = self.shape();
        let (open, sealed) = shape.pages_of_list(self.capacity().tail_tokens);
        let tails = self.kept.iter().flatten().count() as u64;
        let kept: u32 = self.pages().sum();
        tails * u64::from(open) * shape.open_page().0
            + (tails * u64::from(sealed) + u64::from(kept)) * shape.sealed_page().0
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("small")
}

fn owners() -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 1..6).prop_map(|choices| {
        let (mut own, mut owners) = (Vec::new(), Vec::new());
        for (layer, (owns, other)) in (0_u32..).zip(choices) {
            let owner = if owns || own.is_empty() { layer } else { *other.get(&own) };
            if owner == layer {
                own.push(layer);
            }
            owners.push(owner);
        }
        owners
    })
}

fn session() -> impl Strategy<Value = Session> {
    let codec = prop::sample::select(vec!["f16", "f16", "rot3", "kivi4", "f32", "lowrank:32"]);
    let steps = prop::collection::vec(1..ROWS, 0..6);
    (codec, owners(), 1_u32..3, 100_u32..300, steps).prop_flat_map(|(codec, owners, num_kv_heads, n_tokens, steps)| {
        let own = (0_u32..).zip(&owners).filter(|(layer, owner)| *layer == **owner).count();
        let all: Vec<u32> = (0..n_tokens).collect();
        let some = prop::sample::subsequence(all.clone(), 0..=n_tokens as usize).prop_map(Some);
        let kept = prop_oneof![6 => some, 2 => Just(Some(all)), 2 => Just(None)];
        // Layers often keep alike, so that some can share work lists.
        let lists = prop::collection::vec(kept, num_kv_heads as usize);
        let lists = prop_oneof![
            prop::collection::vec(lists.clone(), own).prop_map(|layers| layers.concat()),
            lists.prop_map(move |layer| vec![layer; own].concat()),
        ];
        lists.prop_map(move |kept| {
            let (codec, owners, steps) = (codec.parse().expect("a codec"), owners.clone(), steps.clone());
            Session { codec, num_kv_heads, owners, kept, n_tokens, steps }
        })
    })
}

/// Where a token lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Page(PageId),
    /// A slot of the window.
    Window(u32),
}

/// What a row should find in a list, token by token.
struct Expected {
    /// Position, form and page of each.
    tokens: Vec<(u32, HiddenCodec, Place)>,
    kept: u32,
}

/// What the row at `place` of the tail finds, in a step at whose start `retired` pages were sealed; what the list holds
/// between two steps where `None`.
fn expected(s: &Session, table: &PageTable, (layer, head): (u32, u32), retired: u32, place: Option<u32>) -> Expected {
    let size = PAGE.page_size;
    let (in_codec, open) = table.list(layer, head);
    let kept = &s.kept[s.list(layer, head)];
    let mut tokens = Vec::new();
    for (index, position) in (0_u32..).zip(kept.iter().flatten()) {
        tokens.push((*position, s.codec, Place::Page(in_codec[(index / size) as usize])));
    }
    let n_kept = count(tokens.len());
    let kept_pages = n_kept.div_ceil(size);
    let visible = if kept.is_none() { 0 } else { place.map_or(table.tail(), |place| place + 1) };
    let sealed = match place {
        _ if !s.codec.seals() => 0,
        // A row reads its own page open, and every page before it sealed.
        Some(place) => place / size,
        None => retired,
    };
    for token in 0..visible {
        let page = token / size;
        let (codec, at) = if page < sealed {
            (s.codec, Place::Page(in_codec[(kept_pages + page) as usize]))
        } else {
            let own = open.get((page - retired) as usize).copied().map(Place::Page);
            (HiddenCodec::F16, own.unwrap_or_else(|| Place::Window(page - retired - count(open.len()))))
        };
        tokens.push((s.n_tokens + token, codec, at));
    }
    Expected { tokens, kept: n_kept }
}

fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise()) }
}

/// Whether runs name exactly the tokens that are expected, each once and in order.
fn check(runs: &[Run], expected: &Expected, buffer: &[u32], slots: &std::ops::Range<u32>) -> Result<(), String> {
    let size = PAGE.page_size;
    let mut next = 0;
    for run in runs {
        ensure(run.n_tokens > 0 && run.index == next, || format!("{run:?} should begin at token {next}"))?;
        let in_kept = run.index < expected.kept;
        let offset = if in_kept { run.index } else { run.index - expected.kept };
        ensure(run.offset == offset && offset.is_multiple_of(size), || format!("{run:?} begins inside a page"))?;
        ensure(!in_kept || run.index + run.n_tokens <= expected.kept, || format!("{run:?} crosses parts"))?;
        for token in 0..run.n_tokens {
            let found = expected.tokens.get((run.index + token) as usize);
            let (position, codec, place) = *found.ok_or_else(|| format!("{run:?} goes beyond the row"))?;
            let bound = run.position + token;
            ensure(if in_kept { bound <= position } else { bound == position }, || {
                format!("token {token} of {run:?} is at position {position}")
            })?;
            let entry = run.entry + token / size;
            let here = if run.arena == PageId::WINDOW {
                ensure(slots.contains(&entry) && run.layer_stride == 0, || format!("{run:?} is another head's"))?;
                Place::Window(entry - slots.start)
            } else {
                let cell = *buffer.get(entry as usize).ok_or_else(|| format!("{run:?} is outside the tables"))?;
                Place::Page(PageId { arena: run.arena, cell })
            };
            ensure((codec, place) == (run.codec, here), || {
                format!("token {token} of {run:?} is {codec} in {place:?}")
            })?;
        }
        next += run.n_tokens;
    }
    ensure(next as usize == expected.tokens.len(), || format!("{next} of {} tokens", expected.tokens.len()))?;
    // As few items as arenas allow.
    let parts =
        |a: &Run, b: &Run| (a.codec, a.arena, a.index < expected.kept) == (b.codec, b.arena, b.index < expected.kept);
    let adjacent = |w: &[Run]| parts(&w[0], &w[1]) && w[0].entry + w[0].n_tokens.div_ceil(size) == w[1].entry;
    ensure(!runs.windows(2).any(adjacent), || format!("{runs:?} could be fewer"))
}

/// Which arena takes the place of which from layer `a` to `b`, page by page; `None` where the lists are not alike.
fn spread_alike(s: &Session, table: &PageTable, a: u32, b: u32) -> Option<BTreeMap<u16, u16>> {
    let owns = |layer: u32| s.owners[layer as usize] == layer;
    let spread = |layer, head| {
        let (in_codec, open) = table.list(layer, head);
        let kept = &s.kept[s.list(layer, head)];
        let arenas = in_codec.iter().chain(open).map(|page| page.arena).collect::<Vec<_>>();
        (arenas, kept.as_ref().map(Vec::len), in_codec.len())
    };
    let (mut there, mut back) = (BTreeMap::new(), BTreeMap::new());
    let alike = owns(a)
        && owns(b)
        && (0..s.num_kv_heads).all(|head| {
            let ((from, kept, n), (to, other_kept, other_n)) = (spread(a, head), spread(b, head));
            (kept, n, from.len()) == (other_kept, other_n, to.len())
                && from.iter().zip(&to).all(|(from, to)| {
                    there.insert(*from, *to).is_none_or(|before| before == *to)
                        && back.insert(*to, *from).is_none_or(|before| before == *from)
                })
        });
    alike.then_some(there)
}

fn check_table(
    s: &Session,
    table: &PageTable,
    buffer: &[u32],
    window: &Window,
    (retired, places): (u32, &[Option<u32>]),
) -> Result<(), String> {
    let heads = || (0..s.num_layers()).flat_map(|layer| (0..s.num_kv_heads).map(move |head| (layer, head)));
    let runs = |layer, head, place: Option<u32>| -> Vec<Run> {
        match place {
            Some(place) => table.seen_runs(layer, head, place),
            None => table.held_runs(layer, head).collect(),
        }
    };
    for (layer, head) in heads() {
        let owner = s.owners[layer as usize];
        ensure(table.layers().owner(layer) == owner && table.layers().owns(layer) == (owner == layer), || {
            format!("layer {layer} reads {}, not {owner}", table.layers().owner(layer))
        })?;
        let slots = head * window.slots()..(head + 1) * window.slots();
        for place in places {
            let expected = expected(s, table, (layer, head), retired, *place);
            check(&runs(layer, head, *place), &expected, buffer, &slots)
                .map_err(|e| format!("layer {layer}, head {head}, row {place:?}: {e}"))?;
            ensure(runs(layer, head, *place) == runs(owner, head, *place), || format!("layer {layer} is not {owner}"))?;
            let positions = (0..).zip(&expected.tokens).all(|(i, t)| table.position_of(layer, head, i) == t.0);
            ensure(positions, || format!("positions of layer {layer}, head {head}"))?;
        }
        let held = count(expected(s, table, (layer, head), retired, None).tokens.len());
        ensure(table.n_held(layer, head) == held, || format!("layer {layer} holds {held} tokens"))?;
    }
    for layer in 1..s.num_layers() {
        let mut arenas = ArenaMap::default();
        let alike = table.alike(layer - 1, layer, &mut arenas);
        let expected = spread_alike(s, table, layer - 1, layer);
        ensure(alike == expected.is_some(), || format!("layers {} and {layer}", layer - 1))?;
        for (from, to) in expected.into_iter().flatten() {
            ensure(arenas.of(from) == to, || format!("arena {to} of layer {layer} takes the place of {from}"))?;
        }
        for (head, place) in (0..s.num_kv_heads).flat_map(|head| places.iter().map(move |place| (head, *place))) {
            let next = runs(layer - 1, head, place).into_iter();
            let moved = |run: Run| Run { entry: run.entry + run.layer_stride, arena: arenas.of(run.arena), ..run };
            let next: Vec<_> = next.map(moved).collect();
            ensure(!alike || next == runs(layer, head, place), || format!("layer {layer} is not a stride away"))?;
        }
    }
    let held: u64 = (s.own_layers().iter())
        .flat_map(|layer| (0..s.num_kv_heads).map(|head| u64::from(table.n_held(*layer, head))))
        .sum();
    ensure(table.held_tokens() == held, || format!("{} tokens, not {held}", table.held_tokens()))
}

/// Several sessions over arenas of a few slabs, which their pages share in turns.
struct Pool {
    pool: PagePool,
    ranges: TableRanges,
    window: Window,
    buffer: Vec<u32>,
    untouched: String,
}

impl Pool {
    fn new(arena_slabs: u64) -> Self {
        let window = Window::new(PAGE, 2, ROWS, true);
        let pool = pool(Bytes::mib(24), arena_slabs, &window);
        let mut ranges = TableRanges::new(40_000);
        assert_eq!(ranges.reserve(window.entries()), Some(0), "the window's entries come first");
        let untouched = format!("{ranges:?}");
        Self { pool, ranges, window, buffer: vec![0; 40_000], untouched }
    }

    fn admit(&mut self, s: &Session) -> PageTable {
        let layers = Layers::new(&s.owners);
        let table = PageTable::admit(&mut self.pool, &mut self.ranges, s.shape(), &layers, s.capacity());
        table.expect("all fit")
    }

    fn upload(&mut self, table: &mut PageTable) {
        let mut entries = Vec::new();
        let region = table.write_region(&mut entries) as usize;
        self.buffer[region..region + entries.len()].copy_from_slice(&entries);
    }

    /// The next step of a session; the rows that it has, after which the pages that it seals are still open as well.
    fn grow(&mut self, table: &mut PageTable, n: u32) -> u32 {
        let n = table.cut(n);
        self.window.clear();
        table.grow(&mut self.pool, &mut self.window, n).expect("committed");
        self.upload(table);
        n
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None, rng_seed: RngSeed::Fixed(1), ..ProptestConfig::with_cases(200)
    })]

    #[test]
    fn a_row_finds_every_token_that_stayed_or_came_once_in_its_form(
        sessions in prop::collection::vec(session(), 1..4),
        arena_slabs in prop::sample::select(vec![1_u64, 3, 400]),
    ) {
        let mut pool = Pool::new(arena_slabs);
        let mut tables: Vec<PageTable> = sessions.iter().map(|s| pool.admit(s)).collect();
        for (s, table) in sessions.iter().zip(&mut tables) {
            table.keep(&mut pool.pool, s.kept.clone().into_iter().map(Into::into).collect(), &[], s.n_tokens).expect("committed");
            pool.upload(table);
            prop_assert_eq!(table.n_tokens(), s.n_tokens);
            check_table(s, table, &pool.buffer, &pool.window, (0, &[None])).map_err(TestCaseError::fail)?;
        }
        for step in 0..6 {
            for (s, table) in sessions.iter().zip(&mut tables) {
                let Some(rows) = s.steps.get(step) else { continue };
                let retired = table.sealing_pages().start;
                let n = pool.grow(table, *rows);
                prop_assert!(table.is_dirty() || n > 0, "a step has rows");
                let (tail, size) = (table.tail(), PAGE.page_size);
                // The first row and the last, and those around an edge.
                let edge = (tail / size * size).clamp(tail - n, tail - 1);
                let rows = [tail - n, edge.saturating_sub(1).max(tail - n), edge, tail - 1].map(Some);
                check_table(s, table, &pool.buffer, &pool.window, (retired, &rows)).map_err(TestCaseError::fail)?;
                table.retire();
                let retired = table.sealing_pages().start;
                check_table(s, table, &pool.buffer, &pool.window, (retired, &[None])).map_err(TestCaseError::fail)?;
            }
            let report = pool.pool.report();
            let held: Bytes = tables.iter().map(PageTable::held_bytes).sum();
            prop_assert_eq!(report.pages_in_use_bytes, held);
            let promised = Bytes(sessions.iter().map(Session::promised).sum());
            prop_assert_eq!(held + report.committed_bytes, promised);
        }
        for table in tables {
            table.release(&mut pool.pool, &mut pool.ranges).expect("the pool should agree");
        }
        let report = pool.pool.report();
        prop_assert_eq!((report.pages_in_use_bytes, report.committed_bytes), (Bytes::ZERO, Bytes::ZERO));
        prop_assert_eq!(format!("{:?}", pool.ranges), pool.untouched, "the table entries should be whole again");
    }
}

#[test]
fn a_wrong_run_is_noticed() {
    let kept = vec![Some((0..100).map(|i| 2 * i).collect()), None, Some(vec![3, 7]), Some(vec![])];
    let codec: HiddenCodec = "kivi4".parse().expect("a codec");
    let s = Session { codec, num_kv_heads: 2, owners: vec![0, 0, 2], kept, n_tokens: 200, steps: vec![96, 3] };
    let mut pool = Pool::new(16);
    let mut table = pool.admit(&s);
    table
        .keep(&mut pool.pool, s.kept.clone().into_iter().map(Into::into).collect(), &[], s.n_tokens)
        .expect("committed");
    pool.grow(&mut table, 96);
    table.retire();
    pool.grow(&mut table, 3);
    let good = table.seen_runs(1, 0, 97);
    let expected = expected(&s, &table, (1, 0), 3, Some(97));
    let slots = 0..pool.window.slots();
    let noticed = |runs: &[Run]| check(runs, &expected, &pool.buffer, &slots);
    assert_eq!(noticed(&good), Ok(()), "as the table has it");
    assert_eq!(good.len(), 3, "what stayed, three sealed pages, two open tokens: {good:?}");
    type Change = fn(&mut Vec<Run>);
    let changes: [(&str, Change); 11] = [
        ("a run left out", |r| _ = r.remove(1)),
        ("a run twice", |r| r.insert(1, r[0])),
        ("a token less", |r| r[0].n_tokens -= 1),
        ("a token of the next page", |r| r[2].n_tokens += 1),
        ("another index", |r| r[1].index += 1),
        ("another offset", |r| r[1].offset += 32),
        ("another position in the tail", |r| r[2].position += 1),
        ("a position beyond a kept token's", |r| r[0].position += 100),
        ("another form", |r| r[1].codec = HiddenCodec::F16),
        ("another page", |r| r[1].entry += 1),
        ("another arena", |r| r[0].arena += 1),
    ];
    for (wrong, change) in changes {
        let mut runs = good.clone();
        change(&mut runs);
        assert!(noticed(&runs).is_err(), "{wrong} should be noticed");
    }
    let alike = |a, b| table.alike(a, b, &mut ArenaMap::default());
    assert!(!alike(0, 1) && spread_alike(&s, &table, 0, 1).is_none(), "a layer that shares is like none");
    assert!(!alike(0, 2) && table.seen_runs(0, 1, 97).is_empty(), "and a closed list has nothing");
}
