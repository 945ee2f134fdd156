//! What a step of decode costs the host: dispatches per layer, and no memory of the host or the device once it is warm.
//! On the `noop` backend, which validates every call and computes nothing.

#![expect(unsafe_code, reason = "a counting allocator has to implement GlobalAlloc")]

mod common;
#[path = "common/counting.rs"]
mod counting;

use concertina::compression::Compression;
use concertina::device::Device;
use concertina::engine::{Engine, EngineConfig};
use concertina::geometry::{HeadGeometry, ModelGeometry};
use concertina::kernels::sample::Sampling;
use concertina::schedule::{Backend as _, Caches, PlannedRows, SessionId, StepPlan};
use concertina::weights::{Matrix, Weights};
use counting::allocations_of;
use half::f16;

const PAGE: u32 = 32;
const PROMPT: u32 = 70;

/// The layers of SmolLM2-135M over a small vocabulary; every weight is zero, since nothing is computed.
fn reference_geometry() -> Weights {
    let geometry = ModelGeometry {
        num_layers: 30,
        hidden_size: 576,
        intermediate_size: 1536,
        heads: HeadGeometry { num_qo_heads: 9, num_kv_heads: 3, head_dim: 64 },
        vocab_size: 200,
        context_length: 1024,
        rope_theta: 100_000.0,
        rms_norm_eps: 1e-5,
    };
    let zeros = |rows: u32, cols: u32| Matrix::new(rows, cols, vec![f16::ZERO; (rows * cols) as usize]);
    let norm = vec![1.0; geometry.hidden_size as usize];
    common::weights(geometry, norm, zeros)
}

fn config() -> EngineConfig {
    let codecs = vec![compression("kivi4").hidden];
    EngineConfig { codecs, page_size: PAGE, ..common::config(256) }
}

fn compression(text: &str) -> Compression {
    text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
}

/// The next rows of every session: its prompt, or a token.
fn next(caches: &Caches, sessions: u32) -> StepPlan {
    let mut plan = StepPlan::default();
    for session in (0..sessions).map(SessionId) {
        let first_index = caches.tables[&session].n_tokens();
        let decode = first_index > 0;
        let tokens = vec![1; if decode { 1 } else { PROMPT as usize }];
        let sample = Some(Sampling::GREEDY);
        plan.segments.push(PlannedRows {
            session,
            first_index,
            tokens,
            decode,
            depth: None,
            observed: Vec::new(),
            sample,
        });
    }
    plan
}

/// Sessions of a compression behind their prompts, a row at a time.
fn admit(engine: &mut Engine<'_>, caches: &mut Caches, compression: &Compression, sessions: u32) {
    for session in (0..sessions).map(SessionId) {
        caches.admit(session, compression, PROMPT, PROMPT + 6 * PAGE).expect("all fit");
    }
    // One session's prompt at a time, so that rows fit a step.
    for session in 0..sessions {
        let mut plan = next(caches, sessions);
        plan.segments.retain(|rows| rows.session == SessionId(session));
        while let Some(rows) = plan.segments.first_mut().filter(|rows| !rows.tokens.is_empty()) {
            let n = caches.cut(rows.session, u32::try_from(rows.tokens.len()).expect("short").min(64));
            let rest = rows.tokens.split_off(n as usize);
            caches.grow(&plan).expect("committed");
            engine.execute(&plan, caches).expect("every call should validate");
            caches.retire(&plan);
            let rows = &mut plan.segments[0];
            rows.first_index += n;
            rows.tokens = rest;
        }
    }
}

fn decode(engine: &mut Engine<'_>, caches: &mut Caches, sessions: u32) {
    let plan = next(caches, sessions);
    caches.grow(&plan).expect("committed");
    engine.execute(&plan, caches).expect("every call should validate");
    caches.retire(&plan);
}

#[test]
fn a_layer_of_decode_is_at_most_eight_dispatches() {
    let device = Device::open_noop().expect("the noop backend is compiled into the tests");
    let weights = reference_geometry();
    let layers = weights.geometry.num_layers;
    // Projections, append, decode, merge, output, gate and up, down; sealed pages are read by one more.
    for (text, per_layer) in [("f16", 7), ("kivi4", 8)] {
        let (mut engine, mut caches) = Engine::new(&device, &weights, &config()).expect("256 MiB suffice");
        admit(&mut engine, &mut caches, &compression(text), 8);
        decode(&mut engine, &mut caches, 8);
        let n = engine.last_step().dispatches;
        // Embedding, logits and sampling.
        let expected = 3 + per_layer * layers;
        assert_eq!(n, expected, "{text}: {n} dispatches for {layers} layers, {per_layer} a layer expected");
        println!("{text}: {n} dispatches, {per_layer} a layer");
    }
}

#[test]
fn the_step_that_fills_pages_seals_them_in_one_more_dispatch_a_layer() {
    let device = Device::open_noop().expect("the noop backend is compiled into the tests");
    let weights = common::tiny_model(3);
    let (mut engine, mut caches) = Engine::new(&device, &weights, &config()).expect("256 MiB suffice");
    admit(&mut engine, &mut caches, &compression("kivi4"), 2);
    let mut counted = Vec::new();
    for _ in 0..PAGE {
        decode(&mut engine, &mut caches, 2);
        counted.push(engine.last_step().dispatches);
    }
    let layers = weights.geometry.num_layers;
    let sealing = counted.iter().filter(|n| **n == 3 + 9 * layers).count();
    let others = counted.iter().filter(|n| **n == 3 + 8 * layers).count();
    assert_eq!((sealing, others), (1, PAGE as usize - 1), "dispatches of {PAGE} steps: {counted:?}");
}

#[test]
fn a_warm_step_of_decode_takes_no_memory() {
    let device = Device::open_noop().expect("the noop backend is compiled into the tests");
    let weights = common::tiny_model(4);
    for text in ["f16", "kivi4"] {
        let (mut engine, mut caches) = Engine::new(&device, &weights, &config()).expect("256 MiB suffice");
        admit(&mut engine, &mut caches, &compression(text), 8);
        let mut counted = Vec::new();
        // Three pages, so that every list has been as long as it gets.
        for step in 0..4 * PAGE {
            let plan = next(&caches, 8);
            caches.grow(&plan).expect("committed");
            let (done, n) = allocations_of(|| engine.prepare(&plan, &mut caches));
            done.expect("the step should be planned");
            caches.retire(&plan);
            if step >= 3 * PAGE {
                counted.push(n);
            }
        }
        let total: usize = counted.iter().sum();
        assert_eq!(total, 0, "{text}: allocations of {PAGE} warm steps: {counted:?}");
        // An engine that is not warm shows that they would be seen.
        let (mut engine, mut caches) = Engine::new(&device, &weights, &config()).expect("256 MiB suffice");
        caches.admit(SessionId(0), &compression(text), PROMPT, PROMPT).expect("fits");
        let mut plan = next(&caches, 1);
        plan.segments[0].tokens.truncate(caches.cut(SessionId(0), PROMPT) as usize);
        caches.grow(&plan).expect("committed");
        let (done, n) = allocations_of(|| engine.prepare(&plan, &mut caches));
        done.expect("the step should be planned");
        assert!(n > 5, "{text}: a first step takes memory, and {n} allocations were seen");
    }
}

#[test]
fn a_step_makes_no_device_buffer() {
    let device = Device::open_noop().expect("the noop backend is compiled into the tests");
    let before = device.buffers_made();
    let (mut engine, mut caches) = Engine::new(&device, &common::tiny_model(5), &config()).expect("256 MiB suffice");
    let made = device.buffers_made();
    assert!(made > before + 10, "an engine has buffers, and {} were counted", made - before);
    admit(&mut engine, &mut caches, &compression("kivi4"), 8);
    for _ in 0..2 * PAGE {
        decode(&mut engine, &mut caches, 8);
    }
    assert_eq!(device.buffers_made(), made, "prompts and {} steps of decode", 2 * PAGE);
}
