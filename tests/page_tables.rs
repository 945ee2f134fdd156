//! Page tables of sessions over one pool: what they hold kept, sealed and open, against a model that knows only counts.
//!
//! The model decides by itself which session fits, which pages a step or an eviction takes and which promises return;
//! tables and pool have to agree on every byte after every step. Which tokens a table names is `tests/page_runs.rs`.

#[path = "common/page_admissions.rs"]
mod admissions;
#[path = "common/pool_model.rs"]
mod model;
#[path = "common/page_sharing.rs"]
mod sharing;

use std::collections::BTreeMap;

use concertina::compression::hidden::HiddenCodec;
use concertina::geometry::{Bytes, PageGeometry};
use concertina::pool::page_table::{Capacity, Layers, PageTable, TableRanges, TableShape, Window};
use concertina::pool::{PageId, PagePool, PoolError, PoolLayout, PoolReport};
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
        let mut table = admit(&mut pool, &mut ranges, shape, max_tokens).expect("the pool is roomy");
        prop_assert_eq!(pool.report().committed_bytes, shape.bytes_for(max_tokens));
        let mut n_tokens = 0;
        for n in growth {
            let n = table.cut(n);
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
                    let seen: u32 = table.seen_runs(layer, head, n_tokens - 1).iter().map(|run| run.n_tokens).sum();
                    prop_assert_eq!(seen, n_tokens, "the runs cover the list");
                }
            }
            table.retire();
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

proptest! {
    #![proptest_config(cases())]

    /// Whatever a step took that failed, the next one finds what it would have found.
    #[test]
    fn rows_that_are_taken_back_leave_no_trace(
        (num_layers, num_kv_heads) in (1u32..4, 1u32..3),
        growth in prop::collection::vec((0u32..40, 0u32..40), 1..12),
        codec in prop::sample::select(vec!["f16", "rot3", "f32"]),
        closed in any::<bool>(),
    ) {
        let (mut pool, mut ranges) = roomy();
        let shape = TableShape { num_layers, num_kv_heads, codec: codec.parse().expect("a codec"), ..SHAPE };
        let mut window = Window::new(shape.page, num_kv_heads, 40, true);
        let mut table = admit(&mut pool, &mut ranges, shape, 1_000).expect("the pool is roomy");
        if closed {
            // A list that keeps nothing does not grow.
            let kept = (0..shape.num_lists()).map(|list| (list != 0).then(Vec::new).into()).collect();
            table.keep(&mut pool, kept, &[], 7).expect("nothing is kept");
        }
        for (failing, n) in growth {
            let (before, mut clone) = (pool.report(), (pool.clone(), table.clone()));
            window.clear();
            let failing = table.cut(failing);
            table.grow(&mut pool, &mut window, failing).expect("growth within the admission");
            let after = pool.report();
            let grown = after.pages_in_use_bytes > before.pages_in_use_bytes;
            table.ungrow(&mut pool).expect("the pool should agree");
            let exact = PoolReport { peak_bytes: after.peak_bytes, pages_peak_bytes: after.pages_peak_bytes, ..before };
            prop_assert_eq!(pool.report(), exact, "all but the peak, after {} rows", failing);
            prop_assert!(!grown || after != pool.report(), "a page that was taken shows in this comparison");
            prop_assert_eq!((table.n_tokens(), table.promised_bytes()), (clone.1.n_tokens(), clone.1.promised_bytes()));
            prop_assert!(table.sealing_pages().is_empty() && (failing == 0 || table.is_dirty()), "the device may not know");
            let n = table.cut(n);
            for (pool, table) in [(&mut pool, &mut table), (&mut clone.0, &mut clone.1)] {
                window.clear();
                table.grow(pool, &mut window, n).expect("growth within the admission");
            }
            let pages = |table: &PageTable| table.page_ids().collect::<Vec<_>>();
            prop_assert_eq!(pages(&table), pages(&clone.1), "the same pages as if nothing had failed");
            table.retire();
            table.ungrow(&mut pool).expect("nothing to take back");
            prop_assert_eq!(pages(&table), pages(&clone.1), "a step that is over stays");
        }
        table.release(&mut pool, &mut ranges).expect("the pool should agree");
        prop_assert_eq!((pool.report().pages_in_use_bytes, pool.report().committed_bytes), (Bytes::ZERO, Bytes::ZERO));
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

/// Shapes of the sessions of [`SessionWalk`]: several codecs on two page sizes, one whose pages are as large as open
/// ones, one whose pages are larger.
fn session_shapes() -> Vec<TableShape> {
    let shape = |(codec, page_size): (&str, u32)| {
        let page = PageGeometry { page_size, head_dim: 32 };
        let codec: HiddenCodec = codec.parse().expect("a codec");
        codec.check(page).expect("the codec fits the page");
        TableShape { num_layers: 2, num_kv_heads: 2, page, codec, quest: None }
    };
    [("f16", 16), ("rot3", 16), ("kivi4", 32), ("f32", 16), ("lowrank:32", 32), ("k:int8,v:f16", 16)].map(shape).into()
}

/// A session as the model sees it: counts per list.
struct ModelSession {
    shape: TableShape,
    capacity: Capacity,
    tail: u32,
    /// Open and sealed pages of each list's tail.
    open: u32,
    sealed: u32,
    /// Kept pages of each list; `None` where it is closed.
    kept: Vec<Option<u32>>,
    /// Whether an eviction has filled it, or it began as another did, after which none can.
    filled: bool,
    /// Pages that may still be taken.
    promised: (u64, u64),
    entries: (usize, usize),
    table: PageTable,
    /// Pages that the model has noted.
    pages: Vec<PageId>,
}

impl ModelSession {
    fn size(&self) -> u32 {
        self.shape.page.page_size
    }

    /// Lists that have a tail.
    fn tails(&self) -> u64 {
        self.kept.iter().flatten().count() as u64
    }
}

/// What the model expects of a wish for pages.
struct Expected {
    /// The model after it, or the page size that there is too little of.
    model: Result<Model, Bytes>,
    /// First entry, and entries.
    place: Option<(usize, usize)>,
}

/// Open pages, and those in the codec, that a list's tail can need.
fn of_tail(shape: &TableShape, capacity: Capacity) -> (u64, u64) {
    let size = shape.page.page_size;
    let (all, full) = (u64::from(capacity.tail_tokens.div_ceil(size)), u64::from(capacity.tail_tokens / size));
    if shape.codec.seals() { (1, full) } else { (all, 0) }
}

/// How often each kind of step happened.
#[derive(Debug, Default)]
struct SessionsSeen {
    admitted: u32,
    refused: u32,
    tables_full: u32,
    grown: u32,
    refused_growth: u32,
    evicted: u32,
    refused_eviction: u32,
    closed_lists: u32,
    adopted: u32,
    refused_adoption: u32,
    succeeded: u32,
    refused_succession: u32,
    shared_pages: u32,
    lets_go: u32,
    backing_returned: u32,
    taken_back: u32,
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
        let n = pool.tables().0 / 4 / 20;
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
            15..65 => self.grow(),
            65..80 => self.keep(),
            80..86 => self.adopt(),
            86..88 => self.succeed(),
            88..93 => self.rewind(),
            _ => self.release(),
        }
    }

    /// A table for appended tokens, or one that an eviction can fill.
    fn admit(&mut self) {
        let shape = self.shapes[self.rng.random_range(0..self.shapes.len())];
        let mut capacity = Capacity::tokens(self.rng.random_range(1..900));
        if self.rng.random_bool(0.5) {
            let most = self.rng.random_range(1..40);
            let kept_pages = self.rng.random_range(most..=most * shape.num_lists());
            let (tail_tokens, turns) = (self.rng.random_range(1..200), self.rng.random_bool(0.5));
            capacity = Capacity { tail_tokens, kept_pages, kept_pages_of_list: most, turns, ..Capacity::default() };
        }
        let tail = of_tail(&shape, capacity);
        let lists = u64::from(shape.num_lists());
        let promised = (tail.0 * lists, tail.1 * lists + u64::from(capacity.kept_pages));
        let expected = self.expected(&shape, capacity, promised);
        let before = self.ledger();
        let result = PageTable::admit(&mut self.pool, &mut self.ranges, shape, &Layers::OWN, capacity);
        if let Some((table, entries)) = self.settle(result, expected, &before) {
            let kept = vec![Some(0); shape.num_lists() as usize];
            let (pages, filled, tail) = (Vec::new(), false, 0);
            let session = ModelSession {
                shape,
                capacity,
                tail,
                open: 0,
                sealed: 0,
                kept,
                filled,
                promised,
                entries,
                table,
                pages,
            };
            self.sessions.push(session);
            self.seen.admitted += 1;
        }
    }

    /// What a refusal must leave as it is.
    fn ledger(&self) -> (PoolReport, String) {
        (self.pool.report(), format!("{:?}", self.ranges))
    }

    /// What becomes of a wish for so many pages: the model after it, or the page size that there is too little of; and where its
    /// entries go.
    fn expected(&self, shape: &TableShape, capacity: Capacity, (open, in_codec): (u64, u64)) -> Expected {
        // Open pages first, then what is left for those in the codec.
        let mut model = self.model.clone();
        let tail = of_tail(shape, capacity);
        let of_list = tail.0 + tail.1 + u64::from(capacity.kept_pages_of_list);
        let n = usize::try_from(of_list * u64::from(shape.num_lists())).expect("few entries");
        let mut places = 0..=self.entries.len().saturating_sub(n);
        let place = places.find(|start| self.entries.get(*start..start + n).is_some_and(|e| e.iter().all(|t| !t)));
        for (page, n) in [(shape.open_page(), open), (shape.sealed_page(), in_codec)] {
            if n > model.available(page) {
                return Expected { model: Err(page), place: None };
            }
            model.commit(page, n);
        }
        Expected { model: Ok(model), place: place.map(|start| (start, n)) }
    }

    /// Compares a wish's outcome with what was expected; the table and its entries where it was granted.
    fn settle(
        &mut self,
        result: Result<PageTable, PoolError>,
        expected: Expected,
        before: &(PoolReport, String),
    ) -> Option<(PageTable, (usize, usize))> {
        match (result, expected.model, expected.place) {
            (Ok(table), Ok(model), Some((start, n))) => {
                self.model = model;
                self.entries[start..start + n].fill(true);
                return Some((table, (start, n)));
            }
            (Err(PoolError::DoesNotFit { page, .. }), Err(expected), _) => {
                assert_eq!(page, expected, "the page size that does not fit");
                self.seen.refused += 1;
            }
            (Err(PoolError::TablesFull { .. }), Ok(_), None) => self.seen.tables_full += 1,
            (result, _, place) => panic!("{result:?}; the model expects entries at {place:?}"),
        }
        assert_eq!(&self.ledger(), before, "a refusal changes nothing");
        None
    }

    fn pick(&mut self) -> Option<usize> {
        (!self.sessions.is_empty()).then(|| self.rng.random_range(0..self.sessions.len()))
    }

    fn grow(&mut self) {
        let Some(at) = self.pick() else { return };
        let s = &mut self.sessions[at];
        let max_tokens = s.capacity.tail_tokens;
        let mut n = self.rng.random_range(1..80_u32);
        if s.tail + n > max_tokens {
            if self.rng.random_bool(0.1) {
                // Any number of rows, but whole pages, so that the cut has no say.
                let n = (max_tokens / s.size() + 1) * s.size() - s.tail;
                let mut window = Window::new(s.shape.page, s.shape.num_kv_heads, 1000, true);
                let error = s.table.grow(&mut self.pool, &mut window, n).expect_err("beyond the admission");
                assert_eq!(error, PoolError::NotCommitted(s.shape.open_page()), "the page size");
                self.seen.refused_growth += 1;
                return;
            }
            n = max_tokens - s.tail;
        }
        if n == 0 {
            return;
        }
        n = s.table.cut(n);
        let mut window = Window::new(s.shape.page, s.shape.num_kv_heads, n, true);
        s.table.grow(&mut self.pool, &mut window, n).expect("growth within the admission");
        s.tail += n;
        let (all, full) = (s.tail.div_ceil(s.size()), s.tail / s.size());
        // Pages that are filled and sealed in this step, but the first, pass through the window.
        let (open, sealed) = if s.shape.codec.seals() { (1, full) } else { (all.max(s.open), 0) };
        s.promised.0 -= u64::from(open - s.open) * s.tails();
        s.promised.1 -= u64::from(sealed - s.sealed) * s.tails();
        (s.open, s.sealed) = (open, sealed);
        self.seen.grown += 1;
        self.note(at);
        let before = self.pool.report();
        self.sessions[at].table.retire();
        assert_eq!(self.pool.report(), before, "the open page stays for what comes next");
        self.note(at);
    }

    /// An eviction fills a table: lists keep unequally much, some nothing for good.
    fn keep(&mut self) {
        let Some(at) = self.pick() else { return };
        let s = &mut self.sessions[at];
        if s.tail > 0 || s.open > 0 || s.filled {
            return;
        }
        let size = s.shape.page.page_size;
        let Capacity { kept_pages, kept_pages_of_list, .. } = s.capacity;
        let mut left = kept_pages;
        let mut kept: Vec<Option<Vec<u32>>> = Vec::new();
        for _ in 0..s.shape.num_lists() {
            let most = left.min(kept_pages_of_list) * size;
            let n = self.rng.random_range(0..=most);
            left -= n.div_ceil(size);
            let closes = n == 0 || self.rng.random_bool(0.05);
            left += if closes { n.div_ceil(size) } else { 0 };
            kept.push((!closes).then(|| (0..n).map(|token| token * 3).collect()));
        }
        if self.rng.random_bool(0.2) {
            let beyond = kept_pages_of_list * size + 1;
            kept[0] = Some((0..beyond).collect());
            let before = self.pool.report();
            let error = s
                .table
                .keep(&mut self.pool, kept.into_iter().map(Into::into).collect(), &[], beyond)
                .expect_err("beyond the admission");
            assert_eq!(error, PoolError::NotCommitted(s.shape.sealed_page()), "the page size");
            assert_eq!(self.pool.report(), before, "a refusal changes nothing");
            self.seen.refused_eviction += 1;
            return;
        }
        let pages = |tokens: &Vec<u32>| u32::try_from(tokens.len()).expect("few tokens").div_ceil(size);
        s.kept = kept.iter().map(|tokens| tokens.as_ref().map(pages)).collect();
        s.table
            .keep(&mut self.pool, kept.into_iter().map(Into::into).collect(), &[], 10_000)
            .expect("within the admission");
        s.filled = true;
        let closed = s.kept.len() as u64 - s.tails();
        self.seen.closed_lists += u32::try_from(closed).expect("few lists");
        // What was promised to the tails of closed lists, and to tokens that did not stay.
        let lists = s.kept.len() as u64;
        let of_tails = (s.promised.0 / lists, (s.promised.1 - u64::from(kept_pages)) / lists);
        let taken: u64 = s.kept.iter().flatten().map(|pages| u64::from(*pages)).sum();
        let returned = (closed * of_tails.0, closed * of_tails.1 + u64::from(kept_pages) - taken);
        s.promised = (s.promised.0 - returned.0, s.promised.1 - returned.1 - taken);
        self.model.uncommit(s.shape.open_page(), returned.0);
        self.model.uncommit(s.shape.sealed_page(), returned.1);
        self.seen.evicted += 1;
        self.note(at);
    }

    fn rewind(&mut self) {
        let Some(at) = self.pick() else { return };
        let s = &mut self.sessions[at];
        if s.shape.codec.seals() || s.tail == 0 {
            return;
        }
        // Pages that others name too stay whole.
        let lists = (0..s.shape.num_layers).flat_map(|l| (0..s.shape.num_kv_heads).map(move |h| (l, h)));
        let shared = |page: &PageId| self.model.holders[page] > 1;
        let whole = lists.map(|(l, h)| s.table.list(l, h).1.iter().rposition(shared).map_or(0, |at| at + 1)).max();
        let whole = u32::try_from(whole.unwrap_or(0)).expect("few pages") * s.size();
        if whole >= s.tail {
            return;
        }
        let n = self.rng.random_range(1..=s.tail - whole);
        let before = self.pool.report();
        s.table.rewind(n);
        s.tail -= n;
        assert_eq!(self.pool.report(), before, "pages stay for what comes next");
        self.seen.taken_back += 1;
        self.note(at);
    }

    fn release(&mut self) {
        if let Some(at) = self.pick() {
            self.release_at(at);
            self.seen.released += 1;
        }
    }

    fn release_at(&mut self, at: usize) {
        let s = self.sessions.swap_remove(at);
        s.table.release(&mut self.pool, &mut self.ranges).expect("the pool should agree");
        for page in s.pages {
            let bytes = self.model.pages[&page];
            if !self.model.release(page) {
                self.seen.lets_go += 1;
                self.seen.backing_returned += u32::from(s.capacity.turns);
                self.model.uncommit(bytes, u64::from(s.capacity.turns));
            }
        }
        self.model.uncommit(s.shape.open_page(), s.promised.0);
        self.model.uncommit(s.shape.sealed_page(), s.promised.1);
        self.entries[s.entries.0..s.entries.0 + s.entries.1].fill(false);
        self.check();
    }

    /// Notes the pages that a table took, and compares all numbers.
    fn note(&mut self, at: usize) {
        let s = &mut self.sessions[at];
        let mut now = BTreeMap::new();
        let lists = (0..s.shape.num_layers).flat_map(|l| (0..s.shape.num_kv_heads).map(move |h| (l, h)));
        for ((layer, head), kept) in lists.zip(&s.kept) {
            let (in_codec, open) = s.table.list(layer, head);
            let counts = (u32::try_from(in_codec.len()).expect("few"), u32::try_from(open.len()).expect("few"));
            let expected = kept.map_or((0, 0), |kept| (kept + s.sealed, s.open));
            assert_eq!(counts, expected, "pages in the codec and open ones of {:?} with a tail of {}", s.shape, s.tail);
            now.extend(in_codec.iter().map(|page| (*page, s.shape.sealed_page())));
            now.extend(open.iter().map(|page| (*page, s.shape.open_page())));
        }
        assert!(s.pages.iter().all(|page| now.contains_key(page)), "a table returns no page before it is released");
        // A page that it did not name before is nobody's.
        for (page, bytes) in now.iter().filter(|(page, _)| !s.pages.contains(page)) {
            self.model.take(*page, *bytes).unwrap_or_else(|e| panic!("{e}"));
        }
        s.pages = now.into_keys().collect();
        let held: u64 = s.pages.iter().map(|page| self.model.pages[page].0).sum();
        assert_eq!(s.table.held_bytes(), Bytes(held), "bytes of the table's pages");
        self.check();
    }

    fn check(&self) {
        self.model.compare(&self.pool.report()).unwrap_or_else(|e| panic!("{e}"));
    }
}

#[test]
fn sessions_that_are_evicted_from_agree_with_the_model() {
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
        let least = [s.admitted, s.refused, s.tables_full, s.grown, s.refused_growth, s.evicted, s.refused_eviction];
        let shared = [
            s.adopted,
            s.refused_adoption,
            s.succeeded,
            s.refused_succession,
            s.shared_pages,
            s.lets_go,
            s.backing_returned,
        ];
        let least =
            least.into_iter().chain([s.closed_lists, s.taken_back, s.released]).chain(shared).min().unwrap_or(0);
        assert!(least >= 20, "every kind of step should have happened often: {s:?}");
    }
}
