//! Decode rows that choose pages, against attention in f64 over exactly the pages that the definition chooses.

mod common;

use concertina::compression::Compression;
use concertina::compression::hidden::{HeadParameters, HiddenCodec, PageContext};
use concertina::engine::paged_attention::{NewRows, PagedAttention, PagedAttentionConfig};
use concertina::geometry::{Bytes, HeadGeometry};
use concertina::kernels::PipelineCache;
use concertina::kernels::attention::CacheShape;
use concertina::reference::attention::{Context, attend};
use concertina::reference::compare::nmse;
use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SHAPE: CacheShape =
    CacheShape { heads: HeadGeometry { num_qo_heads: 6, num_kv_heads: 2, head_dim: 64 }, page_size: 16 };
const TOKENS: u32 = 403;

/// Tokens of one head.
fn of_head(rows: &[f32], head: usize) -> Vec<f32> {
    rows.chunks_exact(128).flat_map(|row| row[head * 64..(head + 1) * 64].to_vec()).collect()
}

/// Pages with the largest bounds, in order: largest over the group's heads of `sum_c max(q_c low_c, q_c high_c)`.
fn chosen(k: &[f32], q: &[f32], n_pages: usize, n_chosen: usize) -> Vec<usize> {
    let bound = |page: &[f32]| -> f64 {
        let side = |c: usize, pick: fn(f32, f32) -> f32| page.iter().skip(c).step_by(64).copied().reduce(pick);
        let of_head = |q: &[f32]| -> f64 {
            (0..64)
                .map(|c| {
                    let (low, high) = (side(c, f32::min).expect("a page"), side(c, f32::max).expect("a page"));
                    f64::max(f64::from(q[c]) * f64::from(low), f64::from(q[c]) * f64::from(high))
                })
                .sum()
        };
        q.chunks_exact(64).map(of_head).fold(f64::NEG_INFINITY, f64::max)
    };
    let mut order: Vec<(usize, f64)> = k.chunks_exact(16 * 64).take(n_pages).map(bound).enumerate().collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1));
    let mut pages: Vec<usize> = order[..n_chosen].iter().map(|(page, _)| *page).collect();
    pages.sort_unstable();
    pages
}

fn check(codec: &str, layers_read_all: bool) {
    let hidden: HiddenCodec = codec.parse().expect("a codec");
    let dense = if layers_read_all { "dense1" } else { "dense0" };
    let compression: Compression = format!("token=quest:96:{dense},hidden={codec}").parse().expect("a compression");
    let config = PagedAttentionConfig {
        codecs: [hidden].into_iter().filter(HiddenCodec::seals).collect(),
        choosing: 2,
        context_length: 512,
        ..PagedAttentionConfig::new(SHAPE, Bytes::mib(48), 64, 64 * 6 * 8)
    };
    let device = common::device();
    let mut attention = PagedAttention::new(device, &mut PipelineCache::default(), config).expect("48 MiB are enough");
    attention.poison().expect("a device");
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let mut random =
        |n: usize| -> Vec<f32> { (0..n).map(|_| f16::from_f32(rng.random_range(-2.0_f32..2.0)).to_f32()).collect() };
    let id = attention.admit_compressed(&compression, 500, 500).expect("fits");
    let (mut k, mut v) = (Vec::new(), Vec::new());
    while k.len() < (TOKENS as usize - 1) * 128 {
        let n = 64.min(TOKENS as usize - 1 - k.len() / 128);
        let (a, b) = (random(n * 128), random(n * 128));
        attention.step(&[NewRows { sequence: id, q: &[], k: &a, v: &b, decode: false }]).expect("a device");
        k.extend(a);
        v.extend(b);
    }
    let (q, a, b) = (random(6 * 64), random(128), random(128));
    k.extend(&a);
    v.extend(&b);
    let out = attention.step(&[NewRows { sequence: id, q: &q, k: &a, v: &b, decode: true }]).expect("a device");
    let (n_pages, own) = (25, 400 * 64);
    for head in 0..2 {
        let (k, v) = (of_head(&k, head), of_head(&v, head));
        let q = &q[head * 192..(head + 1) * 192];
        let pages = if layers_read_all { (0..n_pages).collect() } else { chosen(&k, q, n_pages, 6) };
        let (mut seen_k, mut seen_v) = (Vec::new(), Vec::new());
        for page in pages {
            let range = page * 16 * 64..(page + 1) * 16 * 64;
            let nobody = HeadParameters::default();
            let context = PageContext::at(&nobody, u32::try_from(page * 16).expect("few tokens"));
            let words = hidden.encode(SHAPE.page(), context, &k[range.clone()], &v[range]);
            let (a, b) = hidden.decode(SHAPE.page(), context, &words);
            seen_k.extend(a);
            seen_v.extend(b);
        }
        seen_k.extend(&k[own..]);
        seen_v.extend(&v[own..]);
        let heads = HeadGeometry { num_qo_heads: 3, num_kv_heads: 1, head_dim: 64 };
        let n = seen_k.len() / 64;
        let expected = attend(&Context { heads, k: &seen_k, v: &seen_v }, q, n);
        let got = &out.o[head * 192..(head + 1) * 192];
        let error = nmse(got, &expected.o);
        println!("{codec}, {dense}, head {head}: {n} of {TOKENS} tokens read, NMSE {error:e}");
        assert!(error < 1e-6, "{codec}: {error:e}");
        let all = attend(&Context { heads, k: &k, v: &v }, q, TOKENS as usize);
        let apart = nmse(got, &all.o);
        assert!(layers_read_all || apart > 1e-3, "{codec}: all tokens would give something else, {apart:e}");
    }
    let table = attention.table(id).expect("it was admitted");
    assert_eq!(attention.report().pages_in_use_bytes, table.held_bytes(), "bounds are counted");
    attention.release(id).expect("the pool should agree");
    let report = attention.report();
    assert_eq!((report.pages_in_use_bytes, report.committed_bytes), (Bytes::ZERO, Bytes::ZERO), "all returns");
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn decode_rows_read_the_pages_with_the_largest_bounds_gpu() {
    for codec in ["f16", "int8", "rot3"] {
        check(codec, false);
    }
    check("f16", true);
}
