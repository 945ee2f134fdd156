//! Append, decode, prefill and merge against dense f64 attention, over ragged batches of awkward lengths.

use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::{Check, Extent};
use crate::compression::hidden::f16 as codec;
use crate::device::Device;
use crate::engine::EngineError;
use crate::engine::paged_attention::{NewRows, PagedAttention, PagedAttentionConfig, SequenceId};
use crate::geometry::Bytes;
use crate::kernels::PipelineCache;
use crate::kernels::attention::CacheShape;
use crate::kernels::registry::{DEFAULT_PAGE_SIZE, GROUP_SIZES, HEAD_DIMS, cache_shapes};
use crate::reference::attention::{Context, Row, attend};
use crate::reference::compare::{Tolerance, nmse};

/// Rows of the prefill check.
const PREFILL_ROWS: u32 = 33;

fn shapes(extent: Extent) -> Vec<CacheShape> {
    let all = cache_shapes(&[DEFAULT_PAGE_SIZE]);
    match extent {
        Extent::Full => all,
        Extent::Quick => all
            .into_iter()
            .filter(|s| {
                (s.heads.head_dim, s.heads.group_size()) == (64, 3)
                    || (s.heads.head_dim, s.heads.group_size()) == (128, 4)
            })
            .collect(),
    }
}

/// Context lengths of the ragged batch: page edges, and one long sequence that is split.
pub fn lengths(page_size: u32, extent: Extent) -> Vec<u32> {
    let long = if extent == Extent::Full { 4097 } else { 700 };
    vec![1, page_size - 1, page_size, page_size + 1, long, 97]
}

pub(super) fn count(extent: Extent) -> usize {
    match extent {
        Extent::Full => 3 * HEAD_DIMS.len() * GROUP_SIZES.len(),
        Extent::Quick => 3 * 2,
    }
}

pub(super) fn run(device: &Device, extent: Extent, each: &mut dyn FnMut(Check)) -> Result<(), EngineError> {
    let mut cache = PipelineCache::default();
    for shape in shapes(extent) {
        for check in check_shape(device, &mut cache, shape, &lengths(shape.page_size, extent), None)? {
            each(check);
        }
    }
    Ok(())
}

/// One sequence with its real keys and values, rounded as the cache rounds them.
struct Sequence {
    id: SequenceId,
    k: Vec<f32>,
    v: Vec<f32>,
}

fn random(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-2.0_f32..2.0)).collect()
}

/// Checks append, decode and prefill of one shape over one ragged batch; `max_arena` forces several arenas.
///
/// # Errors
/// [`EngineError`] when the device refuses.
pub fn check_shape(
    device: &Device,
    cache: &mut PipelineCache,
    shape: CacheShape,
    lengths: &[u32],
    max_arena: Option<Bytes>,
) -> Result<[Check; 3], EngineError> {
    let heads = shape.heads;
    let mut rng = ChaCha8Rng::seed_from_u64(u64::from(heads.head_dim * 64 + heads.num_qo_heads));
    // Each sequence then grows by one decode row and by the prefill rows.
    let extra = 1 + PREFILL_ROWS;
    let tokens: u32 = lengths.iter().map(|n| (n + extra).next_multiple_of(shape.page_size)).sum();
    let page_bytes = shape.codec.token_bytes(heads.head_dim).0 * u64::from(heads.num_kv_heads);
    let max_rows = 256.max(PREFILL_ROWS * u32::try_from(lengths.len()).expect("a few sequences"));
    let max_states = max_rows * heads.num_qo_heads * 3 + 64 * heads.num_qo_heads;
    let scratch = u64::from(max_states + max_rows * 2) * u64::from(heads.head_dim + 2) * 8;
    let config = PagedAttentionConfig {
        shape,
        budget: Bytes(u64::from(tokens) * page_bytes * 2 + scratch * 2) + Bytes::mib(24),
        max_rows,
        max_states,
        max_arena,
    };
    let mut attention = PagedAttention::new(device, cache, config)?;
    attention.poison()?;
    let kv_width = heads.kv_width() as usize;
    let mut sequences = Vec::new();
    for n in lengths {
        let id = attention.admit(n + extra)?;
        let mut sequence = Sequence { id, k: Vec::new(), v: Vec::new() };
        // Leaves the last token of the context to the decode row.
        let mut left = (n - 1) as usize;
        while left > 0 {
            let rows = left.min(256);
            grow(&mut rng, &mut sequence, rows, kv_width);
            let from = sequence.k.len() - rows * kv_width;
            let (k, v) = (&sequence.k[from..], &sequence.v[from..]);
            attention.step(&[NewRows { sequence: id, q: &[], k, v, decode: false }])?;
            left -= rows;
        }
        sequences.push(sequence);
    }
    let decode = check_rows(&mut attention, &mut sequences, &mut rng, shape, 1)?;
    let prefill = check_rows(&mut attention, &mut sequences, &mut rng, shape, PREFILL_ROWS as usize)?;
    Ok([check_append(&attention, &sequences, shape)?, decode, prefill])
}

fn grow(rng: &mut ChaCha8Rng, sequence: &mut Sequence, rows: usize, kv_width: usize) {
    sequence.k.extend(random(rng, rows * kv_width));
    sequence.v.extend(random(rng, rows * kv_width));
}

/// Adds `rows` rows to every sequence in one step and compares their attention.
fn check_rows(
    attention: &mut PagedAttention<'_>,
    sequences: &mut [Sequence],
    rng: &mut ChaCha8Rng,
    shape: CacheShape,
    rows: usize,
) -> Result<Check, EngineError> {
    let heads = shape.heads;
    let (q_width, kv_width) = (heads.q_width() as usize, heads.kv_width() as usize);
    let queries: Vec<_> = sequences.iter().map(|_| random(rng, rows * q_width)).collect();
    for sequence in sequences.iter_mut() {
        grow(rng, sequence, rows, kv_width);
    }
    let new: Vec<_> = sequences
        .iter()
        .zip(&queries)
        .map(|(s, q)| {
            let from = s.k.len() - rows * kv_width;
            NewRows { sequence: s.id, q, k: &s.k[from..], v: &s.v[from..], decode: rows == 1 }
        })
        .collect();
    let out = attention.step(&new)?;
    let mut worst = 0.0_f64;
    let mut squared = (Vec::new(), Vec::new());
    for (i, (sequence, q)) in sequences.iter().zip(&queries).enumerate() {
        let rounded = |x: &[f32]| -> Vec<f32> { x.iter().map(|x| f16::from_f32(*x).to_f32()).collect() };
        let (k, v) = (rounded(&sequence.k), rounded(&sequence.v));
        let context = Context { heads, k: &k, v: &v };
        let before = k.len() / kv_width - rows;
        let expected: Vec<Row> = (0..rows)
            .into_par_iter()
            .map(|r| attend(&context, &q[r * q_width..(r + 1) * q_width], before + r + 1))
            .collect();
        for (r, expected) in expected.iter().enumerate() {
            let row = i * rows + r;
            let got = &out.o[row * q_width..(row + 1) * q_width];
            let tolerance = Tolerance::attention(before + r + 1, heads.head_dim, PRODUCT_RMS);
            worst = worst.max(tolerance.worst(got, &expected.o, &expected.absolute));
            let n = heads.num_qo_heads as usize;
            let ones: Vec<f64> = expected.lse.iter().map(|x| x.abs().max(1.0)).collect();
            worst = worst.max(tolerance.worst(&out.lse[row * n..(row + 1) * n], &expected.lse, &ones));
            squared.0.extend_from_slice(got);
            squared.1.extend_from_slice(&expected.o);
        }
    }
    Ok(Check {
        kernel: if rows == 1 { "decode" } else { "prefill" },
        case: describe(shape, sequences, kv_width),
        compared: squared.0.len(),
        error_over_bound: worst,
        nmse: Some(nmse(&squared.0, &squared.1)),
    })
}

/// Root mean square of the product of two numbers uniform in [-2, 2].
const PRODUCT_RMS: f64 = 4.0 / 3.0;

fn describe(shape: CacheShape, sequences: &[Sequence], kv_width: usize) -> String {
    let lengths: Vec<_> = sequences.iter().map(|s| (s.k.len() / kv_width).to_string()).collect();
    let (d, g) = (shape.heads.head_dim, shape.heads.group_size());
    format!("head_dim {d}, group {g}, page {}, contexts {}", shape.page_size, lengths.join("/"))
}

/// Bits of every page against the CPU codec, and poison in every slot that was never written.
fn check_append(
    attention: &PagedAttention<'_>,
    sequences: &[Sequence],
    shape: CacheShape,
) -> Result<Check, EngineError> {
    let heads = shape.heads;
    let page = shape.page();
    let width = heads.head_dim as usize;
    let mut wrong = 0_usize;
    let mut compared = 0_usize;
    for sequence in sequences {
        for kv_head in 0..heads.num_kv_heads {
            let head = |rows: &[f32]| -> Vec<f32> {
                let at = kv_head as usize * width;
                rows.chunks_exact(heads.kv_width() as usize).flat_map(|r| r[at..at + width].to_vec()).collect()
            };
            let (k, v) = (head(&sequence.k), head(&sequence.v));
            for (index, bytes) in attention.pages(sequence.id, kv_head)?.iter().enumerate() {
                let start = index * page.page_size as usize * width;
                let end = (start + page.page_size as usize * width).min(k.len());
                let mut expected = vec![f16::from_bits(0xffff); bytes.len() / 2];
                codec::encode(page, &k[start..end], &v[start..end], &mut expected);
                let got: Vec<u16> = bytemuck::pod_collect_to_vec(bytes);
                wrong += got.iter().zip(&expected).filter(|(a, b)| **a != b.to_bits()).count();
                compared += got.len();
            }
        }
    }
    let kv_width = heads.kv_width() as usize;
    let case = describe(shape, sequences, kv_width);
    Ok(Check {
        kernel: "append",
        case,
        compared,
        error_over_bound: if wrong == 0 { 0.0 } else { f64::INFINITY },
        nmse: None,
    })
}
