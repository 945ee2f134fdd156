//! The page pool against a model that is too simple to be wrong: a map of pages, and counts.
//!
//! The model decides by itself which commitment fits, from the pages that it knows of; the pool has to agree on every
//! decision and on every byte after every step.

#[path = "common/pool_model.rs"]
mod model;

use std::str::FromStr as _;

use concertina::geometry::{Bytes, CELL_BYTES};
use concertina::pool::page_table::TableRanges;
use concertina::pool::{PageId, PagePool, PoolError, PoolLayout};
use model::{KIB, Model, SLAB, layout, pages_per_slab};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Sizes that divide a slab, one that leaves a rest, and a whole slab.
const PAGES: [Bytes; 4] = [Bytes(2 * KIB), Bytes(5 * KIB), Bytes(16 * KIB), SLAB];

/// How often each kind of step happened, so that a walk that never got anywhere does not pass.
#[derive(Debug, Default)]
struct Seen {
    refused_commits: u32,
    uncommits: u32,
    refused_uncommits: u32,
    takes: u32,
    refused_takes: u32,
    shares: u32,
    releases: u32,
    /// Releases of pages that other tables still name.
    lets_go: u32,
    refused_releases: u32,
    emptied: u32,
}

struct Walk {
    rng: ChaCha8Rng,
    pool: PagePool,
    model: Model,
    seen: Seen,
    /// Released pages, to be released again.
    stale: Vec<PageId>,
}

impl Walk {
    fn new(seed: u64) -> Self {
        let layout = layout(Bytes::mib(5), Bytes(448 * KIB));
        let mut pool = PagePool::new(&layout).expect("the layout should fit its budget");
        // Page sizes are registered up front, so that a refused step can be shown to change nothing at all.
        PAGES.iter().for_each(|page| pool.commit(*page, 0).expect("no pages always fit"));
        let rng = ChaCha8Rng::seed_from_u64(seed);
        Self { rng, pool, model: Model::new(&layout, &PAGES), seen: Seen::default(), stale: Vec::new() }
    }

    /// Runs what must be refused, and checks that nothing moved.
    fn refused<T>(&mut self, call: impl FnOnce(&mut PagePool) -> Result<T, PoolError>) -> PoolError {
        let before = self.rng.random_bool(0.01).then(|| format!("{:?}", self.pool));
        let Err(error) = call(&mut self.pool) else { panic!("the call should be refused: {:?}", self.model) };
        if let Some(before) = before {
            assert_eq!(before, format!("{:?}", self.pool), "a refused call should change nothing: {error}");
        }
        error
    }

    fn step(&mut self, filling: bool) {
        let page = PAGES[self.rng.random_range(0..PAGES.len())];
        let weights = if filling { [15, 3, 55, 6, 14] } else { [8, 10, 25, 6, 44] };
        let mut draw = self.rng.random_range(0..100);
        let choice = weights.iter().position(|w| {
            let here = draw < *w;
            draw -= w;
            here
        });
        match choice {
            Some(0) => self.commit(page),
            Some(1) => self.uncommit(page),
            Some(2) => self.take(page),
            Some(3) => self.share_one(),
            Some(_) => self.release_one(),
            None => self.misuse(),
        }
    }

    fn commit(&mut self, page: Bytes) {
        let available = self.model.available(page);
        // Mostly a little, sometimes about all there is.
        let most = if self.rng.random_bool(0.1) { available + 2 } else { 2 * pages_per_slab(page) };
        let n = self.rng.random_range(0..=most);
        let pages = u32::try_from(n).expect("the test's pool is small");
        if n <= available {
            self.pool.commit(page, pages).unwrap_or_else(|e| panic!("{n} pages should fit {available}: {e}"));
            self.model.commit(page, n);
            return;
        }
        self.seen.refused_commits += 1;
        let needed = Bytes(n * page.0);
        let capacity = self.model.arenas.iter().copied().sum();
        let expected = PoolError::DoesNotFit { pages, page, needed, available: Bytes(available * page.0), capacity };
        assert_eq!(self.refused(|pool| pool.commit(page, pages)), expected, "the refusal should carry the numbers");
    }

    fn uncommit(&mut self, page: Bytes) {
        let committed = self.model.committed[&page];
        let n = self.rng.random_range(0..=committed + 1);
        let pages = u32::try_from(n).expect("the test's pool is small");
        if n > committed {
            let error = self.refused(|pool| pool.uncommit(page, pages));
            assert_eq!(error, PoolError::NotCommitted(page), "more than was committed");
            self.seen.refused_uncommits += 1;
        } else {
            self.pool.uncommit(page, pages).expect("commitments can be given back");
            self.model.uncommit(page, n);
            self.seen.uncommits += 1;
        }
    }

    fn take(&mut self, page: Bytes) {
        // Beyond the number of arenas on purpose: the pool wraps.
        let preferred = self.rng.random_range(0..2 * self.model.arenas.len());
        if self.model.committed[&page] == 0 {
            let error = self.refused(|pool| pool.take(page, preferred));
            assert_eq!(error, PoolError::NotCommitted(page), "nothing is committed");
            self.seen.refused_takes += 1;
            return;
        }
        let id = self.pool.take(page, preferred).unwrap_or_else(|e| panic!("a committed page should exist: {e}"));
        self.model.take(id, page).unwrap_or_else(|e| panic!("{e}"));
        self.seen.takes += 1;
    }

    /// Some page that is in use.
    fn some_page(&mut self) -> Option<PageId> {
        // A random place in the pool's address range, so that no list of ids has to be kept.
        let arena = u16::try_from(self.rng.random_range(0..self.model.arenas.len())).expect("arenas are few");
        let from = PageId { arena, cell: self.rng.random_range(0..28_672) };
        self.model.pages.range(from..).next().or(self.model.pages.iter().next()).map(|(id, _)| *id)
    }

    fn share_one(&mut self) {
        let Some(id) = self.some_page() else { return };
        self.pool.share(id).expect("a page in use can be shared");
        self.model.share(id);
        assert_eq!(u64::from(self.pool.holders(id)), self.model.holders[&id], "tables that name it");
        self.seen.shares += 1;
    }

    fn release_one(&mut self) {
        let Some(id) = self.some_page() else {
            self.seen.emptied += 1;
            return;
        };
        let returned = self.pool.release(id).expect("a page in use can be released");
        assert_eq!(returned, self.model.release(id), "a page returns with the last that names it");
        self.seen.releases += 1;
        if !returned {
            self.seen.lets_go += 1;
            return;
        }
        self.stale.push(id);
        if self.stale.len() > 64 {
            let at = self.rng.random_range(0..64);
            self.stale.swap_remove(at);
        }
    }

    /// Releases or shares a page that is not in use: released before, in a foreign arena, beyond the end, or inside another page.
    fn misuse(&mut self) {
        let kind = self.rng.random_range(0..4);
        let some = self.model.pages.keys().next_back().copied();
        let id = match (kind, some) {
            (0, Some(id)) => PageId { cell: id.cell + 1, ..id },
            (1, _) => PageId { arena: self.rng.random_range(100..=u16::MAX), cell: 0 },
            (2, _) => PageId { arena: 0, cell: self.rng.random_range(1 << 20..=u32::MAX) },
            _ if self.stale.is_empty() => return,
            _ => self.stale[self.rng.random_range(0..self.stale.len())],
        };
        if self.model.pages.contains_key(&id) {
            return;
        }
        let shares = self.rng.random_bool(0.5);
        let error = self.refused(|pool| if shares { pool.share(id) } else { pool.release(id).map(drop) });
        assert_eq!(error, PoolError::NotInUse { page: id }, "the page is not in use");
        assert_eq!(self.pool.holders(id), 0, "nobody names it");
        self.seen.refused_releases += 1;
    }

    /// On a copy: every commitment can be taken, in any order and wherever preferred.
    fn check_commitments(&mut self) {
        let (mut pool, mut model) = (self.pool.clone(), self.model.clone());
        let mut promised: Vec<Bytes> = Vec::new();
        for (page, n) in &model.committed {
            promised.extend((0..*n).map(|_| *page));
        }
        while !promised.is_empty() {
            let page = promised.swap_remove(self.rng.random_range(0..promised.len()));
            let preferred = self.rng.random_range(0..model.arenas.len());
            let id = pool.take(page, preferred).expect("every committed page can be taken");
            model.take(id, page).unwrap_or_else(|e| panic!("{e}"));
        }
        model.compare(&pool.report()).unwrap_or_else(|e| panic!("{e}"));
    }

    fn check(&self) {
        self.model.compare(&self.pool.report()).unwrap_or_else(|e| panic!("{e}"));
    }

    /// Releases everything, and shows that each page size alone can then have every slab.
    fn finish(&mut self) {
        while let Some(id) = self.model.pages.keys().next().copied() {
            self.pool.release(id).expect("a page in use can be released");
            self.model.release(id);
        }
        for page in PAGES {
            let n = self.model.committed[&page];
            self.pool.uncommit(page, u32::try_from(n).expect("small")).expect("commitments can be given back");
            self.model.uncommit(page, n);
        }
        self.check();
        let report = self.pool.report();
        assert_eq!(report.pages_in_use_bytes, Bytes::ZERO, "everything was released");
        assert_eq!(report.slack_bytes, Bytes::ZERO, "every slab should be free again");
        let slabs = report.arenas_bytes.0 / SLAB.0;
        for page in PAGES {
            let n = u32::try_from(slabs * pages_per_slab(page)).expect("the test's pool is small");
            assert!(self.pool.commit(page, n + 1).is_err(), "{n} pages of {page} are all there are");
            self.pool.commit(page, n).expect("one page size should get the whole capacity");
            self.pool.uncommit(page, n).expect("commitments can be given back");
        }
    }
}

#[test]
fn a_hundred_thousand_random_steps_agree_with_the_model() {
    for seed in 0..4 {
        let mut walk = Walk::new(seed);
        // A panic below shows this line with it, which is enough to repeat the walk.
        println!("seed {seed}");
        for step in 0..25_000 {
            walk.step(step / 1_500 % 2 == 0);
            walk.check();
            if step % 500 == 0 {
                walk.check_commitments();
            }
        }
        walk.finish();
        let s = &walk.seen;
        let least = [s.refused_commits, s.uncommits, s.refused_uncommits, s.takes, s.refused_takes, s.releases];
        let least = least.into_iter().chain([s.shares, s.lets_go, s.refused_releases]).min().unwrap_or(0);
        assert!(least >= 50, "every kind of step should have happened often: {s:?}");
        let (peak, capacity) = (walk.model.peak_pages, walk.model.arenas.iter().copied().sum::<Bytes>());
        assert!(2 * peak.0 > capacity.0, "the walk should have filled the pool: {peak} of {capacity}");
    }
}

#[test]
fn the_model_notices_a_wrong_number_and_an_overlap() {
    let mut walk = Walk::new(7);
    (0..2_000).for_each(|_| walk.step(true));
    walk.check();
    let mut report = walk.pool.report();
    report.slack_bytes += Bytes(16);
    let error = walk.model.compare(&report).expect_err("a wrong number should be noticed");
    assert!(error.starts_with("slack"), "{error}");
    let mut report = walk.pool.report();
    report.shared_bytes += Bytes(16);
    let error = walk.model.compare(&report).expect_err("a wrong number should be noticed");
    assert!(error.starts_with("shared"), "{error}");
    let (id, page) = walk.model.pages.iter().next().map(|(id, page)| (*id, *page)).expect("pages are in use");
    let inside = PageId { cell: id.cell + 1, ..id };
    assert!(walk.model.clone().take(inside, page).is_err(), "an overlap should be noticed");
    let outside = PageId { arena: 0, cell: u32::MAX };
    assert!(walk.model.clone().take(outside, page).is_err(), "a page after the arena's end should be noticed");
    assert!(walk.model.clone().take(id, page).is_err(), "the same page twice should be noticed");
}

#[test]
fn a_budget_larger_than_one_binding_is_spread_over_arenas() {
    let layout = layout(Bytes::mib(5), Bytes::mib(1));
    let mut pool = PagePool::new(&layout).expect("the layout should fit its budget");
    let arenas: Vec<_> = pool.arena_bytes().collect();
    assert_eq!(arenas.len(), 5, "four whole arenas and a rest: {arenas:?}");
    assert!(arenas.iter().all(|bytes| *bytes <= Bytes::mib(1)), "no arena exceeds a binding: {arenas:?}");
    let page = Bytes(16 * KIB);
    let all = u32::try_from(pool.capacity().0 / page.0).expect("small");
    pool.commit(page, all).expect("all pages fit");
    let first: Vec<_> = (0..5).map(|preferred| pool.take(page, preferred).expect("committed").arena).collect();
    assert_eq!(first, [0, 1, 2, 3, 4], "each page should come from the preferred arena while that has room");
    let rest: Vec<_> = (5..all).map(|_| pool.take(page, 2).expect("committed")).collect();
    let spilled = rest.iter().filter(|id| id.arena != 2).count();
    assert!(spilled > 0 && rest[..50].iter().all(|id| id.arena == 2), "pages spill only when the arena is full");
    assert_eq!(pool.report().pages_in_use_bytes, pool.capacity(), "every byte of every arena is in use");
}

/// The budget that a refusal tells the user to give, as the user would read it.
fn advised_budget(error: &PoolError) -> Bytes {
    let text = error.to_string();
    let (_, advice) = text.split_once("give at least ").expect("the refusal should name a budget");
    Bytes::from_str(advice).expect("the named budget should be a size")
}

#[test]
fn a_slab_larger_than_a_binding_is_refused_without_advising_a_budget_that_fails_too() {
    let small = PoolLayout { max_binding: Bytes(32 * KIB), ..layout(Bytes::mib(5), Bytes::mib(1)) };
    let error = small.split().expect_err("no slab fits a binding");
    if error.to_string().contains("give at least ") {
        let larger = PoolLayout { budget: advised_budget(&error), ..small };
        assert!(larger.split().is_ok(), "the advice should help: {error}");
    }
}

/// The same cases in every run, and no files of failures beside the tests.
fn cases() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, rng_seed: RngSeed::Fixed(1), ..ProptestConfig::with_cases(1_000) }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn a_split_stays_within_the_budget_or_names_one_that_works(
        (budget, staging, scratch) in (0u64..1 << 27, 0u64..1 << 24, 0u64..1 << 24),
        (slab_cells, binding_slabs, page_share) in (64u64..1 << 16, 1u64..40, 1u64..64),
        fixed_entries in 0u32..1 << 12,
    ) {
        let slab = Bytes(slab_cells * CELL_BYTES);
        let layout = PoolLayout {
            budget: Bytes(budget),
            staging: Bytes(staging),
            scratch: Bytes(scratch),
            max_binding: Bytes(binding_slabs * slab.0 + 4),
            slab,
            smallest_page: Bytes((slab_cells / page_share).max(1) * CELL_BYTES),
            fixed_entries,
        };
        match layout.split() {
            Ok((arenas, tables)) => {
                let pages: Bytes = arenas.iter().copied().sum();
                prop_assert!(layout.staging + layout.scratch + tables + pages <= layout.budget, "over the budget");
                prop_assert!(arenas.iter().all(|a| a.0 > 0 && a.0 % slab.0 == 0 && *a <= layout.max_binding));
                let entries = pages.0 / layout.smallest_page.0 + u64::from(fixed_entries);
                prop_assert!(tables.0 >= 4 * entries, "every page and every fixed entry needs its place");
                let pool = PagePool::new(&layout).expect("what can be split can be made");
                prop_assert!(pool.report().allocated_bytes <= layout.budget);
            }
            Err(error) => {
                let PoolError::BudgetTooSmall { fixed, slab, .. } = error else { panic!("unexpected: {error}") };
                prop_assert!(budget < (fixed + slab).0, "a budget as large as the advice was refused");
                let exact = PoolLayout { budget: fixed + slab, ..layout.clone() };
                prop_assert!(exact.split().is_ok(), "the numbers of the refusal should be enough");
                let printed = PoolLayout { budget: advised_budget(&error), ..layout };
                prop_assert!(printed.split().is_ok(), "the printed advice should be enough: {}", error);
            }
        }
    }

    #[test]
    fn table_ranges_are_first_fit_and_join_again(steps in prop::collection::vec((any::<bool>(), 1u32..24), 1..200)) {
        const TOTAL: u32 = 64;
        let mut ranges = TableRanges::new(TOTAL);
        let mut taken = [false; TOTAL as usize];
        let mut held: Vec<(u32, u32)> = Vec::new();
        for (reserve, n) in steps {
            if reserve {
                let fits = |start: u32| taken[start as usize..(start + n) as usize].iter().all(|t| !t);
                let expected = (0..=TOTAL - n).find(|start| fits(*start));
                prop_assert_eq!(ranges.reserve(n), expected, "first fit of {} in {:?}", n, held);
                if let Some(start) = expected {
                    taken[start as usize..(start + n) as usize].fill(true);
                    held.push((start, n));
                }
            } else if !held.is_empty() {
                let (start, length) = held.swap_remove(n as usize % held.len());
                ranges.release(start, length);
                taken[start as usize..(start + length) as usize].fill(false);
            }
        }
        for (start, length) in held {
            ranges.release(start, length);
        }
        prop_assert_eq!(ranges.reserve(TOTAL), Some(0), "all entries should be in one piece again");
    }
}
