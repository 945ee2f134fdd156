//! Seeded simulations of the schedule with budgets too small for all: invariants at every step, equal seeds equal
//! traces.

use std::collections::BTreeSet;

use concertina::compression::Compression;
use concertina::compression::hidden::HiddenCodec;
use concertina::geometry::{Bytes, PageGeometry};
use concertina::kernels::sample::Sampling;
use concertina::pool::page_table::{Sealing, TableShape, Window};
use concertina::pool::{PagePool, PoolLayout};
use concertina::schedule::simulation::Simulation;
use concertina::schedule::{Caches, Finish, Phase, Request, ScheduleConfig, Scheduler, SessionId, SubmitError};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What sessions ask for: nothing, a little, half, more than f16, and sides of their own.
const ASKED: [&str; 5] = ["f16", "rot3", "kivi4", "f32", "k:int8,v:rot2"];

fn compressed(codec: &str) -> Compression {
    codec.parse().expect("a codec")
}

fn full(num_layers: u32, num_kv_heads: u32, page_size: u32) -> TableShape {
    let page = PageGeometry { page_size, head_dim: 32 };
    TableShape { num_layers, num_kv_heads, page, codec: HiddenCodec::F16, sealing: Sealing::WhenFull }
}

/// Caches over `slabs` slabs of 16 open pages each, in arenas of `arena_slabs`, that serve `codecs`.
fn caches(full: TableShape, codecs: Vec<HiddenCodec>, max_rows: u32, slabs: u64, arena_slabs: u64) -> Caches {
    let window = Window::new(full.page, full.num_kv_heads, max_rows, !codecs.is_empty());
    let pages: Vec<Bytes> = codecs.iter().map(|c| c.page_bytes(full.page)).chain([full.open_page()]).collect();
    let largest = pages.iter().max().expect("open pages at least");
    let slab = Bytes(largest.0 * 16);
    let smallest_page = *pages.iter().min().expect("open pages at least");
    let tables = slab.0.div_ceil(smallest_page.0) * 8;
    let layout = PoolLayout {
        budget: Bytes(slabs * (slab.0 + tables) + 10_000 + u64::from(window.entries()) * 4),
        staging: Bytes(4096),
        scratch: Bytes(2048),
        max_binding: Bytes(slab.0 * arena_slabs),
        slab,
        smallest_page,
        fixed_entries: window.entries(),
    };
    let pool = PagePool::new(&layout).expect("the layout should fit");
    Caches::new(pool, full, window, codecs)
}

fn scheduler(rng: &mut ChaCha8Rng) -> Scheduler {
    let page_size = *[16_u32, 32].get(rng.random_range(0..2_usize)).expect("two sizes");
    let shape = full(rng.random_range(1..4), rng.random_range(1..4), page_size);
    let max_sessions = rng.random_range(1..9);
    let config = ScheduleConfig { max_rows: max_sessions + rng.random_range(0..80), max_sessions, context_length: 256 };
    // Some are not served: pages too small for a codec's groups, or chance.
    let asked = ASKED.iter().map(|codec| compressed(codec).hidden);
    let served = asked.filter(|c| c.seals() && c.check(shape.page).is_ok() && rng.random_bool(0.8)).collect();
    let (slabs, arena_slabs) = (rng.random_range(2..24), rng.random_range(1..8));
    Scheduler::new(config, caches(shape, served, config.max_rows, slabs, arena_slabs))
}

/// Whether a session could be admitted if it were alone: a slab serves one page size at a time.
fn fits_alone(caches: &Caches, shape: &TableShape, tokens: u32) -> bool {
    let (n, size) = (u64::from(tokens), u64::from(shape.page.page_size));
    let (open, sealed) = if shape.codec.seals() { (1, n / size) } else { (n.div_ceil(size), 0) };
    // The slab is 16 of the largest pages that the caches serve.
    let pages = caches.codecs.iter().map(|codec| codec.page_bytes(shape.page).0).chain([shape.open_page().0]);
    let slab = 16 * pages.max().expect("open pages at least");
    let slabs = |per_list: u64, page: Bytes| (per_list * u64::from(shape.num_lists())).div_ceil(slab / page.0);
    slabs(open, shape.open_page()) + slabs(sealed, shape.sealed_page()) <= caches.pool.capacity().0 / slab
}

fn check(s: &Scheduler, max_sessions: usize) {
    let report = s.report();
    assert!(report.in_use_bytes <= report.budget_bytes && report.peak_bytes <= report.budget_bytes, "budget");
    let caches = s.caches();
    let mut pages = BTreeSet::new();
    let (mut held, mut promised) = (0_u64, 0_u64);
    for (id, session) in s.sessions() {
        let table = caches.tables.get(&id);
        assert_eq!(session.is_admitted(), table.is_some(), "exactly admitted sessions hold pages");
        let Some(table) = table else { continue };
        let expected = match session.phase {
            Phase::Prefill(done) => done as usize,
            _ => session.request.prompt.len() + session.produced.len() - 1,
        };
        assert_eq!(table.n_tokens() as usize, expected, "session {id:?}: cached tokens");
        let shape = caches.shape(&session.request.compression);
        assert_eq!(table.shape(), &shape, "session {id:?}: the table is of what was asked for");
        let page_size = shape.page.page_size as usize;
        // Between steps a page is either sealed or open; f16 pages are always open.
        let (open, sealed) = if shape.codec.seals() {
            (expected.div_ceil(page_size).min(1), expected / page_size)
        } else {
            (expected.div_ceil(page_size), 0)
        };
        for (layer, head) in (0..shape.num_layers).flat_map(|l| (0..shape.num_kv_heads).map(move |h| (l, h))) {
            let (codes, own) = table.list(layer, head);
            assert_eq!((own.len(), codes.len()), (open, sealed), "session {id:?}: open and sealed pages of a list");
            assert!(codes.iter().chain(own).all(|p| pages.insert(*p)), "no page belongs to two lists");
        }
        assert!(table.sealing_pages().is_empty(), "session {id:?}: nothing is left to seal between steps");
        assert_eq!(table.held_bytes(), shape.bytes_for(table.n_tokens()), "session {id:?}: bytes held");
        held += table.held_bytes().0;
        promised += shape.bytes_for(session.request.max_tokens()).0;
    }
    assert_eq!(report.pages_in_use_bytes, Bytes(held), "the pool holds what the tables name");
    assert_eq!(
        report.pages_in_use_bytes + report.committed_bytes,
        Bytes(promised),
        "no session has more than it can need"
    );
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
            let prompt: Vec<u32> = (0..rng.random_range(1..120)).map(|_| rng.random_range(0..50)).collect();
            let stop = if rng.random_bool(0.5) { vec![7] } else { Vec::new() };
            let compression = compressed(ASKED[rng.random_range(0..ASKED.len())]);
            let max_new = rng.random_range(1..40);
            let served = s.caches().serves(compression.hidden);
            let tokens = u32::try_from(prompt.len()).expect("short") + max_new - 1;
            let fits = fits_alone(s.caches(), &s.caches().shape(&compression), tokens);
            let request =
                Request { prompt, max_new, sampling: Sampling::GREEDY, stop, compression: compression.clone() };
            match s.submit(request) {
                Ok(id) => {
                    assert!(served, "{compression} should be refused");
                    assert!(fits, "seed {seed}: {tokens} tokens of {compression} would wait for ever");
                    submitted.push(id);
                }
                Err(SubmitError::NotServed { codec, .. }) => {
                    assert!(!served && codec == compression.hidden, "only codecs without kernels are refused");
                    refused += 1;
                }
                Err(SubmitError::NeverFits { .. }) => {
                    assert!(!fits, "only what can never fit is refused");
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

/// A request without compression.
fn request(n: usize, max_new: u32) -> Request {
    let (sampling, stop, compression) = (Sampling::GREEDY, Vec::new(), Compression::default());
    Request { prompt: vec![1; n], max_new, sampling, stop, compression }
}

#[test]
fn a_decoding_session_gets_a_token_in_every_step_while_another_prefills() {
    let config = ScheduleConfig { max_rows: 8, max_sessions: 2, context_length: 256 };
    let served = vec![compressed("rot3").hidden];
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
    let long = s.submit(request(250, 10)).expect_err("beyond the context").to_string();
    assert!(long.contains("250") && long.contains("260") && long.contains("256"), "{long}");
    s.cancel(SessionId(99)).expect("an unknown session is no error");
}

#[test]
fn a_codec_without_kernels_is_refused_with_those_that_have_some() {
    let config = ScheduleConfig { max_rows: 8, max_sessions: 2, context_length: 256 };
    let served = vec![compressed("kivi4").hidden, compressed("rot3").hidden];
    let mut s = Scheduler::new(config, caches(full(1, 1, 32), served, 8, 16, 16));
    for codec in ["f16", "kivi4", "rot3"] {
        s.submit(Request { compression: compressed(codec), ..request(4, 2) }).expect("it has kernels");
    }
    let error = s.submit(Request { compression: compressed("rot4"), ..request(4, 2) }).expect_err("no kernels");
    assert!(matches!(error, SubmitError::NotServed { codec, .. } if codec == compressed("rot4").hidden), "{error}");
    let message = error.to_string();
    assert!(message.contains("hidden=rot4") && message.contains("f16, kivi4, rot3"), "{message}");
}

/// Open and sealed pages need a slab each, however few bytes they are.
#[test]
fn a_session_that_no_empty_pool_could_admit_is_refused() {
    let config = ScheduleConfig { max_rows: 64, max_sessions: 2, context_length: 256 };
    let served = vec![compressed("rot3").hidden];
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
    let config = ScheduleConfig { max_rows: 512, max_sessions: 512, context_length: 2048 };
    let shape = full(2, 2, 32);
    // Prompts that end inside a page, on an edge, and before the first one.
    for n in [1000, 1024, 20] {
        let admitted = |codec: &str| -> (u64, Bytes, Bytes, Bytes) {
            let served = vec![compressed("kivi4").hidden, compressed("rot3").hidden];
            let caches = caches(shape, served, config.max_rows, 64, 64);
            let (capacity, slab) = (caches.pool.capacity(), Bytes(shape.open_page().0 * 16));
            let mut s = Scheduler::new(config, caches);
            let request = Request { compression: compressed(codec), ..request(n, 1) };
            let each = s.caches().needed(&request);
            for _ in 0..config.max_sessions {
                s.submit(request.clone()).expect("each fits alone");
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
