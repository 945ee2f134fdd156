//! What the tests on a device share: one device, one model, and small random models.
//!
//! Tests that need a GPU adapter have names ending in `_gpu`. Without an adapter they fail; the feature `no-gpu-tests`
//! excludes them explicitly, and then they show as ignored.

#![expect(dead_code, reason = "each test binary uses a part")]

pub(crate) mod process;
pub(crate) mod sessions;

use std::sync::OnceLock;

use concertina::device::{AdapterRequest, Device, Tier};
use concertina::engine::EngineConfig;
use concertina::geometry::{Bytes, HeadGeometry, ModelGeometry};
use concertina::model::{GgufFile, Tokenizer, reference_model_path};
use concertina::weights::{LayerWeights, Matrix, Weights};
use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The adapter's best tier.
pub(crate) fn device() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(|| open(None))
}

/// The portable tier of the same adapter.
pub(crate) fn portable() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(|| open(Some(Tier::Portable)))
}

fn open(tier: Option<Tier>) -> Device {
    let device = Device::open(&AdapterRequest { tier, ..AdapterRequest::default() })
        .unwrap_or_else(|e| panic!("{e}; to leave out the tests that need one: cargo test --features no-gpu-tests"));
    println!("device: {} ({}), {} tier", device.summary().name, device.summary().backend, device.tier());
    device
}

/// The reference model.
pub(crate) struct Model {
    pub weights: Weights,
    pub tokenizer: Tokenizer,
}

/// SmolLM2-135M-Instruct, loaded once per test binary.
pub(crate) fn model() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| {
        let path = reference_model_path();
        let gguf = GgufFile::open(&path)
            .unwrap_or_else(|e| panic!("the reference model is needed: {e}; get it with: cargo xtask model"));
        let tokenizer = Tokenizer::from_gguf(&gguf).expect("the reference model has a tokenizer");
        let weights = gguf.weights(&mut |_, _| ()).expect("the reference model has weights");
        Model { weights, tokenizer }
    })
}

/// An engine of moderate size.
pub(crate) fn config(budget_mib: u64) -> EngineConfig {
    EngineConfig {
        budget: Bytes::mib(budget_mib),
        max_rows: 64,
        max_sessions: 8,
        max_logit_rows: 64,
        context_length: 1024,
        page_size: 16,
        codecs: Vec::new(),
        chooses: false,
        evictions: None,
        swap_chunk: Bytes::ZERO,
        max_arena: None,
    }
}

/// A two-layer model with random weights: 4 query heads on 2 KV heads, separate output matrix.
pub(crate) fn tiny_model(seed: u64) -> Weights {
    let geometry = ModelGeometry {
        num_layers: 2,
        hidden_size: 64,
        intermediate_size: 136,
        heads: HeadGeometry { num_qo_heads: 4, num_kv_heads: 2, head_dim: 24 },
        vocab_size: 200,
        context_length: 1024,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
    };
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut matrix = |rows: u32, cols: u32| {
        let scale = 1.5 / (cols as f32).sqrt();
        let data = (0..rows * cols).map(|_| f16::from_f32(rng.random_range(-1.0_f32..1.0) * scale)).collect();
        Matrix::new(rows, cols, data)
    };
    let norm = (0..geometry.hidden_size).map(|i| 1.0 + (i % 7) as f32 * 0.05).collect();
    let (rows, cols) = (geometry.vocab_size, geometry.hidden_size);
    let tied = weights(geometry, norm, &mut matrix);
    Weights { output: Some(matrix(rows, cols)), ..tied }
}

/// A model of a shape whose embedding is its output matrix too; every norm is `norm`.
pub(crate) fn weights(geometry: ModelGeometry, norm: Vec<f32>, mut matrix: impl FnMut(u32, u32) -> Matrix) -> Weights {
    let (hidden, inner) = (geometry.hidden_size, geometry.intermediate_size);
    let (q, kv) = (geometry.heads.q_width(), geometry.heads.kv_width());
    let layers = (0..geometry.num_layers)
        .map(|_| LayerWeights {
            attention_norm: norm.clone(),
            qkv: matrix(q + 2 * kv, hidden),
            attention_output: matrix(hidden, q),
            ffn_norm: norm.clone(),
            gate_up: matrix(2 * inner, hidden),
            down: matrix(hidden, inner),
        })
        .collect();
    let embedding = matrix(geometry.vocab_size, hidden);
    Weights { geometry, embedding, layers, output_norm: norm, output: None }
}

/// Seeded tokens below `vocab`.
pub(crate) fn tokens(seed: u64, n: usize, vocab: u32) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(0..vocab)).collect()
}
