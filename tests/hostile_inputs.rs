//! Numbers that are not: infinities and NaN in one sequence stay in that sequence.

mod common;

use concertina::compression::Compression;
use concertina::compression::hidden::{self, HeadParameters, HiddenCodec};
use concertina::engine::EvictionConfig;
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

/// Evictions rank what they are given: scores that are no numbers decide in their own sequence alone.
#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn poison_that_an_eviction_ranks_stays_in_its_sequence_gpu() {
    let heads = HeadGeometry { num_qo_heads: 6, num_kv_heads: 2, head_dim: 64 };
    let shape = CacheShape { heads, page_size: 16 };
    let config = PagedAttentionConfig {
        codecs: vec!["rot3".parse().expect("a codec")],
        evictions: Some(EvictionConfig { slots: 2, moments: true, ..EvictionConfig::default() }),
        context_length: 128,
        ..PagedAttentionConfig::new(shape, Bytes::mib(16), 128, 4096)
    };
    let mut cache = PipelineCache::default();
    let mut attention = PagedAttention::new(common::device(), &mut cache, config).expect("a small cache fits");
    let clean: Vec<f32> = (0..60 * 384).map(|i| ((i * 37) % 101) as f32 * 0.02 - 1.0).collect();
    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let (q_width, kv_width) = (384, 128);
    // What each of two sequences keeps, and its outputs in the steps after that; the first may be poisoned.
    let mut run = |compression: &Compression, poison: Option<f32>| {
        attention.poison().expect("the device should be writable");
        let mut admit = || attention.admit_compressed(compression, 50, 96).expect("fits");
        let (a, b) = (admit(), admit());
        let (k, q) = (clean[..50 * kv_width].to_vec(), clean[..50 * q_width].to_vec());
        let (mut dirty_k, mut dirty_q) = (k.clone(), q.clone());
        if let Some(value) = poison {
            // A key in the middle, in both heads, and a query that ranks.
            (dirty_k[20 * kv_width + 5], dirty_k[20 * kv_width + 69]) = (value, value);
            dirty_q[49 * q_width + 7] = value;
        }
        let rows = |sequence, q, k| NewRows { sequence, q, k, v: k, decode: false };
        attention.step(&[rows(a, &dirty_q, &dirty_k), rows(b, &q, &k)]).expect("the prompts should run");
        let kept = [a, b].map(|sequence| attention.evict(sequence).expect("it should run").expect("it is due"));
        let mut outputs = (Vec::new(), Vec::new());
        for token in 0..40 {
            let next = |sequence| {
                let (q, k) = (&clean[token * q_width..][..q_width], &clean[token * kv_width..][..kv_width]);
                NewRows { sequence, q, k, v: k, decode: true }
            };
            let out = attention.step(&[next(a), next(b)]).expect("the decode rows should run");
            let (own, other) = out.o.split_at(q_width);
            outputs.0.extend(bits(own));
            outputs.1.extend(bits(other));
        }
        [a, b].into_iter().for_each(|sequence| attention.release(sequence).expect("it exists"));
        assert_eq!(attention.report().committed_bytes, Bytes::ZERO, "nothing is promised any more");
        let [of_a, of_b] = kept;
        ((of_a, outputs.0), (of_b, outputs.1))
    };
    let mut changed = 0;
    for policy in [
        "token=snapkv:0.5:window4:kernel3",
        "token=h2o:48:every16,hidden=rot3",
        "token=adakv:0.5:snapkv:window4,hidden=rot3",
        "token=expected:0.5",
        "token=keydiff:0.5",
        "token=knorm:0.5",
    ] {
        let compression = policy.parse().unwrap_or_else(|e| panic!("{policy}: {e}"));
        let (own, expected) = run(&compression, None);
        assert!(own == expected, "{policy}: the same rows give the same");
        assert!(expected.0.iter().all(|kept| !kept.is_empty() && kept.len() < 50), "{policy}: some tokens leave");
        assert!(expected.1.iter().all(|x| f32::from_bits(*x).is_finite()), "{policy}: clean inputs give numbers");
        for value in POISON {
            let (dirty, neighbour) = run(&compression, Some(value));
            assert!(neighbour == expected, "{policy}: {value} reached the other sequence");
            changed += u32::from(dirty != own);
        }
    }
    // A poisoned key may leave, and those that stay may be those that would have stayed.
    println!("{changed} of 36 poisoned sequences said something else");
    assert!(changed >= 12, "what is poisoned should mostly change its own sequence, not only {changed} of 36 times");
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
    assert!(refused.contains("serves f16") && refused.contains("hidden=rot4"), "{refused}");
    let half: Compression = "streaming:0.5".parse().expect("a policy");
    let refused = attention.admit_compressed(&half, 8, 16).expect_err("not made for it").to_string();
    assert!(refused.contains("without evictions"), "{refused}");
    assert_eq!(attention.report().pages_in_use_bytes, Bytes::ZERO, "nothing is held");
    let evictions = Some(EvictionConfig { slots: 1, ..EvictionConfig::default() });
    let evicting = PagedAttentionConfig { evictions, context_length: 64, ..config.clone() };
    let mut attention = PagedAttention::new(common::device(), &mut cache, evicting).expect("a small cache fits");
    let ranked: Compression = "snapkv:0.5:window4".parse().expect("a policy");
    let refused = attention.admit_compressed(&ranked, 4, 16).expect_err("no room for the window").to_string();
    assert!(refused.contains("leaves 2 tokens") && refused.contains("last 4"), "{refused}");
    // A document that is said to be longer than the sequence, or to have no tokens, is no error.
    let first = attention.admit_compressed(&ranked, 40, 16).expect("16 tokens fit");
    let refused = attention.admit_compressed(&ranked, 8, 16).expect_err("one slot").to_string();
    assert!(refused.contains("all 1 slots"), "{refused}");
    assert_eq!(attention.evict(first).expect("nothing to do"), None, "nothing is due yet");
    attention.release(first).expect("it exists");
    let empty = attention.admit_compressed(&half, 0, 16).expect("fits");
    let row = NewRows { sequence: empty, q: &x[..128], k: &x[..128], v: &x[..128], decode: false };
    let outputs = [0, 1].map(|_| attention.step(&[row]).expect("a row"));
    assert!(outputs.iter().all(|out| out.o.iter().all(|x| (x - 0.5).abs() < 1e-3)), "both tokens are read");
    attention.release(empty).expect("it exists");
    assert_eq!(attention.report().committed_bytes, Bytes::ZERO, "nothing is promised");
    let codecs = vec!["kivi4".parse().expect("a codec")];
    let groups = PagedAttentionConfig { codecs, ..config.clone() };
    let refused = PagedAttention::new(common::device(), &mut cache, groups).expect_err("groups of 32").to_string();
    assert!(refused.contains("16 tokens") && refused.contains("groups of 32"), "{refused}");
    let small = PagedAttentionConfig { budget: Bytes(1000), ..config };
    let refused = PagedAttention::new(common::device(), &mut cache, small).expect_err("too small").to_string();
    assert!(refused.contains("1000 B") && refused.contains("give at least"), "{refused}");
}
