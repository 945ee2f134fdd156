//! Sessions of many rounds over pools that hold a few of them: caches that leave and come back, or are dropped and computed
//! again, priorities, and sessions that end early. Whatever happens to its cache, a session answers as it does alone.

use std::collections::BTreeMap;
use std::time::Duration;

use concertina::geometry::Bytes;
use concertina::schedule::simulation::Simulation;
use concertina::schedule::{
    Abilities, Caches, Finish, HostConfig, Phase, Place, Rates, Request, Round, ScheduleConfig, Scheduler, SessionId,
    Store, SubmitError,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::world::{abilities, caches, compressed, full};

/// Simulations of the test below.
const SEEDS: u64 = 1_000;

/// What sessions ask for: full caches, codecs, evictions once and again, heads and layers.
const ASKED: [&str; 10] = [
    "f16",
    "kivi4",
    "rot3",
    "token=snapkv:0.25:window8",
    "token=h2o:96:every32,hidden=kivi4",
    "token=streaming:64:every32",
    "token=streaming:64:every32:rerotate",
    "head=duo:0.5:sink4:recent16,token=snapkv:0.25:window8,hidden=rot3",
    "token=expected:0.25",
    "layer=share:2",
];

/// A world in which a few sessions fit.
pub(crate) struct World {
    pub(crate) config: ScheduleConfig,
    pub(crate) caches: Caches,
    seed: u64,
}

impl World {
    pub(crate) fn new(rng: &mut ChaCha8Rng, seed: u64) -> Self {
        let shape = full(2, rng.random_range(1..3), 16);
        let codecs = ["kivi4", "rot3"];
        let max_sessions = rng.random_range(1..6);
        let rate = |rng: &mut ChaCha8Rng| if rng.random_bool(0.2) { 0.0 } else { rng.random_range(1e5..1e9) };
        let rates = Rates { out: rate(rng), back: rate(rng), prefill: rate(rng) / 1e5 };
        let host = HostConfig {
            budget: Bytes(if rng.random_bool(0.2) { 0 } else { rng.random_range(0..400_000) }),
            rates,
            disk_budget: Bytes(if rng.random_bool(0.7) { 0 } else { rng.random_range(0..800_000) }),
            disk_rates: [rates.out / 10.0, rates.back / 10.0],
            codec: rng.random_bool(0.2).then(|| "kivi4".parse().expect("a codec")),
            max_preemptions: rng.random_range(0..3),
        };
        let config = ScheduleConfig {
            max_rows: max_sessions + rng.random_range(0..64),
            max_sessions,
            context_length: 600,
            host,
        };
        // A chunk holds one of the largest pages at least.
        let swap_bytes = Bytes(shape.open_page().0 * rng.random_range(1..40));
        let slot_bytes = Bytes(rng.random_range(0..5_000));
        let slots = rng.random_range(1..4);
        let abilities = Abilities { swap_bytes, slot_bytes, ..abilities(&shape, &codecs, slots) };
        let caches = caches(shape, abilities, config.max_rows, rng.random_range(6..26), rng.random_range(2..9));
        Self { config, caches, seed }
    }

    pub(crate) fn schedule(&self) -> (Scheduler, Simulation) {
        let mut simulation = Simulation::new(self.seed, 40);
        simulation.rates = self.config.host.rates;
        // Some disks are full before their budget is.
        simulation.disk = Bytes(if self.seed.is_multiple_of(3) { 60_000 } else { u64::MAX });
        (Scheduler::new(self.config, self.caches.clone()), simulation)
    }

    /// What a session produces when nobody else is there.
    pub(crate) fn alone(&self, request: &Request) -> Vec<u32> {
        let (mut s, mut backend) = self.schedule();
        let id = s.submit(request.clone()).expect("it was submitted before");
        while !s.is_idle() {
            s.step(&mut backend).expect("a simulation does not fail");
        }
        s.session(id).expect("it was submitted").produced.clone()
    }
}

pub(crate) fn random_request(rng: &mut ChaCha8Rng) -> Request {
    let mut tokens =
        |most: usize| -> Vec<u32> { (0..rng.random_range(1..most)).map(|_| rng.random_range(0..40)).collect() };
    let prompt = tokens(150);
    let later: Vec<_> = (0..3).map(|_| tokens(20)).collect();
    let later = later.into_iter().take(rng.random_range(0..4)).map(|tokens| Round {
        tokens,
        max_new: rng.random_range(1..30),
        think: Duration::from_millis(rng.random_range(0..200)),
    });
    let rounds = later.collect();
    let document = rng.random_bool(0.5).then(|| rng.random_range(1..=u32::try_from(prompt.len()).expect("short")));
    Request {
        rounds,
        document,
        stop: if rng.random_bool(0.5) { vec![7] } else { Vec::new() },
        compression: compressed(ASKED[rng.random_range(0..ASKED.len())]),
        priority: rng.random_range(0..3),
        ladder: [&[][..], &["kivi4"], &["kivi4", "token=keydiff:0.5,hidden=kivi4", "token=streaming:32,hidden=kivi4"]]
            [rng.random_range(0..3_usize)]
        .iter()
        .map(|text| compressed(text))
        .collect(),
        ..Request::new(prompt, rng.random_range(1..60))
    }
}

/// Submits a request, unless no empty pool could hold it.
pub(crate) fn arrive(s: &mut Scheduler, request: Request, submitted: &mut BTreeMap<SessionId, Request>) {
    match s.submit(request.clone()) {
        Ok(id) => drop(submitted.insert(id, request)),
        Err(SubmitError::NotServed(_) | SubmitError::NeverFits { .. }) => {}
        Err(other) => panic!("{other}"),
    }
}

/// What a simulation came to.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    trace: u64,
    steps: u64,
    swapped: u32,
    dropped: u32,
    compressed: u32,
    preempted: u32,
    rounds: usize,
    cancelled: usize,
    /// Bytes in files at most.
    in_files: u64,
}

/// Checks what holds between two steps.
pub(crate) fn check(s: &Scheduler, world: &World, preempted: &BTreeMap<(SessionId, usize), u32>) {
    let report = s.report();
    assert!(report.in_use_bytes <= report.budget_bytes, "the pool's budget");
    let (held, peak) = s.away_bytes(Store::Host);
    assert!(held <= peak && peak <= world.config.host.budget, "{held} of {} on the host", world.config.host.budget);
    let (in_files, peak) = s.away_bytes(Store::Disk);
    assert!(in_files <= peak && peak <= world.config.host.disk_budget, "{in_files} in files");
    let mut seated = 0;
    for (id, session) in s.sessions() {
        assert_eq!(session.is_admitted(), s.caches().tables.contains_key(&id), "{id:?} holds pages where it says so");
        let runs = session.place == Place::Device && session.wants_rows() && !s.waiting().any(|w| w == id);
        seated += u32::from(runs);
        let tokens = u32::try_from(session.tokens.len()).expect("short");
        assert!(session.cached() <= tokens, "{id:?}: no more is cached than there is");
        if session.phase == Phase::Decode && session.place != Place::Nowhere {
            assert_eq!(session.cached() + 1, tokens, "{id:?}: all but the last is cached");
        }
    }
    assert!(seated <= world.config.max_sessions, "{seated} sessions of {} have seats", world.config.max_sessions);
    let most = preempted.values().max().copied().unwrap_or(0);
    assert!(most <= world.config.host.max_preemptions, "a session lost its place {most} times in a round");
}

fn simulate(seed: u64) -> Outcome {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let world = World::new(&mut rng, seed);
    let (mut s, mut backend) = world.schedule();
    let arrivals = rng.random_range(3..16);
    let mut submitted: BTreeMap<SessionId, Request> = BTreeMap::new();
    let mut tried = 0;
    let mut preempted = BTreeMap::new();
    let mut outcome = Outcome::default();
    let mut still = 0;
    while tried < arrivals || !s.is_idle() {
        while tried < arrivals && rng.random_bool(0.2) {
            let request = random_request(&mut rng);
            tried += 1;
            arrive(&mut s, request, &mut submitted);
        }
        if rng.random_bool(0.002) && !submitted.is_empty() {
            let ids: Vec<_> = submitted.keys().copied().collect();
            s.cancel(ids[rng.random_range(0..ids.len())]).expect("the pool agrees");
        }
        let report = s.step(&mut backend).expect("a simulation does not fail");
        outcome.swapped += u32::try_from(report.swapped_out.len()).expect("few");
        outcome.dropped += u32::try_from(report.dropped.len()).expect("few");
        outcome.compressed += u32::try_from(report.compressed.len()).expect("few");
        for id in &report.preempted {
            outcome.preempted += 1;
            let round = s.session(*id).expect("it exists").round();
            *preempted.entry((*id, round)).or_default() += 1;
        }
        let bytes = report.in_bytes + report.out_bytes;
        let moved = report.decode_rows + report.prefill_rows > 0
            || !report.compressed.is_empty()
            || bytes > Bytes::ZERO
            || !report.idle.is_zero();
        still = if moved || !report.asked.is_empty() { 0 } else { still + 1 };
        assert!(still < 4 || s.is_idle(), "nothing happens any more, though {} wait", s.waiting().len());
        check(&s, &world, &preempted);
        assert!(backend.steps() < 200_000, "no simulation takes so long");
    }
    // What ended on its way may still be there.
    s.step(&mut backend).expect("a simulation does not fail");
    assert_eq!(backend.hosted().len(), 0, "no copy is left on the host");
    let report = s.report();
    assert_eq!((report.pages_in_use_bytes, report.committed_bytes), (Bytes::ZERO, Bytes::ZERO), "all bytes are back");
    for store in [Store::Host, Store::Disk] {
        assert_eq!(s.away_bytes(store).0, Bytes::ZERO, "all bytes of {store:?} are back");
    }
    outcome.in_files = s.away_bytes(Store::Disk).1.0;
    for (id, session) in s.sessions() {
        let Phase::Finished(why) = session.phase else { panic!("{id:?} should be over") };
        let alone = world.alone(&submitted[&id]);
        outcome.rounds += session.answers.len();
        if why == Finish::Cancelled {
            outcome.cancelled += 1;
            assert!(alone.starts_with(&session.produced), "{id:?}: what it produced until then");
        } else {
            assert_eq!(session.produced, alone, "{id:?} ({}) answers as alone", session.request.compression.short());
            assert_eq!(session.answers.len(), 1 + session.request.rounds.len(), "{id:?}: every question is answered");
        }
    }
    Outcome { trace: backend.trace_hash(), steps: backend.steps(), ..outcome }
}

#[test]
fn sessions_answer_as_alone_in_1000_seeded_simulations() {
    let run = |seed| {
        let run = std::panic::catch_unwind(|| simulate(seed));
        run.unwrap_or_else(|_| panic!("seed {seed} failed: rounds::simulate({seed}) repeats it"))
    };
    let all: Vec<Outcome> = (0..SEEDS).map(run).collect();
    let sum = |of: &dyn Fn(&Outcome) -> u32| all.iter().map(of).sum::<u32>();
    let (swapped, dropped, preempted) = (sum(&|o| o.swapped), sum(&|o| o.dropped), sum(&|o| o.preempted));
    let steps: u64 = all.iter().map(|o| o.steps).sum();
    let (rounds, cancelled): (usize, usize) =
        (all.iter().map(|o| o.rounds).sum(), all.iter().map(|o| o.cancelled).sum());
    println!("{SEEDS} simulations, {steps} steps, {rounds} rounds, {cancelled} sessions cancelled");
    let compressed = sum(&|o| o.compressed);
    println!("{swapped} caches left for the host, {dropped} were computed again, {compressed} compressed harder");
    println!("{preempted} sessions lost their place in a round");
    let in_files = all.iter().filter(|o| o.in_files > 0).count();
    println!("in {in_files} simulations caches went to files");
    assert!(in_files > 20, "host memory should have been full");
    assert!(compressed > 100, "caches should have been compressed harder");
    assert!(swapped > 1_000 && dropped > 300 && preempted > 100, "all of it should have happened");
}

#[test]
fn the_same_seed_gives_the_same_trace_of_rounds() {
    assert_eq!(simulate(5), simulate(5), "equal seeds");
    assert_ne!(simulate(5).trace, simulate(6).trace, "different seeds");
}

/// What four sessions of two rounds do where two fit: caches that left, were dropped, were compressed.
fn four_sessions(host: HostConfig, ladder: &[&str]) -> [usize; 3] {
    let shape = full(1, 1, 16);
    let abilities = Abilities { swap_bytes: Bytes(1 << 20), ..abilities(&shape, &["kivi4"], 1) };
    let config = ScheduleConfig { max_rows: 64, max_sessions: 4, context_length: 600, host };
    // A session takes 22 pages; two leave one of four slabs of 16 pages for codes.
    let mut s = Scheduler::new(config, caches(shape, abilities, 64, 4, 4));
    let mut backend = Simulation::new(1, 40);
    let round = Round { tokens: vec![3; 4], max_new: 4, think: Duration::from_millis(50) };
    let request = Request {
        rounds: vec![round],
        ladder: ladder.iter().map(|text| compressed(text)).collect(),
        ..Request::new(vec![1; 336], 4)
    };
    for at in 0..4 {
        // Nothing in common to share.
        let prompt = vec![at; 336];
        s.submit(Request { prompt, ..request.clone() }).expect("one fits");
    }
    let mut counts = [0; 3];
    while !s.is_idle() {
        let step = s.step(&mut backend).expect("a simulation does not fail");
        let here = [step.swapped_out.len(), step.dropped.len(), step.compressed.len()];
        counts.iter_mut().zip(here).for_each(|(count, n)| *count += n);
    }
    counts
}

#[test]
fn machines_that_compute_fast_recompute_and_those_with_fast_links_swap() {
    let with = |rates: Rates, budget: u64| HostConfig { budget: Bytes(budget), rates, ..HostConfig::default() };
    let page = full(1, 1, 16).open_page().0;
    let cache = 22 * page;
    // A cache of 339 tokens: both take 10 ms at these rates.
    let (link, prefill) = (2.0 * cache as f64 / 0.01, 339.0 / 0.01);
    let rates = |link: f64, prefill: f64| Rates { out: link, back: link, prefill };
    let [swapped, dropped, _] = four_sessions(with(rates(1.1 * link, prefill), 4 * cache), &[]);
    assert!(swapped >= 2 && dropped == 0, "the link is faster: {swapped} left, {dropped} were dropped");
    let [swapped, dropped, _] = four_sessions(with(rates(0.9 * link, prefill), 4 * cache), &[]);
    assert!(swapped == 0 && dropped >= 2, "reading is faster: {swapped} left, {dropped} were dropped");
    let [swapped, dropped, compressed] = four_sessions(with(rates(1.1 * link, prefill), page), &["kivi4"]);
    assert!(swapped == 0 && compressed > 0, "no room: {swapped} left, {dropped} dropped, {compressed} compressed");
    let [swapped, _, compressed] = four_sessions(with(rates(1.1 * link, prefill), 4 * cache), &["kivi4"]);
    assert!(swapped > 0 && compressed == 0, "room: nothing is lost, {compressed} compressed");
}

/// A session is preempted by higher priorities only, and so often at most in a round; a higher one that comes late goes first.
#[test]
fn priorities_take_places_and_nobody_loses_one_too_often() {
    let shape = full(1, 1, 16);
    let host = HostConfig { budget: Bytes(1 << 20), max_preemptions: 2, ..HostConfig::default() };
    let abilities = Abilities { swap_bytes: Bytes(1 << 20), ..abilities(&shape, &[], 1) };
    let config = ScheduleConfig { max_rows: 64, max_sessions: 4, context_length: 600, host };
    let mut s = Scheduler::new(config, caches(shape, abilities, 64, 1, 1));
    let mut backend = Simulation::new(1, 40);
    let low = s.submit(Request::new(vec![1; 150], 100)).expect("it fits");
    let mut high = Vec::new();
    let mut steps = 0;
    while !s.is_idle() {
        s.step(&mut backend).expect("a simulation does not fail");
        steps += 1;
        if steps % 12 == 0 && high.len() < 6 {
            let request = Request { priority: 1, ..Request::new(vec![2; 150], 3) };
            high.push(s.submit(request).expect("it fits"));
        }
    }
    let low = s.session(low).expect("it was submitted");
    assert_eq!(low.moves.preempted, 2, "it gives up its place twice, and no more");
    assert_eq!(low.produced.len(), 100, "and ends");
    let times = |id: &SessionId| s.session(*id).expect("it was submitted").times.finished.expect("over");
    assert!(times(&high[0]) < times(high.last().expect("six")), "the first did not wait for the low one, the last did");
}
