//! Sessions that share pages on the device: the logits of one that takes over another's pages are those of the same session alone,
//! bit by bit, whatever becomes of the other.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use common::sessions::tight;
use concertina::compression::Compression;
use concertina::compression::head::HeadScores;
use concertina::engine::{Engine, EngineConfig, EngineError, EvictionConfig};
use concertina::geometry::Bytes;
use concertina::model::reference_model_path;
use concertina::reference::compare::{agree_top1, kl_divergence, widen};
use concertina::schedule::{
    Backend, Caches, HostConfig, Phase, Request, Round, ScheduleConfig, Scheduler, SessionId, StepPlan, StepReport,
    StepResult,
};

const VOCAB: u32 = 200;

fn compression(text: &str) -> Compression {
    text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
}

/// Codecs; evictions by attention, by keys, again and again; heads that keep a window; layers that share, merge, or are skipped.
const SHARED: [&str; 9] = [
    "full",
    "kivi4",
    "k:rot3,v:int8",
    "token=snapkv:0.5:window8",
    "token=keydiff:0.5,hidden=kivi4",
    "token=streaming:64:every32,hidden=kivi4",
    "head=duo:0.5:sink4:recent32",
    "layer=minicache:0..",
    "layer=skip-prefill:1..",
];

fn config(texts: &[&str]) -> EngineConfig {
    let compressions: Vec<_> = texts.iter().map(|text| compression(text)).collect();
    let codecs: BTreeSet<_> = compressions.iter().flat_map(Caches::codecs_of).collect();
    let scores = HeadScores::parse("0.9\t0.1\n0.2\t0.8\n").expect("two layers of two heads");
    let evictions = EvictionConfig::of(&compressions, 4)
        .map(|evictions| EvictionConfig { head_scores: Some(Arc::new(scores)), ..evictions });
    EngineConfig {
        codecs: codecs.into_iter().collect(),
        evictions,
        page_size: 32,
        context_length: 512,
        ..common::config(64)
    }
}

/// A question about a document of 150 tokens.
fn about(document: u64, question: u64, max_new: u32, text: &str) -> Request {
    let mut prompt = common::tokens(document, 150, VOCAB);
    prompt.extend(common::tokens(1_000 + question, 7, VOCAB));
    Request { document: Some(150), compression: compression(text), ..Request::new(prompt, max_new) }
}

/// The engine, as a backend that takes the most probable token and keeps all logits.
struct Greedy<'e, 'd> {
    engine: &'e mut Engine<'d>,
    logits: BTreeMap<SessionId, Vec<Vec<f32>>>,
}

impl Backend for Greedy<'_, '_> {
    type Error = EngineError;

    fn execute(&mut self, plan: &StepPlan, caches: &mut Caches) -> Result<StepResult, EngineError> {
        let logits = self.engine.logits(plan, caches)?;
        let sampling = plan.segments.iter().filter(|rows| rows.sample.is_some());
        let best = |row: &Vec<f32>| (0..).zip(row).max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(token, _)| token);
        let tokens = logits.iter().map(best).collect();
        sampling.zip(logits).for_each(|(rows, row)| self.logits.entry(rows.session).or_default().push(row));
        Ok(StepResult { tokens, elapsed: Duration::from_millis(1), ..StepResult::default() })
    }

    fn evict(&mut self, session: SessionId, tokens: &[u32], caches: &mut Caches) -> Result<Duration, EngineError> {
        self.engine.evict(session, tokens, caches)
    }
}

fn schedule(caches: &Caches, host: HostConfig) -> Scheduler {
    Scheduler::new(ScheduleConfig { max_rows: 64, max_sessions: 8, context_length: 512, host }, caches.clone())
}

/// Steps until everybody is over.
fn finish<B: Backend<Error = EngineError>>(s: &mut Scheduler, backend: &mut B) -> Vec<StepReport> {
    let mut reports = Vec::new();
    while !s.is_idle() {
        reports.push(s.step(backend).expect("the step runs"));
    }
    let report = s.report();
    let rest = (report.pages_in_use_bytes, report.committed_bytes, report.shared_bytes);
    assert_eq!(rest, (Bytes::ZERO, Bytes::ZERO, Bytes::ZERO), "all bytes are back");
    reports
}

fn bits(rows: &[Vec<f32>]) -> Vec<Vec<u32>> {
    rows.iter().map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
}

/// What a session gives when nobody else is there.
fn alone(engine: &mut Engine<'_>, caches: &Caches, request: &Request) -> Vec<Vec<u32>> {
    let mut s = schedule(caches, HostConfig::default());
    let id = s.submit(request.clone()).expect("it fits");
    let mut backend = Greedy { engine, logits: BTreeMap::new() };
    finish(&mut s, &mut backend);
    bits(&backend.logits[&id])
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn a_session_that_shares_gives_the_bits_that_it_gives_alone_gpu() {
    let weights = common::tiny_model(4);
    let config = config(&SHARED);
    let (mut engine, caches) = Engine::new(common::device(), &weights, &config).expect("ample memory");
    for text in SHARED {
        let mut s = schedule(&caches, HostConfig::default());
        let requests = [6, 40, 12, 12].into_iter().zip(0..).map(|(max_new, at)| about(1, at, max_new, text));
        let requests: Vec<Request> = requests.collect();
        let mut backend = Greedy { engine: &mut engine, logits: BTreeMap::new() };
        // The first reads the document; the second waits for that, shares, and goes on when the first has ended.
        let mut ids: Vec<_> = requests[..2].iter().map(|request| s.submit(request.clone()).expect("it fits")).collect();
        let mut shared = Vec::new();
        while !s.session(ids[0]).is_some_and(|first| first.is_finished()) {
            shared.extend(s.step(&mut backend).expect("the step runs").shared);
        }
        assert!(s.report().shared_bytes == Bytes::ZERO, "{text}: one of them is left, and has the pages to itself");
        // Two more take over what the second has taken over.
        ids.extend(requests[2..].iter().map(|request| s.submit(request.clone()).expect("it fits")));
        shared.extend(s.step(&mut backend).expect("the step runs").shared);
        assert!(s.report().shared_bytes > Bytes::ZERO, "{text}: pages are shared");
        shared.extend(finish(&mut s, &mut backend).into_iter().flat_map(|report| report.shared));
        let logits = backend.logits;
        let sharing: Vec<_> = shared.iter().map(|(id, _)| *id).collect();
        assert_eq!(sharing, ids[1..], "{text}: all but the first share");
        let mut first = Vec::new();
        for (id, request) in ids.iter().zip(&requests) {
            let alone = alone(&mut engine, &caches, request);
            assert_eq!(alone.len(), request.max_new as usize, "{text}: a row of logits per token");
            assert!(bits(&logits[id]) == alone, "{text}: {id:?} alone differs from the one that shares");
            first.push(alone[0].clone());
        }
        assert!(first.windows(2).all(|pair| pair[0] != pair[1]), "{text}: questions should show in the logits");
        let other = alone(&mut engine, &caches, &about(2, 1, 1, text));
        assert!(other[0] != first[1], "{text}: the document should show in the logits");
    }
}

/// Rows of answers are read over what a fork shares; the last page's tokens are read again, as a prompt, whose rows add in another
/// order.
#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn a_fork_predicts_what_its_parent_does_gpu() {
    let weights = common::tiny_model(4);
    let texts = ["full", "kivi4", "token=keydiff:0.5,hidden=kivi4"];
    let (mut engine, caches) = Engine::new(common::device(), &weights, &config(&texts)).expect("ample memory");
    for text in texts {
        let mut s = schedule(&caches, HostConfig::default());
        let question = common::tokens(77, 6, VOCAB);
        let round = Round { tokens: question.clone(), max_new: 8, think: Duration::from_secs(1) };
        let parent = s.submit(Request { rounds: vec![round], ..about(1, 1, 50, text) }).expect("it fits");
        let mut backend = Greedy { engine: &mut engine, logits: BTreeMap::new() };
        while !s.session(parent).is_some_and(|parent| matches!(parent.phase, Phase::Thinking(_))) {
            s.step(&mut backend).expect("the step runs");
        }
        let fork = s.fork(parent, &question, 8).expect("it fits");
        let reports = finish(&mut s, &mut backend);
        let shared: Vec<_> = reports.iter().flat_map(|report| &report.shared).collect();
        assert_eq!((shared.len(), shared[0].1.donor), (1, parent), "{text}: it shares with its parent");
        assert!(shared[0].1.tokens > 157, "{text}: answers too");
        let of = |id: SessionId, at: usize| widen(&backend.logits[&id][at]);
        let worst = (0..8).map(|at| kl_divergence(&of(parent, 50 + at), &of(fork, at))).fold(0.0, f64::max);
        println!("{text}: KL at most {worst:.1e}");
        assert!(worst <= 1e-4, "{text}: KL of {worst}");
        assert!((0..8).all(|at| agree_top1(&of(parent, 50 + at), &of(fork, at))), "{text}: the same tokens");
        let other = kl_divergence(&of(parent, 50), &of(fork, 1));
        assert!(other > 1e-4, "{text}: another place would be noticed: {other}");
    }
}

/// Caches that others name pages of leave for the host and come back, and those that others go on with are as they were.
#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn sessions_that_share_are_swapped_and_answer_as_alone_gpu() {
    let weights = common::tiny_model(4);
    for (text, fit) in [("full", 26), ("kivi4", 15), ("token=snapkv:0.5:window8", 16)] {
        let round = |at: u64| Round {
            tokens: common::tokens(50 + at, 5, VOCAB),
            max_new: 10,
            think: Duration::from_millis(at),
        };
        let request = |at: u64| Request { rounds: vec![round(at), round(at + 1)], ..about(at % 2, at, 10, text) };
        let all: Vec<Request> = (0..8).map(request).collect();
        let config = EngineConfig { swap_chunk: Bytes(24 << 10), ..config(&[text]) };
        let config = tight(&weights, &config, &all[7], fit);
        let (mut engine, caches) = Engine::new(common::device(), &weights, &config).expect("the budget suffices");
        let host = HostConfig { budget: Bytes::mib(64), ..HostConfig::default() };
        let mut s = schedule(&caches, host);
        let ids: Vec<_> = all.iter().map(|request| s.submit(request.clone()).expect("it fits")).collect();
        let (mut shared, mut swapped, mut donors_left) = (0, 0, 0);
        while !s.is_idle() {
            let named: BTreeSet<_> =
                s.caches().tables.keys().filter(|id| s.caches().shared_bytes(**id) > Bytes::ZERO).copied().collect();
            let step = s.step(&mut engine).expect("the step runs");
            shared += step.shared.len();
            swapped += step.swapped_out.len();
            donors_left += step.swapped_out.iter().filter(|id| named.contains(id)).count();
        }
        println!(
            "{text}: {shared} shared, {swapped} left for the host, {donors_left} of them while others named their pages"
        );
        assert!(shared >= 3 && swapped >= 3 && donors_left >= 1, "{text}: all of it should have happened");
        let report = s.report();
        assert_eq!(
            (report.pages_in_use_bytes, report.committed_bytes),
            (Bytes::ZERO, Bytes::ZERO),
            "all bytes are back"
        );
        for (id, request) in ids.iter().zip(&all) {
            let mut one = schedule(&caches, HostConfig::default());
            let alone = one.submit(request.clone()).expect("it fits");
            finish(&mut one, &mut engine);
            let (got, expected) = (s.session(*id).expect("known"), one.session(alone).expect("known"));
            assert_eq!(got.produced, expected.produced, "{text}: {id:?} answers as alone");
        }
    }
}

/// Two questions about one document, as people ask them: the report says what was read once and which bytes were shared.
#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn questions_about_one_document_read_it_once_gpu() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(path("a.txt"), "The town lies by the sea, and the mill stands on the hill. ".repeat(8))
        .expect("written");
    let run = |documents: &[&str], questions: &[&str], compression: &str| -> serde_json::Value {
        let mut command = Command::new(env!("CARGO_BIN_EXE_concertina"));
        command.args(["run", "--model", &reference_model_path().display().to_string(), "--compress", compression]);
        command.arg("--document").args(documents.iter().map(|name| path(name))).arg("--ask").args(questions);
        command.args(["--max-new", "4", "--context", "512", "--page-size", "32", "--json", &path("report.json")]);
        let output = command.output().expect("the command starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(text.contains("in pages of other sessions"), documents.len() > 1, "{text}");
        serde_json::from_slice(&std::fs::read(path("report.json")).expect("written")).expect("JSON")
    };
    let questions = ["Where is the mill?", "What lies by the sea?"];
    for compression in ["kivi4", "keydiff:0.5"] {
        let both = run(&["a.txt", "a.txt"], &questions, compression);
        let number = |value: &serde_json::Value| value.as_u64().unwrap_or_else(|| panic!("no number: {value}"));
        let sessions = both["sessions"].as_array().expect("a list");
        let prompts: u64 = sessions.iter().map(|session| number(&session["prompt_tokens"])).sum();
        let prefill = &both["metrics"]["prefill"];
        let shared = number(&prefill["shared_tokens"]);
        assert!(shared >= 96, "{compression}: three pages at least: {shared}");
        assert_eq!(number(&prefill["prompt_tokens"]) + shared, prompts, "{compression}: every token is read or shared");
        let of = |at: usize, name: &str| number(&sessions[at][name]);
        assert_eq!((of(0, "shared_tokens"), of(1, "shared_tokens")), (0, shared), "{compression}: the second shares");
        let bytes = [of(0, "kv_shared_bytes"), of(1, "kv_shared_bytes")];
        assert!(bytes[0] > 0 && bytes[0] == bytes[1], "{compression}: both hold the same pages: {bytes:?}");
        assert_eq!(number(&both["pool"]["spared_peak_bytes"]), bytes[0], "{compression}: which are held once");
        assert_eq!(number(&both["pool"]["spared_bytes"]), 0, "{compression}: nothing is left");
        for (at, question) in questions.iter().enumerate() {
            let alone = run(&["a.txt"], &[question], compression);
            let answer = |report: &serde_json::Value, at: usize| report["sessions"][at]["rounds"][0]["answer"].clone();
            assert_eq!(answer(&both, at), answer(&alone, 0), "{compression}: {question}");
        }
    }
}
