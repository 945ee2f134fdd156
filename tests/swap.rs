//! Sessions of three rounds under a budget for two of them: caches leave for the host and come back, or are computed again, and
//! every answer is the one that a session gives when there is room for all.

mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Output};

use common::sessions::{KINDS, compression, config, request, tight};
use concertina::compression::Compression;
use concertina::device::Device;
use concertina::engine::{Engine, EngineConfig, EngineError};
use concertina::eval::prompt::Driver;
use concertina::geometry::Bytes;
use concertina::model::reference_model_path;
use concertina::reference::compare::{agree_top1, kl_divergence, widen};
use concertina::schedule::{HostConfig, Request, ScheduleConfig, Scheduler, Session, Store};
use concertina::weights::Weights;

/// What a run came to.
#[derive(Debug, Default)]
struct Outcome {
    sessions: Vec<Session>,
    swapped: usize,
    dropped: usize,
    compressed: usize,
    /// Steps that moved pages beside rows, and alone.
    moving: (u32, u32),
    most_resident: usize,
    host_peak: Bytes,
    disk_peak: Bytes,
}

fn run(device: &Device, weights: &Weights, config: &EngineConfig, host: HostConfig, all: &[Request]) -> Outcome {
    let folder = tempfile::tempdir().expect("a folder");
    run_in(folder.path(), device, weights, config, host, all)
}

/// With a folder for caches that go to files.
fn run_in(
    folder: &Path,
    device: &Device,
    weights: &Weights,
    config: &EngineConfig,
    host: HostConfig,
    all: &[Request],
) -> Outcome {
    let (mut engine, caches) = Engine::new(device, weights, config).expect("the budget suffices");
    engine.keep_in(folder.to_owned());
    assert_eq!(caches.pool.report().allocated_bytes, engine.held_bytes(), "the pool says what the device holds");
    let &EngineConfig { max_rows, max_sessions, context_length, .. } = config;
    let mut s = Scheduler::new(ScheduleConfig { max_rows, max_sessions, context_length, host }, caches);
    for request in all {
        s.submit(request.clone()).expect("it fits");
    }
    let mut outcome = Outcome::default();
    while !s.is_idle() {
        let step = s.step(&mut engine).expect("the step runs");
        outcome.swapped += step.swapped_out.len();
        outcome.dropped += step.dropped.len();
        outcome.compressed += step.compressed.len();
        if step.out_bytes + step.in_bytes > Bytes::ZERO {
            let alone = step.decode_rows + step.prefill_rows == 0;
            outcome.moving.0 += u32::from(!alone);
            outcome.moving.1 += u32::from(alone);
        }
        outcome.most_resident = outcome.most_resident.max(s.n_admitted());
        assert!(engine.host_bytes() <= host.budget, "{} of {} on the host", engine.host_bytes(), host.budget);
    }
    s.step(&mut engine).expect("nothing is left to do");
    assert_eq!(engine.host_bytes(), Bytes::ZERO, "nothing is left on the host");
    let report = s.report();
    assert_eq!((report.pages_in_use_bytes, report.committed_bytes), (Bytes::ZERO, Bytes::ZERO), "all bytes are back");
    outcome.host_peak = s.away_bytes(Store::Host).1;
    outcome.disk_peak = s.away_bytes(Store::Disk).1;
    outcome.sessions = s.sessions().map(|(_, session)| session.clone()).collect();
    outcome
}

fn compare(ample: &Outcome, got: &Outcome, what: &str) {
    for (at, (expected, got)) in ample.sessions.iter().zip(&got.sessions).enumerate() {
        assert_eq!(got.produced, expected.produced, "{what}: session {at} answers as with ample memory");
        assert_eq!(got.answers.len(), 3, "{what}: session {at} answered every question");
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn swapped_sessions_answer_as_with_ample_memory_gpu() {
    let (device, weights) = (common::device(), common::tiny_model(4));
    for (text, fit) in KINDS {
        let all: Vec<_> = (0..8).map(|seed| request(seed, 150 + 9 * seed, 12, 200, text)).collect();
        let config = config(&weights, &[text]);
        let ample = run(device, &weights, &config, HostConfig::default(), &all);
        assert_eq!((ample.swapped, ample.dropped), (0, 0), "{text}: there is room for all");
        // Chunks of a few pages, so that a cache takes many steps.
        let config = EngineConfig { swap_chunk: Bytes(24 << 10), ..config };
        let config = tight(&weights, &config, &all[7], fit);
        let host = HostConfig { budget: Bytes::mib(64), ..HostConfig::default() };
        let got = run(device, &weights, &config, host, &all);
        println!(
            "{text}: {} swapped in {} steps beside rows and {} alone, {} on the host at most",
            got.swapped, got.moving.0, got.moving.1, got.host_peak
        );
        assert!(got.swapped >= 4, "{text}: {} caches left for the host", got.swapped);
        assert!(got.most_resident < all.len(), "{text}: {} sessions held pages at once", got.most_resident);
        assert_eq!(got.dropped, 0, "{text}: the host has room");
        compare(&ample, &got, text);
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn sessions_of_every_kind_swap_in_one_schedule_gpu() {
    let (device, weights) = (common::device(), common::tiny_model(4));
    let all: Vec<_> = (0..9).map(|at| request(at, 140 + 7 * at, 16, 200, KINDS[at].0)).collect();
    let config = config(&weights, &KINDS.map(|(text, _)| text));
    let ample = run(device, &weights, &config, HostConfig::default(), &all);
    let config = EngineConfig { swap_chunk: Bytes(40 << 10), ..config };
    let config = tight(&weights, &config, &all[0], 30);
    let host = HostConfig { budget: Bytes::mib(64), ..HostConfig::default() };
    let got = run(device, &weights, &config, host, &all);
    assert!(got.swapped > 4, "{} caches left for the host", got.swapped);
    compare(&ample, &got, "all kinds");
}

/// KL of every position of an answer between a cache that decoded it and one that read it again as a prompt.
fn computed_again(text: &str) -> Vec<(Vec<f64>, Vec<f64>)> {
    let (device, weights) = (common::device(), common::tiny_model(4));
    let config = config(&weights, &[text]);
    let (mut engine, mut caches) = Engine::new(device, &weights, &config).expect("ample memory");
    let tokens = common::tokens(77, 190, 200);
    let mut driver = Driver::new(&mut engine, &mut caches);
    let first = driver.admit(&compression(text), 150, 200).expect("fits");
    let mut decoded = Vec::new();
    driver.prefill(first, &tokens[..150], 149..150, 64, &mut |_, row| decoded.push(widen(&row))).expect("runs");
    for token in &tokens[150..] {
        decoded.extend(driver.decode(&[(first, *token)]).expect("runs").iter().map(|row| widen(row)));
    }
    let again = driver.admit(&compression(text), 150, 200).expect("fits");
    let mut read = Vec::new();
    driver.prefill(again, &tokens, 149..190, 64, &mut |_, row| read.push(widen(&row))).expect("runs");
    driver.end().expect("the pool agrees");
    assert_eq!(decoded.len(), read.len(), "a row per position");
    decoded.into_iter().zip(read).collect()
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn caches_that_are_computed_again_predict_the_same_gpu() {
    // Rows of a prompt add in another order than those of decode, by some 1e-7. In f16 that is all; in a codec a number near
    // the edge of two codes can fall to the other side, which then differs by a whole step of the codec.
    for (text, most) in [("full", 1e-9), ("int8", 1e-4), ("kivi4", 1e-4), ("kivi2", 1e-3)] {
        let rows = computed_again(text);
        let worst = rows.iter().map(|(a, b)| kl_divergence(a, b)).fold(0.0, f64::max);
        println!("{text}: {} positions, KL at most {worst:.1e}", rows.len());
        assert!(worst <= most, "{text}: KL of {worst}");
        assert!(rows.iter().all(|(a, b)| agree_top1(a, b)), "{text}: the most probable token is the same");
        let other = kl_divergence(&rows[0].0, &rows[1].1);
        assert!(other > 1e-4, "another position's distribution would be noticed: {other}");
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn without_host_memory_caches_are_computed_again_gpu() {
    let (device, weights) = (common::device(), common::tiny_model(4));
    let all: Vec<_> = (0..5).map(|seed| request(seed, 150, 12, 200, "full")).collect();
    let config = config(&weights, &["full"]);
    let ample = run(device, &weights, &config, HostConfig::default(), &all);
    let config = tight(&weights, &config, &all[0], 26);
    let got = run(device, &weights, &config, HostConfig::default(), &all);
    assert!(got.dropped >= 5 && got.swapped == 0, "{} caches were dropped", got.dropped);
    // Rows of a prompt add in another order than those of decode, so that a sampled token could differ; in these it does not.
    compare(&ample, &got, "computed again");
}

/// No file can be made in a folder that is gone.
#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn where_files_can_not_be_written_caches_are_computed_again_gpu() {
    let (device, weights) = (common::device(), common::tiny_model(4));
    let all: Vec<_> = (0..5).map(|seed| request(seed, 150, 12, 200, "full")).collect();
    let config = EngineConfig { swap_chunk: Bytes(24 << 10), ..config(&weights, &["full"]) };
    let ample = run(device, &weights, &config, HostConfig::default(), &all);
    let config = tight(&weights, &config, &all[0], 26);
    let host = HostConfig { disk_budget: Bytes::mib(64), ..HostConfig::default() };
    let gone = tempfile::tempdir().expect("a folder").path().to_owned();
    let got = run_in(&gone, device, &weights, &config, host, &all);
    assert!(got.dropped >= 5 && got.swapped == 0, "{} caches were dropped", got.dropped);
    compare(&ample, &got, "computed again");
    let folder = tempfile::tempdir().expect("a folder");
    let got = run_in(folder.path(), device, &weights, &config, host, &all);
    assert!(got.dropped == 0 && got.swapped >= 5, "{} caches went to files where there is a folder", got.swapped);
    compare(&ample, &got, "from files");
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn without_room_anywhere_caches_are_compressed_harder_gpu() {
    let (device, weights) = (common::device(), common::tiny_model(4));
    let rungs = ["kivi4", "token=keydiff:0.5,hidden=kivi4"];
    let ladder: Vec<_> = rungs.iter().map(|text| compression(text)).collect();
    let with_ladder = |seed| Request { ladder: ladder.clone(), ..request(seed, 150, 12, 200, "full") };
    let all: Vec<_> = (0..5).map(with_ladder).collect();
    let config = config(&weights, &["full", rungs[0], rungs[1]]);
    let ample = run(device, &weights, &config, HostConfig::default(), &all);
    assert_eq!((ample.compressed, ample.dropped), (0, 0), "there is room for all");
    let config = tight(&weights, &config, &all[0], 28);
    let got = run(device, &weights, &config, HostConfig::default(), &all);
    println!("{} compressed harder, {} dropped", got.compressed, got.dropped);
    assert!(got.compressed >= 3, "{} caches were compressed harder", got.compressed);
    let mut changed = 0;
    for (expected, session) in ample.sessions.iter().zip(&got.sessions) {
        assert_eq!(session.answers.len(), 3, "every question is answered");
        let rung = session.moves.compressed as usize;
        let named = ladder.iter().chain([&expected.request.compression]).any(|c| *c == session.request.compression);
        assert!(named, "{} is a rung", session.request.compression);
        if rung == 0 && session.moves.dropped == 0 {
            assert_eq!(session.produced, expected.produced, "what was left alone answers as before");
        }
        changed += usize::from(session.produced != expected.produced);
    }
    assert!(changed > 0, "4 bits and half of the tokens should be noticed in sampled answers");
}

/// A codec on the way out is a loss that was asked for: fewer bytes leave, and answers afterwards are those of the codec.
#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn caches_can_leave_in_another_codec_gpu() {
    let (device, weights) = (common::device(), common::tiny_model(4));
    let all: Vec<_> = (0..5).map(|seed| request(seed, 150, 12, 200, "full")).collect();
    let config = EngineConfig { swap_chunk: Bytes(24 << 10), ..config(&weights, &["full", "kivi4"]) };
    let config = EngineConfig { evictions: Some(Default::default()), ..config };
    // Room for the codes of one that leaves.
    let config = tight(&weights, &config, &all[0], 26);
    let host = HostConfig { budget: Bytes::mib(64), ..HostConfig::default() };
    let as_it_is = run(device, &weights, &config, host, &all);
    let codec = Some("kivi4".parse().expect("a codec"));
    let got = run(device, &weights, &config, HostConfig { codec, ..host }, &all);
    println!("{} encoded, {} on the host at most, {} as they are", got.compressed, got.host_peak, as_it_is.host_peak);
    assert!(
        as_it_is.compressed == 0 && got.compressed > 0 && got.swapped > 0,
        "{} caches were encoded",
        got.compressed
    );
    assert!(got.host_peak < as_it_is.host_peak, "codes are smaller");
    let mut changed = 0;
    for (expected, session) in as_it_is.sessions.iter().zip(&got.sessions) {
        assert_eq!(session.answers.len(), 3, "every question is answered");
        let encoded = session.moves.compressed > 0;
        assert_eq!(session.request.compression == compression("kivi4"), encoded, "it says what it came to");
        assert!(encoded || session.produced == expected.produced, "what was left alone answers as before");
        changed += usize::from(session.produced != expected.produced);
    }
    assert!(changed > 0, "4 bits should be noticed in sampled answers");
}

#[test]
fn rungs_that_can_not_be_reached_later_are_refused_with_the_reason() {
    let device = Device::open_noop().expect("the noop backend is compiled into the tests");
    let weights = common::tiny_model(4);
    let (_, caches) = Engine::new(&device, &weights, &config(&weights, &KINDS.map(|(t, _)| t))).expect("ample memory");
    let full = Compression::default();
    let refused = |rung: &str| caches.serves_later(&full, &compression(rung)).expect_err("it can not be reached");
    assert!(refused("token=snapkv:0.5:window8").contains("not known any more"), "nobody remembers attention");
    assert!(refused("layer=share:2").contains("other layers"), "layers stay");
    assert!(refused("token=streaming:64:every32").contains("again and again"), "it begins with a session");
    assert!(refused("rot2").contains("no kernels"), "it is not served at all");
    for rung in ["kivi4", "token=keydiff:0.5,hidden=kivi4", "head=duo:0.5:sink4:recent32"] {
        assert_eq!(caches.serves_later(&full, &compression(rung)), Ok(()), "{rung}");
    }
}

/// The size after "at least" in a message.
fn advised(message: &str) -> String {
    let rest = message.split("at least ").nth(1).unwrap_or_else(|| panic!("no advice in: {message}"));
    rest.split_whitespace().take(2).collect()
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn the_command_switches_between_sessions_and_says_so_gpu() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let model = reference_model_path().display().to_string();
    for (name, text) in [("a.txt", "The town lies by the sea."), ("b.txt", "The mill stands on the hill.")] {
        std::fs::write(path(name), text.repeat(4)).expect("written");
    }
    let run = |budget: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_concertina"));
        command.args(["run", "--model", &model, "--document", &path("a.txt"), &path("b.txt"), "--ask", "Where is it?"]);
        command.args(["--then", "Say that again.", "--max-new", "3", "--context", "256", "--kv-budget", budget]);
        command.args(["--host-budget", "64MiB", "--trace", &path("trace.json"), "--json", &path("report.json")]);
        command.output().expect("the command starts")
    };
    let message = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let fixed = advised(&message(&run("100KiB")));
    let one = advised(&message(&run(&fixed)));
    let output = run(&one);
    assert!(output.status.success(), "{}", message(&output));
    let read = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(path(name)).expect("written")).expect("JSON")
    };
    let report = read("report.json");
    assert_eq!(report["metrics"]["concurrency"]["resident_max"], 1, "there is room for one");
    let switch = &report["metrics"]["context_switch"];
    assert!(switch["swapped_out"].as_u64() >= Some(2), "both leave once: {switch}");
    assert_eq!(switch["swapped_out"], switch["swapped_in"], "and come back: {switch}");
    assert_eq!(switch["out_bytes"], switch["in_bytes"], "as they are: {switch}");
    for session in report["sessions"].as_array().expect("a list") {
        let rounds = session["rounds"].as_array().expect("a list");
        assert_eq!(rounds.len(), 2, "two questions: {session}");
        assert!(rounds.iter().all(|round| round["new_tokens"].as_u64() > Some(0)), "two answers: {session}");
        assert_eq!(rounds[1]["question"], "Say that again.", "in order");
    }
    assert_eq!(report["metrics"]["service"]["sessions_finished"], 2, "both");
    let trace = read("trace.json");
    let spans = trace["traceEvents"].as_array().expect("a list").iter().filter(|event| event["ph"] == "X");
    let names: BTreeSet<_> = spans.filter_map(|event| event["name"].as_str()).collect();
    assert!(["prefill", "decode", "swap out"].iter().all(|name| names.contains(name)), "{names:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("2 out and 2 back") || text.contains("3 out and 3 back"), "{text}");
}

/// The reference model, full and compressed: eight documents under a budget for two.
#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn the_reference_model_answers_as_with_ample_memory_gpu() {
    let (device, model) = (common::device(), common::model());
    for text in ["full", "kivi4"] {
        let vocab = model.weights.geometry.vocab_size;
        let all: Vec<_> = (0..8).map(|seed| request(seed, 40, 2, vocab, text)).collect();
        let config = EngineConfig { context_length: 64, ..config(&model.weights, &[text]) };
        let ample = run(device, &model.weights, &config, HostConfig::default(), &all);
        let config = EngineConfig { swap_chunk: Bytes(600 << 10), ..config };
        let config = tight(&model.weights, &config, &all[0], 24);
        for (budget, disk_budget) in [(Bytes::mib(64), Bytes::ZERO), (Bytes::ZERO, Bytes::mib(64))] {
            let host = HostConfig { budget, disk_budget, ..HostConfig::default() };
            let got = run(device, &model.weights, &config, host, &all);
            println!("{text}: {} swapped, {} on the host, {} in files", got.swapped, got.host_peak, got.disk_peak);
            assert!(got.swapped >= 8 && got.dropped == 0, "{} caches left", got.swapped);
            assert_eq!(got.host_peak == Bytes::ZERO, budget == Bytes::ZERO, "they go where there is room");
            compare(&ample, &got, text);
        }
    }
}

#[test]
fn a_chunk_that_holds_no_page_is_refused_with_the_numbers() {
    let device = Device::open_noop().expect("the noop backend is compiled into the tests");
    let weights = common::tiny_model(4);
    let config = EngineConfig { swap_chunk: Bytes(1_000), ..config(&weights, &["full"]) };
    let error = Engine::new(&device, &weights, &config).expect_err("a page is larger");
    let EngineError::Input(message) = error else { panic!("{error}") };
    assert!(message.contains("1000 B") || message.contains("1,000 B"), "{message}");
}
