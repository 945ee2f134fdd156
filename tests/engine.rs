//! The engine against the CPU reference on small random models, and its bookkeeping.

mod common;

use concertina::device::Device;
use concertina::engine::{Engine, EngineConfig};
use concertina::eval::prompt;
use concertina::geometry::Bytes;
use concertina::kernels::sample::Sampling;
use concertina::reference::compare::{kl_divergence, widen};
use concertina::reference::transformer::ReferenceModel;
use concertina::schedule::{Finish, Phase, Request, ScheduleConfig, Scheduler};

fn request(seed: u64, n: usize, max_new: u32, sampling: Sampling) -> Request {
    Request { prompt: common::tokens(seed, n, 200), max_new, sampling, stop: Vec::new() }
}

fn schedule() -> ScheduleConfig {
    ScheduleConfig { max_rows: 64, max_sessions: 8, context_length: 1024 }
}

#[test]
fn a_token_outside_the_vocabulary_is_an_error_with_the_numbers() {
    let device = Device::open_noop().expect("the noop backend is compiled into the tests");
    let weights = common::tiny_model(1);
    let (mut engine, caches) = Engine::new(&device, &weights, &common::config(32)).expect("32 MiB suffice");
    let mut s = Scheduler::new(schedule(), caches);
    let prompt = vec![3, 200];
    s.submit(Request { prompt, ..request(1, 1, 1, Sampling::GREEDY) }).expect("the scheduler knows no vocabulary");
    let message = s.step(&mut engine).expect_err("token 200 of 200").to_string();
    assert!(message.contains("token 200") && message.contains("size, 200"), "{message}");
}

#[test]
fn a_whole_step_validates_on_the_noop_backend() {
    let device = Device::open_noop().expect("the noop backend is compiled into the tests");
    let weights = common::tiny_model(1);
    let (mut engine, caches) = Engine::new(&device, &weights, &common::config(32)).expect("32 MiB suffice");
    let mut s = Scheduler::new(schedule(), caches);
    s.submit(request(1, 30, 3, Sampling::GREEDY)).expect("fits");
    s.submit(request(2, 90, 3, Sampling::GREEDY)).expect("fits");
    while !s.is_idle() {
        s.step(&mut engine).expect("every call should validate");
    }
    assert!(engine.last_step().dispatches > 10, "the step was recorded");
    assert_eq!(s.report().pages_in_use_bytes, Bytes::ZERO, "all bytes are back");
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn logits_match_the_reference_over_one_arena_and_many_gpu() {
    let weights = common::tiny_model(2);
    let reference = ReferenceModel::new(&weights);
    let tokens = common::tokens(5, 300, 200);
    let positions: Vec<usize> = (290..300).collect();
    let expected = reference.logits(&tokens, &positions);
    // Eight slabs of 16 pages to an arena: the prompt's 76 pages spill.
    let page = 16 * 24 * 4;
    for (name, max_arena) in [("one arena", None), ("many arenas", Some(Bytes(page * 16 * 8)))] {
        let config = EngineConfig { budget: Bytes::mib(8), max_arena, ..common::config(8) };
        let (mut engine, mut caches) = Engine::new(common::device(), &weights, &config).expect("8 MiB suffice");
        let arenas = caches.pool.report().arenas;
        assert_eq!(arenas > 1, max_arena.is_some(), "{name}: {arenas} arenas");
        let mut got = Vec::new();
        let mut keep = |_, row: Vec<f32>| got.push(widen(&row));
        prompt::logits(&mut engine, &mut caches, &tokens, 290..300, 50, &mut keep).expect("the prompt fits");
        assert_eq!(got.len(), expected.len(), "a row per position");
        for (got, expected) in got.iter().zip(&expected) {
            let kl = kl_divergence(expected, got);
            assert!(kl <= 1e-6, "{name}: {kl:e} nats from the reference");
        }
        assert!(kl_divergence(&expected[0], &got[9]) > 1e-3, "another position should not pass");
        let report = caches.pool.report();
        assert_eq!(report.allocated_bytes, engine.held_bytes(), "{name}: the pool says what the device holds");
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn greedy_text_is_the_argmax_of_the_reference_gpu() {
    let weights = common::tiny_model(3);
    let reference = ReferenceModel::new(&weights).round_kv_to_f16(true);
    let (mut engine, caches) = Engine::new(common::device(), &weights, &common::config(32)).expect("32 MiB suffice");
    let mut s = Scheduler::new(schedule(), caches);
    let ids: Vec<_> = [(1, 5), (2, 70), (3, 33)]
        .map(|(seed, n)| s.submit(request(seed, n, 12, Sampling::GREEDY)).expect("fits"))
        .into();
    while !s.is_idle() {
        s.step(&mut engine).expect("the step should run");
    }
    for id in ids {
        let session = s.session(id).expect("known");
        assert_eq!(session.phase, Phase::Finished(Finish::Length), "as many as asked for");
        let mut tokens = session.request.prompt.clone();
        for token in &session.produced {
            let logits = &reference.logits(&tokens, &[tokens.len() - 1])[0];
            let best = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            // Rounding may swap two logits that are equal within it; any larger gap is an error.
            assert!(
                best - logits[*token as usize] < 1e-3,
                "session {id:?}: {} below the best",
                best - logits[*token as usize]
            );
            tokens.push(*token);
        }
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn the_same_seed_samples_the_same_text_alone_and_in_company_gpu() {
    let weights = common::tiny_model(4);
    let sampling = Sampling { temperature: 1.0, top_k: 40, top_p: 0.95, seed: 9 };
    let run = |requests: Vec<Request>| {
        let (mut engine, caches) =
            Engine::new(common::device(), &weights, &common::config(32)).expect("32 MiB suffice");
        let mut s = Scheduler::new(schedule(), caches);
        for request in requests {
            s.submit(request).expect("fits");
        }
        while !s.is_idle() {
            s.step(&mut engine).expect("the step should run");
        }
        s.sessions().map(|(_, s)| s.produced.clone()).collect::<Vec<_>>()
    };
    let alone = run(vec![request(1, 20, 30, sampling)]);
    let company = run(vec![
        request(1, 20, 30, sampling),
        request(2, 50, 30, sampling),
        request(1, 20, 30, Sampling { seed: 10, ..sampling }),
    ]);
    assert_eq!(alone[0], company[0], "the same seed");
    assert_ne!(company[0], company[2], "another seed");
}
