//! The engine against the CPU reference on small random models, and its bookkeeping.

mod common;

use std::sync::Arc;

use concertina::compression::Compression;
use concertina::compression::head::HeadScores;
use concertina::device::Device;
use concertina::engine::{Engine, EngineConfig, EngineError, EvictionConfig};
use concertina::eval::prompt::{self, Driver};
use concertina::geometry::Bytes;
use concertina::kernels::sample::Sampling;
use concertina::pool::PoolError;
use concertina::reference::compare::{kl_divergence, widen};
use concertina::reference::transformer::ReferenceModel;
use concertina::schedule::{Finish, HostConfig, Phase, Request, ScheduleConfig, Scheduler, SubmitError};

fn request(seed: u64, n: usize, max_new: u32, sampling: Sampling) -> Request {
    Request { sampling, ..Request::new(common::tokens(seed, n, 200), max_new) }
}

fn schedule() -> ScheduleConfig {
    ScheduleConfig { max_rows: 64, max_sessions: 8, context_length: 1024, host: HostConfig::default() }
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

fn compression(codec: &str) -> Compression {
    codec.parse().unwrap_or_else(|e| panic!("{codec}: {e}"))
}

/// An engine whose pages hold whole groups of the KIVI codecs.
fn config_with(codecs: &[&str], budget_mib: u64) -> EngineConfig {
    let codecs = codecs.iter().map(|codec| compression(codec).hidden).collect();
    EngineConfig { codecs, page_size: 32, ..common::config(budget_mib) }
}

#[test]
fn whole_steps_of_compressed_sessions_validate_on_the_noop_backend() {
    let device = Device::open_noop().expect("the noop backend is compiled into the tests");
    let weights = common::tiny_model(1);
    let codecs = ["kivi4", "rot3", "think:0.6+int8", "lowrank:8", "k:fp8,v:f32"];
    let (mut engine, caches) = Engine::new(&device, &weights, &config_with(&codecs, 32)).expect("32 MiB suffice");
    let mut s = Scheduler::new(schedule(), caches);
    for (at, codec) in codecs.into_iter().chain(["f16"]).enumerate() {
        let n = [70, 110, 30][at % 3];
        let request = request(at as u64, n, 40, Sampling::GREEDY);
        s.submit(Request { compression: compression(codec), ..request }).expect("fits");
    }
    while !s.is_idle() {
        s.step(&mut engine).expect("every call should validate");
    }
    let report = s.report();
    assert_eq!(report.pages_in_use_bytes, Bytes::ZERO, "all bytes are back");
    assert_eq!(report.allocated_bytes, engine.held_bytes(), "the pool says what the device holds");
    let refused = s.submit(Request { compression: compression("rot2"), ..request(1, 9, 9, Sampling::GREEDY) });
    assert!(refused.is_err(), "no kernels were made for it");
}

/// The same, and what evictions need.
fn evicting(codecs: &[&str], slots: u32, budget_mib: u64) -> EngineConfig {
    let scores = HeadScores::parse("0.9\t0.1\n0.2\t0.8\n").expect("two layers of two heads");
    let repeat_prompt = vec![7, 8, 9];
    let evictions = EvictionConfig { slots, moments: true, head_scores: Some(Arc::new(scores)), repeat_prompt };
    EngineConfig { evictions: Some(evictions), ..config_with(codecs, budget_mib) }
}

/// A score of every kind, once and again, with lists that share, compete, keep a window or nothing.
const EVICTING: [&str; 12] = [
    "token=snapkv:0.25:window8",
    "token=h2o:64:every32,hidden=kivi4",
    "token=streaming:64:every32:rerotate",
    "token=adakv:0.25:snapkv:window8,hidden=rot3",
    "token=pyramidkv:0.5:window8,hidden=lowrank:8",
    "token=expected:0.5,hidden=kivi4",
    "token=keydiff:0.5,layer=share:2",
    "token=knorm:64:every16",
    "token=tova:0.5",
    "token=kvzip:0.3,hidden=kivi4",
    "token=random:0.5,head=duo:0.5:sink4:recent16",
    "head=prune:0.5,hidden=kivi4",
];

#[test]
fn whole_steps_of_sessions_that_are_evicted_from_validate_on_the_noop_backend() {
    let device = Device::open_noop().expect("the noop backend is compiled into the tests");
    let weights = common::tiny_model(1);
    let codecs = ["kivi4", "rot3", "lowrank:8"];
    let (mut engine, caches) = Engine::new(&device, &weights, &evicting(&codecs, 3, 64)).expect("64 MiB suffice");
    let mut s = Scheduler::new(schedule(), caches);
    for (at, policy) in EVICTING.into_iter().enumerate() {
        let n = [70, 110, 40][at % 3];
        let request = Request { document: [None, Some(33)][at % 2], ..request(at as u64, n, 70, Sampling::GREEDY) };
        s.submit(Request { compression: compression(policy), ..request }).unwrap_or_else(|e| panic!("{policy}: {e}"));
    }
    let mut evictions = 0;
    while !s.is_idle() {
        evictions += s.step(&mut engine).expect("every call should validate").evicted.len();
    }
    assert!(evictions > EVICTING.len(), "each session is evicted from, some again and again: {evictions}");
    let report = s.report();
    assert_eq!((report.pages_in_use_bytes, report.committed_bytes), (Bytes::ZERO, Bytes::ZERO), "all bytes are back");
    assert_eq!(report.allocated_bytes, engine.held_bytes(), "the pool says what the device holds");
}

/// Layers that share are planned one by one, whether anything is evicted or not.
#[test]
fn a_step_of_many_layers_that_share_fits_its_buffer() {
    let device = Device::open_noop().expect("the noop backend is compiled into the tests");
    let mut weights = common::tiny_model(1);
    weights.layers = vec![weights.layers[0].clone(); 24];
    weights.geometry.num_layers = 24;
    for policy in ["share:2", "layer=share:3,hidden=lowrank:8"] {
        let evictions = EvictionConfig::of(&[compression(policy)], 4);
        assert_eq!(evictions.as_ref().map(|e| e.slots), Some(0), "{policy}: nothing is scored");
        let config = EngineConfig { evictions, ..config_with(&["lowrank:8"], 64) };
        let (mut engine, caches) = Engine::new(&device, &weights, &config).expect("64 MiB suffice");
        let mut s = Scheduler::new(schedule(), caches);
        for (seed, n) in (0..8).zip((100..).step_by(40)) {
            let request = request(seed, n, 20, Sampling::GREEDY);
            s.submit(Request { compression: compression(policy), ..request }).expect("fits");
        }
        while !s.is_idle() {
            s.step(&mut engine).unwrap_or_else(|e| panic!("{policy}: {e}"));
        }
        assert_eq!(s.report().pages_in_use_bytes, Bytes::ZERO, "{policy}: all bytes are back");
    }
}

#[test]
fn an_eviction_that_an_engine_was_not_made_for_is_refused_with_the_reason() {
    let device = Device::open_noop().expect("the noop backend is compiled into the tests");
    let weights = common::tiny_model(1);
    let refusal = |config: &EngineConfig, policy: &str| {
        let (_, caches) = Engine::new(&device, &weights, config).expect("32 MiB suffice");
        let mut s = Scheduler::new(schedule(), caches);
        let request = Request { compression: compression(policy), ..request(1, 40, 9, Sampling::GREEDY) };
        s.submit(request).expect_err(policy).to_string()
    };
    let without = config_with(&["kivi4"], 32);
    for policy in ["streaming:0.5", "snapkv:0.9", "duo:0.5", "share:2"] {
        assert!(refusal(&without, policy).contains("without evictions"), "{policy} needs its buffers");
    }
    assert!(EvictionConfig::of(&[compression("kivi4"), compression("full")], 4).is_none(), "codecs need none");
    let mut no_scores = evicting(&["kivi4"], 0, 32);
    let evictions = no_scores.evictions.as_mut().expect("it evicts");
    evictions.head_scores = None;
    assert!(refusal(&no_scores, "snapkv:0.9").contains("without slots"), "nothing would ever free one");
    assert!(refusal(&no_scores, "duo:0.5").contains("--head-scores"), "who is worth what");
    let served = evicting(&["kivi4"], 1, 32);
    assert!(refusal(&served, "snapkv:0.25").contains("at least 32"), "a quarter of 40 tokens has no room for a window");
    let turned = "snapkv:0.9:rerotate".parse::<Compression>().expect_err("it turns what streaming leaves").to_string();
    assert!(turned.contains("leave rerotate out"), "{turned}");
    assert!(refusal(&served, "share:0,0,0").contains("3 layers"), "a map for another model");
}

#[test]
fn a_codec_that_does_not_fit_the_pages_is_refused_before_anything_is_made() {
    let device = Device::open_noop().expect("the noop backend is compiled into the tests");
    let weights = common::tiny_model(1);
    for (codec, reason) in [("kivi4:64", "32 tokens"), ("lowrank:32", "24 channels")] {
        let error = Engine::new(&device, &weights, &config_with(&[codec], 32)).expect_err("it does not fit");
        assert!(error.to_string().contains(reason), "{codec}: {error}");
    }
}

/// From a budget of a single slab on: what a refusal advises has to be enough to admit the session.
#[test]
fn the_budget_that_a_refusal_advises_admits_the_session() {
    let device = Device::open_noop().expect("the noop backend is compiled into the tests");
    let weights = common::tiny_model(1);
    for served in [&["kivi4"][..], &["f32"], &["rot3", "f32"]] {
        for codec in served.iter().chain(&["f16"]) {
            let config = EngineConfig { max_rows: 8, max_logit_rows: 8, ..config_with(served, 0) };
            let error = Engine::new(&device, &weights, &config).expect_err("no bytes at all");
            let EngineError::Pool(PoolError::BudgetTooSmall { fixed, slab, .. }) = error else { panic!("{error}") };
            let mut budget = fixed + slab;
            let mut advised = 0;
            loop {
                let config = EngineConfig { budget, ..config.clone() };
                let (mut engine, caches) = Engine::new(&device, &weights, &config).expect("as much as was advised");
                let mut s = Scheduler::new(ScheduleConfig { max_rows: 8, ..schedule() }, caches);
                let request = request(1, 900, 20, Sampling::GREEDY);
                match s.submit(Request { compression: compression(codec), ..request }) {
                    Ok(_) => {
                        let report = s.step(&mut engine).expect("every call should validate");
                        assert_eq!(report.admitted.len(), 1, "{codec} of {served:?} should not wait in {budget}");
                        break;
                    }
                    Err(SubmitError::NeverFits { enough, .. }) => budget = enough,
                    Err(other) => panic!("{other}"),
                }
                advised += 1;
                assert!(advised <= 1, "{codec} of {served:?}: the first advice should be enough");
            }
            assert_eq!(advised, 1, "{codec} of {served:?}: one slab should be too little");
        }
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn compressed_caches_change_logits_a_little_over_one_arena_and_many_gpu() {
    let weights = common::tiny_model(2);
    let tokens = common::tokens(5, 300, 200);
    let codecs = ["kivi4", "rot4", "rot2", "lowrank:24", "f32"];
    let page = 32 * 24 * 4;
    let mut bytes = Vec::new();
    for (name, max_arena) in [("one arena", None), ("many arenas", Some(Bytes(2 * page * 16)))] {
        let config = EngineConfig { max_arena, ..config_with(&codecs, 8) };
        let (mut engine, mut caches) = Engine::new(common::device(), &weights, &config).expect("8 MiB suffice");
        let report = caches.pool.report();
        assert_eq!(report.arenas > 1, max_arena.is_some(), "{name}: {} arenas", report.arenas);
        assert_eq!(report.allocated_bytes, engine.held_bytes(), "{name}: the pool says what the device holds");
        assert!(report.allocated_bytes <= report.budget_bytes, "{name}: within the budget");
        let mut logits = |codec: &str| {
            let mut rows = Vec::new();
            let mut keep = |_, row: Vec<f32>| rows.push(row);
            let compression = compression(codec);
            prompt::logits(&mut engine, &mut caches, &compression, &tokens, 270..300, 50, &mut keep).expect("fits");
            assert_eq!(caches.pool.report().pages_in_use_bytes, Bytes::ZERO, "{name}, {codec}: all bytes are back");
            rows
        };
        let full = logits("f16");
        let divergence = |rows: &[Vec<f32>]| {
            let each = full.iter().zip(rows).map(|(f, r)| kl_divergence(&widen(f), &widen(r)));
            each.sum::<f64>() / full.len() as f64
        };
        let mut of_codec = Vec::new();
        for codec in codecs {
            let rows = logits(codec);
            assert_eq!(rows.len(), 30, "a row per position");
            let kl = divergence(&rows);
            println!("{name}, {codec}: {kl:.1e} nats from f16");
            of_codec.push(kl);
            bytes.push((codec, rows));
        }
        let [kivi4, rot4, rot2, lowrank, f32] = of_codec[..] else { panic!("five codecs") };
        for (codec, kl) in [("kivi4", kivi4), ("rot4", rot4)] {
            assert!(
                kl > 1e-9 && kl < 0.02,
                "{name}: {codec} should be close to f16 and not equal, not {kl:e} nats away"
            );
        }
        assert!(rot2 > 3.0 * rot4, "{name}: half the bits should cost more: {rot2:e} to {rot4:e} nats");
        // As many latents as channels: only rounding is left. And f32 holds what f16 did.
        assert!(lowrank < 1e-4, "{name}: all latents should lose nothing but rounding: {lowrank:e} nats");
        assert!(f32 < 1e-9, "{name}: f32 pages hold what f16 pages did: {f32:e} nats");
        assert!(divergence(&full[1..]) > 1e-3, "other positions should not pass as close");
    }
    let (one, many) = bytes.split_at(codecs.len());
    for ((codec, one), (_, many)) in one.iter().zip(many) {
        for (one, many) in one.iter().zip(many) {
            let kl = kl_divergence(&widen(one), &widen(many));
            assert!(kl < 1e-4, "{codec}: one arena and many are {kl:e} nats apart");
        }
    }
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
        let full = Compression::default();
        prompt::logits(&mut engine, &mut caches, &full, &tokens, 290..300, 50, &mut keep).expect("the prompt fits");
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
fn a_cache_made_of_a_full_one_holds_less_and_shows_in_later_logits_only_gpu() {
    let weights = common::tiny_model(2);
    let tokens = common::tokens(5, 300, 200);
    let (mut engine, mut caches) =
        Engine::new(common::device(), &weights, &evicting(&["kivi4"], 1, 32)).expect("32 MiB suffice");
    let full_shape = caches.full;
    let kivi4 = caches.shape(&compression("kivi4")).expect("it is served");
    let lists = u64::from(kivi4.num_lists());
    let mut driver = Driver::new(&mut engine, &mut caches);
    let [full, other] = [0, 1].map(|_| driver.admit(&Compression::default(), 300, 310).expect("fits"));
    let [of_full, of_other] = [full, other].map(|probe| {
        let mut rows = Vec::new();
        let mut keep = |_, row: Vec<f32>| rows.push(row);
        driver.prefill(probe, &tokens, 290..300, 50, &mut keep).expect("the prompt fits");
        rows
    });
    assert_eq!(of_full, of_other, "the same prompt");
    // All 300 tokens in ten pages of codes, and 75 of them as they were, in three.
    let [codes, quarter] = ["kivi4", "streaming:0.25"]
        .map(|policy| driver.fork(full, &compression(policy), 0, 10).expect("the full cache is there"));
    assert_eq!(driver.held_bytes(full), full_shape.bytes_for(300), "the full cache stays as it is");
    assert_eq!(driver.held_bytes(codes), Bytes(lists * 10 * kivi4.sealed_page().0), "pages of codes, none open");
    assert_eq!(driver.held_bytes(quarter), Bytes(lists * 3 * full_shape.open_page().0), "what stayed");
    assert_eq!((driver.held_tokens(codes), driver.held_tokens(quarter)), (lists * 300, lists * 75), "tokens");
    for step in 0..10 {
        let rows = [full, other, codes, quarter].map(|probe| (probe, step));
        let rows = driver.decode(&rows).expect("the step should run");
        assert_eq!(rows[0], rows[1], "step {step}: the full cache is as if nothing had been made of it");
        let kl = |row: usize| kl_divergence(&widen(&rows[0]), &widen(&rows[row]));
        let (codes, quarter) = (kl(2), kl(3));
        assert!(codes > 1e-9 && codes < 0.05, "step {step}: codes should show, a little: {codes:e} nats");
        assert!(quarter > codes && quarter.is_finite(), "step {step}: a quarter costs more: {quarter:e} nats");
    }
    driver.end().expect("the pool agrees");
    assert_eq!(caches.pool.report().pages_in_use_bytes, Bytes::ZERO, "all bytes are back");
    assert_eq!(caches.pool.report().committed_bytes, Bytes::ZERO, "and all commitments");
}

/// A document whose tokens all stay reads as it was; only then do the pages of the full cache go.
#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn a_session_that_evicts_nothing_says_what_it_would_have_said_gpu() {
    let weights = common::tiny_model(2);
    let tokens = common::tokens(5, 200, 200);
    let (mut engine, mut caches) =
        Engine::new(common::device(), &weights, &evicting(&[], 1, 32)).expect("32 MiB suffice");
    let mut logits = |policy: &str| {
        let mut driver = Driver::new(&mut engine, &mut caches);
        // A question of 80 tokens behind a document of 120.
        let probe = driver.admit(&compression(policy), 120, 210).expect("fits");
        let mut rows = Vec::new();
        driver.prefill(probe, &tokens, 100..200, 50, &mut |_, row: Vec<f32>| rows.push(row)).expect("it fits");
        for token in 0..9 {
            rows.extend(driver.decode(&[(probe, token)]).expect("the step should run"));
        }
        let held = driver.held_tokens(probe);
        driver.end().expect("the pool agrees");
        (rows, held)
    };
    let (full, all) = logits("full");
    let compared = |rows: &[Vec<f32>]| {
        let each: Vec<f64> = full.iter().zip(rows).map(|(f, r)| kl_divergence(&widen(f), &widen(r))).collect();
        let (document, rest) = each.split_at(20);
        (document.iter().copied().fold(0.0, f64::max), rest.iter().copied().fold(0.0, f64::max))
    };
    for policy in ["snapkv:1", "h2o:512:every32", "keydiff:1", "adakv:1", "streaming:1"] {
        let (rows, held) = logits(policy);
        let (document, rest) = compared(&rows);
        println!("{policy}: {rest:e} nats, {held} of {all} tokens");
        // The document in other pages, split at other places.
        assert!(document == 0.0 && rest < 1e-6, "{policy}: {document:e} nats in the document, {rest:e} behind it");
        assert_eq!(held, all, "{policy}: everything stays");
    }
    let (rows, held) = logits("streaming:0.25");
    let (document, rest) = compared(&rows);
    assert!(document == 0.0 && rest > 1e-4 && held < all, "what left should be missed: {rest:e} nats");
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
