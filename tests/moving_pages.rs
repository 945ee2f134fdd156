//! Caches that leave the device and come back, bit by bit: pages in one run and scattered, of several arenas and sizes, in
//! chunks of any size, copied run by run and packed.

mod common;

use std::collections::BTreeSet;

use common::sessions::{compression, config, request, tight};
use concertina::engine::{Engine, EngineConfig};
use concertina::eval::prompt::{Driver, Probe};
use concertina::geometry::Bytes;
use concertina::pool::PageId;
use concertina::schedule::{Backend as _, Caches, Direction, SessionId, StepPlan, Store};

struct World {
    engine: Engine<'static>,
    caches: Caches,
    _folder: tempfile::TempDir,
}

impl World {
    /// Room for six sessions of 200 tokens in arenas of two or four slabs.
    fn new(text: &str, max_arena: Option<Bytes>) -> Self {
        let weights = common::tiny_model(4);
        let config = EngineConfig { swap_chunk: Bytes(256 << 10), max_arena, ..config(&weights, &[text]) };
        let config = tight(&weights, &config, &request(0, 200, 0, 200, text), 60);
        let (mut engine, caches) = Engine::new(common::device(), &weights, &config).expect("the budget suffices");
        let folder = tempfile::tempdir().expect("a folder");
        engine.keep_in(folder.path().to_owned());
        Self { engine, caches, _folder: folder }
    }

    fn pages(&self, id: SessionId) -> Vec<(PageId, Bytes)> {
        self.caches.tables[&id].page_ids().collect()
    }

    /// Runs of pages that lie together.
    fn runs(&self, id: SessionId) -> usize {
        let mut pages = self.pages(id);
        pages.sort_unstable();
        let follows = |(a, bytes): &(PageId, Bytes), (b, _): &(PageId, Bytes)| {
            a.arena == b.arena && u64::from(b.cell - a.cell) * 16 == bytes.0
        };
        pages.chunk_by(follows).count()
    }

    /// What lists hold, decoded page by page: knows nothing of moving pages.
    fn rows(&self, id: SessionId) -> Vec<u32> {
        let table = &self.caches.tables[&id];
        let of = |list: u32| {
            let (k, v) = self.engine.held_rows(table, list / 2, list % 2).expect("they are read");
            k.into_iter().chain(v).map(f32::to_bits)
        };
        (0..4).flat_map(of).collect()
    }

    /// Its pages in order, read `chunk` bytes at a time.
    fn read(&mut self, id: SessionId, chunk: Bytes) -> Vec<u8> {
        self.caches.abilities.swap_bytes = chunk;
        self.engine.read_cache(id, &self.caches).expect("it is read").0
    }

    /// Moves whole caches, of each at most `chunk` bytes in a step; the steps.
    fn move_all(&mut self, ids: &[(SessionId, Store)], direction: Direction, chunk: Bytes) -> usize {
        let mut from = vec![Some(0); ids.len()];
        let mut steps = 0;
        while from.iter().any(Option::is_some) {
            let mut plan = StepPlan::default();
            for ((id, store), from) in ids.iter().zip(&mut from) {
                let Some(at) = *from else { continue };
                let transfer = self.caches.transfer(*id, direction, at, chunk);
                *from = (!transfer.last).then_some(transfer.pages.end);
                plan.transfers.push(concertina::schedule::Transfer { store: *store, ..transfer });
            }
            let result = self.engine.execute(&plan, &mut self.caches).expect("the step runs");
            assert!(result.lost.is_empty(), "everything is kept");
            steps += 1;
        }
        self.engine.settle().expect("nothing is lost");
        steps
    }
}

/// A session that is read in one step.
fn in_one_run(world: &mut World, text: &str) -> Vec<SessionId> {
    let mut driver = Driver::new(&mut world.engine, &mut world.caches);
    let probe = driver.admit(&compression(text), 64, 64).expect("it fits");
    driver.prefill(probe, &common::tokens(1, 64, 200), 0..0, 64, &mut |_, _| ()).expect("the step runs");
    vec![probe.session()]
}

/// Two sessions that grew beside each other, one of them in the gaps that a third left.
fn scattered(world: &mut World, text: &str) -> Vec<SessionId> {
    let mut driver = Driver::new(&mut world.engine, &mut world.caches);
    let admit = |driver: &mut Driver<'_, '_>| driver.admit(&compression(text), 200, 200).expect("it fits");
    let read = |driver: &mut Driver<'_, '_>, probe: Probe, seed: u64, n: usize| {
        driver.prefill(probe, &common::tokens(seed, n, 200), 0..0, 32, &mut |_, _| ()).expect("the step runs");
    };
    let [gone, first] = [admit(&mut driver), admit(&mut driver)];
    for at in 0..3 {
        read(&mut driver, gone, at, 32);
        read(&mut driver, first, 10 + at, 32);
    }
    driver.release(gone).expect("the pool agrees");
    let second = admit(&mut driver);
    for at in 0..3 {
        read(&mut driver, second, 20 + at, 40);
        read(&mut driver, first, 30 + at, 17);
    }
    vec![first.session(), second.session()]
}

/// Out and back, in chunks of so many bytes and with runs from so many bytes on copied by themselves. Steps one way; caches that
/// got other pages; and caches whose pages held something else before they came back.
fn there_and_back(
    world: &mut World,
    text: &str,
    ids: &[SessionId],
    chunk: Bytes,
    shortest: Bytes,
) -> (usize, usize, usize) {
    let what = format!("{text} in chunks of {chunk}, runs from {shortest} on");
    let largest = world.pages(ids[0]).iter().map(|(_, bytes)| *bytes).max().expect("it has pages");
    // A chunk of one page has one order only.
    world.engine.set_shortest_run(Bytes(u64::MAX));
    let rows: Vec<_> = ids.iter().map(|id| world.rows(*id)).collect();
    let bytes: Vec<_> = ids.iter().map(|id| world.read(*id, largest)).collect();
    world.engine.set_shortest_run(shortest);
    for (id, bytes) in ids.iter().zip(&bytes) {
        assert_eq!(world.read(*id, chunk), *bytes, "{what}: read where it is");
    }
    let stores = [Store::Host, Store::Disk];
    let moving: Vec<_> = ids.iter().copied().zip(stores).collect();
    let steps = world.move_all(&moving, Direction::Out, chunk);
    for (id, bytes) in ids.iter().zip(&bytes) {
        let kept = world.engine.host_cache(*id).expect("nothing is lost").expect("it left");
        assert_eq!(kept.pages.all().expect("it is read"), *bytes, "{what}: pages in the order of the table");
    }
    // One that stays, without which numbers of those that are away would be given out again.
    let mut driver = Driver::new(&mut world.engine, &mut world.caches);
    let stays = driver.admit(&compression(text), 150, 150).expect("it fits");
    let before: Vec<_> = ids.iter().map(|id| world.pages(*id)).collect();
    let away: Vec<_> = ids.iter().map(|id| (*id, world.caches.suspend(*id).expect("the pool agrees"))).collect();
    // Others take all pages that there are, and write into them.
    let mut driver = Driver::new(&mut world.engine, &mut world.caches);
    let others: Vec<_> = std::iter::from_fn(|| driver.admit(&compression(text), 150, 150).ok()).collect();
    for (probe, seed) in std::iter::once(&stays).chain(&others).zip(40..) {
        driver.prefill(*probe, &common::tokens(seed, 150, 200), 0..0, 64, &mut |_, _| ()).expect("the step runs");
    }
    others.into_iter().for_each(|probe| driver.release(probe).expect("the pool agrees"));
    for (id, suspended) in away.iter().rev() {
        world.caches.resume(*id, suspended).expect("there is room");
    }
    let elsewhere = ids.iter().zip(&before).filter(|(id, before)| world.pages(**id) != **before).count();
    let lost = ids.iter().zip(&rows).filter(|(id, rows)| world.rows(**id) != **rows).count();
    world.move_all(&moving, Direction::In, chunk);
    for ((id, bytes), rows) in ids.iter().zip(&bytes).zip(&rows) {
        assert!(world.engine.host_cache(*id).expect("nothing is lost").is_none(), "{what}: it is back");
        assert_eq!(world.rows(*id), *rows, "{what}: what attention reads");
        assert_eq!(world.read(*id, largest), *bytes, "{what}: every bit");
    }
    world.caches.release(stays.session()).expect("the pool agrees");
    (steps, elsewhere, lost)
}

/// Every chunk size with every way of copying.
fn every_way(world: &mut World, text: &str, ids: &[SessionId]) {
    let page = world.pages(ids[0]).iter().map(|(_, bytes)| *bytes).max().expect("it has pages");
    let (mut steps, mut elsewhere, mut lost) = (BTreeSet::new(), 0, 0);
    for pages in [1, 3, 5, 80] {
        for shortest in [Bytes::ZERO, Bytes(page.0 * 3), Bytes(u64::MAX)] {
            let (took, moved, differ) = there_and_back(world, text, ids, Bytes(page.0 * pages), shortest);
            steps.insert(took);
            (elsewhere, lost) = (elsewhere + moved, lost + differ);
        }
    }
    println!("{text}: of {} caches {elsewhere} got other pages, and {lost} would have been missed", 12 * ids.len());
    assert!(elsewhere > 0, "{text}: nobody got other pages");
    assert_eq!(lost, 12 * ids.len(), "{text}: what does not come back is missed");
    assert!(steps.contains(&1) && steps.iter().any(|steps| *steps > 4), "{text}: in one step and in many: {steps:?}");
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn a_cache_in_one_run_goes_and_comes_back_gpu() {
    let mut world = World::new("full", None);
    let ids = in_one_run(&mut world, "full");
    assert_eq!((world.pages(ids[0]).len(), world.runs(ids[0])), (8, 1), "pages lie together");
    every_way(&mut world, "full", &ids);
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn scattered_pages_of_several_sizes_and_arenas_go_and_come_back_gpu() {
    // Full pages alone, and codes with an open page in f16.
    for (text, sizes) in [("full", 1), ("kivi4", 2), ("k:rot3,v:int8", 2)] {
        let mut world = World::new(text, Some(Bytes(200 << 10)));
        let ids = scattered(&mut world, text);
        let pages: Vec<_> = ids.iter().flat_map(|id| world.pages(*id)).collect();
        let arenas: BTreeSet<_> = pages.iter().map(|(page, _)| page.arena).collect();
        let of_sizes: BTreeSet<_> = pages.iter().map(|(_, bytes)| *bytes).collect();
        let runs: Vec<_> = ids.iter().map(|id| world.runs(*id)).collect();
        println!("{text}: {} pages of {of_sizes:?} in runs {runs:?} of arenas {arenas:?}", pages.len());
        assert!(arenas.len() > 1 && of_sizes.len() == sizes, "{text}: {arenas:?} {of_sizes:?}");
        assert!(runs.iter().all(|runs| *runs >= 3), "{text}: they do not lie together: {runs:?}");
        every_way(&mut world, text, &ids);
    }
}
