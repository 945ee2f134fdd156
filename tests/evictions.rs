//! Evictions on a device against their definitions and the f64 oracle: every policy alone, every pair of dimensions, and a
//! sample of combinations of all four, many sequences in each batch.

mod common;

use std::sync::{LazyLock, Mutex, PoisonError};

use concertina::compression::Compression;
use concertina::compression::{head, hidden, layer, token};
use concertina::eval::verify::eviction::{check, fits, singles};
use concertina::geometry::Bytes;
use concertina::kernels::PipelineCache;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Sequences of one batch.
const BATCH: usize = 24;

fn check_all(compressions: &[Compression], max_arena: Option<Bytes>) {
    // Kernels are most of the time; the tests take turns at one cache of them.
    static CACHE: LazyLock<Mutex<PipelineCache>> = LazyLock::new(Mutex::default);
    let mut cache = CACHE.lock().unwrap_or_else(PoisonError::into_inner);
    let (mut failed, mut n_checks, mut worst) = (Vec::new(), 0, 0.0_f64);
    for batch in compressions.chunks(BATCH) {
        for check in check(common::device(), &mut cache, batch, max_arena).expect("the device should not fail") {
            n_checks += 1;
            worst = worst.max(check.error_over_bound);
            if !check.passed() {
                failed.push(format!("{check:?}"));
            }
        }
    }
    println!("{} compressions, {n_checks} checks, largest error / bound {worst:.3}", compressions.len());
    assert_eq!(n_checks, 5 * compressions.len(), "five checks of each");
    assert!(failed.is_empty(), "{} failed: {failed:#?}", failed.len());
}

fn tokens() -> Vec<Compression> {
    token::examples().map(|token| Compression { token, ..Compression::default() }).collect()
}

/// Pairs of what one list says of a dimension and another of a second one, as far as they go together.
fn pairs(
    a: &[Compression],
    b: &[Compression],
    join: impl Fn(&Compression, &Compression) -> Compression,
) -> Vec<Compression> {
    let (mut all, mut refused) = (Vec::new(), 0);
    for a in a {
        for b in b {
            let both = join(a, b);
            match both.check_together() {
                Ok(()) => all.push(both),
                Err(reason) => {
                    assert!(reason.len() > 40, "a refusal says why: {reason}");
                    refused += 1;
                }
            }
        }
    }
    let n = all.len();
    all.retain(fits);
    println!("{n} pairs go together, {refused} are refused; {} evict and fit a small cache", all.len());
    all
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn every_policy_keeps_what_its_definition_keeps_gpu() {
    check_all(&singles(), None);
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn every_policy_goes_with_every_codec_gpu() {
    let codecs: Vec<_> = hidden::examples().map(|hidden| Compression { hidden, ..Compression::default() }).collect();
    check_all(&pairs(&tokens(), &codecs, |a, b| Compression { hidden: b.hidden, ..a.clone() }), None);
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn every_policy_goes_with_every_head_pattern_and_sharing_map_gpu() {
    let heads: Vec<_> = head::examples().map(|head| Compression { head, ..Compression::default() }).collect();
    let layers: Vec<_> = layer::examples().map(|layer| Compression { layer, ..Compression::default() }).collect();
    let mut all = pairs(&tokens(), &heads, |a, b| Compression { head: b.head, ..a.clone() });
    all.extend(pairs(&tokens(), &layers, |a, b| Compression { layer: b.layer.clone(), ..a.clone() }));
    check_all(&all, None);
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn combinations_of_all_four_dimensions_agree_with_the_oracle_gpu() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let tokens: Vec<_> = token::examples().collect();
    let heads: Vec<_> = head::examples().collect();
    let layers: Vec<_> = layer::examples().collect();
    let codecs: Vec<_> = hidden::examples().collect();
    let mut all = Vec::new();
    while all.len() < 200 {
        let compression = Compression {
            token: tokens[rng.random_range(0..tokens.len())],
            head: heads[rng.random_range(0..heads.len())],
            layer: layers[rng.random_range(0..layers.len())].clone(),
            hidden: codecs[rng.random_range(0..codecs.len())],
        };
        if fits(&compression) {
            all.push(compression);
        }
    }
    check_all(&all, None);
}

/// Small arenas scatter the pages of source and target.
#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn evictions_over_scattered_pages_agree_with_the_oracle_gpu() {
    let some =
        ["token=expected:0.5", "token=keydiff:0.5", "token=h2o:0.5,hidden=kivi4", "layer=minicache:0..,hidden=rot3"];
    let some: Vec<Compression> = some.iter().map(|text| text.parse().expect("a compression")).collect();
    check_all(&some, Some(Bytes(64 * (8 << 10))));
}
