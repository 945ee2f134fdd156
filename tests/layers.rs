//! Layers that share caches or skip the prompt, against the f64 reference that does the same without any cache.

mod common;

use concertina::compression::Compression;
use concertina::engine::{Engine, EngineConfig, EvictionConfig};
use concertina::eval::prompt::Driver;
use concertina::reference::compare::{kl_divergence, widen};
use concertina::reference::transformer::ReferenceModel;
use concertina::weights::Weights;

const PROMPT: usize = 75;
const DECODED: usize = 6;

/// A model of four layers: those of two models of two.
fn four_layers() -> Weights {
    let mut weights = common::tiny_model(5);
    weights.layers.extend(common::tiny_model(6).layers);
    weights.geometry.num_layers = 4;
    weights
}

/// Logits of the last prompt row and of some decoded tokens, through the engine.
fn logits(weights: &Weights, compression: &str, tokens: &[u32]) -> Vec<Vec<f64>> {
    let compression: Compression = compression.parse().expect("a compression");
    let evictions = EvictionConfig::of(std::slice::from_ref(&compression), 0);
    let config = EngineConfig { codecs: vec!["f32".parse().expect("a codec")], evictions, ..common::config(16) };
    let (mut engine, mut caches) = Engine::new(common::device(), weights, &config).expect("16 MiB are enough");
    let mut driver = Driver::new(&mut engine, &mut caches);
    let probe = driver.admit(&compression, PROMPT, tokens.len()).expect("fits");
    let mut rows = Vec::new();
    let wanted = PROMPT - 1..PROMPT;
    // Chunks of 32: the prompt's last row is alone neither in its chunk nor in its page.
    driver.prefill(probe, &tokens[..PROMPT], wanted, 32, &mut |_, row| rows.push(widen(&row))).expect("a device");
    for token in &tokens[PROMPT..] {
        rows.extend(driver.decode(&[(probe, *token)]).expect("a device").iter().map(|row| widen(row)));
    }
    driver.end().expect("the pool should agree");
    rows
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn layers_that_share_or_skip_match_the_reference_gpu() {
    let weights = four_layers();
    let tokens = common::tokens(8, PROMPT + DECODED, weights.geometry.vocab_size);
    let positions: Vec<usize> = (PROMPT - 1..tokens.len()).collect();
    let model = || ReferenceModel::new(&weights).round_kv_to_f16(true);
    let cases = [
        ("full", model()),
        ("layer=share:2", model().share_layers(&[0, 0, 2, 2])),
        ("layer=share:0,0,0,3", model().share_layers(&[0, 0, 0, 3])),
        ("layer=skip-prefill:2..", model().skip_prefill(2, PROMPT)),
        ("layer=skip-prefill:1..,hidden=f32", model().skip_prefill(1, PROMPT)),
        ("layer=share:2+skip-prefill:3..", model().share_layers(&[0, 0, 2, 2]).skip_prefill(3, PROMPT)),
    ];
    let mut all = Vec::new();
    for (text, model) in cases {
        let (got, expected) = (logits(&weights, text, &tokens), model.logits(&tokens, &positions));
        assert_eq!(got.len(), 1 + DECODED, "{text}: the last row of the prompt and the decoded ones");
        let worst = got.iter().zip(&expected).map(|(a, b)| kl_divergence(b, a)).fold(0.0, f64::max);
        println!("{text}: {worst:.1e} nats from the reference at most");
        assert!(worst < 1e-5, "{text}: {worst:e} nats");
        all.push((text, expected));
    }
    // Each is a model of its own: another's logits would not pass.
    for (text, logits) in &all[1..] {
        let apart = logits.iter().zip(&all[0].1).map(|(a, b)| kl_divergence(b, a)).fold(0.0, f64::max);
        assert!(apart > 1e-3, "{text} and the full model are {apart:e} nats apart");
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn rows_that_skip_layers_have_no_logits_gpu() {
    let weights = four_layers();
    let tokens = common::tokens(8, PROMPT, weights.geometry.vocab_size);
    let compression: Compression = "layer=skip-prefill:2..".parse().expect("a compression");
    let config =
        EngineConfig { evictions: EvictionConfig::of(std::slice::from_ref(&compression), 0), ..common::config(16) };
    let (mut engine, mut caches) = Engine::new(common::device(), &weights, &config).expect("enough");
    let mut driver = Driver::new(&mut engine, &mut caches);
    let probe = driver.admit(&compression, PROMPT, PROMPT).expect("fits");
    let refused = driver.prefill(probe, &tokens, 3..9, 32, &mut |_, _| ()).expect_err("no logits").to_string();
    assert!(refused.contains("skip layers"), "{refused}");
}
