//! Seeded simulations of the schedule with budgets too small for all: invariants at every step, equal seeds equal
//! traces. Sessions ask for codecs and for evictions, of a whole prompt or of a document before a question.

mod backend;
mod faults;
mod restarts;
mod rounds;
mod sharing;
mod world;

use std::collections::{BTreeMap, BTreeSet};

use backend::Watched;
use concertina::compression::keep::Domain;
use concertina::geometry::Bytes;
use concertina::pool::page_table::TableShape;
use concertina::schedule::simulation::Simulation;
use concertina::schedule::{
    Finish, HostConfig, Phase, Request, ScheduleConfig, Scheduler, Session, SessionId, SubmitError,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use world::{ASKED, Follower, abilities, caches, compressed, fits_alone, full, is_beyond, scheduler};

/// What a simulation came to.
#[derive(Debug, PartialEq)]
struct Outcome {
    trace: u64,
    steps: u64,
    waited: usize,
    evictions: u32,
    ragged: u32,
    carried: u32,
    slots: usize,
}

/// Tokens of each session that its cache has seen.
fn cached(s: &Scheduler) -> BTreeMap<SessionId, u32> {
    s.caches().tables.iter().map(|(id, table)| (*id, table.n_tokens())).collect()
}

fn random_request(rng: &mut ChaCha8Rng) -> Request {
    let prompt: Vec<u32> = (0..rng.random_range(1..160)).map(|_| rng.random_range(0..50)).collect();
    let stop = if rng.random_bool(0.3) { vec![7] } else { Vec::new() };
    let compression = compressed(ASKED[rng.random_range(0..ASKED.len())]);
    let max_new = rng.random_range(1..140);
    // A question behind the document, no document at all, or one that is said to be longer than the prompt.
    let n = u32::try_from(prompt.len()).expect("short");
    let document = rng.random_bool(0.5).then(|| if rng.random_bool(0.1) { n + 9 } else { rng.random_range(0..=n) });
    Request { stop, compression, document, ..Request::new(prompt, max_new) }
}

/// Runs one seed.
fn simulate(seed: u64) -> Outcome {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut s = scheduler(&mut rng);
    let mut backend = Watched::new(seed, 50, s.caches().abilities.slots.unwrap_or(0));
    let mut follower = Follower::default();
    let arrivals = rng.random_range(5..30_usize);
    let (mut submitted, mut refused, mut waited) = (Vec::new(), 0, BTreeSet::new());
    let mut order = Vec::new();
    let mut steps_without_progress = 0;
    while submitted.len() + refused < arrivals || !s.is_idle() {
        while submitted.len() + refused < arrivals && rng.random_bool(0.4) {
            let request = random_request(&mut rng);
            let beyond = is_beyond(s.caches(), &request);
            let described = format!("{} of {:?} in {}", request.compression, request.document, request.prompt.len());
            match s.submit(request.clone()) {
                Ok(id) => {
                    assert!(!beyond, "{described} should be refused");
                    assert!(fits_alone(s.caches(), &request), "seed {seed}: {described} would wait for ever");
                    backend.requests.insert(id, request);
                    submitted.push(id);
                }
                Err(SubmitError::NotServed(why)) => {
                    assert!(beyond, "{described} could be served: {why}");
                    refused += 1;
                }
                Err(SubmitError::NeverFits { .. }) => {
                    assert!(!fits_alone(s.caches(), &request), "only what can never fit is refused");
                    refused += 1;
                }
                Err(other) => panic!("{other}"),
            }
        }
        if rng.random_bool(0.03) && !submitted.is_empty() {
            let victim = submitted[rng.random_range(0..submitted.len())];
            s.cancel(victim).expect("the pool agrees");
            follower.check(&s);
        }
        follower.before(&s);
        let before = cached(&s);
        let report = s.step(&mut backend).expect("a simulation does not fail");
        order.extend(report.admitted.iter().copied());
        waited.extend(s.waiting());
        steps_without_progress =
            if report.decode_rows + report.prefill_rows > 0 { 0 } else { steps_without_progress + 1 };
        assert!(s.is_idle() || steps_without_progress < 3, "an admitted session should always progress");
        follower.after(&s, &report, &before);
    }
    assert!(order.windows(2).all(|w| w[0] < w[1]), "sessions are admitted in order of arrival");
    for (id, session) in s.sessions() {
        check_finished(id, session);
    }
    let report = s.report();
    assert_eq!((report.pages_in_use_bytes, report.committed_bytes), (Bytes::ZERO, Bytes::ZERO), "all bytes are back");
    Outcome {
        trace: backend.simulation.trace_hash(),
        steps: backend.simulation.steps(),
        waited: waited.len(),
        evictions: backend.evictions,
        ragged: backend.ragged,
        carried: backend.carried,
        slots: follower.most_slots,
    }
}

fn check_finished(id: SessionId, session: &Session) {
    let Phase::Finished(why) = session.phase else { panic!("session {id:?} should be over") };
    let n = session.produced.len();
    match why {
        Finish::Length => assert_eq!(n, session.request.max_new as usize, "as many as asked for"),
        Finish::Stop => assert_eq!(session.produced.last(), Some(&7), "ended by the stop token"),
        Finish::Cancelled => {}
    }
    assert!(session.produced.iter().rev().skip(1).all(|t| !session.request.stop.contains(t)), "nothing after stop");
}

#[test]
fn invariants_hold_in_200_seeded_simulations() {
    let run = |seed| {
        let run = std::panic::catch_unwind(|| simulate(seed));
        run.unwrap_or_else(|_| panic!("seed {seed} failed: simulate({seed}) repeats it"))
    };
    let all: Vec<Outcome> = (0..200).map(run).collect();
    let sum = |of: &dyn Fn(&Outcome) -> u32| all.iter().map(of).sum::<u32>();
    let (waited, steps) = (all.iter().map(|o| o.waited).sum::<usize>(), all.iter().map(|o| o.steps).sum::<u64>());
    let (evictions, ragged, carried) = (sum(&|o| o.evictions), sum(&|o| o.ragged), sum(&|o| o.carried));
    let slots = all.iter().map(|o| o.slots).max();
    println!("200 simulations, {steps} steps, {waited} sessions had to wait");
    println!("{evictions} evictions, {ragged} left lists unequally long, {carried} carried scores along");
    assert!(waited > 500, "the budgets should be too small for all: {waited} sessions waited");
    assert!(evictions > 1000 && ragged > 100 && carried > 100, "evictions of every kind should have happened");
    assert_eq!(slots, Some(3), "as many slots as there are should have been taken at once");
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    assert_eq!(simulate(3), simulate(3), "equal seeds");
    assert_ne!(simulate(3).trace, simulate(4).trace, "different seeds");
}

/// A request without compression.
fn request(n: usize, max_new: u32) -> Request {
    Request::new(vec![1; n], max_new)
}

#[test]
fn a_decoding_session_gets_a_token_in_every_step_while_another_prefills() {
    let config = ScheduleConfig { max_rows: 8, max_sessions: 2, context_length: 256, host: HostConfig::default() };
    let served = abilities(&full(1, 1, 16), &["rot3"], 0);
    let mut s = Scheduler::new(config, caches(full(1, 1, 16), served, 8, 16, 16));
    let request = |n: usize, codec: &str| Request { max_new: 30, compression: compressed(codec), ..request(n, 1) };
    let short = s.submit(request(4, "f16")).expect("fits");
    let long = s.submit(request(100, "rot3")).expect("fits");
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
    assert!(matches!(s.submit(request(0, 5)), Err(SubmitError::Empty { .. })), "no prompt");
    assert!(matches!(s.submit(request(5, 0)), Err(SubmitError::Empty { .. })), "nothing to produce");
    let long = s.submit(request(310, 20)).expect_err("beyond the context").to_string();
    assert!(long.contains("310") && long.contains("330") && long.contains("320"), "{long}");
    s.cancel(SessionId(99)).expect("an unknown session is no error");
}

#[test]
fn a_codec_without_kernels_is_refused_with_those_that_have_some() {
    let config = ScheduleConfig { max_rows: 8, max_sessions: 2, context_length: 256, host: HostConfig::default() };
    let served = abilities(&full(1, 1, 32), &["kivi4", "rot3"], 0);
    let mut s = Scheduler::new(config, caches(full(1, 1, 32), served, 8, 16, 16));
    for codec in ["f16", "kivi4", "rot3"] {
        s.submit(Request { compression: compressed(codec), ..request(4, 2) }).expect("it has kernels");
    }
    let error = s.submit(Request { compression: compressed("rot4"), ..request(4, 2) }).expect_err("no kernels");
    assert!(matches!(error, SubmitError::NotServed(_)), "{error}");
    let message = error.to_string();
    assert!(message.contains("hidden=rot4") && message.contains("f16, kivi4, rot3"), "{message}");
}

/// Open and sealed pages need a slab each, however few bytes they are.
#[test]
fn a_session_that_no_empty_pool_could_admit_is_refused() {
    let config = ScheduleConfig { max_rows: 64, max_sessions: 2, context_length: 256, host: HostConfig::default() };
    let served = abilities(&full(1, 1, 16), &["rot3"], 0);
    for (slabs, admitted) in [(1, false), (2, true)] {
        let mut s = Scheduler::new(config, caches(full(1, 1, 16), served.clone(), config.max_rows, slabs, 16));
        match s.submit(Request { compression: compressed("rot3"), ..request(20, 1) }) {
            Ok(_) => {
                let report = s.step(&mut Simulation::new(1, 50)).expect("a simulation does not fail");
                assert_eq!(report.admitted.len(), 1, "in {slabs} slabs an accepted session should not wait for ever");
                assert!(admitted, "{slabs} slabs do not hold an open and a sealed page");
            }
            Err(SubmitError::NeverFits { .. }) => assert!(!admitted, "{slabs} slabs hold an open and a sealed page"),
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn a_pool_holds_more_compressed_sessions_in_the_ratio_of_their_bytes() {
    let config = ScheduleConfig { max_rows: 512, max_sessions: 512, context_length: 2048, host: HostConfig::default() };
    let shape = full(2, 2, 32);
    // Prompts that end inside a page, on an edge, and before the first one.
    for n in [1000, 1024, 20] {
        let admitted = |codec: &str| -> (u64, Bytes, Bytes, Bytes) {
            let served = abilities(&shape, &["kivi4", "rot3"], 0);
            let caches = caches(shape, served, config.max_rows, 64, 64);
            let (capacity, slab) = (caches.pool.capacity(), Bytes(shape.open_page().0 * 16));
            let mut s = Scheduler::new(config, caches);
            let request = Request { compression: compressed(codec), ..request(n, 1) };
            let each = s.caches().needed(&request).expect("it is served");
            for at in 0..config.max_sessions {
                // Nothing in common to share.
                let prompt = vec![at; n];
                s.submit(Request { prompt, ..request.clone() }).expect("each fits alone");
            }
            let report = s.step(&mut Simulation::new(1, 50)).expect("a simulation does not fail");
            (report.admitted.len() as u64, each, capacity, slab)
        };
        let mut numbers = Vec::new();
        for codec in ["f16", "kivi4", "rot3"] {
            let (sessions, each, capacity, slab) = admitted(codec);
            println!("{n} tokens of {codec}: {sessions} sessions of {each} in {capacity}");
            assert!(sessions * each.0 <= capacity.0, "{codec}: no more than fit");
            // Open and sealed pages each may leave a part of one slab, and of each slab a rest.
            let rest = Bytes(2 * slab.0 + capacity.0 / 16);
            let filled = (sessions + 1) * each.0 + rest.0 > capacity.0 || sessions == u64::from(config.max_sessions);
            assert!(filled, "{codec}: {sessions} sessions of {each} leave room for more in {capacity}");
            numbers.push((sessions as f64, each.0 as f64));
        }
        let (full, kivi4, rot3) = (numbers[0], numbers[1], numbers[2]);
        if n < 32 {
            assert!((kivi4.1 - full.1).abs() < 1.0 && kivi4.0 >= full.0, "what is not full is not compressed");
            continue;
        }
        for (name, codec) in [("kivi4", kivi4), ("rot3", rot3)] {
            let (ratio, of_bytes) = (codec.0 / full.0, full.1 / codec.1);
            assert!(of_bytes > 2.0, "{name} should take less than half of the bytes: {of_bytes}");
            assert!((ratio / of_bytes - 1.0).abs() < 0.1, "{name}: {ratio} times the sessions, {of_bytes} by bytes");
        }
    }
}

/// A document shorter than what later evictions keep gives pages back that those will want.
#[test]
fn tables_that_take_turns_are_there_however_full_the_pool_is() {
    let shape = full(1, 1, 16);
    let config = ScheduleConfig { max_rows: 64, max_sessions: 3, context_length: 320, host: HostConfig::default() };
    // One slab: 16 pages.
    let mut s = Scheduler::new(config, caches(shape, abilities(&shape, &[], 1), config.max_rows, 1, 1));
    // A page for 10 tokens; then twice two pages of what stays and two of what comes, 9 in all.
    let turns = Request { compression: compressed("streaming:64:every32"), ..request(10, 100) };
    let turns = s.submit(turns).expect("9 of 16 pages");
    let others = s.submit(request(40, 73)).expect("the other 7");
    // What the first eviction gives back for good is the page of the document, and no more.
    let two_pages = s.submit(request(1, 32)).expect("fits alone");
    let mut backend = Simulation::new(1, 50);
    let mut evictions = 0;
    while s.session(turns).is_some_and(|session| !matches!(session.phase, Phase::Finished(_))) {
        let others_hold = s.session(others).is_some_and(Session::is_admitted);
        let report = s.step(&mut backend).expect("an eviction never finds the pool empty");
        evictions += report.evicted.len();
        assert!(!others_hold || evictions == 0 || !report.admitted.contains(&two_pages), "the pool is full");
        let held = s.caches().tables.get(&turns).map_or(0, |table| table.held_tokens());
        assert!(held <= 64, "{held} tokens of 64");
    }
    assert_eq!(evictions, 4, "after 10, 42, 74 and 106 tokens");
    while !s.is_idle() {
        s.step(&mut backend).expect("the others end");
    }
    let phase = s.session(two_pages).expect("known").phase;
    assert_eq!(phase, Phase::Finished(Finish::Length), "it had its turn");
    let report = s.report();
    assert_eq!((report.pages_in_use_bytes, report.committed_bytes), (Bytes::ZERO, Bytes::ZERO), "all bytes are back");
}

/// However long a session decodes, its bytes stay what the first eviction left and the tokens until the next.
#[test]
fn a_session_whose_budget_is_in_tokens_stays_flat_for_20000_tokens() {
    let shape = full(2, 2, 64);
    let config = ScheduleConfig { max_rows: 128, max_sessions: 2, context_length: 32_768, host: HostConfig::default() };
    for (policy, in_codec) in [("streaming:512:every64", "f16"), ("streaming:512:every64,hidden=rot3", "rot3")] {
        let mut s = Scheduler::new(config, caches(shape, abilities(&shape, &["rot3"], 1), config.max_rows, 60, 60));
        let compression = compressed(&format!("token={policy}"));
        let flat = Request { compression, ..request(1_000, 20_000) };
        let needed = s.caches().needed(&flat).expect("it is served");
        let flat = s.submit(flat).expect("20 pages of each list, and twice 9");
        // The same length, with everything kept, would never fit.
        let error = s.submit(request(1_000, 20_000)).expect_err("329 pages of each list");
        assert!(matches!(error, SubmitError::NeverFits { .. }), "{error}");
        let sealed = TableShape { codec: compressed(in_codec).hidden, ..shape }.sealed_page();
        // 448 tokens stay in 7 pages of each list; 64 more open one, and leave it in the codec.
        let bound = 4 * (7 * sealed.0 + shape.open_page().0 + sealed.0);
        let mut backend = Simulation::new(1, 50);
        let (mut evictions, mut held_at_eviction, mut promised) = (0_usize, BTreeSet::new(), BTreeSet::new());
        while s.session(flat).is_some_and(|session| !matches!(session.phase, Phase::Finished(_))) {
            let report = s.step(&mut backend).expect("committed");
            evictions += report.evicted.len();
            let Some(table) = s.caches().tables.get(&flat) else { continue };
            if evictions > 0 {
                let (held, pool) = (table.held_bytes(), s.report());
                assert!(held.0 <= bound, "{policy}: {held} after {evictions} evictions, at most {bound} B");
                assert!((0..2).all(|layer| table.n_held(layer, 1) <= 512), "{policy}: no list exceeds the budget");
                assert_eq!(pool.pages_in_use_bytes, held, "{policy}: it is alone");
                let all = pool.pages_in_use_bytes + pool.committed_bytes;
                assert!(all < needed, "{policy}: the bytes of the document are not promised any more");
                promised.insert(all);
                held_at_eviction.extend((!report.evicted.is_empty()).then_some(held));
            }
        }
        // 1000 tokens, then every 64 until 20,999 are cached.
        assert_eq!(evictions, 1 + 19_998 / 64, "{policy}: evictions");
        assert_eq!((held_at_eviction.len(), promised.len()), (1, 1), "{policy}: {held_at_eviction:?}, {promised:?}");
        let session = s.session(flat).expect("known");
        assert_eq!(session.produced.len(), 20_000, "{policy}: all tokens came");
        let evicted = 4 * (1_000 - 448 + 64 * (evictions as u64 - 1));
        assert_eq!(s.caches().evicted_tokens(), evicted, "{policy}: tokens that left");
        let report = s.report();
        let rest = (report.pages_in_use_bytes, report.committed_bytes, report.slack_bytes);
        assert_eq!(rest, (Bytes::ZERO, Bytes::ZERO, Bytes::ZERO), "{policy}: all bytes are back");
    }
}

/// Evictions that follow each other meet lists of any lengths, and their tables are promised before.
#[test]
fn tables_that_take_turns_hold_what_stays_of_lists_of_any_length() {
    for (size, policy) in [
        (16, "pyramidkv:80:window8:every16"),
        (16, "pyramidkv:129:window16:kernel1:beta10:every16"),
        (32, "pyramidkv:200:window16:every32"),
        (16, "adakv:64:h2o:every16"),
        (16, "snapkv:90:window8:every16"),
    ] {
        let shape = full(6, 3, size);
        let caches = caches(shape, abilities(&shape, &[], 1), 64, 200, 200);
        let compression = compressed(&format!("token={policy}"));
        let turns = Request { compression: compression.clone(), ..request(20, 200) };
        let pages = caches.pages_needed(&turns).expect("it is served");
        let (_, promised) = pages.last().copied().expect("three tables");
        assert_eq!(pages.len(), 6, "{policy}: open pages and those in the codec, of three tables");
        for n in 1..1500 {
            let domains = caches.domains(&compression, n).expect("there is room for what always stays");
            // As unequally as lists that compete can be.
            let of_domain = |domain: &Domain| {
                let lists = u32::try_from(domain.lists.len()).expect("few lists");
                let certain = domain.floor.max(domain.sink + domain.recent).min(n);
                let one = domain.total.saturating_sub(certain * (lists - 1)).min(n);
                one.div_ceil(size) + certain.div_ceil(size) * (lists - 1)
            };
            let needed: u32 = domains.iter().map(of_domain).sum();
            assert!(needed <= promised, "{policy}: lists of {n} tokens leave {needed} pages, {promised} are promised");
        }
    }
}
