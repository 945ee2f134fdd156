//! Faults on a real device: it is destroyed in the middle of a run, or a submission finds no memory. Sessions go on, from host
//! memory or computed again, and answer as they do undisturbed.

mod common;

use common::sessions;
use concertina::device::loss::Failure;
use concertina::device::staging::{Uploader, download};
use concertina::device::{AdapterRequest, Device, DeviceError};
use concertina::engine::host_cache::HostCopies;
use concertina::engine::{Engine, EngineConfig, EngineError};
use concertina::geometry::Bytes;
use concertina::schedule::{
    BackendError, Caches, Fault, HostConfig, Loss, Place, Request, ScheduleConfig, Scheduler, Session, Store,
};
use concertina::weights::Weights;

/// A device of its own, since it will be lost.
fn own_device() -> Device {
    let shared = common::device();
    let device = Device::open(&AdapterRequest { tier: Some(shared.tier()), ..AdapterRequest::default() });
    device.expect("an adapter opens a second device")
}

/// Three rounds over a document.
fn request(seed: usize, n: usize, text: &str) -> Request {
    sessions::request(seed, n, 12, 200, text)
}

/// A budget with room for so many tenths of a request's session, and chunks of a few pages.
fn tight(weights: &Weights, config: &EngineConfig, request: &Request, tenths: u64) -> EngineConfig {
    let config = EngineConfig { swap_chunk: Bytes(24 << 10), ..config.clone() };
    sessions::tight(weights, &config, request, tenths)
}

fn schedule(config: &EngineConfig, caches: Caches, all: &[Request]) -> Scheduler {
    let &EngineConfig { max_rows, max_sessions, context_length, .. } = config;
    let host = HostConfig { budget: Bytes::mib(64), ..HostConfig::default() };
    let mut s = Scheduler::new(ScheduleConfig { max_rows, max_sessions, context_length, host }, caches);
    for request in all {
        s.submit(request.clone()).expect("it fits");
    }
    s
}

/// What sessions come to when nothing goes wrong and there is room for all.
fn undisturbed(weights: &Weights, config: &EngineConfig, all: &[Request]) -> Vec<Session> {
    let (mut engine, caches) = Engine::new(common::device(), weights, config).expect("ample memory");
    let mut s = schedule(config, caches, all);
    while !s.is_idle() {
        s.step(&mut engine).expect("the step runs");
    }
    s.sessions().map(|(_, session)| session.clone()).collect()
}

fn all_back(s: &Scheduler, engine: &Engine<'_>) {
    let report = s.report();
    assert_eq!((report.pages_in_use_bytes, report.committed_bytes), (Bytes::ZERO, Bytes::ZERO), "all bytes are back");
    assert_eq!(
        (s.away_bytes(Store::Host).0, engine.host_bytes()),
        (Bytes::ZERO, Bytes::ZERO),
        "nothing is left on the host"
    );
}

/// Runs sessions over devices that are destroyed whenever some caches are on the device, some in host memory, and some steps
/// have passed.
fn run_through_losses(
    weights: &Weights,
    config: &EngineConfig,
    all: &[Request],
    losses: usize,
) -> (Scheduler, Vec<Loss>) {
    let mut copies = HostCopies::default();
    let mut kept: Option<Scheduler> = None;
    let mut lost = Vec::new();
    loop {
        let device = own_device();
        let (mut engine, caches) = Engine::new(&device, weights, config).expect("the budget suffices");
        engine.keep_copies(std::mem::take(&mut copies));
        let s = kept.get_or_insert_with(|| schedule(config, caches, all));
        let mut steps = 0;
        let error = loop {
            if s.is_idle() {
                s.step(&mut engine).expect("nothing is left to do");
                all_back(s, &engine);
                return (kept.expect("there is one"), lost);
            }
            let somewhere = |is: fn(Place) -> bool| s.sessions().any(|(_, session)| is(session.place));
            steps += 1;
            let here = somewhere(|place| matches!(place, Place::Device | Place::Leaving(_)));
            if lost.len() < losses && steps > 7 && here && somewhere(|place| place == Place::Host) {
                device.destroy();
            }
            match s.step(&mut engine) {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert_eq!(error.fault(), Fault::DeviceLost, "{error}");
        copies = engine.take_copies();
        lost.push(s.device_lost(&copies.sessions()).expect("the pool agrees"));
        assert_eq!(s.report().pages_in_use_bytes, Bytes::ZERO, "nothing is on the device");
    }
}

/// Full caches and codecs, which leave in chunks; evictions that are over, and those that go on and hold a slot.
const KINDS: [(&str, u64); 4] =
    [("full", 26), ("kivi4", 26), ("token=snapkv:0.5:window8", 20), ("token=h2o:96:every32,hidden=kivi4", 11)];

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn sessions_survive_devices_that_are_lost_gpu() {
    let weights = common::tiny_model(4);
    for (text, fit) in KINDS {
        let all: Vec<_> = (0..8).map(|seed| request(seed, 150 + 9 * seed, text)).collect();
        let config = sessions::config(&weights, &[text]);
        let expected = undisturbed(&weights, &config, &all);
        let (s, losses) = run_through_losses(&weights, &tight(&weights, &config, &all[7], fit), &all, 2);
        assert_eq!(losses.len(), 2, "{text}: two devices were lost");
        let restored: usize = losses.iter().map(|loss| loss.restored.len()).sum();
        let recomputed: usize = losses.iter().map(|loss| loss.recomputed.len()).sum();
        let (mut untouched, mut equal) = (0, 0);
        for ((id, session), expected) in s.sessions().zip(&expected) {
            assert_eq!(session.answers.len(), 3, "{text}: {id:?} answered every question");
            let same = session.produced == expected.produced;
            // A cache that is computed again is read as a prompt: f16 rows add in another order, and lossy ones differ by as much
            // as the codec costs.
            assert!(same || (session.moves.dropped > 0 && text != "full"), "{text}: {id:?} answers as undisturbed");
            untouched += usize::from(session.moves.dropped == 0);
            equal += usize::from(same);
        }
        println!(
            "{text}: {restored} caches came back from the host, {recomputed} were computed again; {equal} of {} sessions \
             answer as undisturbed, {untouched} of them were never computed again",
            expected.len()
        );
        assert!(restored > 0 && recomputed > 0 && untouched > 0, "{text}: some of each");
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn a_copy_that_is_not_handed_over_is_missed_gpu() {
    let weights = common::tiny_model(4);
    let all: Vec<_> = (0..8).map(|seed| request(seed, 150 + 9 * seed, "full")).collect();
    let config = tight(&weights, &sessions::config(&weights, &["full"]), &all[7], 26);
    let device = common::device();
    let (mut engine, caches) = Engine::new(device, &weights, &config).expect("the budget suffices");
    let mut s = schedule(&config, caches, &all);
    while !s.sessions().any(|(_, session)| session.place == Place::Host) {
        s.step(&mut engine).expect("the step runs");
    }
    engine.settle().expect("nothing is lost");
    let copies = engine.take_copies();
    assert_eq!(copies.sessions().len(), 1, "one is whole");
    s.device_lost(&copies.sessions()).expect("the pool agrees");
    let (mut engine, _) = Engine::new(device, &weights, &config).expect("the budget suffices");
    let error = loop {
        match s.step(&mut engine) {
            Ok(_) => assert!(!s.is_idle(), "nobody can answer without its cache"),
            Err(error) => break error,
        }
    };
    assert!(error.to_string().contains("is not in host memory"), "{error}");
    // As the first try of a step that fails: once it is there, all goes on.
    engine.keep_copies(copies);
    while !s.is_idle() {
        s.step(&mut engine).expect("it is there");
    }
    let expected = undisturbed(&weights, &EngineConfig { budget: Bytes::mib(64), ..config }, &all);
    for ((id, session), expected) in s.sessions().zip(&expected) {
        assert_eq!(session.produced, expected.produced, "{id:?} answers as undisturbed");
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn submissions_that_find_no_memory_change_no_answer_gpu() {
    let weights = common::tiny_model(4);
    let device = own_device();
    let all: Vec<_> = (0..8).map(|at| request(at, 140 + 7 * at, KINDS[at % 4].0)).collect();
    let config = sessions::config(&weights, &KINDS.map(|(text, _)| text));
    let expected = undisturbed(&weights, &config, &all);
    let config = tight(&weights, &config, &all[0], 30);
    let (mut engine, caches) = Engine::new(&device, &weights, &config).expect("the budget suffices");
    let mut s = schedule(&config, caches, &all);
    let (mut shortages, mut swapped, mut step) = (0, 0, 0);
    while !s.is_idle() {
        step += 1;
        if step % 3 == 0 {
            // Steps are one submission where nothing is evicted, and evictions a few.
            device.fail_after(step / 3 % 5, Failure::NoMemory);
        }
        let report = s.step(&mut engine).expect("there is memory for the next try");
        shortages += u32::from(report.shortage.is_some());
        swapped += report.swapped_out.len();
    }
    println!("{shortages} of {step} steps found no memory, {swapped} caches left for the host");
    assert!(shortages > 20 && swapped > 4, "{shortages} shortages, {swapped} swapped");
    for ((id, session), expected) in s.sessions().zip(&expected) {
        assert_eq!(session.moves.dropped, 0, "{id:?}: nothing was lost");
        assert_eq!(session.produced, expected.produced, "{id:?} answers as undisturbed");
    }
    device.fail_after(u32::MAX, Failure::NoMemory);
    s.step(&mut engine).expect("nothing is left to do");
    all_back(&s, &engine);
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn every_call_on_a_lost_device_is_an_error_gpu() {
    let weights = common::tiny_model(4);
    let device = own_device();
    let config = sessions::config(&weights, &["full", "token=h2o:96:every32,hidden=kivi4"]);
    let config = EngineConfig { swap_chunk: Bytes(24 << 10), ..config };
    let mut uploader = Uploader::new(&device, "staging", Bytes(4096)).expect("memory");
    let buffer = device.storage("data", Bytes(4096)).expect("memory");
    uploader.upload(&device, &[1; 4096], &buffer, 0).expect("it is there");
    assert_eq!(download(&device, &buffer, 0, 4096).expect("it is there"), [1; 4096], "before the loss all goes well");
    let (mut engine, caches) = Engine::new(&device, &weights, &config).expect("memory");
    let mut s = schedule(&config, caches, &[request(1, 150, "full")]);
    s.step(&mut engine).expect("before the loss all goes well");
    device.destroy();
    let lost = |error: &DeviceError| matches!(error, DeviceError::Lost(_));
    let is_lost = |error: EngineError| assert_eq!(error.fault(), Fault::DeviceLost, "{error}");
    is_lost(s.step(&mut engine).expect_err("a step"));
    is_lost(s.step(&mut engine).expect_err("and each after it"));
    is_lost(engine.link_rates().expect_err("copies"));
    is_lost(Engine::new(&device, &weights, &config).map(|_| ()).expect_err("another engine"));
    for _ in 0..3 {
        assert!(lost(&uploader.upload(&device, &[2; 4096], &buffer, 0).expect_err("an upload")), "each half");
    }
    assert!(lost(&download(&device, &buffer, 0, 4096).expect_err("a download")), "reading");
    assert!(lost(&device.storage("more", Bytes(64)).expect_err("a buffer")), "allocating");
    assert!(lost(&device.wait().expect_err("a wait")), "waiting");
    let loss = s.device_lost(&engine.take_copies().sessions()).expect("the pool agrees");
    assert_eq!((loss.restored.len(), loss.recomputed.len()), (0, 1), "its session is computed again");
}
