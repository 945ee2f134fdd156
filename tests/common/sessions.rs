//! Sessions of three rounds over caches of every kind.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use concertina::compression::Compression;
use concertina::compression::head::HeadScores;
use concertina::device::Device;
use concertina::engine::{Engine, EngineConfig, EvictionConfig};
use concertina::geometry::Bytes;
use concertina::kernels::sample::Sampling;
use concertina::schedule::{Caches, Request, Round};
use concertina::weights::Weights;

/// Full caches, codecs, latents, evictions that are over and those that go on, shared and merged layers; and how many tenths
/// of one there is room for while they read, since evictions make room later.
pub(crate) const KINDS: [(&str, u64); 9] = [
    ("full", 26),
    ("kivi4", 26),
    ("k:rot3,v:int8", 26),
    ("lowrank:8", 26),
    ("token=snapkv:0.5:window8", 20),
    ("token=h2o:96:every32,hidden=kivi4", 11),
    ("token=adakv:0.5:expected,head=duo:0.5:sink4:recent32", 15),
    ("layer=share:2", 26),
    ("layer=minicache:0..", 15),
];

pub(crate) fn compression(text: &str) -> Compression {
    text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
}

/// Three rounds over a document of `n` tokens; sampled, so that a small difference shows.
pub(crate) fn request(seed: usize, n: usize, max_new: u32, vocab: u32, text: &str) -> Request {
    let sampling = Sampling { temperature: 1.0, seed: seed as u64, ..Sampling::GREEDY };
    let round = |at: usize| Round {
        tokens: super::tokens((1_000 + 10 * seed + at) as u64, 5 + at, vocab),
        max_new,
        think: Duration::from_millis(at as u64),
    };
    Request {
        rounds: vec![round(1), round(2)],
        sampling,
        compression: compression(text),
        document: Some(u32::try_from(n).expect("short") - 4),
        ..Request::new(super::tokens(seed as u64, n, vocab), max_new)
    }
}

pub(crate) fn config(weights: &Weights, texts: &[&str]) -> EngineConfig {
    let compressions: Vec<_> = texts.iter().map(|text| compression(text)).collect();
    let codecs: BTreeSet<_> = compressions.iter().flat_map(Caches::codecs_of).collect();
    let line = "0.9\t0.1\n".repeat(weights.geometry.num_layers as usize);
    let scores = (weights.geometry.heads.num_kv_heads == 2).then(|| HeadScores::parse(&line).expect("scores"));
    let evictions = EvictionConfig::of(&compressions, 8)
        .map(|evictions| EvictionConfig { head_scores: scores.map(Arc::new), ..evictions });
    EngineConfig {
        codecs: codecs.into_iter().collect(),
        evictions,
        page_size: 32,
        context_length: 512,
        ..super::config(64)
    }
}

/// A budget with room for so many tenths of a request's session.
pub(crate) fn tight(weights: &Weights, config: &EngineConfig, request: &Request, tenths: u64) -> EngineConfig {
    let device = Device::open_noop().expect("the noop backend is compiled into the tests");
    let mut tight = config.clone();
    // Staging shrinks with the budget, so that the arenas come out larger than what was taken off; a few times closer.
    for _ in 0..4 {
        let (_, caches) = Engine::new(&device, weights, &tight).expect("ample memory");
        let needed = caches.pool.slabs_for(&caches.pages_needed(request).expect("it is served"));
        let wanted = Bytes(needed.0 * tenths / 10);
        tight.budget = (tight.budget + wanted).saturating_sub(caches.pool.capacity());
    }
    tight
}
