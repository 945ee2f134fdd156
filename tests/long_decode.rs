//! A session may decode for ever under a cap: its bytes stay flat, and it still reads exactly what it holds.

mod common;

use concertina::compression::Compression;
use concertina::engine::{Engine, EngineConfig, EvictionConfig};
use concertina::eval::prompt::Driver;
use concertina::geometry::Bytes;
use concertina::reference::compare::nmse;
use concertina::reference::transformer::ReferenceModel;

const STEPS: usize = 20_000;
const CAP: u64 = 512;

/// Positions alone with keys that are turned to their places, and sums of attention over codes.
const SPECS: [&str; 2] = ["token=streaming:512:every64:rerotate", "token=h2o:512:every64,hidden=kivi4"];

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn twenty_thousand_tokens_under_a_cap_hold_no_more_bytes_than_a_thousand_gpu() {
    let mut weights = common::tiny_model(3);
    weights.geometry.context_length = 32_768;
    // One layer is enough for all that happens to a list.
    weights.layers.truncate(1);
    weights.geometry.num_layers = 1;
    let compressions: Vec<Compression> = SPECS.iter().map(|text| text.parse().expect("a compression")).collect();
    let slots = u32::try_from(SPECS.len()).expect("two");
    let config = EngineConfig {
        max_rows: 128,
        max_logit_rows: 128,
        context_length: 21_000,
        page_size: 64,
        codecs: vec!["kivi4".parse().expect("a codec")],
        evictions: EvictionConfig::of(&compressions, slots),
        budget: Bytes::mib(64),
        ..common::config(64)
    };
    let (mut engine, mut caches) = Engine::new(common::device(), &weights, &config).expect("64 MiB are enough");
    let before = caches.pool.report();
    let tokens = common::tokens(9, STEPS + 200, weights.geometry.vocab_size);
    let mut driver = Driver::new(&mut engine, &mut caches);
    let mut probes = Vec::new();
    for compression in &compressions {
        let probe = driver.admit(compression, 200, tokens.len()).expect("fits");
        driver.prefill(probe, &tokens[..200], 0..0, 128, &mut |_, _| ()).expect("the device should not fail");
        probes.push(probe);
    }
    let lists = u64::from(weights.geometry.num_lists());
    let mut held = vec![Vec::new(); probes.len()];
    let mut last = Vec::new();
    for (step, token) in tokens[200..].iter().enumerate() {
        let rows: Vec<_> = probes.iter().map(|probe| (*probe, *token)).collect();
        last = driver.decode(&rows).expect("the device should not fail");
        for (probe, held) in probes.iter().zip(&mut held) {
            assert!(driver.held_tokens(*probe) <= CAP * lists, "step {step}: never more than {CAP} tokens per head");
            held.push(driver.held_bytes(*probe));
        }
    }
    let model = ReferenceModel::new(&weights);
    for ((probe, spec), (held, got)) in probes.iter().zip(SPECS).zip(held.iter().zip(&last)) {
        // One eviction after another: the largest of the first thousand tokens is that of all that follow.
        let most = |range: &[Bytes]| range.iter().max().copied();
        assert_eq!(most(&held[..1000]), most(&held[1000..]), "{spec}: bytes stay flat");
        let position = driver.position(*probe) - 1;
        let mut list = |layer, head| driver.rows(*probe, layer, head).expect("the device should not fail");
        let expected = model.logits_over(tokens[tokens.len() - 1], position, &mut list);
        let error = nmse(got, &expected);
        println!("{spec}: {:?} bytes at most, position {position}, NMSE {error:e}", most(held));
        assert!(error < 1e-6, "{spec}: {error:e}");
        // Without its newest token, what it holds gives something else.
        let mut short = |layer, head| {
            let (mut k, mut v) = driver.rows(*probe, layer, head).expect("the device should not fail");
            let width = weights.geometry.heads.head_dim as usize;
            k.truncate(k.len() - width);
            v.truncate(v.len() - width);
            (k, v)
        };
        let other = model.logits_over(tokens[tokens.len() - 1], position, &mut short);
        assert!(nmse(got, &other) > 1e-6, "{spec}: a token less should show");
    }
    driver.end().expect("the pool should agree");
    let after = caches.pool.report();
    assert_eq!((after.pages_in_use_bytes, after.committed_bytes), (Bytes::ZERO, Bytes::ZERO), "nothing leaks");
    assert!(after.released_pages > before.released_pages, "pages were released");
    println!("{} tokens evicted, {} pages released", caches.evicted_tokens(), after.released_pages);
}
