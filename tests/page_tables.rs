//! Page tables of sessions over one pool: what they hold open and sealed, against a model that knows only counts.
//!
//! The model decides by itself which session fits, which pages a step takes and which it returns; tables and pool have
//! to agree on every byte after every step.

#[path = "common/pool_model.rs"]
mod model;

use std::collections::BTreeMap;

use concertina::compression::hidden::HiddenCodec;
use concertina::geometry::{Bytes, PageGeometry};
use concertina::pool::page_table::{PageTable, Sealing, TableRanges, TableShape, Window};
use concertina::pool::{PageId, PagePool, PoolError, PoolLayout};
use model::{KIB, Model, layout};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The same cases in every run, and no files of failures beside the tests.
fn cases() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, rng_seed: RngSeed::Fixed(1), ..ProptestConfig::with_cases(1_000) }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn a_page_table_gives_back_all_that_it_took(
        (num_layers, num_kv_heads) in (1u32..5, 1u32..4),
        max_tokens in 0u32..200,
        growth in prop::collection::vec(0u32..40, 0..12),
        codec in prop::sample::select(vec!["f16", "rot3", "f32", "lowrank:32"]),
    ) {
        let (mut pool, mut ranges) = roomy();
        let untouched = (pool.report(), format!("{ranges:?}"));
        let codec = codec.parse().expect("a codec");
        let shape = TableShape { num_layers, num_kv_heads, codec, ..SHAPE };
        let mut window = Window::new(shape.page, num_kv_heads, 40, true);
        let mut table = PageTable::admit(&mut pool, &mut ranges, shape, max_tokens).expect("the pool is roomy");
        prop_assert_eq!(pool.report().committed_bytes, shape.bytes_for(max_tokens));
        let mut n_tokens = 0;
        for n in growth {
            let n = shape.cut(n_tokens, n);
            if n_tokens + n > max_tokens {
                break;
            }
            window.clear();
            table.grow(&mut pool, &mut window, n).expect("growth within the admission");
            n_tokens += n;
            let (all, full) = (n_tokens.div_ceil(16) as usize, n_tokens as usize / 16);
            let wanted = if codec.seals() { (full, all.min(1)) } else { (0, all) };
            for (layer, head) in (0..num_layers).flat_map(|l| (0..num_kv_heads).map(move |h| (l, h))) {
                let (sealed, open) = table.list(layer, head);
                prop_assert_eq!((sealed.len(), open.len()), wanted, "every list has room for the tokens");
                if n > 0 {
                    // What the step's last row reads.
                    let seen: u32 = table.seen_extents(layer, head, (n_tokens - 1) / 16).map(|e| e.pages).sum();
                    prop_assert_eq!(seen as usize, all, "the extents cover the list");
                }
            }
            table.retire(&mut pool).expect("the pool should agree");
            prop_assert_eq!(pool.report().pages_in_use_bytes, shape.bytes_for(n_tokens));
            prop_assert_eq!(table.held_bytes(), shape.bytes_for(n_tokens));
        }
        prop_assert_eq!(table.n_tokens(), n_tokens);
        table.release(&mut pool, &mut ranges).expect("the pool should agree");
        let now = pool.report();
        prop_assert_eq!(now.pages_in_use_bytes, Bytes::ZERO);
        prop_assert_eq!(now.committed_bytes, Bytes::ZERO);
        prop_assert_eq!(now.slack_bytes, untouched.0.slack_bytes);
        prop_assert_eq!(format!("{ranges:?}"), untouched.1, "the table entries should be whole again");
    }
}

fn roomy() -> (PagePool, TableRanges) {
    let pool = PagePool::new(&layout(Bytes::mib(5), Bytes::mib(1))).expect("the layout should fit its budget");
    (pool, TableRanges::new(4_000))
}

/// Open pages of 2 KiB.
const SHAPE: TableShape = TableShape {
    num_layers: 3,
    num_kv_heads: 2,
    page: PageGeometry { page_size: 16, head_dim: 32 },
    codec: HiddenCodec::F16,
    sealing: Sealing::WhenFull,
};

/// For sessions whose pages are never sealed.
fn no_window() -> Window {
    Window::new(SHAPE.page, SHAPE.num_kv_heads, 0, false)
}

#[test]
fn an_admission_that_fails_leaves_everything_as_it_was() {
    let (mut pool, _) = roomy();
    let mut few = TableRanges::new(20);
    pool.commit(SHAPE.open_page(), 0).expect("no pages always fit");
    let before = (format!("{pool:?}"), format!("{few:?}"));
    let error = PageTable::admit(&mut pool, &mut few, SHAPE, 16 * 4).expect_err("24 entries of 20");
    assert_eq!(error, PoolError::TablesFull { wanted: 24, total: 20 }, "the refusal should carry the numbers");
    assert_eq!((format!("{pool:?}"), format!("{few:?}")), before, "too few table entries");
    let error = PageTable::admit(&mut pool, &mut few, SHAPE, 16 * 5_000).expect_err("58 MiB of 5");
    assert!(matches!(error, PoolError::DoesNotFit { pages: 30_000, .. }), "{error}");
    assert_eq!((format!("{pool:?}"), format!("{few:?}")), before, "too few pages");
    let table = PageTable::admit(&mut pool, &mut few, SHAPE, 16 * 3).expect("18 entries of 20");
    assert_ne!(format!("{few:?}"), before.1, "an admission that succeeds shows in this comparison");
    table.release(&mut pool, &mut few).expect("the pool should agree");
}

#[test]
fn growth_beyond_the_admission_is_refused_and_takes_nothing_from_others() {
    let (mut pool, mut ranges) = roomy();
    let mut small = PageTable::admit(&mut pool, &mut ranges, SHAPE, 16).expect("the pool is roomy");
    let mut other = PageTable::admit(&mut pool, &mut ranges, SHAPE, 160).expect("the pool is roomy");
    small.grow(&mut pool, &mut no_window(), 16).expect("growth within the admission");
    let before = format!("{pool:?}");
    let error = small.grow(&mut pool, &mut no_window(), 1).expect_err("a second page per list was never admitted");
    assert_eq!(error, PoolError::NotCommitted(SHAPE.open_page()), "the refusal should name the page size");
    assert_eq!(format!("{pool:?}"), before, "another session's commitments should be untouched");
    other.grow(&mut pool, &mut no_window(), 160).expect("what was admitted can be taken");
}

#[test]
fn an_admission_whose_sealed_pages_do_not_fit_leaves_everything_as_it_was() {
    let (mut pool, mut ranges) = roomy();
    let shape = TableShape { codec: "f32".parse().expect("a codec"), ..SHAPE };
    for page in [shape.open_page(), shape.sealed_page()] {
        pool.commit(page, 0).expect("no pages always fit");
    }
    let before = (format!("{pool:?}"), format!("{ranges:?}"));
    let error = PageTable::admit(&mut pool, &mut ranges, shape, 16 * 1_000).expect_err("24 MiB of 5");
    assert!(
        matches!(error, PoolError::DoesNotFit { pages: 6_000, page, .. } if page == shape.sealed_page()),
        "{error}"
    );
    assert_eq!((format!("{pool:?}"), format!("{ranges:?}")), before, "the open pages are not committed either");
}

/// Sealing on request is worth it only when the bytes are there for others at once.
#[test]
fn open_pages_that_are_sealed_on_request_return_their_bytes() {
    let (mut pool, mut ranges) = (roomy().0, TableRanges::new(10_000));
    let shape = TableShape { codec: "rot2".parse().expect("a codec"), sealing: Sealing::OnRequest, ..SHAPE };
    let capacity = pool.capacity();
    // About as long as the pool allows, by the bytes of both forms: slabs leave a rest.
    let list = shape.open_page().0 + shape.sealed_page().0;
    let n_pages = u32::try_from(capacity.0 / (list * u64::from(shape.num_lists()))).expect("few pages") - 9;
    let n_tokens = n_pages * 16 + 5;
    let mut table = PageTable::admit(&mut pool, &mut ranges, shape, n_tokens).expect("as long as the pool allows");
    let mut window = no_window();
    table.grow(&mut pool, &mut window, n_tokens).expect("within the admission");
    table.retire(&mut pool).expect("the pool should agree");
    let lists = u64::from(shape.num_lists());
    let open = Bytes(u64::from(n_pages + 1) * lists * shape.open_page().0);
    assert_eq!(pool.report().pages_in_use_bytes, open, "every page is open");
    let other = TableShape { codec: HiddenCodec::F16, ..SHAPE };
    let wanted = 16 * (n_pages / 2);
    PageTable::admit(&mut pool, &mut ranges, other, wanted).expect_err("the pool is full");
    let mut left = n_pages;
    while left > 0 {
        let before = pool.report().pages_in_use_bytes;
        table.seal(&mut pool, 7).expect("committed");
        let sealing = left.min(7);
        assert_eq!(table.sealing_pages().len(), sealing as usize, "at most seven pages of each list");
        let both = before + Bytes(u64::from(sealing) * lists * shape.sealed_page().0);
        assert_eq!(pool.report().pages_in_use_bytes, both, "for the length of a step a page has both forms");
        table.retire(&mut pool).expect("the pool should agree");
        let after = both - Bytes(u64::from(sealing) * lists * shape.open_page().0);
        assert_eq!(pool.report().pages_in_use_bytes, after, "then its open form is gone");
        left -= sealing;
    }
    table.seal_when_full(&mut pool).expect("the pool should agree");
    let report = pool.report();
    assert_eq!(
        report.pages_in_use_bytes,
        TableShape { sealing: Sealing::WhenFull, ..shape }.bytes_for(n_tokens),
        "both"
    );
    assert_eq!(report.pages_in_use_bytes, table.held_bytes(), "the table knows what it holds");
    assert_eq!(report.committed_bytes, Bytes::ZERO, "nothing is kept for later");
    let other = PageTable::admit(&mut pool, &mut ranges, other, wanted).expect("the bytes of open pages are there");
    other.release(&mut pool, &mut ranges).expect("the pool should agree");
    table.release(&mut pool, &mut ranges).expect("the pool should agree");
    assert_eq!(pool.report().pages_in_use_bytes, Bytes::ZERO, "everything returned");
}

#[test]
#[should_panic(expected = "every full page should be sealed")]
fn a_session_with_open_full_pages_can_not_be_sealed_as_it_fills() {
    let (mut pool, mut ranges) = roomy();
    let shape = TableShape { codec: "rot2".parse().expect("a codec"), sealing: Sealing::OnRequest, ..SHAPE };
    let mut table = PageTable::admit(&mut pool, &mut ranges, shape, 40).expect("the pool is roomy");
    table.grow(&mut pool, &mut no_window(), 40).expect("within the admission");
    let _ = table.seal_when_full(&mut pool);
}

#[test]
#[should_panic(expected = "rows that leave a page should end on an edge")]
fn rows_beyond_the_cut_are_noticed() {
    let (mut pool, mut ranges) = roomy();
    let shape = TableShape { codec: "rot2".parse().expect("a codec"), ..SHAPE };
    let mut table = PageTable::admit(&mut pool, &mut ranges, shape, 40).expect("the pool is roomy");
    let _ = table.grow(&mut pool, &mut Window::new(shape.page, shape.num_kv_heads, 64, true), 20);
}

#[test]
fn an_admission_of_more_pages_than_32_bits_count_is_refused() {
    let (mut pool, mut ranges) = roomy();
    let shape = TableShape { num_layers: 64, num_kv_heads: 64, ..SHAPE };
    // 64 * 64 * 2^20 pages: exactly 2^32, which wraps to none.
    let error = PageTable::admit(&mut pool, &mut ranges, shape, 1 << 24).expect_err("32 TiB of 5 MiB");
    assert!(matches!(error, PoolError::DoesNotFit { .. }), "{error}");
}

/// Shapes of the sessions of [`SessionWalk`]: several codecs on two page sizes, one whose pages are as large as open
/// ones, one whose pages are larger.
fn session_shapes() -> Vec<TableShape> {
    let shape = |codec: &str, page_size, sealing| {
        let page = PageGeometry { page_size, head_dim: 32 };
        let codec: HiddenCodec = codec.parse().expect("a codec");
        codec.check(page).expect("the codec fits the page");
        TableShape { num_layers: 2, num_kv_heads: 2, page, codec, sealing }
    };
    let codecs = [("f16", 16), ("rot3", 16), ("kivi4", 32), ("f32", 16), ("lowrank:32", 32), ("k:int8,v:f16", 16)];
    let both = [Sealing::WhenFull, Sealing::OnRequest];
    codecs.into_iter().flat_map(|(codec, size)| both.map(|sealing| shape(codec, size, sealing))).collect()
}

/// A session as the model sees it: counts per list.
struct ModelSession {
    shape: TableShape,
    max_tokens: u32,
    n_tokens: u32,
    open: u32,
    sealed: u32,
    retired: u32,
    /// Pages per list that may still be taken.
    promised: (u32, u32),
    entries: (usize, usize),
    table: PageTable,
    /// Pages that the model has noted.
    pages: Vec<PageId>,
}

impl ModelSession {
    fn when_full(&self) -> bool {
        self.shape.codec.seals() && self.shape.sealing == Sealing::WhenFull
    }

    fn lists(&self) -> u64 {
        u64::from(self.shape.num_layers * self.shape.num_kv_heads)
    }

    fn size(&self) -> u32 {
        self.shape.page.page_size
    }
}

/// How often each kind of step happened.
#[derive(Debug, Default)]
struct SessionsSeen {
    admitted: u32,
    refused: u32,
    tables_full: u32,
    grown: u32,
    refused_growth: u32,
    sealed_on_request: u32,
    sealed_from_now_on: u32,
    released: u32,
}

/// Page tables of many sessions over one pool, against the same model.
struct SessionWalk {
    rng: ChaCha8Rng,
    pool: PagePool,
    ranges: TableRanges,
    /// Which table entries are taken.
    entries: Vec<bool>,
    model: Model,
    sessions: Vec<ModelSession>,
    shapes: Vec<TableShape>,
    seen: SessionsSeen,
}

impl SessionWalk {
    fn new(seed: u64) -> Self {
        let shapes = session_shapes();
        let mut sizes: Vec<Bytes> = shapes.iter().flat_map(|s| [s.open_page(), s.sealed_page()]).collect();
        sizes.sort_unstable();
        sizes.dedup();
        let smallest_page = sizes[0];
        let layout = PoolLayout { smallest_page, ..layout(Bytes::mib(2), Bytes(448 * KIB)) };
        let mut pool = PagePool::new(&layout).expect("the layout should fit its budget");
        sizes.iter().for_each(|page| pool.commit(*page, 0).expect("no pages always fit"));
        // Fewer than the pool would have, so that they run out as well.
        let n = pool.tables().0 / 4 / 10;
        let ranges = TableRanges::new(u32::try_from(n).expect("a small pool"));
        let entries = vec![false; usize::try_from(n).expect("a small pool")];
        let model = Model::new(&layout, &sizes);
        let rng = ChaCha8Rng::seed_from_u64(seed);
        let (sessions, seen) = (Vec::new(), SessionsSeen::default());
        Self { rng, pool, ranges, entries, model, sessions, shapes, seen }
    }

    fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..15 => self.admit(),
            15..70 => self.grow(),
            70..90 => self.seal(),
            _ => self.release(),
        }
    }

    fn admit(&mut self) {
        let shape = self.shapes[self.rng.random_range(0..self.shapes.len())];
        let max_tokens = self.rng.random_range(1..900_u32);
        let (all, full) = (max_tokens.div_ceil(shape.page.page_size), max_tokens / shape.page.page_size);
        let promised = match shape.sealing {
            _ if !shape.codec.seals() => (all, 0),
            Sealing::WhenFull => (1, full),
            Sealing::OnRequest => (all, full),
        };
        let lists = u64::from(shape.num_layers * shape.num_kv_heads);
        let (open, sealed) = (u64::from(promised.0) * lists, u64::from(promised.1) * lists);
        // Open pages first, then what is left for sealed ones.
        let mut expected = Ok(());
        let mut model = self.model.clone();
        for (page, n) in [(shape.open_page(), open), (shape.sealed_page(), sealed)] {
            if n > model.available(page) {
                expected = Err(page);
                break;
            }
            model.commit(page, n);
        }
        let n = usize::try_from(open + sealed).expect("few entries");
        let mut places = 0..=self.entries.len().saturating_sub(n);
        let place = places.find(|start| self.entries.get(*start..start + n).is_some_and(|e| e.iter().all(|t| !t)));
        let before = (format!("{:?}", self.pool), format!("{:?}", self.ranges));
        let result = PageTable::admit(&mut self.pool, &mut self.ranges, shape, max_tokens);
        match (result, expected, place) {
            (Ok(table), Ok(()), Some(start)) => {
                self.model = model;
                self.entries[start..start + n].fill(true);
                let (entries, pages) = ((start, n), Vec::new());
                let (n_tokens, open, sealed, retired) = (0, 0, 0, 0);
                let session = ModelSession {
                    shape,
                    max_tokens,
                    n_tokens,
                    open,
                    sealed,
                    retired,
                    promised,
                    entries,
                    table,
                    pages,
                };
                self.sessions.push(session);
                self.seen.admitted += 1;
                return;
            }
            (Err(PoolError::DoesNotFit { page, .. }), Err(expected), _) => {
                assert_eq!(page, expected, "the page size that does not fit");
                self.seen.refused += 1;
            }
            (Err(PoolError::TablesFull { .. }), Ok(()), None) => self.seen.tables_full += 1,
            (result, expected, place) => panic!("{shape:?}: {result:?}; the model expects {expected:?} at {place:?}"),
        }
        assert_eq!((format!("{:?}", self.pool), format!("{:?}", self.ranges)), before, "a refusal changes nothing");
    }

    fn pick(&mut self) -> Option<usize> {
        (!self.sessions.is_empty()).then(|| self.rng.random_range(0..self.sessions.len()))
    }

    fn grow(&mut self) {
        let Some(at) = self.pick() else { return };
        let s = &mut self.sessions[at];
        let mut n = self.rng.random_range(1..80_u32);
        if s.n_tokens + n > s.max_tokens {
            if self.rng.random_bool(0.1) {
                // Any number of rows, but whole pages, so that the cut has no say.
                let n = (s.max_tokens / s.size() + 1) * s.size() - s.n_tokens;
                let mut window = Window::new(s.shape.page, s.shape.num_kv_heads, 1000, true);
                let error = s.table.grow(&mut self.pool, &mut window, n).expect_err("beyond the admission");
                assert_eq!(error, PoolError::NotCommitted(s.shape.open_page()), "the page size");
                self.seen.refused_growth += 1;
                return;
            }
            n = s.max_tokens - s.n_tokens;
        }
        if n == 0 {
            return;
        }
        n = s.shape.cut(s.n_tokens, n);
        let mut window = Window::new(s.shape.page, s.shape.num_kv_heads, n, true);
        s.table.grow(&mut self.pool, &mut window, n).expect("growth within the admission");
        s.n_tokens += n;
        let (all, full) = (s.n_tokens.div_ceil(s.size()), s.n_tokens / s.size());
        // Pages that are filled and sealed in this step, but the first, pass through the window.
        let open = if s.when_full() { all.min(1) } else { all - s.retired };
        s.promised.0 -= open.max(s.open) - s.open;
        s.open = s.open.max(open);
        if s.when_full() {
            s.promised.1 -= full - s.sealed;
            s.sealed = full;
        }
        self.seen.grown += 1;
        self.note(at);
        self.retire(at);
    }

    fn seal(&mut self) {
        let Some(at) = self.pick() else { return };
        let most = self.rng.random_range(1..5);
        let s = &mut self.sessions[at];
        s.table.seal(&mut self.pool, most).expect("committed");
        if s.shape.codec.seals() {
            let sealed = (s.n_tokens / s.size()).min(s.sealed + most);
            s.promised.1 -= sealed - s.sealed;
            self.seen.sealed_on_request += u32::from(sealed > s.sealed);
            s.sealed = sealed;
        }
        self.note(at);
        self.retire(at);
        let s = &mut self.sessions[at];
        let all = s.sealed == s.n_tokens / s.size();
        if s.shape.sealing == Sealing::OnRequest && (all || !s.shape.codec.seals()) && self.rng.random_bool(0.3) {
            s.table.seal_when_full(&mut self.pool).expect("the pool should agree");
            s.shape.sealing = Sealing::WhenFull;
            if s.shape.codec.seals() {
                // A list that holds no open page needs one if tokens are still to come.
                let needed = u32::from(s.open == 0 && s.n_tokens < s.max_tokens);
                let returned = u64::from(s.promised.0 - needed) * s.lists();
                s.promised.0 = needed;
                self.model.uncommit(s.shape.open_page(), returned);
                self.seen.sealed_from_now_on += 1;
            }
            self.note(at);
        }
    }

    fn retire(&mut self, at: usize) {
        let s = &mut self.sessions[at];
        let before = self.pool.report().pages_in_use_bytes;
        s.table.retire(&mut self.pool).expect("the pool should agree");
        let done = s.sealed - s.retired;
        s.retired = s.sealed;
        let mut returned = Bytes::ZERO;
        if s.shape.sealing == Sealing::OnRequest {
            s.open -= done;
            returned = Bytes(u64::from(done) * s.lists() * s.shape.open_page().0);
        }
        assert_eq!(before - self.pool.report().pages_in_use_bytes, returned, "bytes of open pages that are sealed now");
        self.note(at);
    }

    fn release(&mut self) {
        let Some(at) = self.pick() else { return };
        let s = self.sessions.swap_remove(at);
        s.table.release(&mut self.pool, &mut self.ranges).expect("the pool should agree");
        s.pages.into_iter().for_each(|page| self.model.release(page));
        let lists = u64::from(s.shape.num_layers * s.shape.num_kv_heads);
        self.model.uncommit(s.shape.open_page(), u64::from(s.promised.0) * lists);
        self.model.uncommit(s.shape.sealed_page(), u64::from(s.promised.1) * lists);
        self.entries[s.entries.0..s.entries.0 + s.entries.1].fill(false);
        self.seen.released += 1;
        self.check();
    }

    /// Notes the pages that a table took and returned, and compares all numbers.
    fn note(&mut self, at: usize) {
        let s = &mut self.sessions[at];
        let mut now = BTreeMap::new();
        for (layer, head) in (0..s.shape.num_layers).flat_map(|l| (0..s.shape.num_kv_heads).map(move |h| (l, h))) {
            let (sealed, open) = s.table.list(layer, head);
            let counts = (u32::try_from(sealed.len()).expect("few"), u32::try_from(open.len()).expect("few"));
            assert_eq!(counts, (s.sealed, s.open), "sealed and open pages of {:?} at {}", s.shape, s.n_tokens);
            now.extend(sealed.iter().map(|page| (*page, s.shape.sealed_page())));
            now.extend(open.iter().map(|page| (*page, s.shape.open_page())));
        }
        for page in std::mem::take(&mut s.pages) {
            if !now.contains_key(&page) {
                self.model.release(page);
            }
        }
        s.pages = now.keys().copied().collect();
        for (page, bytes) in now {
            if !self.model.pages.contains_key(&page) {
                self.model.take(page, bytes).unwrap_or_else(|e| panic!("{e}"));
            }
        }
        let held: u64 = s.pages.iter().map(|page| self.model.pages[page].0).sum();
        assert_eq!(s.table.held_bytes(), Bytes(held), "bytes of the table's pages");
        self.check();
    }

    fn check(&self) {
        self.model.compare(&self.pool.report()).unwrap_or_else(|e| panic!("{e}"));
    }
}

#[test]
fn sessions_that_are_sealed_agree_with_the_model() {
    for seed in 0..4 {
        let mut walk = SessionWalk::new(seed);
        println!("seed {seed}");
        for _ in 0..10_000 {
            walk.step();
            walk.check();
        }
        while !walk.sessions.is_empty() {
            walk.release();
        }
        let report = walk.pool.report();
        let rest = (report.pages_in_use_bytes, report.committed_bytes, report.slack_bytes);
        assert_eq!(rest, (Bytes::ZERO, Bytes::ZERO, Bytes::ZERO), "everything was released");
        let n = walk.ranges.total();
        assert_eq!(walk.ranges.reserve(n), Some(0), "all table entries are in one piece again");
        let s = &walk.seen;
        println!("{s:?}");
        let least = [s.admitted, s.refused, s.grown, s.sealed_on_request, s.sealed_from_now_on, s.released];
        let least = least.into_iter().chain([s.tables_full, s.refused_growth]).min().unwrap_or(0);
        assert!(least >= 20, "every kind of step should have happened often: {s:?}");
    }
}
