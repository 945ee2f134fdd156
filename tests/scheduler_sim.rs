//! Seeded simulations of the schedule with budgets too small for all: invariants at every step, equal seeds equal
//! traces.

use std::collections::BTreeSet;

use concertina::geometry::Bytes;
use concertina::kernels::sample::Sampling;
use concertina::pool::page_table::TableShape;
use concertina::pool::{PagePool, PoolLayout};
use concertina::schedule::simulation::Simulation;
use concertina::schedule::{Caches, Finish, Phase, Request, ScheduleConfig, Scheduler, SessionId, SubmitError};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const PAGE: Bytes = Bytes(1024);

fn scheduler(rng: &mut ChaCha8Rng) -> Scheduler {
    let shape = TableShape {
        num_layers: rng.random_range(1..4),
        num_kv_heads: rng.random_range(1..4),
        page_size: *[4_u32, 16].get(rng.random_range(0..2_usize)).expect("two sizes"),
        page: PAGE,
    };
    let slabs = rng.random_range(2..24_u64);
    let layout = PoolLayout {
        budget: Bytes(slabs * PAGE.0 * 16 + 10_000),
        staging: Bytes(4096),
        scratch: Bytes(2048),
        max_binding: Bytes(PAGE.0 * 16 * rng.random_range(1..8_u64)),
        slab: Bytes(PAGE.0 * 16),
        smallest_page: PAGE,
    };
    let pool = PagePool::new(&layout).expect("the layout should fit");
    let max_sessions = rng.random_range(1..9);
    let config = ScheduleConfig { max_rows: max_sessions + rng.random_range(0..40), max_sessions, context_length: 256 };
    Scheduler::new(config, Caches::new(pool, shape))
}

fn check(s: &Scheduler, max_sessions: usize) {
    let report = s.report();
    assert!(report.in_use_bytes <= report.budget_bytes && report.peak_bytes <= report.budget_bytes, "budget");
    let caches = s.caches();
    let mut pages = BTreeSet::new();
    let mut held = 0_u64;
    for (id, session) in s.sessions() {
        let table = caches.tables.get(&id);
        assert_eq!(session.is_admitted(), table.is_some(), "exactly admitted sessions hold pages");
        let Some(table) = table else { continue };
        let expected = match session.phase {
            Phase::Prefill(done) => done as usize,
            _ => session.request.prompt.len() + session.produced.len() - 1,
        };
        assert_eq!(table.n_tokens() as usize, expected, "session {id:?}: cached tokens");
        for layer in 0..caches.shape.num_layers {
            for head in 0..caches.shape.num_kv_heads {
                let list = table.list(layer, head);
                assert_eq!(list.len(), expected.div_ceil(caches.shape.page_size as usize), "pages of a list");
                held += list.len() as u64 * PAGE.0;
                assert!(list.iter().all(|p| pages.insert(*p)), "no page belongs to two lists");
            }
        }
    }
    assert_eq!(report.pages_in_use_bytes, Bytes(held), "the pool holds what the tables name");
    assert!(s.n_admitted() <= max_sessions, "no more sessions than allowed");
}

/// Runs one seed; the trace's hash, steps, and how many sessions had to wait.
fn simulate(seed: u64) -> (u64, u64, usize) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut s = scheduler(&mut rng);
    let mut backend = Simulation::new(seed, 50);
    let arrivals = rng.random_range(5..30_usize);
    let (mut submitted, mut refused, mut waited) = (Vec::new(), 0, BTreeSet::new());
    let mut order = Vec::new();
    let mut steps_without_progress = 0;
    while submitted.len() + refused < arrivals || !s.is_idle() {
        while submitted.len() + refused < arrivals && rng.random_bool(0.4) {
            let prompt = (0..rng.random_range(1..120)).map(|_| rng.random_range(0..50)).collect();
            let stop = if rng.random_bool(0.5) { vec![7] } else { Vec::new() };
            let request = Request { prompt, max_new: rng.random_range(1..40), sampling: Sampling::GREEDY, stop };
            match s.submit(request) {
                Ok(id) => submitted.push(id),
                Err(SubmitError::NeverFits { needed, capacity, .. }) => {
                    assert!(needed > capacity, "only what can never fit is refused");
                    refused += 1;
                }
                Err(other) => panic!("{other}"),
            }
        }
        if rng.random_bool(0.03) && !submitted.is_empty() {
            let victim = submitted[rng.random_range(0..submitted.len())];
            s.cancel(victim).expect("the pool agrees");
            check(&s, 9);
        }
        let report = s.step(&mut backend).expect("a simulation does not fail");
        order.extend(report.admitted.iter().copied());
        waited.extend(s.waiting());
        steps_without_progress =
            if report.decode_rows + report.prefill_rows > 0 { 0 } else { steps_without_progress + 1 };
        assert!(s.is_idle() || steps_without_progress < 3, "an admitted session should always progress");
        check(&s, 9);
    }
    assert!(order.windows(2).all(|w| w[0] < w[1]), "sessions are admitted in order of arrival");
    for (id, session) in s.sessions() {
        let Phase::Finished(why) = session.phase else { panic!("session {id:?} should be over") };
        let n = session.produced.len();
        match why {
            Finish::Length => assert_eq!(n, session.request.max_new as usize, "as many as asked for"),
            Finish::Stop => assert_eq!(session.produced.last(), Some(&7), "ended by the stop token"),
            Finish::Cancelled => {}
        }
        assert!(session.produced.iter().rev().skip(1).all(|t| !session.request.stop.contains(t)), "nothing after stop");
    }
    let report = s.report();
    assert_eq!((report.pages_in_use_bytes, report.committed_bytes), (Bytes::ZERO, Bytes::ZERO), "all bytes are back");
    (backend.trace_hash(), backend.steps(), waited.len())
}

#[test]
fn invariants_hold_in_200_seeded_simulations() {
    let mut waited = 0;
    let mut steps = 0;
    for seed in 0..200 {
        let run = std::panic::catch_unwind(|| simulate(seed));
        let (_, n, w) = run.unwrap_or_else(|_| panic!("seed {seed} failed: simulate({seed}) repeats it"));
        waited += w;
        steps += n;
    }
    println!("200 simulations, {steps} steps, {waited} sessions had to wait");
    assert!(waited > 500, "the budgets should be too small for all: {waited} sessions waited");
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    assert_eq!(simulate(3), simulate(3), "equal seeds");
    assert_ne!(simulate(3).0, simulate(4).0, "different seeds");
}

#[test]
fn a_decoding_session_gets_a_token_in_every_step_while_another_prefills() {
    let shape = TableShape { num_layers: 1, num_kv_heads: 1, page_size: 16, page: PAGE };
    let layout = PoolLayout {
        budget: Bytes::mib(1),
        staging: Bytes::ZERO,
        scratch: Bytes::ZERO,
        max_binding: Bytes::mib(1),
        slab: Bytes(PAGE.0 * 16),
        smallest_page: PAGE,
    };
    let pool = PagePool::new(&layout).expect("one MiB holds slabs");
    let config = ScheduleConfig { max_rows: 8, max_sessions: 2, context_length: 256 };
    let mut s = Scheduler::new(config, Caches::new(pool, shape));
    let request = |n: usize| Request { prompt: vec![1; n], max_new: 30, sampling: Sampling::GREEDY, stop: Vec::new() };
    let short = s.submit(request(4)).expect("fits");
    let long = s.submit(request(100)).expect("fits");
    let mut backend = Simulation::new(0, 9);
    s.step(&mut backend).expect("the first step");
    while !matches!(s.session(long).map(|s| s.phase), Some(Phase::Decode)) {
        let report = s.step(&mut backend).expect("a step");
        assert!(report.produced.iter().any(|(id, _)| *id == short), "the short session should not stall");
        assert!(report.prefill_rows + report.decode_rows <= 8, "the step keeps to its rows");
    }
}

#[test]
fn requests_that_can_never_run_are_refused_with_the_numbers() {
    let mut s = scheduler(&mut ChaCha8Rng::seed_from_u64(1));
    let request =
        |n: usize, max_new| Request { prompt: vec![1; n], max_new, sampling: Sampling::GREEDY, stop: Vec::new() };
    assert!(matches!(s.submit(request(0, 5)), Err(SubmitError::Empty { .. })), "no prompt");
    assert!(matches!(s.submit(request(5, 0)), Err(SubmitError::Empty { .. })), "nothing to produce");
    let long = s.submit(request(250, 10)).expect_err("beyond the context").to_string();
    assert!(long.contains("250") && long.contains("260") && long.contains("256"), "{long}");
    s.cancel(SessionId(99)).expect("an unknown session is no error");
}
