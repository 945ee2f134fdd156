//! Compressed caches through the library, without a model: what codecs save, and what they cost.
//!
//! Four sequences hold the same keys and values in one pool, one as they are and three sealed in codecs; one decode
//! step attends to all of them in one batch. The answer over a sealed cache differs from that over the full one by the
//! policy error of its codec. From dense attention in f64 over what its pages decode to it differs by the kernel error,
//! which has to be tiny.
//!
//! ```text
//! cargo run --example compressed_cache
//! ```

use concertina::compression::hidden::{HeadParameters, HiddenCodec, PageContext};
use concertina::device::{AdapterRequest, Device};
use concertina::engine::paged_attention::{NewRows, PagedAttention, PagedAttentionConfig};
use concertina::geometry::{Bytes, HeadGeometry};
use concertina::kernels::PipelineCache;
use concertina::kernels::attention::CacheShape;
use concertina::reference::attention::{Context, attend};
use concertina::reference::compare::{nmse, widen};

const HEADS: HeadGeometry = HeadGeometry { num_qo_heads: 9, num_kv_heads: 3, head_dim: 64 };
const SHAPE: CacheShape = CacheShape { heads: HEADS, page_size: 64 };
/// Tokens of each sequence: nine full pages and a part of one.
const N_TOKENS: usize = 9 * 64 + 25;

/// Numbers that look random and that any machine makes the same, exact in f16.
fn numbers(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        f32::from(u8::try_from(state >> 56).expect("8 bits")) / 128.0 - 1.0
    };
    // Sums of uniform numbers are bell-shaped, as activations are.
    (0..n).map(|_| (next() + next() + next()) / 2.0).collect()
}

/// What attention reads of one side after full pages were sealed: `[tokens][num_kv_heads][head_dim]`.
fn decoded(codec: HiddenCodec, k: &[f32], v: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (page, width, row) = (SHAPE.page(), HEADS.head_dim as usize, HEADS.kv_width() as usize);
    let (mut k_read, mut v_read) = (k.to_vec(), v.to_vec());
    let parameters = HeadParameters::default();
    let tokens_of_page = page.page_size as usize;
    for first in (0..N_TOKENS / tokens_of_page).map(|index| index * tokens_of_page) {
        for head in 0..HEADS.num_kv_heads as usize {
            let channels = |t: usize| (first + t) * row + head * width..(first + t) * row + (head + 1) * width;
            let gather =
                |from: &[f32]| (0..tokens_of_page).flat_map(|t| from[channels(t)].to_vec()).collect::<Vec<_>>();
            let first_position = u32::try_from(first).expect("few tokens");
            let context = PageContext::at(&parameters, first_position);
            let words = codec.encode(page, context, &gather(k), &gather(v));
            let (k_page, v_page) = codec.decode(page, context, &words);
            for t in 0..tokens_of_page {
                k_read[channels(t)].copy_from_slice(&k_page[t * width..(t + 1) * width]);
                v_read[channels(t)].copy_from_slice(&v_page[t * width..(t + 1) * width]);
            }
        }
    }
    (k_read, v_read)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = Device::open(&AdapterRequest::default())?;
    println!("{} ({}), {} tier", device.summary().name, device.summary().backend, device.tier());

    let (q_width, kv_width) = (HEADS.q_width() as usize, HEADS.kv_width() as usize);
    let (mut k, v) = (numbers(1, N_TOKENS * kv_width), numbers(2, N_TOKENS * kv_width));
    // A few channels of keys are much larger than the others, as in models: kivi scales them apart, rot spreads them.
    k.iter_mut().enumerate().filter(|(i, _)| [3, 40].contains(&(i % 64))).for_each(|(_, k)| *k *= 8.0);
    let q = numbers(3, q_width);

    let codecs: Vec<HiddenCodec> = ["f16", "int8", "kivi4", "rot3"].map(|text| text.parse().expect("a codec")).into();
    let sealing = codecs.iter().copied().filter(HiddenCodec::seals).collect();
    let config =
        PagedAttentionConfig { codecs: sealing, ..PagedAttentionConfig::new(SHAPE, Bytes::mib(16), 1024, 1024) };
    let mut attention = PagedAttention::new(&device, &mut PipelineCache::default(), config)?;

    // All but the last token are appended, without attending; full pages are sealed on the way.
    let cached = (N_TOKENS - 1) * kv_width;
    let mut sequences = Vec::new();
    for codec in &codecs {
        let before = attention.report().pages_in_use_bytes;
        let id = attention.admit(*codec, u32::try_from(N_TOKENS)?)?;
        attention.step(&[NewRows { sequence: id, q: &[], k: &k[..cached], v: &v[..cached], decode: false }])?;
        sequences.push((id, attention.report().pages_in_use_bytes.saturating_sub(before)));
    }

    // One decode step over all four: the same token and the same question to each.
    let row = |(id, _): &_| NewRows { sequence: *id, q: &q, k: &k[cached..], v: &v[cached..], decode: true };
    let out = attention.step(&sequences.iter().map(row).collect::<Vec<_>>())?;
    let answers: Vec<&[f32]> = out.o.chunks_exact(q_width).collect();

    println!("{N_TOKENS} tokens, {} KV heads of {} channels", HEADS.num_kv_heads, HEADS.head_dim);
    println!("codec   bits   bytes held   policy NMSE   kernel NMSE");
    for ((codec, (_, held)), answer) in codecs.iter().zip(&sequences).zip(&answers) {
        let (k, v) = decoded(*codec, &k, &v);
        let expected = attend(&Context { heads: HEADS, k: &k, v: &v }, &q, N_TOKENS);
        let (policy, kernel) = (nmse(answer, &widen(answers[0])), nmse(answer, &expected.o));
        let bits = codec.effective_bits(SHAPE.page());
        println!("{codec:5} {bits:6.2} {held:>12} {policy:>13.1e} {kernel:>13.1e}");
        if kernel > 1e-10 {
            return Err(format!("{codec}: the kernels are off: NMSE {kernel:e}").into());
        }
    }
    Ok(())
}
