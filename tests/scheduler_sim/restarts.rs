//! Schedules that end in the middle: every session goes on record, and goes on in another schedule with what its cache held.

use concertina::schedule::simulation::Simulation;
use concertina::schedule::{Phase, Request, Scheduler, SessionId, SessionRecord, Store};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::rounds::{World, random_request};

/// What a restart came to.
#[derive(Debug, Default)]
struct Outcome {
    /// Sessions that went on with their caches, and without.
    with_cache: usize,
    without: usize,
    /// Of those with a cache, in an answer, and over what an eviction left.
    answering: usize,
    evicted: usize,
}

/// The rest of a session: what is still to be asked and produced.
fn rest(session: &concertina::schedule::Session, record: &SessionRecord) -> Option<(Request, Vec<u32>)> {
    let (mut prompt, mut rounds) = (record.prompt.clone(), session.request.rounds[session.round()..].to_vec());
    let mut max_new = record.max_new;
    if record.answered {
        if rounds.is_empty() {
            return None;
        }
        let next = rounds.remove(0);
        prompt.extend(next.tokens);
        max_new = next.max_new;
    }
    let (compression, document) = (record.compression.clone(), Some(record.document));
    let request = Request { prompt, max_new, rounds, compression, document, ..session.request.clone() };
    Some((request, record.produced.clone()))
}

fn restart(seed: u64, spoil: bool) -> Outcome {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let world = World::new(&mut rng, seed);
    let (mut s, mut backend) = world.schedule();
    let requests: Vec<Request> = (0..8)
        .map(|_| Request { keep: rng.random_bool(0.5), ..random_request(&mut rng) })
        .filter(|request| s.submit(request.clone()).is_ok())
        .collect();
    for _ in 0..rng.random_range(1..120) {
        s.step(&mut backend).expect("a simulation does not fail");
    }
    let (mut after, mut others): (Scheduler, Simulation) = world.schedule();
    let mut outcome = Outcome::default();
    let mut went_on: Vec<(SessionId, usize, Vec<u32>)> = Vec::new();
    for (at, (id, session)) in s.sessions().enumerate() {
        let record = s.record(id);
        let done = session.produced.len() - record.produced.len();
        let before = session.produced[..done].to_vec();
        let Some((request, produced)) = rest(session, &record) else {
            assert_eq!(before, world.alone(&requests[at]), "seed {seed}: {id:?} was over");
            continue;
        };
        let content = backend.content(id);
        let cache = record.cache.clone().map(|cache| {
            let restored = after.caches().restore(&record.compression, cache, record.cached, request.max_tokens());
            restored.unwrap_or_else(|e| panic!("seed {seed}: {id:?} of {}: {e}", record.compression.short()))
        });
        outcome.with_cache += usize::from(cache.is_some());
        outcome.without += usize::from(cache.is_none());
        outcome.answering += usize::from(cache.is_some() && session.phase == Phase::Decode);
        outcome.evicted += usize::from(record.cache.iter().any(|cache| cache.table.tail_start > 0));
        let pages = cache.as_ref().map(|cache| (cache.n_pages(), cache.n_tokens()));
        let new = after.restore(request, &produced, record.cached, cache.map(|cache| (cache, Store::Disk)));
        let new = new.unwrap_or_else(|e| panic!("seed {seed}: {id:?}: {e}"));
        if let Some((pages, tokens)) = pages {
            // A cache that nothing was read into yet holds the hash of nothing, whatever its session held before.
            let (n, hash) = content.filter(|_| tokens > 0).unwrap_or((0, 0xcbf2_9ce4_8422_2325));
            assert_eq!(n, tokens, "seed {seed}: {id:?}: what is on record is what is cached");
            others.insert(new, pages, (n, hash ^ u64::from(spoil)));
        }
        went_on.push((new, at, before));
    }
    while !after.is_idle() {
        after.step(&mut others).expect("a simulation does not fail");
    }
    for (id, at, before) in went_on {
        let produced = [before, after.session(id).expect("it went on").produced.clone()].concat();
        assert_eq!(produced, world.alone(&requests[at]), "seed {seed}: {id:?} answers as without a restart");
        after.cancel(id).expect("the pool agrees");
    }
    after.step(&mut others).expect("a simulation does not fail");
    let report = after.report();
    assert_eq!(report.pages_in_use_bytes.0 + report.committed_bytes.0, 0, "seed {seed}: all bytes are back");
    assert_eq!(after.away_bytes(Store::Disk).0.0, 0, "seed {seed}: nothing is away");
    outcome
}

#[test]
fn sessions_on_record_go_on_as_if_nothing_had_happened() {
    let all: Vec<Outcome> = (0..400).map(|seed| restart(seed, false)).collect();
    let sum = |of: fn(&Outcome) -> usize| all.iter().map(of).sum::<usize>();
    let (with, without) = (sum(|o| o.with_cache), sum(|o| o.without));
    println!("{with} sessions went on with their caches, {} of them in an answer,", sum(|o| o.answering));
    println!("{} over what an eviction left; {without} without", sum(|o| o.evicted));
    assert!(with > 500 && without > 100 && sum(|o| o.answering) > 100 && sum(|o| o.evicted) > 100, "all of it happens");
}

#[test]
fn another_cache_than_the_session_s_is_noticed() {
    let noticed = (0..20).filter(|seed| std::panic::catch_unwind(|| restart(*seed, true)).is_err()).count();
    assert!(noticed > 10, "other contents give other answers in {noticed} of 20 restarts");
}
