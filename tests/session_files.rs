//! Sessions that go on in another process: their files hold all that they need, and nothing else is taken for one.

mod common;

use std::path::Path;

use common::sessions::{KINDS, config, request};
use concertina::disk::session_file::{Origin, Turn};
use concertina::disk::{SessionFile, SessionFileError};
use concertina::engine::{Engine, EngineConfig};
use concertina::geometry::Bytes;
use concertina::schedule::{Request, ScheduleConfig, Scheduler, SessionId, Store};
use concertina::weights::Weights;

fn origin(weights: &Weights) -> Origin {
    let geometry = &weights.geometry;
    Origin::new("a small random model".to_owned(), "1 byte".to_owned(), geometry.num_layers, geometry.heads, 32)
}

/// An engine with its schedule, as one process has it.
struct Process<'d> {
    engine: Engine<'d>,
    scheduler: Scheduler,
    origin: Origin,
}

impl Process<'_> {
    fn start(weights: &Weights, config: &EngineConfig) -> Self {
        let (engine, caches) = Engine::new(common::device(), weights, config).expect("ample memory");
        let &EngineConfig { max_rows, max_sessions, context_length, .. } = config;
        let config = ScheduleConfig { max_rows, max_sessions, context_length, host: Default::default() };
        Self { engine, scheduler: Scheduler::new(config, caches), origin: origin(weights) }
    }

    /// Takes steps until the session has produced so many tokens, or is over.
    fn run(&mut self, id: SessionId, tokens: usize) {
        let produced = |s: &Scheduler| s.session(id).expect("it exists").produced.len();
        while !self.scheduler.is_idle() && produced(&self.scheduler) < tokens {
            self.scheduler.step(&mut self.engine).expect("the step runs");
        }
    }

    /// Writes the session, ends it, and returns what it has produced.
    fn end(mut self, id: SessionId, path: &Path) -> Vec<u32> {
        let turn = Turn { question: "What?".to_owned(), answer: "That.".to_owned() };
        let name = "a session".to_owned();
        let saved = self.engine.save(&self.scheduler, id, name, self.origin.clone(), vec![turn]).expect("it is read");
        let bytes = saved.write(path).expect("room on the disk");
        assert_eq!(bytes.0, std::fs::metadata(path).expect("written").len(), "what it says");
        let produced = self.scheduler.session(id).expect("it exists").produced.clone();
        self.scheduler.cancel(id).expect("the pool agrees");
        let report = self.scheduler.report();
        assert_eq!(report.pages_in_use_bytes + report.committed_bytes, Bytes::ZERO, "all bytes are back");
        produced
    }

    fn restore(&mut self, path: &Path, more: &[u32], request: Request) -> SessionId {
        let file = SessionFile::open(path).unwrap_or_else(|e| panic!("{e}"));
        file.origin().serves(&self.origin).expect("the same model");
        let id = self.engine.restore(&mut self.scheduler, file, more, request).unwrap_or_else(|e| panic!("{e}"));
        assert!(self.scheduler.away_bytes(Store::Disk).0 > Bytes::ZERO, "its pages are still in the file");
        id
    }
}

fn restarts(weights: &Weights, config: &EngineConfig, whole: &Request, what: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("one.session");
    let mut process = Process::start(weights, config);
    let id = process.scheduler.submit(whole.clone()).expect("it fits");
    process.run(id, usize::MAX);
    let expected = process.scheduler.session(id).expect("it exists").produced.clone();

    // One process for each question.
    let one = |max_new: u32| Request { rounds: Vec::new(), keep: true, max_new, ..whole.clone() };
    let mut process = Process::start(weights, config);
    let id = process.scheduler.submit(one(whole.max_new)).expect("it fits");
    process.run(id, usize::MAX);
    let mut produced = process.end(id, &path);
    for round in &whole.rounds {
        let mut process = Process::start(weights, config);
        let id = process.restore(&path, &round.tokens, one(round.max_new));
        process.run(id, usize::MAX);
        produced.extend(process.end(id, &path));
    }
    assert_eq!(produced, expected, "{what}: answers as in one process");

    // In the middle of the first answer.
    let mut process = Process::start(weights, config);
    let id = process.scheduler.submit(one(whole.max_new)).expect("it fits");
    process.run(id, 3);
    let before = process.end(id, &path);
    assert_eq!(before.len(), 3, "{what}: an answer under way");
    let mut process = Process::start(weights, config);
    let id = process.restore(&path, &[], one(whole.max_new));
    process.run(id, usize::MAX);
    let produced = process.end(id, &path);
    assert!(produced.starts_with(&before), "{what}: what was there stays");
    assert_eq!(produced, expected[..produced.len()], "{what}: the answer goes on");
    assert_eq!(produced.len(), whole.max_new as usize, "{what}: to its end");
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn caches_of_every_kind_go_on_in_another_process_gpu() {
    let weights = common::tiny_model(4);
    let more = ["token=streaming:64:every32:rerotate,hidden=rot3", "head=prune:0.5,hidden=kivi2", "token=kvzip:0.5"];
    for text in KINDS.iter().map(|(text, _)| *text).chain(more) {
        let config = EngineConfig { swap_chunk: Bytes(24 << 10), ..config(&weights, &[text]) };
        restarts(&weights, &config, &request(3, 170, 12, 200, text), text);
    }
}

/// A file of a session over a cache that was evicted from, of a model on no device.
fn some_file(path: &Path) -> Vec<u8> {
    let weights = common::tiny_model(4);
    let text = "token=h2o:96:every32,hidden=kivi4";
    let config = EngineConfig { swap_chunk: Bytes(24 << 10), ..config(&weights, &[text]) };
    let mut process = Process::start(&weights, &config);
    let request = Request { rounds: Vec::new(), keep: true, ..request(3, 130, 4, 200, text) };
    let id = process.scheduler.submit(request).expect("it fits");
    process.run(id, usize::MAX);
    process.end(id, path);
    std::fs::read(path).expect("written")
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn what_does_not_belong_here_is_refused_with_the_reason_gpu() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("one.session");
    let bytes = some_file(&path);
    let text = |bytes: &[u8]| {
        std::fs::write(&path, bytes).expect("written");
        SessionFile::open(&path).expect_err("it should be refused").to_string()
    };
    assert!(text(&bytes[..bytes.len() / 2]).contains("it is not whole"), "{}", text(&bytes[..bytes.len() / 2]));
    assert!(text(&[&bytes[..], &[0]].concat()).contains("it is not whole"), "too long");
    assert!(text(&bytes[..5]).contains("no session file"), "too short for anything");
    assert!(text(b"GGUF and so on").contains("no session file"), "something else");
    let mut damaged = bytes.clone();
    *damaged.last_mut().expect("pages") ^= 1;
    assert!(text(&damaged).contains("damaged"), "one bit of a page");
    let header = String::from_utf8_lossy(&bytes[8..400]).into_owned();
    let replaced = |from: &str, to: &str| {
        assert!(header.contains(from), "{header}");
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).expect("it is there");
        [&bytes[..at], to.as_bytes(), &bytes[at + from.len()..]].concat()
    };
    assert!(text(&replaced(r#""version":"1""#, r#""version":"2""#)).contains("of version 2"), "newer");
    assert!(text(&replaced("concertina session", "concertina sessiom")).contains("no session file"), "another format");

    std::fs::write(&path, &bytes).expect("written");
    let file = SessionFile::open(&path).expect("it is whole");
    assert_eq!((file.name(), file.turns().len()), ("a session", 1), "what it is");
    let weights = common::tiny_model(4);
    let other = Origin { model: "another".to_owned(), fingerprint: "2 bytes".to_owned(), ..origin(&weights) };
    let error = file.origin().serves(&other).expect_err("another model");
    assert_eq!(
        error.to_string(),
        "the session is of the model a small random model (1 byte), and this run has another (2 bytes)",
        "both are named"
    );
    let other = Origin { page_tokens: 64, ..origin(&weights) };
    assert!(matches!(file.origin().serves(&other), Err(SessionFileError::Other { .. })), "other pages");
    // An engine that has no kernels for it, or cuts its pages otherwise.
    let full = EngineConfig { swap_chunk: Bytes(24 << 10), ..config(&weights, &["full"]) };
    let mut process = Process::start(&weights, &full);
    let request = Request { keep: true, ..Request::new(vec![1], 4) };
    let error = process.engine.restore(&mut process.scheduler, file, &[5, 6], request).expect_err("not served");
    assert!(error.to_string().contains("no kernels were made for hidden=kivi4"), "{error}");
    assert!(process.scheduler.is_idle(), "nothing was queued");
}
