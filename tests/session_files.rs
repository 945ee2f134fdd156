//! Sessions that go on in another process: their files hold all that they need, and nothing else is taken for one.

mod common;

use std::path::Path;

use common::process::{Process, origin};
use common::sessions::{KINDS, config, request, tight};
use concertina::disk::session_file::Origin;
use concertina::disk::{SessionFile, SessionFileError};
use concertina::engine::EngineConfig;
use concertina::geometry::Bytes;
use concertina::schedule::{HostConfig, Request, SessionId, Store};
use concertina::weights::Weights;

/// Writes a session, ends its process, and returns what it has produced.
fn end(mut process: Process<'_>, id: SessionId, path: &Path) -> Vec<u32> {
    process.save(id, path);
    let produced = process.produced(id);
    process.end();
    produced
}

fn restarts(weights: &Weights, config: &EngineConfig, whole: &Request, what: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("one.session");
    let start = || Process::start(weights, config, HostConfig::default());
    let mut process = start();
    let id = process.scheduler.submit(whole.clone()).expect("it fits");
    process.run();
    let expected = process.produced(id);

    // One process for each question.
    let one = |max_new: u32| Request { rounds: Vec::new(), keep: true, max_new, ..whole.clone() };
    let mut process = start();
    let id = process.scheduler.submit(one(whole.max_new)).expect("it fits");
    process.run();
    let mut produced = end(process, id, &path);
    for round in &whole.rounds {
        let mut process = start();
        let id = process.restore(&path, &round.tokens, one(round.max_new));
        process.run();
        produced.extend(end(process, id, &path));
    }
    assert_eq!(produced, expected, "{what}: answers as in one process");

    // In the middle of the first answer.
    let mut process = start();
    let id = process.scheduler.submit(one(whole.max_new)).expect("it fits");
    process.run_until(id, 3);
    let before = end(process, id, &path);
    assert_eq!(before.len(), 3, "{what}: an answer under way");
    let mut process = start();
    let id = process.restore(&path, &[], one(whole.max_new));
    process.run();
    let produced = end(process, id, &path);
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
    let mut process = Process::start(&weights, &config, HostConfig::default());
    let request = Request { rounds: Vec::new(), keep: true, ..request(3, 130, 4, 200, text) };
    let id = process.scheduler.submit(request).expect("it fits");
    process.run();
    end(process, id, path);
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
    let mut process = Process::start(&weights, &full, HostConfig::default());
    let request = Request { keep: true, ..Request::new(vec![1], 4) };
    let error = process.engine.restore(&mut process.scheduler, file, &[5, 6], request).expect_err("not served");
    assert!(error.to_string().contains("no kernels were made for hidden=kivi4"), "{error}");
    assert!(process.scheduler.is_idle(), "nothing was queued");
}

/// Eight sessions of the reference model, in a process for each question that has room for two of them: the others' caches are
/// in host memory and in files when their sessions are saved.
#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn eight_sessions_answer_across_restarts_under_a_budget_for_two_gpu() {
    let weights = &common::model().weights;
    for text in ["full", "kivi4"] {
        let all: Vec<_> = (0..8).map(|seed| request(seed, 40, 2, weights.geometry.vocab_size, text)).collect();
        let config = EngineConfig { context_length: 64, swap_chunk: Bytes(600 << 10), ..config(weights, &[text]) };
        let mut ample = Process::start(weights, &config, HostConfig::default());
        for request in &all {
            ample.scheduler.submit(request.clone()).expect("it fits");
        }
        ample.run();
        assert_eq!(ample.moves, [0; 3], "{text}: there is room for all");
        let expected: Vec<_> = ample.scheduler.sessions().map(|(_, session)| session.produced.clone()).collect();
        let whole = ample.scheduler.caches().needed(&all[0]).expect("it is served");
        drop(ample);

        let config = tight(weights, &config, &all[0], 24);
        // Three of those that are away fit into host memory.
        let host = HostConfig { budget: Bytes(whole.0 * 7 / 2), disk_budget: Bytes::mib(64), ..HostConfig::default() };
        let folder = tempfile::tempdir().expect("a folder");
        let path = |at: usize| folder.path().join(format!("{at}.session"));
        let mut produced = vec![Vec::new(); all.len()];
        for round in 0..3 {
            let mut process = Process::start(weights, &config, host);
            let begin = |(at, whole): (usize, &Request)| {
                let one = |max_new| Request { rounds: Vec::new(), keep: true, max_new, ..whole.clone() };
                match round {
                    0 => process.scheduler.submit(one(whole.max_new)).expect("it fits"),
                    _ => {
                        let question = &whole.rounds[round - 1];
                        process.restore(&path(at), &question.tokens, one(question.max_new))
                    }
                }
            };
            let ids: Vec<_> = all.iter().enumerate().map(begin).collect();
            process.run();
            let [out, back, dropped] = process.moves;
            let (away, stores) = (process.away(), [Store::Host, Store::Disk]);
            let [memory, files] = stores.map(|store| process.scheduler.away_bytes(store).0);
            println!(
                "{text}, question {round}: {out} left, {back} came back; {memory} in memory, {files} in files at the end"
            );
            assert!(process.most_resident < all.len(), "{text}: {} held pages at once", process.most_resident);
            assert!(away >= 5 && dropped == 0, "{text}: {away} are away at the end, {dropped} were dropped");
            let began_away = if round == 0 { 0 } else { all.len() };
            assert_eq!(began_away + out, back + away, "{text}: every cache that left is away or back");
            assert!(memory > Bytes::ZERO && files > Bytes::ZERO, "{text}: saved from host memory and from files");
            for (at, id) in ids.into_iter().enumerate() {
                process.save(id, &path(at));
                produced[at].extend(process.produced(id));
            }
            process.end();
        }
        assert_eq!(produced, expected, "{text}: answers as with ample memory in one process");
        assert!((1..8).all(|at| expected[at] != expected[0]), "{text}: an exchanged session would be noticed");
    }
}
