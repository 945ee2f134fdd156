//! Numbers that are not: infinities and NaN in one sequence stay in that sequence.

mod common;

use concertina::compression::hidden::HiddenCodec;
use concertina::engine::paged_attention::{NewRows, PagedAttention, PagedAttentionConfig};
use concertina::geometry::{Bytes, HeadGeometry};
use concertina::kernels::PipelineCache;
use concertina::kernels::attention::CacheShape;

const POISON: [f32; 6] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, f32::MIN_POSITIVE];

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn poison_in_one_sequence_does_not_reach_another_gpu() {
    let heads = HeadGeometry { num_qo_heads: 6, num_kv_heads: 2, head_dim: 64 };
    let shape = CacheShape { heads, page_size: 16, codec: HiddenCodec::F16 };
    let config =
        PagedAttentionConfig { shape, budget: Bytes::mib(16), max_rows: 64, max_states: 2048, max_arena: None };
    let mut cache = PipelineCache::default();
    let clean: Vec<f32> = (0..20 * 384).map(|i| ((i * 37) % 101) as f32 * 0.02 - 1.0).collect();
    let run = |cache: &mut PipelineCache, poison: Option<f32>, decode: bool| {
        let mut attention = PagedAttention::new(common::device(), cache, config.clone()).expect("a small cache fits");
        attention.poison().expect("the device should be writable");
        let (a, b) = (attention.admit(32).expect("fits"), attention.admit(32).expect("fits"));
        let rows = if decode { 1 } else { 20 };
        let mut k = clean[..rows * 128].to_vec();
        let mut q = clean[..rows * 384].to_vec();
        if let Some(value) = poison {
            k[5] = value;
            q[7] = value;
        }
        let dirty = NewRows { sequence: a, q: &q, k: &k, v: &k, decode };
        let (q, k) = (&clean[..rows * 384], &clean[..rows * 128]);
        let other = NewRows { sequence: b, q, k, v: k, decode };
        let out = attention.step(&[dirty, other]).expect("the step should run");
        let half = out.o.len() / 2;
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        (bits(&out.o[half..]), bits(&out.o[..half]))
    };
    for decode in [true, false] {
        let (expected, own) = run(&mut cache, None, decode);
        assert!(expected.iter().all(|x| f32::from_bits(*x).is_finite()), "clean inputs give numbers");
        for value in POISON {
            let (neighbour, dirty) = run(&mut cache, Some(value), decode);
            assert!(neighbour == expected, "{value} reached the other sequence (decode {decode})");
            assert!(dirty != own || value == f32::MIN_POSITIVE, "{value} should change its own sequence");
        }
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn misuse_is_an_error_with_the_numbers_gpu() {
    let heads = HeadGeometry { num_qo_heads: 2, num_kv_heads: 2, head_dim: 64 };
    let shape = CacheShape { heads, page_size: 16, codec: HiddenCodec::F16 };
    let config = PagedAttentionConfig { shape, budget: Bytes::mib(8), max_rows: 4, max_states: 64, max_arena: None };
    let mut cache = PipelineCache::default();
    let mut attention = PagedAttention::new(common::device(), &mut cache, config.clone()).expect("a small cache fits");
    let sequence = attention.admit(16).expect("fits");
    let x = [0.5_f32; 128 * 5];
    let rows = |n: usize, q: usize| NewRows { sequence, q: &x[..q], k: &x[..n], v: &x[..n], decode: false };
    let message = |r: Result<_, concertina::engine::EngineError>| r.expect_err("should be refused").to_string();
    assert!(message(attention.step(&[rows(128 * 5, 0)])).contains("5 rows"), "too many rows");
    assert!(message(attention.step(&[rows(100, 0)])).contains("100"), "not a row");
    assert!(message(attention.step(&[rows(128, 100)])).contains("100 query"), "query of another length");
    attention.release(sequence).expect("it exists");
    assert!(message(attention.step(&[rows(128, 128)])).contains("does not exist"), "released");
    assert!(attention.admit(1 << 20).is_err(), "more than the budget");
    assert_eq!(attention.report().pages_in_use_bytes, Bytes::ZERO, "nothing is held");
    let small = PagedAttentionConfig { budget: Bytes(1000), ..config };
    let refused = PagedAttention::new(common::device(), &mut cache, small).expect_err("too small").to_string();
    assert!(refused.contains("1000 B") && refused.contains("give at least"), "{refused}");
}
