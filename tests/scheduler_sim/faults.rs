//! The simulations of rounds, with faults: steps that find no memory, steps that fail half-way and leave rubbish, devices that
//! are lost with all they had. No session is lost, no byte leaks, and whatever happened, a session answers as it does alone.
//!
//! `CONCERTINA_FAULT_SEED=17 cargo test --test scheduler_sim through_faults` runs one seed alone.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::panic::catch_unwind;
use std::time::Duration;

use concertina::geometry::Bytes;
use concertina::schedule::recovery::{GOOD_STEPS, MAX_FAILURES};
use concertina::schedule::simulation::{SimulatedFault, Simulation, SimulationError};
use concertina::schedule::{
    Abilities, Backend, BackendError, Caches, Fault, Finish, HostConfig, Loss, Phase, Place, Request, Round,
    ScheduleConfig, Scheduler, SessionId, Shortage, StepPlan, StepReport, StepResult, Store,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::rounds::{self, World, arrive, random_request};
use super::world::{abilities, caches, compressed, full};

/// Simulations of the test below.
const SEEDS: u64 = 1_000;
/// Runs one seed alone.
const SEED: &str = "CONCERTINA_FAULT_SEED";
/// Calls of the backend after which nothing fails any more.
const CALLS: u64 = 2_000;

/// What goes wrong, and when: lost devices, errors of no consequence, memory that is short for a few calls whatever they are,
/// or for many whose steps are large.
pub(crate) fn random_faults(rng: &mut ChaCha8Rng, max_sessions: u32) -> Vec<SimulatedFault> {
    let often = rng.random_range(12..60);
    let (mut faults, mut at) = (Vec::new(), 0);
    while at < CALLS {
        at += rng.random_range(10..often);
        let (fault, calls, above_rows) = match rng.random_range(0..8) {
            0 | 1 => (Fault::DeviceLost, 1, 0),
            2 => (Fault::Other, 1, 0),
            3..=5 => (Fault::OutOfMemory, rng.random_range(1..=u64::from(MAX_FAILURES) / 2), 0),
            // The sessions that run have a row each, so that halving ends there.
            _ => (Fault::OutOfMemory, rng.random_range(20..200), max_sessions + rng.random_range(0..8)),
        };
        faults.push(SimulatedFault { calls: at..at + calls, above_rows, fault, half: rng.random_bool(0.5) });
        at += calls;
    }
    faults
}

/// What a simulation came to.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    trace: u64,
    steps: u64,
    losses: usize,
    restored: usize,
    recomputed: usize,
    shortages: usize,
    given_up: usize,
    others: usize,
    cancelled: usize,
    finished: usize,
}

/// What reports have said of each session, which has to be what happened to it.
#[derive(Debug, Default)]
struct Told {
    dropped: BTreeMap<SessionId, u32>,
    preempted: BTreeMap<SessionId, u32>,
    in_round: BTreeMap<(SessionId, usize), u32>,
}

impl Told {
    fn hear(&mut self, s: &Scheduler, report: &StepReport) {
        report.dropped.iter().for_each(|id| *self.dropped.entry(*id).or_default() += 1);
        for id in &report.preempted {
            *self.preempted.entry(*id).or_default() += 1;
            *self.in_round.entry((*id, s.session(*id).expect("it exists").round())).or_default() += 1;
        }
    }
}

/// Checks what holds after every step, whether it went well or not.
fn check(s: &Scheduler, world: &World, told: &Told) {
    rounds::check(s, world, &told.in_round);
    let (mut held, mut pages) = (0, BTreeSet::new());
    for (id, table) in &s.caches().tables {
        held += table.held_bytes().0;
        assert!(table.page_ids().all(|(page, _)| pages.insert(page)), "{id:?}: no page belongs to two lists");
        let session = s.session(*id).expect("it exists");
        // Positions are fewer than tokens where kept keys are turned to their places in the cache.
        let rerotates = session.request.compression.token.eviction().is_some_and(|eviction| eviction.rerotate);
        if let (Phase::Prefill(done), false) = (session.phase, rerotates) {
            assert_eq!(table.n_tokens(), done, "{id:?}: rows that failed are taken back");
        }
        assert!(table.sealing_pages().is_empty(), "{id:?}: nothing is left to seal between steps");
    }
    let report = s.report();
    assert_eq!(report.pages_in_use_bytes, Bytes(held), "the pool holds what the tables name");
    assert!(report.peak_bytes <= report.budget_bytes, "the budget was never exceeded");
    assert!(s.max_rows() >= 1 && s.max_rows() <= world.config.max_rows, "{} rows", s.max_rows());
}

/// A lost device: nothing is on it, and every session that had something there is to get it back.
fn rebuild(s: &mut Scheduler, copies: &BTreeSet<SessionId>, now: Duration) -> Loss {
    let before: BTreeMap<SessionId, Place> = s.sessions().map(|(id, session)| (id, session.place)).collect();
    let loss = s.device_lost(copies).expect("the pool agrees");
    let report = s.report();
    let left = (report.pages_in_use_bytes, report.committed_bytes, report.slack_bytes, s.n_admitted());
    assert_eq!(left, (Bytes::ZERO, Bytes::ZERO, Bytes::ZERO, 0), "nothing is on the device");
    assert_eq!(s.now(), now, "no time passes");
    for (id, session) in s.sessions() {
        let whole = copies.contains(&id) && matches!(before[&id], Place::Host | Place::Coming(_));
        assert_eq!(session.place, if whole { Place::Host } else { Place::Nowhere }, "{id:?} was at {:?}", before[&id]);
        let lost = loss.recomputed.iter().any(|(lost, tokens)| *lost == id && *tokens > 0);
        assert_eq!(loss.restored.contains(&id), whole, "{id:?} comes back");
        assert!(!lost || (before[&id] != Place::Nowhere && !whole), "{id:?} is computed again");
        assert_eq!(s.waiting().any(|w| w == id), session.wants_rows(), "{id:?} stands in line");
    }
    loss
}

fn simulate(seed: u64) -> Outcome {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0xfa_0175);
    let world = World::new(&mut rng, seed);
    let (mut s, mut backend) = world.schedule();
    backend.faults = random_faults(&mut rng, world.config.max_sessions);
    let arrivals = rng.random_range(3..12);
    let mut submitted: BTreeMap<SessionId, Request> = BTreeMap::new();
    let (mut tried, mut still) = (0, 0);
    let (mut told, mut outcome) = (Told::default(), Outcome::default());
    while tried < arrivals || !s.is_idle() {
        while tried < arrivals && rng.random_bool(0.2) {
            let request = random_request(&mut rng);
            tried += 1;
            arrive(&mut s, request, &mut submitted);
        }
        if rng.random_bool(0.004) && !submitted.is_empty() {
            let ids: Vec<_> = submitted.keys().copied().collect();
            s.cancel(ids[rng.random_range(0..ids.len())]).expect("the pool agrees");
        }
        match s.step(&mut backend) {
            Ok(report) => {
                told.hear(&s, &report);
                outcome.shortages += usize::from(report.shortage.is_some());
                outcome.given_up += if report.shortage.is_some() { report.preempted.len() } else { 0 };
                let moved = report.decode_rows + report.prefill_rows > 0
                    || report.in_bytes + report.out_bytes > Bytes::ZERO
                    || !report.idle.is_zero()
                    || report.shortage.is_some()
                    || !(report.asked.is_empty() && report.compressed.is_empty());
                still = if moved { 0 } else { still + 1 };
                assert!(still < 4 || s.is_idle(), "nothing happens any more, though {} wait", s.waiting().len());
            }
            Err(error) if error.fault() == Fault::DeviceLost => {
                let (copies, now) = (backend.rebuilt(), s.now());
                let loss = rebuild(&mut s, &copies, now);
                outcome.losses += 1;
                outcome.restored += loss.restored.len();
                outcome.recomputed += loss.recomputed.len();
            }
            Err(SimulationError::Fault { fault: Fault::Other, .. }) => outcome.others += 1,
            Err(error) => panic!("{error}"),
        }
        check(&s, &world, &told);
        assert!(backend.steps() < 200_000, "no simulation takes so long");
    }
    // What ended on its way may still be there, and what is left to say.
    backend.faults.clear();
    let report = s.step(&mut backend).expect("nothing fails");
    told.hear(&s, &report);
    assert_eq!(backend.hosted().len(), 0, "no copy is left on the host");
    let report = s.report();
    assert_eq!((report.pages_in_use_bytes, report.committed_bytes), (Bytes::ZERO, Bytes::ZERO), "all bytes are back");
    let away = [Store::Host, Store::Disk].map(|store| s.away_bytes(store).0);
    assert_eq!((away, report.slack_bytes), ([Bytes::ZERO; 2], Bytes::ZERO), "all bytes are back");
    assert_eq!(s.sessions().count(), submitted.len(), "no session is lost");
    for (id, session) in s.sessions() {
        let Phase::Finished(why) = session.phase else { panic!("{id:?} should be over") };
        let alone = world.alone(&submitted[&id]);
        if why == Finish::Cancelled {
            outcome.cancelled += 1;
            assert!(alone.starts_with(&session.produced), "{id:?}: what it produced until then");
        } else {
            outcome.finished += 1;
            assert_eq!(session.produced, alone, "{id:?} ({}) answers as alone", session.request.compression.short());
            assert_eq!(session.answers.len(), 1 + session.request.rounds.len(), "{id:?}: every question is answered");
        }
        let heard = |of: &BTreeMap<SessionId, u32>| of.get(&id).copied().unwrap_or(0);
        let happened = (session.moves.dropped, session.moves.preempted);
        assert_eq!((heard(&told.dropped), heard(&told.preempted)), happened, "{id:?}: reports say what happened");
    }
    Outcome { trace: backend.trace_hash(), steps: backend.steps(), ..outcome }
}

#[test]
fn sessions_answer_as_alone_through_faults_in_1000_seeded_simulations() {
    let alone = std::env::var(SEED).ok().map(|seed| seed.parse().expect("a seed is a number"));
    let seeds = alone.map_or(0..SEEDS, |seed: u64| seed..seed + 1);
    let run = |seed| {
        catch_unwind(|| simulate(seed)).unwrap_or_else(|_| {
            panic!("seed {seed} failed; to repeat it: {SEED}={seed} cargo test --test scheduler_sim through_faults")
        })
    };
    let all: Vec<Outcome> = seeds.map(run).collect();
    let sum = |of: &dyn Fn(&Outcome) -> usize| all.iter().map(of).sum::<usize>();
    let (losses, restored, recomputed) = (sum(&|o| o.losses), sum(&|o| o.restored), sum(&|o| o.recomputed));
    let (shortages, given_up, others) = (sum(&|o| o.shortages), sum(&|o| o.given_up), sum(&|o| o.others));
    let steps: u64 = all.iter().map(|o| o.steps).sum();
    println!("{} simulations, {steps} steps, {others} other errors", all.len());
    println!("{losses} devices lost: {restored} caches came back from the host, {recomputed} were computed again");
    println!("{shortages} steps found no memory, {given_up} sessions gave up their places for it");
    println!("{} sessions answered everything, {} were cancelled", sum(&|o| o.finished), sum(&|o| o.cancelled));
    if alone.is_none() {
        assert!(losses > 1_000 && restored > 300 && recomputed > 1_000, "devices should have been lost");
        assert!(shortages > 2_000 && given_up > 100 && others > 200, "all of it should have happened");
    }
}

#[test]
fn the_same_seed_gives_the_same_trace_of_faults() {
    assert_eq!(simulate(5), simulate(5), "equal seeds");
    assert_ne!(simulate(5).trace, simulate(6).trace, "different seeds");
}

/// Four sessions of two questions where two fit, with seats for three.
fn four_sessions() -> (Scheduler, Simulation) {
    let shape = full(1, 1, 16);
    let abilities = Abilities { swap_bytes: shape.open_page(), ..abilities(&shape, &[], 1) };
    let host = HostConfig { budget: Bytes(1 << 20), ..HostConfig::default() };
    let config = ScheduleConfig { max_rows: 64, max_sessions: 3, context_length: 600, host };
    let mut s = Scheduler::new(config, caches(shape, abilities, 64, 2, 2));
    let round = Round { tokens: vec![3; 4], max_new: 30, think: Duration::from_millis(1) };
    for first in 1..5 {
        let prompt = [vec![first], vec![1; 150]].concat();
        s.submit(Request { rounds: vec![round.clone()], ..Request::new(prompt, 30) }).expect("one fits");
    }
    (s, Simulation::new(1, 40))
}

fn short_of_memory(calls: Range<u64>, above_rows: u32) -> SimulatedFault {
    SimulatedFault { calls, above_rows, fault: Fault::OutOfMemory, half: false }
}

/// What every session has produced when all are over.
fn finish<B: Backend<Error: std::fmt::Debug>>(s: &mut Scheduler, backend: &mut B) -> Vec<Vec<u32>> {
    while !s.is_idle() {
        s.step(backend).expect("nothing fails");
    }
    s.sessions().map(|(_, session)| session.produced.clone()).collect()
}

#[test]
fn memory_that_stays_short_is_an_error_after_so_many_tries_and_nothing_is_lost() {
    let (mut undisturbed, mut backend) = four_sessions();
    let expected = finish(&mut undisturbed, &mut backend);
    let (mut s, mut backend) = four_sessions();
    for _ in 0..5 {
        s.step(&mut backend).expect("nothing fails yet");
    }
    let before = s.report();
    backend.faults = vec![short_of_memory(0..u64::MAX, 0)];
    let mut rows = Vec::new();
    for failures in 1..=MAX_FAILURES {
        let shortage = s.step(&mut backend).expect("it goes on").shortage.expect("there was no memory");
        assert_eq!(shortage, Shortage { failures, max_rows: s.max_rows() }, "the report has the numbers");
        rows.push(shortage.max_rows);
    }
    assert_eq!(rows[..5], [32, 16, 8, 4, 2], "halved to the two sessions that run");
    assert_eq!(rows[5..], [1; 7], "one of them gave up its place");
    let error = s.step(&mut backend).expect_err("so many tries are enough");
    assert_eq!(error.fault(), Fault::OutOfMemory, "{error}");
    let moved = s.sessions().filter(|(_, session)| session.moves.preempted > 0).count();
    assert_eq!(moved, 1, "and nobody else");
    assert_eq!(s.report().pages_in_use_bytes, before.pages_in_use_bytes, "no rows were computed");
    backend.faults.clear();
    assert_eq!(finish(&mut s, &mut backend), expected, "once there is memory, everybody answers");
}

#[test]
fn smaller_steps_grow_again_after_so_many_that_went_well() {
    let (mut s, mut backend) = four_sessions();
    backend.faults = vec![short_of_memory(0..3, 8)];
    let mut rows = Vec::new();
    while s.max_rows() < 64 || rows.is_empty() {
        let report = s.step(&mut backend).expect("smaller steps have room");
        assert!(report.decode_rows + report.prefill_rows <= s.max_rows(), "no more than the limit");
        // Steps that only move pages say nothing about rows.
        let tried = report.shortage.is_some() || report.decode_rows + report.prefill_rows > 0;
        rows.extend(tried.then_some(s.max_rows()));
        assert!(!s.is_idle(), "it grew before the end: {rows:?}");
    }
    assert_eq!(rows[..3], [32, 16, 8], "three failures");
    let at = |limit: u32| rows.iter().filter(|rows| **rows == limit).count();
    let well = GOOD_STEPS as usize;
    assert_eq!((at(8), at(16), at(32)), (well, 1 + well, 1 + well), "twice as many after each {GOOD_STEPS} good steps");
}

/// Codes of 520 tokens fit, and so do the tokens that an eviction keeps of them; the f16 document that such a cache begins with
/// does not, so that one which was dropped could never be made again.
#[test]
fn a_cache_moves_to_no_rung_that_could_not_be_computed_again() {
    let shape = full(2, 2, 16);
    let config = ScheduleConfig { max_rows: 64, max_sessions: 8, context_length: 600, host: HostConfig::default() };
    let mut s = Scheduler::new(config, caches(shape, abilities(&shape, &["kivi4"], 4), 64, 9, 9));
    let ladder = vec![compressed("token=keydiff:0.3,hidden=kivi4")];
    let round = Round { tokens: vec![3; 4], max_new: 4, think: Duration::from_millis(20) };
    for document in 0..8 {
        let (compression, rounds) = (compressed("kivi4"), vec![round.clone(); 2]);
        let request = Request { compression, rounds, ladder: ladder.clone(), ..Request::new(vec![document; 520], 4) };
        let rung = Request { compression: ladder[0].clone(), ..request.clone() };
        let pages = s.caches().pages_needed(&rung).expect("it is served");
        assert!(s.caches().pool.slabs_for(&pages) > s.caches().pool.capacity(), "the rung does not fit from the start");
        s.submit(request).expect("codes fit");
    }
    let mut backend = Simulation::new(1, 40);
    let mut steps = 0;
    while !s.is_idle() {
        s.step(&mut backend).expect("nothing fails");
        steps += 1;
        assert!(steps < 5_000, "{} wait for ever", s.waiting().len());
    }
    assert!(s.sessions().any(|(_, session)| session.moves.dropped > 0), "caches were dropped");
}

/// A device that clears slots in steps that go well.
struct Slots {
    simulation: Simulation,
    cleared: BTreeSet<u32>,
}

impl Backend for Slots {
    type Error = SimulationError;

    fn execute(&mut self, plan: &StepPlan, caches: &mut Caches) -> Result<StepResult, SimulationError> {
        let fresh = caches.take_fresh();
        let result = self.simulation.execute(plan, caches)?;
        self.cleared.extend(fresh);
        let observed = plan.segments.iter().flat_map(|rows| &rows.observed).map(|observed| observed.slot);
        assert!(observed.into_iter().all(|slot| self.cleared.contains(&slot)), "slots begin at zero");
        Ok(result)
    }

    fn evict(&mut self, id: SessionId, tokens: &[u32], caches: &mut Caches) -> Result<Duration, SimulationError> {
        self.simulation.evict(id, tokens, caches)
    }
}

#[test]
fn slots_begin_at_zero_though_their_first_step_failed() {
    let shape = full(1, 1, 16);
    let config = ScheduleConfig { max_rows: 64, max_sessions: 1, context_length: 600, host: HostConfig::default() };
    let mut s = Scheduler::new(config, caches(shape, abilities(&shape, &[], 1), 64, 8, 8));
    let request = Request { compression: compressed("token=h2o:0.5"), ..Request::new(vec![1; 100], 9) };
    s.submit(request).expect("it fits");
    let mut simulation = Simulation::new(1, 40);
    simulation.faults = vec![short_of_memory(0..2, 0)];
    let mut backend = Slots { simulation, cleared: BTreeSet::new() };
    assert_eq!(finish(&mut s, &mut backend)[0].len(), 9, "it answers");
    assert_eq!(backend.cleared.len(), 1, "its slot was cleared");
}

/// A device that was lost and says that it had no memory.
struct Lying(Simulation);

impl Backend for Lying {
    type Error = SimulationError;

    fn execute(&mut self, plan: &StepPlan, caches: &mut Caches) -> Result<StepResult, SimulationError> {
        self.0.execute(plan, caches).map_err(|error| match error {
            SimulationError::Fault { call, .. } => SimulationError::Fault { call, fault: Fault::OutOfMemory },
            other => other,
        })
    }

    fn evict(&mut self, id: SessionId, tokens: &[u32], caches: &mut Caches) -> Result<Duration, SimulationError> {
        self.0.evict(id, tokens, caches)
    }
}

fn lost_at(call: u64) -> Vec<SimulatedFault> {
    vec![SimulatedFault { calls: call..call + 1, above_rows: 0, fault: Fault::DeviceLost, half: false }]
}

#[test]
fn a_loss_that_is_taken_for_a_shortage_would_be_noticed() {
    let run = |call: u64| {
        let (mut s, mut backend) = four_sessions();
        backend.faults = lost_at(call);
        finish(&mut s, &mut Lying(backend))
    };
    assert!(catch_unwind(|| run(u64::MAX - 1)).is_ok(), "nothing is lost");
    assert!(catch_unwind(|| run(0)).is_ok(), "there was nothing to lose");
    assert!(catch_unwind(|| run(10)).is_err(), "what was cached is gone");
}

#[test]
fn a_copy_that_was_not_whole_would_be_noticed() {
    // The device is lost in the step after the one in which a session's last pages left.
    let run = |lies: bool| {
        let (mut s, mut backend) = four_sessions();
        while s.step(&mut backend).expect("nothing fails yet").swapped_out.is_empty() {}
        let torn: Vec<SessionId> =
            s.sessions().filter(|(_, session)| session.place == Place::Host).map(|(id, _)| id).collect();
        assert_eq!(torn.len(), 1, "the first one left");
        backend.faults = lost_at(backend.calls());
        assert_eq!(s.step(&mut backend).expect_err("the device is lost").fault(), Fault::DeviceLost, "as it says");
        let mut copies = backend.rebuilt();
        assert!(!copies.contains(&torn[0]), "its last pages were still on the device");
        copies.extend(torn.iter().copied().filter(|_| lies));
        let loss = s.device_lost(&copies).expect("the pool agrees");
        assert_eq!(loss.restored.contains(&torn[0]), lies, "taken for what it is said to be");
        assert_eq!(loss.recomputed.iter().any(|(id, _)| *id == torn[0]), !lies, "and computed again if not");
        backend.faults.clear();
        finish(&mut s, &mut backend)
    };
    let (mut undisturbed, mut backend) = four_sessions();
    assert_eq!(run(false), finish(&mut undisturbed, &mut backend), "everybody answers");
    assert!(catch_unwind(|| run(true)).is_err(), "nobody can bring it back");
}
