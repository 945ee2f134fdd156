//! Codecs at their edges: sealing of pages that real caches rarely hold, and reading of every code.

use std::collections::BTreeSet;

use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::attention::{Words, parameters};
use super::{Check, Extent};
use crate::compression::hidden::{self, Codec, HiddenCodec, PageContext, Quantizer, Transform, fp8};
use crate::device::Device;
use crate::engine::EngineError;
use crate::engine::paged_attention::{NewRows, PagedAttention, PagedAttentionConfig};
use crate::geometry::{Bytes, HeadGeometry};
use crate::kernels::PipelineCache;
use crate::kernels::attention::CacheShape;
use crate::kernels::registry::HEAD_DIMS;

/// Kinds of pages.
const KINDS: [&str; 10] = [
    "random",
    "constant",
    "zero",
    "signed zeros",
    "subnormal",
    "huge",
    "outlier channel",
    "outlier token",
    "NaN",
    "infinity",
];
/// Pages of 128 tokens hold the groups of every codec.
const PAGE_SIZE: u32 = 128;

fn head_dims(extent: Extent) -> &'static [u32] {
    if extent == Extent::Full { &HEAD_DIMS } else { &[64] }
}

pub(super) fn count(extent: Extent) -> usize {
    head_dims(extent).len() * hidden::examples().filter(HiddenCodec::seals).count() + value_codecs().len()
}

pub(super) fn run(device: &Device, extent: Extent, each: &mut dyn FnMut(Check)) -> Result<(), EngineError> {
    for head_dim in head_dims(extent) {
        for codec in hidden::examples().filter(HiddenCodec::seals) {
            each(kinds(device, codec, *head_dim)?);
        }
    }
    for codec in value_codecs() {
        each(every_code(device, codec)?);
    }
    Ok(())
}

/// A number of a page of some kind, exact in f16.
fn number(kind: &str, rng: &mut ChaCha8Rng, token: u32, channel: u32) -> f32 {
    let x = rng.random_range(-2.0_f32..2.0);
    let x = match kind {
        "constant" => 1.375,
        "zero" => 0.0,
        "signed zeros" => 0.0_f32.copysign(x),
        "subnormal" => {
            f16::from_bits(u16::try_from(rng.random_range(0..0x400)).expect("a subnormal")).to_f32().copysign(x)
        }
        "huge" => f16::MAX.to_f32() * x / 2.0,
        "outlier channel" if channel == 5 => 100.0 + x,
        "outlier token" if token == 7 => 300.0 * x,
        "NaN" if (token, channel) == (9, 3) => f32::NAN,
        "infinity" if (token, channel) == (17, 6) => f32::NEG_INFINITY,
        _ => x,
    };
    f16::from_f32(x).to_f32()
}

/// One page of every kind, sealed, against the definition.
fn kinds(device: &Device, codec: HiddenCodec, head_dim: u32) -> Result<Check, EngineError> {
    let mut rng = ChaCha8Rng::seed_from_u64(u64::from(head_dim));
    let heads = HeadGeometry { num_qo_heads: 1, num_kv_heads: 1, head_dim };
    let shape = CacheShape { heads, page_size: PAGE_SIZE };
    let page = shape.page();
    let parameters = parameters(&mut rng, &shape);
    let tokens = PAGE_SIZE * u32::try_from(KINDS.len()).expect("a few kinds");
    let config = PagedAttentionConfig {
        codecs: vec![codec],
        parameters: parameters.clone(),
        context_length: tokens,
        ..PagedAttentionConfig::new(shape, Bytes::mib(32), PAGE_SIZE, 1)
    };
    let mut attention = PagedAttention::new(device, &mut PipelineCache::default(), config)?;
    attention.poison()?;
    let sequence = attention.admit(codec, tokens)?;
    let mut expected = Vec::new();
    for (index, kind) in (0..).zip(KINDS) {
        let mut side = || -> Vec<f32> {
            let places = (0..PAGE_SIZE).flat_map(|t| (0..head_dim).map(move |c| (t, c)));
            places.map(|(t, c)| number(kind, &mut rng, t, c)).collect()
        };
        let (k, v) = (side(), side());
        attention.step(&[NewRows { sequence, q: &[], k: &k, v: &v, decode: false }])?;
        let context = PageContext::at(&parameters[0], index * PAGE_SIZE);
        expected.push(codec.encode(page, context, &k, &v));
    }
    let mut words = Words::default();
    let sealed = attention.pages(sequence, 0)?.sealed;
    assert_eq!(sealed.len(), expected.len(), "every page should be sealed");
    sealed.iter().zip(&expected).for_each(|(got, expected)| words.compare(got, expected));
    Ok(words.check("seal", format!("{codec}, head_dim {head_dim}, {} kinds of pages", KINDS.len())))
}

/// Codecs of values, beside keys in f32 that pick one token.
fn value_codecs() -> Vec<HiddenCodec> {
    let k = Codec { transform: Transform::None, quantizer: Quantizer::F32 };
    let mut sides: Vec<Codec> = hidden::examples().map(|codec| codec.v).collect();
    sides.sort_unstable();
    sides.dedup();
    sides.into_iter().map(|v| HiddenCodec { k, v, paired: false }).collect()
}

/// Keys are one-hot, so that row `t` attends to token `t` alone and its output is the decoded value of that token. The
/// values walk through every code.
fn every_code(device: &Device, codec: HiddenCodec) -> Result<Check, EngineError> {
    let head_dim = PAGE_SIZE;
    let heads = HeadGeometry { num_qo_heads: 1, num_kv_heads: 1, head_dim };
    let shape = CacheShape { heads, page_size: PAGE_SIZE };
    let page = shape.page();
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let parameters = parameters(&mut rng, &shape);
    let width = head_dim as usize;
    let n = width * width;
    // Against its own token the score is 100^2 / sqrt(128), far beyond what a difference of f32 exponents can show.
    let one_hot: Vec<f32> = (0..n).map(|i| if i / width == i % width { 100.0 } else { 0.0 }).collect();
    let value = |i: usize| -> f32 {
        let (token, channel) = (i / width, i % width);
        match codec.v.quantizer {
            Quantizer::Fp8 => {
                let code = u32::try_from(i % 256).expect("a byte");
                // Codes of NaN are left to the pages of kinds.
                if code & 0x7f == 0x7f { 0.0 } else { fp8::value(code) }
            }
            // Every group has the ends of the range, so that a number is its own code at 8 bits.
            _ => match channel % 32 {
                0 => 0.0,
                1 => 255.0,
                _ => ((token * 64 + channel * 5) % 256) as f32,
            },
        }
    };
    let values: Vec<f32> = (0..n).map(value).collect();
    let config = PagedAttentionConfig {
        codecs: vec![codec],
        parameters: parameters.clone(),
        context_length: 2 * PAGE_SIZE,
        ..PagedAttentionConfig::new(shape, Bytes::mib(32), PAGE_SIZE, 4 * PAGE_SIZE)
    };
    let mut attention = PagedAttention::new(device, &mut PipelineCache::default(), config)?;
    attention.poison()?;
    let sequence = attention.admit(codec, 2 * PAGE_SIZE)?;
    attention.step(&[NewRows { sequence, q: &[], k: &one_hot, v: &values, decode: false }])?;
    // The rows' own keys are zero: their scores are nothing beside that of the picked token.
    let zeros = vec![0.0; n];
    let out = attention.step(&[NewRows { sequence, q: &one_hot, k: &zeros, v: &zeros, decode: false }])?;
    let context = PageContext::at(&parameters[0], 0);
    let words = codec.encode(page, context, &one_hot, &values);
    let (_, decoded) = codec.decode(page, context, &words);
    if codec.v.transform == Transform::None {
        let codes: BTreeSet<u32> = decoded.iter().map(|x| x.to_bits()).collect();
        let expected = match codec.v.quantizer {
            Quantizer::Kivi { bits, .. } => 1 << bits,
            Quantizer::Fp8 => 253,
            _ => 200,
        };
        assert!(codes.len() >= expected, "{codec}: only {} values appear", codes.len());
    }
    // Rounding of the products and of what a rotation or a basis adds up, relative to the row's largest value.
    let bound = |row: &[f32]| f64::from(row.iter().fold(0.0_f32, |top, x| top.max(x.abs()))) * 1e-5;
    let mut worst = 0.0_f64;
    for (got, expected) in out.o.chunks_exact(width).zip(decoded.chunks_exact(width)) {
        for (a, b) in got.iter().zip(expected) {
            let error = (f64::from(*a) - f64::from(*b)).abs() / bound(expected);
            worst = if error.is_nan() { f64::INFINITY } else { worst.max(error) };
        }
    }
    let case = format!("{}, values of every code", codec.v);
    Ok(Check { kernel: "decode codes", case, compared: n, error_over_bound: worst, nmse: None })
}
