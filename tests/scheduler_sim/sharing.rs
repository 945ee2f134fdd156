//! Sessions over few documents, which share pages: whoever read them, whoever has left since, and whatever happened to a cache,
//! a session answers as it does alone, and every byte is counted once.

use std::collections::BTreeMap;
use std::time::Duration;

use concertina::geometry::Bytes;
use concertina::pool::PageId;
use concertina::schedule::simulation::{Simulation, SimulationError};
use concertina::schedule::{
    Backend, BackendError, Caches, Fault, Finish, HostConfig, Phase, Place, Request, Round, ScheduleConfig, Scheduler,
    SessionId, StepPlan, StepReport, StepResult, SubmitError,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::faults::random_faults;
use super::rounds::{World, check, random_request};
use super::world::{abilities, caches, compressed, full};

/// Simulations of the test below.
const SEEDS: u64 = 1_000;

/// What a simulation came to.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    trace: u64,
    shared: u32,
    /// Of these, with what an eviction kept.
    kept: u32,
    /// Of these, by sessions that were forked from their donor.
    forked: u32,
    /// Of these, of a session that left as they were taken over.
    inherited: u32,
    /// Of these, by sessions that had lost their own cache.
    again: u32,
    tokens: u64,
    prompt_rows: u64,
    /// Most bytes that were spared at once.
    spared: u64,
    /// Sessions that left for the host, were dropped or were compressed harder, while others named their pages.
    left: u32,
    outlived: u32,
    /// Devices that were lost.
    lost: u32,
}

/// Compares what the pool counts with what the tables name.
fn exact(s: &Scheduler) {
    let mut named: BTreeMap<PageId, (u32, Bytes, bool)> = BTreeMap::new();
    let (mut held, mut returning) = (Bytes::ZERO, Bytes::ZERO);
    let caches = s.caches();
    for (id, table) in &caches.tables {
        for (page, bytes) in table.page_ids() {
            let (n, _, _) = named.entry(page).or_insert((0, bytes, table.admitted().turns));
            *n += 1;
        }
        held += table.held_bytes();
        returning += caches.returning_bytes(*id);
    }
    let sum = |of: &dyn Fn(&(u32, Bytes, bool)) -> bool| -> Bytes {
        named.values().filter(|page| of(page)).map(|(_, bytes, _)| *bytes).sum()
    };
    let (once, shared) = (sum(&|_| true), sum(&|(n, _, _)| *n > 1));
    let report = s.report();
    assert_eq!(report.pages_in_use_bytes, once, "a shared page is held once");
    assert_eq!((report.shared_bytes, report.spared_bytes), (shared, held - once), "what is shared, and spared by it");
    assert!(named.iter().all(|(page, (n, _, _))| caches.pool.holders(*page) == *n), "tables that name each page");
    for (id, table) in &caches.tables {
        let of_others = table.page_ids().filter(|(page, _)| named[page].0 > 1).map(|(_, bytes)| bytes).sum();
        assert_eq!(caches.shared_bytes(*id), of_others, "{id:?}: bytes that others name too");
    }
    // Everything that is promised returns with somebody, but for pages that several name and nobody's commitment backs.
    let unbacked = sum(&|(n, _, turns)| *n > 1 && !turns);
    assert_eq!(report.pages_in_use_bytes + report.committed_bytes, returning + unbacked, "what would return");
}

/// Documents, and what is asked of them.
struct Library {
    documents: Vec<Vec<u32>>,
    compressions: Vec<&'static str>,
}

impl Library {
    fn new(rng: &mut ChaCha8Rng) -> Self {
        let document = |n: usize, rng: &mut ChaCha8Rng| (0..n).map(|_| rng.random_range(0..40)).collect();
        let documents = (0..rng.random_range(1..4)).map(|_| document(rng.random_range(20..200), rng)).collect();
        let asked = [
            "f16",
            "kivi4",
            "rot3",
            "token=snapkv:0.25:window8",
            "token=snapkv:64:window16:every32,hidden=kivi4",
            "token=h2o:96:every32,hidden=kivi4",
            "token=h2o:0.5",
            "token=streaming:64:every32",
            "head=duo:0.5:sink4:recent16,token=snapkv:0.25:window8,hidden=rot3",
            "token=keydiff:0.5,hidden=kivi4",
            "layer=share:2",
        ];
        let compressions = (0..rng.random_range(1..3)).map(|_| asked[rng.random_range(0..asked.len())]).collect();
        Self { documents, compressions }
    }

    /// A question about a document, mostly the whole one.
    fn request(&self, rng: &mut ChaCha8Rng) -> Request {
        let request = random_request(rng);
        let document = &self.documents[rng.random_range(0..self.documents.len())];
        let n = if rng.random_bool(0.8) { document.len() } else { rng.random_range(1..=document.len()) };
        let question = &request.prompt[..rng.random_range(0..request.prompt.len().min(40))];
        let prompt: Vec<u32> = document[..n].iter().chain(question).copied().collect();
        let document = rng.random_bool(0.9).then(|| u32::try_from(n).expect("short"));
        let compression = compressed(self.compressions[rng.random_range(0..self.compressions.len())]);
        Request { prompt, document, compression, ..request }
    }
}

/// Notes what a step did to pages that are shared.
fn note(
    outcome: &mut Outcome,
    s: &Scheduler,
    report: &StepReport,
    shared_before: &BTreeMap<SessionId, Bytes>,
    parents: &BTreeMap<SessionId, SessionId>,
) {
    for (id, shared) in &report.shared {
        let session = s.session(*id).expect("it exists");
        outcome.shared += 1;
        outcome.kept += u32::from(session.request.compression.token.eviction().is_some());
        let donor = s.session(shared.donor).expect("it exists");
        outcome.forked += u32::from(parents.get(id) == Some(&shared.donor));
        outcome.inherited += u32::from(!donor.is_admitted());
        outcome.again += u32::from(!report.admitted.contains(id));
        outcome.tokens += u64::from(shared.tokens);
    }
    let had = |id: &&SessionId| shared_before.get(id).is_some_and(|bytes| *bytes > Bytes::ZERO);
    let left = report.swapped_out.iter().chain(&report.dropped).chain(&report.compressed).filter(had).count();
    outcome.left += u32::try_from(left).expect("few");
    let ended = report.finished.iter().map(|(id, _)| id).filter(had).count();
    outcome.outlived += u32::try_from(ended).expect("few");
    outcome.prompt_rows += u64::from(report.prefill_rows);
    outcome.spared = outcome.spared.max(s.report().spared_bytes.0);
}

/// Submits, or forks from a session that is there.
fn arrive(
    s: &mut Scheduler,
    library: &Library,
    rng: &mut ChaCha8Rng,
    submitted: &BTreeMap<SessionId, Request>,
    parents: &mut BTreeMap<SessionId, SessionId>,
) -> Option<(SessionId, Request)> {
    let ids: Vec<_> = submitted.keys().copied().collect();
    let result = if !ids.is_empty() && rng.random_bool(0.2) {
        let question: Vec<u32> = (0..rng.random_range(0..30)).map(|_| rng.random_range(0..40)).collect();
        let parent = ids[rng.random_range(0..ids.len())];
        let fork = s.fork(parent, &question, rng.random_range(1..30));
        parents.extend(fork.iter().map(|fork| (*fork, parent)));
        fork
    } else {
        s.submit(library.request(rng))
    };
    match result {
        Ok(id) => Some((id, s.session(id).expect("it was submitted").request.clone())),
        Err(SubmitError::NotServed(_) | SubmitError::NeverFits { .. } | SubmitError::TooLong { .. }) => None,
        Err(other) => panic!("{other}"),
    }
}

/// After a step that failed: another device in place of one that is lost.
fn go_on(s: &mut Scheduler, backend: &mut Simulation, error: &SimulationError) -> u32 {
    let lost = error.fault() == Fault::DeviceLost;
    if lost {
        s.device_lost(&backend.rebuilt()).expect("the pool agrees");
    }
    exact(s);
    u32::from(lost)
}

fn simulate(seed: u64, faults: bool) -> Outcome {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let world = World::new(&mut rng, seed);
    let library = Library::new(&mut rng);
    let (mut s, mut backend) = world.schedule();
    if faults {
        backend.faults = random_faults(&mut ChaCha8Rng::seed_from_u64(seed), world.config.max_sessions);
    }
    let arrivals = rng.random_range(3..16);
    let mut submitted: BTreeMap<SessionId, Request> = BTreeMap::new();
    let (mut tried, mut still) = (0, 0);
    let (mut preempted, mut parents) = (BTreeMap::new(), BTreeMap::new());
    let mut outcome = Outcome::default();
    while tried < arrivals || !s.is_idle() {
        while tried < arrivals && rng.random_bool(0.2) {
            tried += 1;
            submitted.extend(arrive(&mut s, &library, &mut rng, &submitted, &mut parents));
        }
        if rng.random_bool(0.002) && !submitted.is_empty() {
            let ids: Vec<_> = submitted.keys().copied().collect();
            s.cancel(ids[rng.random_range(0..ids.len())]).expect("the pool agrees");
        }
        let shared: BTreeMap<_, _> = s.caches().tables.keys().map(|id| (*id, s.caches().shared_bytes(*id))).collect();
        let report = match s.step(&mut backend) {
            Ok(report) => report,
            Err(error) => {
                assert!(faults, "a simulation does not fail: {error}");
                outcome.lost += go_on(&mut s, &mut backend, &error);
                continue;
            }
        };
        note(&mut outcome, &s, &report, &shared, &parents);
        for id in &report.preempted {
            *preempted.entry((*id, s.session(*id).expect("it exists").round())).or_default() += 1;
        }
        let bytes = report.in_bytes + report.out_bytes;
        let moved = report.decode_rows + report.prefill_rows > 0 || bytes > Bytes::ZERO || !report.idle.is_zero();
        let moved = moved || !report.compressed.is_empty() || !report.asked.is_empty() || report.shortage.is_some();
        still = if moved { 0 } else { still + 1 };
        assert!(still < 4 || s.is_idle(), "nothing happens any more, though {} wait", s.waiting().len());
        check(&s, &world, &preempted);
        exact(&s);
    }
    backend.faults.clear();
    s.step(&mut backend).expect("a simulation does not fail");
    let report = s.report();
    let rest = (report.pages_in_use_bytes, report.committed_bytes, report.shared_bytes, report.spared_bytes);
    assert_eq!(rest, (Bytes::ZERO, Bytes::ZERO, Bytes::ZERO, Bytes::ZERO), "all bytes are back");
    for (id, session) in s.sessions() {
        let Phase::Finished(why) = session.phase else { panic!("{id:?} should be over") };
        let alone = world.alone(&submitted[&id]);
        match why {
            Finish::Cancelled => assert!(alone.starts_with(&session.produced), "{id:?}: what it produced until then"),
            _ => assert_eq!(session.produced, alone, "{id:?} ({}) as alone", session.request.compression.short()),
        }
    }
    Outcome { trace: backend.trace_hash(), ..outcome }
}

#[test]
fn sessions_that_share_answer_as_alone_in_1000_seeded_simulations() {
    let run = |seed| {
        let run = std::panic::catch_unwind(|| simulate(seed, false));
        run.unwrap_or_else(|_| panic!("seed {seed} failed: sharing::simulate({seed}, false) repeats it"))
    };
    let all: Vec<Outcome> = (0..SEEDS).map(run).collect();
    let sum = |of: &dyn Fn(&Outcome) -> u32| all.iter().map(of).sum::<u32>();
    let (shared, kept, forked, again) = (sum(&|o| o.shared), sum(&|o| o.kept), sum(&|o| o.forked), sum(&|o| o.again));
    let (left, outlived, inherited) = (sum(&|o| o.left), sum(&|o| o.outlived), sum(&|o| o.inherited));
    let (tokens, rows): (u64, u64) = (all.iter().map(|o| o.tokens).sum(), all.iter().map(|o| o.prompt_rows).sum());
    println!("{SEEDS} simulations: {shared} sessions shared {tokens} tokens beside {rows} that were read");
    println!("{kept} of what evictions kept, {forked} forked, {again} of sessions whose caches were dropped");
    println!("{left} left while others named their pages, {outlived} ended, {inherited} handed them over");
    let least = [shared / 10, kept / 4, forked, again, left, outlived, inherited].into_iter().min().unwrap_or(0);
    assert!(least > 50, "all of it should have happened");
    assert!(tokens > rows / 4, "sharing should spare much of the reading");
}

#[test]
fn sessions_that_share_answer_as_alone_though_steps_fail() {
    let run = |seed| {
        let run = std::panic::catch_unwind(|| simulate(seed, true));
        run.unwrap_or_else(|_| panic!("seed {seed} failed: sharing::simulate({seed}, true) repeats it"))
    };
    let all: Vec<Outcome> = (0..SEEDS / 4).map(run).collect();
    let sum = |of: &dyn Fn(&Outcome) -> u32| all.iter().map(of).sum::<u32>();
    let (shared, again, lost) = (sum(&|o| o.shared), sum(&|o| o.again), sum(&|o| o.lost));
    println!("{shared} sessions shared, {again} of them not for the first time, over {lost} lost devices");
    assert!(shared > 200 && again > 50 && lost > 200, "all of it should have happened");
}

#[test]
fn the_same_seed_gives_the_same_trace_of_sharing() {
    assert_eq!(simulate(5, false), simulate(5, false), "equal seeds");
    assert_ne!(simulate(5, false).trace, simulate(6, false).trace, "different seeds");
}

/// A document of so many tokens, and a question about it.
fn about(document: u32, n: u32, question: u32) -> Request {
    let prompt = (0..n).map(|at| (at * 7 + document * 3) % 37).chain([question; 5]).collect();
    Request { document: Some(n), ..Request::new(prompt, 4) }
}

fn schedule(max_sessions: u32, slabs: u64, codecs: &[&str]) -> Scheduler {
    let shape = full(2, 2, 16);
    let abilities = abilities(&shape, codecs, 1);
    let config = ScheduleConfig { max_rows: 64, max_sessions, context_length: 600, host: HostConfig::default() };
    Scheduler::new(config, caches(shape, abilities, 64, slabs, slabs))
}

/// Steps until everybody is over; the reports.
fn finish(s: &mut Scheduler, backend: &mut impl Backend<Error = SimulationError>) -> Vec<StepReport> {
    let mut reports = Vec::new();
    while !s.is_idle() {
        reports.push(s.step(backend).expect("a simulation does not fail"));
        exact(s);
    }
    reports
}

/// A document is read once and evicted from once, however many ask about it; the others read their questions, and what is in
/// no whole page.
#[test]
fn a_document_is_read_once_and_compressed_once() {
    for (text, again) in [
        ("f16", 200 % 16),
        ("kivi4", 200 % 32),
        ("layer=share:2", 200 % 16),
        ("token=snapkv:0.5:window8,hidden=kivi4", 0),
        ("token=h2o:0.5", 0),
        ("token=streaming:64:every32", 0),
        ("head=duo:0.5:sink4:recent16", 0),
    ] {
        let shape = full(2, 2, 32);
        let config = ScheduleConfig { max_rows: 64, max_sessions: 4, context_length: 600, host: HostConfig::default() };
        let shape = if text.contains("kivi4") { shape } else { full(2, 2, 16) };
        let mut s = Scheduler::new(config, caches(shape, abilities(&shape, &["kivi4"], 1), 64, 40, 40));
        for question in 0..4 {
            let request = Request { compression: compressed(text), ..about(0, 200, question) };
            s.submit(request).expect("it fits");
        }
        let reports = finish(&mut s, &mut Simulation::new(1, 40));
        let rows: u32 = reports.iter().map(|report| report.prefill_rows).sum();
        assert_eq!(rows, 200 + 5 + 3 * (again + 5), "{text}: the document, four questions, and what is not whole");
        let evictions: usize = reports.iter().map(|report| report.evicted.len()).sum();
        assert_eq!(
            evictions,
            usize::from(compressed(text).token.eviction().is_some() || text.contains("duo")),
            "{text}"
        );
        let shared: u64 = s.sessions().map(|(_, session)| session.shared_tokens).sum();
        assert_eq!(shared, 3 * u64::from(200 - again), "{text}: tokens that were not read again");
        assert!(s.report().spared_peak_bytes > Bytes::ZERO, "{text}: nothing is held twice");
    }
}

/// What cannot be shared is read again: other compressions, other documents, what was hardened or goes on adding up scores.
#[test]
fn what_differs_is_not_shared() {
    let every = "token=h2o:96:every32,hidden=kivi4";
    let longer = Request { max_new: 60, ..about(0, 200, 1) };
    let with = |text: &str, request: Request| Request { compression: compressed(text), ..request };
    let cases = [
        ("codecs", with("f16", about(0, 200, 1)), with("kivi4", about(0, 200, 2))),
        ("a first token", with("f16", about(0, 200, 1)), with("f16", about(1, 200, 2))),
        ("less than a page", with("f16", about(0, 15, 1)), with("f16", about(0, 15, 2))),
        (
            "parts of an evicted document",
            with("token=h2o:0.5", about(0, 200, 1)),
            with("token=h2o:0.5", about(0, 199, 2)),
        ),
        ("sums that go on", with(every, longer.clone()), with(every, longer)),
    ];
    for (what, first, second) in cases {
        let mut s = schedule(2, 60, &["kivi4"]);
        // Pages that codec serves.
        if second.compression.hidden.seals() {
            let shape = full(2, 2, 32);
            let config =
                ScheduleConfig { max_rows: 64, max_sessions: 2, context_length: 600, host: HostConfig::default() };
            s = Scheduler::new(config, caches(shape, abilities(&shape, &["kivi4"], 2), 64, 60, 60));
        }
        for request in [first, second] {
            s.submit(request).unwrap_or_else(|e| panic!("{what}: {e}"));
        }
        let reports = finish(&mut s, &mut Simulation::new(1, 40));
        assert!(reports.iter().all(|report| report.shared.is_empty()), "{what} keep sessions apart");
    }
}

/// Where one session and a half fit, four over one document do.
#[test]
fn shared_documents_let_more_sessions_in() {
    let most = |documents: u32| {
        let mut s = schedule(4, 6, &[]);
        for at in 0..4 {
            s.submit(about(at % documents, 200, at)).expect("one fits");
        }
        let (mut backend, mut most) = (Simulation::new(1, 40), 0);
        while !s.is_idle() {
            s.step(&mut backend).expect("a simulation does not fail");
            exact(&s);
            most = most.max(s.n_admitted());
        }
        most
    };
    assert_eq!((most(4), most(1)), (1, 4), "one of four documents, and all four questions about one");
}

/// Where little more than one session fits, the next inherits what the one before has read: as it ends, as it is copied to the host,
/// and as it is dropped.
#[test]
fn what_was_read_is_handed_over() {
    for (rounds, host) in [(0, 0), (1, 1 << 20), (1, 0)] {
        let shape = full(2, 2, 16);
        let abilities = concertina::schedule::Abilities { swap_bytes: Bytes(1 << 16), ..abilities(&shape, &[], 1) };
        let host = HostConfig { budget: Bytes(host), ..HostConfig::default() };
        let config = ScheduleConfig { max_rows: 64, max_sessions: 4, context_length: 600, host };
        // 18 pages in each of 4 lists, of 80 pages in all.
        let mut s = Scheduler::new(config, caches(shape, abilities, 64, 5, 5));
        let round = Round { tokens: vec![5; 5], max_new: 60, think: Duration::from_secs(1) };
        let request = |at: u32| Request { max_new: 20, rounds: vec![round.clone(); rounds], ..about(0, 192, at) };
        let request = |at: u32| if rounds == 0 { Request { max_new: 90, ..request(at) } } else { request(at) };
        let ids: Vec<_> = (0..2).map(|at| s.submit(request(at)).expect("one fits")).collect();
        let mut reports = Vec::new();
        let mut backend = Simulation::new(1, 40);
        while s.session(ids[1]).is_some_and(|second| second.shared_tokens == 0) {
            assert!(!s.is_idle(), "the second never shares: {rounds} rounds, {host:?}");
            reports.push(s.step(&mut backend).expect("a simulation does not fail"));
            exact(&s);
        }
        let first = s.session(ids[0]).expect("known");
        assert!(!first.is_admitted(), "the first has left: {:?}", first.place);
        assert_eq!(s.session(ids[1]).expect("known").shared_tokens, 192, "all of the document");
        finish(&mut s, &mut backend);
    }
}

/// One that reads is waited for, unless it is of a lower priority.
#[test]
fn nobody_waits_for_a_lower_priority() {
    let first_step = |priority: i32| {
        let mut s = schedule(2, 60, &[]);
        let mut backend = Simulation::new(1, 40);
        let reader = s.submit(about(0, 200, 1)).expect("it fits");
        s.step(&mut backend).expect("the first step");
        let other = s.submit(Request { priority, ..about(0, 200, 2) }).expect("it fits");
        let report = s.step(&mut backend).expect("the second step");
        assert!(s.session(reader).is_some_and(|reader| reader.place == Place::Device), "it reads");
        finish(&mut s, &mut backend);
        let shared = s.session(other).expect("it was submitted").shared_tokens;
        (report.admitted.contains(&other), shared)
    };
    assert_eq!(first_step(0), (false, 192), "it waits, and reads its question");
    assert_eq!(first_step(1), (true, 64), "it begins with what is there after one step of 64 rows");
}

/// A session goes on from where another is, while that one goes on too, and after it has ended.
#[test]
fn forks_go_on_from_answers() {
    for text in ["f16", "token=snapkv:0.5:window8", "token=streaming:64:every32"] {
        let mut s = schedule(4, 60, &[]);
        let mut backend = Simulation::new(1, 40);
        let round = Round { tokens: vec![9; 20], max_new: 40, think: Duration::from_secs(1) };
        let request = Request { rounds: vec![round], max_new: 40, compression: compressed(text), ..about(0, 100, 1) };
        let parent = s.submit(request.clone()).expect("it fits");
        while s
            .session(parent)
            .is_some_and(|parent| parent.answers.len() < 2 && !matches!(parent.phase, Phase::Thinking(_)))
        {
            s.step(&mut backend).expect("a simulation does not fail");
        }
        // The same question that the parent will be asked.
        let fork = s.fork(parent, &[9; 20], 40).expect("it fits");
        let reports = finish(&mut s, &mut backend);
        let shared: Vec<_> = reports.iter().flat_map(|report| &report.shared).collect();
        assert_eq!(
            (shared.len(), shared[0].0, shared[0].1.donor),
            (1, fork, parent),
            "{text}: it shares with its parent"
        );
        assert!(shared[0].1.tokens > 100, "{text}: answers too, not the document alone: {}", shared[0].1.tokens);
        let (parent, child) = (s.session(parent).expect("known"), s.session(fork).expect("known"));
        assert_eq!(parent.produced[40..], child.produced, "{text}: both answer the same");
        let late = s.fork(fork, &[3; 4], 5).expect("it fits");
        finish(&mut s, &mut backend);
        assert_eq!(s.session(late).expect("known").shared_tokens, 0, "{text}: nobody holds these pages any more");
        assert_eq!(s.session(late).expect("known").produced.len(), 5, "{text}: they are read again");
    }
    let unknown = schedule(1, 60, &[]).fork(SessionId(7), &[1], 1).expect_err("no such session").to_string();
    assert!(unknown.contains('7'), "{unknown}");
}

/// A backend that confuses the pages of two sessions as they begin.
struct Confused {
    simulation: Simulation,
    pair: Option<(SessionId, SessionId)>,
}

impl Backend for Confused {
    type Error = SimulationError;

    fn execute(&mut self, plan: &StepPlan, caches: &mut Caches) -> Result<StepResult, SimulationError> {
        let begins = |id: SessionId| plan.segments.iter().any(|rows| rows.session == id && rows.first_index == 192);
        let pair = self.pair.filter(|(a, b)| begins(*a) && begins(*b));
        let swap = |caches: &mut Caches| {
            if let Some((a, b)) = pair {
                let (of_a, of_b) = (caches.tables[&a].clone(), caches.tables[&b].clone());
                caches.tables.extend([(a, of_b), (b, of_a)]);
            }
        };
        swap(caches);
        let result = self.simulation.execute(plan, caches);
        swap(caches);
        result
    }

    fn evict(&mut self, session: SessionId, tokens: &[u32], caches: &mut Caches) -> Result<Duration, SimulationError> {
        self.simulation.evict(session, tokens, caches)
    }
}

#[test]
fn pages_of_another_session_give_other_answers() {
    let run = |confuse: bool| {
        let mut s = schedule(4, 60, &[]);
        let mut backend = Confused { simulation: Simulation::new(1, 40), pair: None };
        let submit = |s: &mut Scheduler, document: u32| {
            let request = Request { max_new: 30, ..about(document, 200, 3) };
            s.submit(request).expect("it fits")
        };
        let readers = [0, 1].map(|document| submit(&mut s, document));
        while readers.iter().any(|id| s.session(*id).is_some_and(|reader| reader.phase != Phase::Decode)) {
            s.step(&mut backend).expect("a simulation does not fail");
        }
        let others = [0, 1].map(|document| submit(&mut s, document));
        backend.pair = confuse.then_some((others[0], others[1]));
        finish(&mut s, &mut backend);
        assert!(others.iter().all(|id| s.session(*id).expect("known").shared_tokens == 192), "both share");
        readers.into_iter().chain(others).map(|id| s.session(id).expect("known").produced.clone()).collect::<Vec<_>>()
    };
    let (right, wrong) = (run(false), run(true));
    assert_eq!((&right[2], &right[3]), (&right[0], &right[1]), "the same question about the same document");
    assert_eq!(wrong[..2], right[..2], "whoever read the pages answers as before");
    assert!(wrong[2] != right[2] && wrong[3] != right[3], "whoever was given the wrong ones does not");
}
