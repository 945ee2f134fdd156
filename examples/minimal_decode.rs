//! Attention over a paged cache through the library, without a model.
//!
//! Three sequences share one pool, one of them with pages in a codec of 4 bits; one decode step attends to all of them
//! at once, and the result is compared with dense attention in f64 over what was appended.
//!
//! ```text
//! cargo run --example minimal_decode
//! ```

use concertina::compression::hidden::HiddenCodec;
use concertina::device::{AdapterRequest, Device};
use concertina::engine::paged_attention::{NewRows, PagedAttention, PagedAttentionConfig, SequenceId};
use concertina::geometry::{Bytes, HeadGeometry};
use concertina::kernels::PipelineCache;
use concertina::kernels::attention::CacheShape;
use concertina::reference::attention::{Context, attend};
use concertina::reference::compare::nmse;

/// Numbers that any machine makes the same, exact in f16.
fn numbers(seed: usize, n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 31 + seed * 17) % 127) as f32 / 64.0 - 1.0).collect()
}

struct Sequence {
    id: SequenceId,
    codec: HiddenCodec,
    /// Bytes of its pages.
    held: Bytes,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = Device::open(&AdapterRequest::default())?;
    println!("{} ({}), {} tier", device.summary().name, device.summary().backend, device.tier());

    // Nine query heads on three KV heads, pages of 64 tokens per KV head.
    let heads = HeadGeometry { num_qo_heads: 9, num_kv_heads: 3, head_dim: 64 };
    let shape = CacheShape { heads, page_size: 64 };
    let kivi4: HiddenCodec = "kivi4".parse()?;
    let config =
        PagedAttentionConfig { codecs: vec![kivi4], ..PagedAttentionConfig::new(shape, Bytes::mib(16), 1024, 1024) };
    let mut attention = PagedAttention::new(&device, &mut PipelineCache::default(), config)?;

    let (q_width, kv_width) = (heads.q_width() as usize, heads.kv_width() as usize);
    let mut sequences = Vec::new();
    for (seed, codec, n_tokens) in [(1, HiddenCodec::F16, 700_u32), (1, kivi4, 700), (2, HiddenCodec::F16, 33)] {
        let n = n_tokens as usize;
        let before = attention.report().pages_in_use_bytes;
        let id = attention.admit(codec, n_tokens)?;
        let (k, v) = (numbers(seed, n * kv_width), numbers(seed + 9, n * kv_width));
        // All but the last token are already cached: appended, without attending. Full pages become codes as they fill.
        let cached = (n - 1) * kv_width;
        attention.step(&[NewRows { sequence: id, q: &[], k: &k[..cached], v: &v[..cached], decode: false }])?;
        let held = attention.report().pages_in_use_bytes - before;
        sequences.push(Sequence { id, codec, held, q: numbers(seed + 5, q_width), k, v });
    }

    // One decode step for all sequences: append the last token, attend to everything.
    let rows: Vec<_> = sequences
        .iter()
        .map(|s| {
            let last = s.k.len() - kv_width;
            NewRows { sequence: s.id, q: &s.q, k: &s.k[last..], v: &s.v[last..], decode: true }
        })
        .collect();
    let out = attention.step(&rows)?;

    for (row, s) in sequences.iter().enumerate() {
        let n_tokens = s.k.len() / kv_width;
        let expected = attend(&Context { heads, k: &s.k, v: &s.v }, &s.q, n_tokens);
        let error = nmse(&out.o[row * q_width..(row + 1) * q_width], &expected.o);
        println!(
            "{n_tokens:>4} tokens of {:<5} in {:>9}: NMSE against dense f64 attention {error:.1e}",
            s.codec, s.held
        );
        // f16 loses nothing of these numbers; codes of 4 bits lose what the codec loses.
        let bound = if s.codec.seals() { 0.05 } else { 1e-10 };
        if error > bound {
            return Err(format!("the result is off: NMSE {error:e}").into());
        }
    }
    let held = attention.report();
    println!("pages in use: {} of a budget of {}", held.pages_in_use_bytes, held.budget_bytes);
    for s in &sequences {
        attention.release(s.id)?;
    }
    println!("after release: {}", attention.report().pages_in_use_bytes);
    Ok(())
}
