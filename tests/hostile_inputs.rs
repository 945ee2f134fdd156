//! Numbers that are not: infinities and NaN in one sequence stay in that sequence.

mod common;

use concertina::compression::hidden::{self, HeadParameters, HiddenCodec};
use concertina::engine::paged_attention::{NewRows, PagedAttention, PagedAttentionConfig};
use concertina::geometry::{Bytes, HeadGeometry};
use concertina::kernels::PipelineCache;
use concertina::kernels::attention::CacheShape;
use half::f16;

const POISON: [f32; 6] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, f32::MIN_POSITIVE];

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn poison_in_one_sequence_does_not_reach_another_gpu() {
    let heads = HeadGeometry { num_qo_heads: 6, num_kv_heads: 2, head_dim: 64 };
    let shape = CacheShape { heads, page_size: 16 };
    let config = PagedAttentionConfig::new(shape, Bytes::mib(16), 64, 2048);
    let mut cache = PipelineCache::default();
    let clean: Vec<f32> = (0..20 * 384).map(|i| ((i * 37) % 101) as f32 * 0.02 - 1.0).collect();
    let run = |cache: &mut PipelineCache, poison: Option<f32>, decode: bool| {
        let mut attention = PagedAttention::new(common::device(), cache, config.clone()).expect("a small cache fits");
        attention.poison().expect("the device should be writable");
        let mut admit = || attention.admit(HiddenCodec::F16, 32).expect("fits");
        let (a, b) = (admit(), admit());
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

/// Sealing looks at whole pages: scales, rankings of channels and rotations must keep to the page that they are for.
#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn poison_in_a_page_that_is_sealed_stays_in_its_sequence_gpu() {
    const PAGE: usize = 128;
    let heads = HeadGeometry { num_qo_heads: 6, num_kv_heads: 2, head_dim: 64 };
    let shape = CacheShape { heads, page_size: 128 };
    let codecs: Vec<HiddenCodec> =
        hidden::examples().filter(|codec| codec.seals() && codec.check(shape.page()).is_ok()).collect();
    assert!(codecs.len() >= 15, "pages of 128 tokens suit every codec, not only {}", codecs.len());
    // Latents of the unit basis are the first channels.
    let unit: Vec<f16> = (0..64 * 64).map(|i| f16::from_f32(if i / 64 == i % 64 { 1.0 } else { 0.0 })).collect();
    let head = HeadParameters { key_basis: unit.clone(), value_basis: unit, rope_theta: 10_000.0 };
    let config = PagedAttentionConfig {
        codecs: codecs.clone(),
        parameters: vec![head; 2],
        context_length: 256,
        ..PagedAttentionConfig::new(shape, Bytes::mib(16), 320, 8192)
    };
    let mut cache = PipelineCache::default();
    let mut attention = PagedAttention::new(common::device(), &mut cache, config).expect("a small cache fits");
    let clean: Vec<f32> = (0..(PAGE + 10) * 384).map(|i| ((i * 37) % 101) as f32 * 0.02 - 1.0).collect();
    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let (q_width, kv_width) = (384, 128);
    // Outputs of the neighbour and of the poisoned sequence: rows of the prompt, then a decode row.
    let mut run = |codec: HiddenCodec, poison: Option<f32>| {
        attention.poison().expect("the device should be writable");
        let mut admit = || attention.admit(codec, 160).expect("fits");
        let (a, b) = (admit(), admit());
        let n = PAGE + 9;
        let (mut k, mut v) = (clean[..n * kv_width].to_vec(), clean[7..7 + n * kv_width].to_vec());
        let (clean_k, clean_v) = (k.clone(), v.clone());
        if let Some(value) = poison {
            // Inside the page that the prompt fills, in both heads.
            (k[20 * kv_width + 5], v[31 * kv_width + 9]) = (value, value);
            (k[40 * kv_width + 70], v[50 * kv_width + 90]) = (value, value);
        }
        let q = &clean[..n * q_width];
        let dirty = NewRows { sequence: a, q, k: &k, v: &v, decode: false };
        let other = NewRows { sequence: b, q, k: &clean_k, v: &clean_v, decode: false };
        let prompt = attention.step(&[dirty, other]).expect("the prompts should run");
        let last = |sequence| NewRows {
            sequence,
            q: &q[..q_width],
            k: &clean_k[..kv_width],
            v: &clean_v[..kv_width],
            decode: true,
        };
        let decode = attention.step(&[last(a), last(b)]).expect("the decode rows should run");
        let halves = |values: &[f32]| {
            let (own, other) = values.split_at(values.len() / 2);
            (bits(other), bits(own))
        };
        let parts = [&prompt.o, &prompt.lse, &decode.o, &decode.lse].map(|values| halves(values));
        let sealed = attention.pages(b, 0).expect("the pages are there").sealed;
        attention.release(a).expect("it exists");
        attention.release(b).expect("it exists");
        let (other, own): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
        (other, own, sealed)
    };
    for codec in codecs {
        let (expected, own, page) = run(codec, None);
        let numbers = expected.iter().flatten().all(|x| f32::from_bits(*x).is_finite());
        assert!(numbers, "{codec}: clean inputs give numbers");
        assert_eq!(page.len(), 1, "{codec}: one page is sealed");
        for value in POISON {
            let (neighbour, dirty, sealed) = run(codec, Some(value));
            assert!(neighbour == expected, "{codec}: {value} reached the other sequence");
            assert!(sealed == page, "{codec}: {value} reached the other sequence's page");
            // The decode row reads codes alone: what is not finite has to show through them.
            assert!(
                dirty[2] != own[2] || value == f32::MIN_POSITIVE,
                "{codec}: {value} should change its own sequence"
            );
        }
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn misuse_is_an_error_with_the_numbers_gpu() {
    let heads = HeadGeometry { num_qo_heads: 2, num_kv_heads: 2, head_dim: 64 };
    let shape = CacheShape { heads, page_size: 16 };
    let config = PagedAttentionConfig::new(shape, Bytes::mib(8), 4, 64);
    let mut cache = PipelineCache::default();
    let mut attention = PagedAttention::new(common::device(), &mut cache, config.clone()).expect("a small cache fits");
    let sequence = attention.admit(HiddenCodec::F16, 16).expect("fits");
    let x = [0.5_f32; 128 * 5];
    let rows = |n: usize, q: usize| NewRows { sequence, q: &x[..q], k: &x[..n], v: &x[..n], decode: false };
    let message = |r: Result<_, concertina::engine::EngineError>| r.expect_err("should be refused").to_string();
    assert!(message(attention.step(&[rows(128 * 5, 0)])).contains("5 rows"), "too many rows");
    assert!(message(attention.step(&[rows(100, 0)])).contains("100"), "not a row");
    assert!(message(attention.step(&[rows(128, 100)])).contains("100 query"), "query of another length");
    attention.release(sequence).expect("it exists");
    assert!(message(attention.step(&[rows(128, 128)])).contains("does not exist"), "released");
    assert!(attention.admit(HiddenCodec::F16, 1 << 20).is_err(), "more than the budget");
    let refused = attention.admit("rot4".parse().expect("a codec"), 16).expect_err("no kernels").to_string();
    assert!(refused.contains("f16") && refused.contains("not for rot4"), "{refused}");
    assert_eq!(attention.report().pages_in_use_bytes, Bytes::ZERO, "nothing is held");
    let codecs = vec!["kivi4".parse().expect("a codec")];
    let groups = PagedAttentionConfig { codecs, ..config.clone() };
    let refused = PagedAttention::new(common::device(), &mut cache, groups).expect_err("groups of 32").to_string();
    assert!(refused.contains("16 tokens") && refused.contains("groups of 32"), "{refused}");
    let small = PagedAttentionConfig { budget: Bytes(1000), ..config };
    let refused = PagedAttention::new(common::device(), &mut cache, small).expect_err("too small").to_string();
    assert!(refused.contains("1000 B") && refused.contains("give at least"), "{refused}");
}
