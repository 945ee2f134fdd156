//! Decode over latents with wider keys than values, on synthetic latents, against dense f64 attention.

use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Check;
use crate::compression::hidden::{Codec, HeadParameters, PageContext, Quantizer, Side, Transform};
use crate::device::Device;
use crate::engine::EngineError;
use crate::kernels::abi::{AttentionParams, DecodeItem, MergeItem, MergeParams};
use crate::kernels::latent_decode::{HEAD_TILE, LatentDecodeSpec};
use crate::kernels::run_once::run_once;
use crate::kernels::{PipelineCache, flat_grid, merge_states};
use crate::reference::compare::{Tolerance, nmse};

/// Tokens of the sequences: one token, page edges, and one that is split.
const LENGTHS: [u32; 5] = [1, 63, 64, 65, 700];
const SPLIT: u32 = 512;
const WIDTHS: (u32, u32) = (576, 512);

/// Heads, and how latents are stored. Codes need full pages, so that contexts are then whole pages.
const CASES: [(u32, Quantizer); 4] =
    [(16, Quantizer::F16), (128, Quantizer::F16), (16, Quantizer::Int8), (16, Quantizer::Kivi { bits: 4, group: 32 })];

pub(super) const COUNT: usize = CASES.len();

pub(super) fn run(device: &Device, each: &mut dyn FnMut(Check)) -> Result<(), EngineError> {
    for (num_qo_heads, quantizer) in CASES {
        each(check(device, num_qo_heads, Codec { transform: Transform::None, quantizer })?);
    }
    Ok(())
}

/// Appends the latents of one sequence to the arena, page by page; what attention reads in them. Slots that no token
/// uses stay poison.
fn fill(spec: &LatentDecodeSpec, latents: &[f32], arena: &mut Vec<u32>) -> Vec<f32> {
    let page = spec.page();
    let values = (page.page_size * page.head_dim) as usize;
    let nobody = HeadParameters::default();
    let mut decoded = Vec::new();
    for rows in latents.chunks(values) {
        let mut full = rows.to_vec();
        full.resize(values, f32::NAN);
        let context = PageContext::at(&nobody, 0);
        let words = spec.codec.encode(Side::Key, page, context, &full);
        decoded.extend_from_slice(&spec.codec.decode(Side::Key, page, context, &words)[..rows.len()]);
        arena.extend(words);
    }
    decoded
}

fn check(device: &Device, num_qo_heads: u32, codec: Codec) -> Result<Check, EngineError> {
    let (width_qk, width_vo) = WIDTHS;
    let spec = LatentDecodeSpec { num_qo_heads, width_qk, width_vo, page_size: 64, codec, tier: device.tier() };
    let (wide, narrow) = (width_qk as usize, width_vo as usize);
    let mut rng = ChaCha8Rng::seed_from_u64(u64::from(num_qo_heads));
    let mut random =
        |n: usize| -> Vec<f32> { (0..n).map(|_| f16::from_f32(rng.random_range(-2.0_f32..2.0)).to_f32()).collect() };
    let whole_pages = codec != Codec::default();
    let lengths = LENGTHS.map(|n| if whole_pages { n.next_multiple_of(64) } else { n });
    let (mut arena, mut tables, mut decoded) = (Vec::new(), Vec::new(), Vec::new());
    let (mut decode, mut merge) = (Vec::new(), Vec::new());
    let mut n_states = 0;
    for (row, n) in (0..).zip(lengths) {
        let first_page = u32::try_from(tables.len()).expect("pages are few");
        let latents = random(n as usize * wide);
        decoded.push(fill(&spec, &latents, &mut arena));
        let cells = spec.page_words() / 4;
        tables.extend((first_page..first_page + n.div_ceil(64)).map(|page| page * cells));
        for tile in 0..spec.tiles() {
            let q_row = row * spec.tiles() + tile;
            let state_lo = n_states;
            for start in (0..n).step_by(SPLIT as usize) {
                let n_tokens = (n - start).min(SPLIT);
                let page_lo = first_page + start / 64;
                decode.push(DecodeItem { q_row, n_tokens, page_lo, slot: n_states, ..DecodeItem::default() });
                n_states += HEAD_TILE;
            }
            merge.push(MergeItem { q_row, state_lo, n_states: n.div_ceil(SPLIT), stride: HEAD_TILE });
        }
    }
    let q = random(LENGTHS.len() * num_qo_heads as usize * wide);
    let sm_scale = 1.0 / f64::from(width_qk).sqrt();
    #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is what is wanted")]
    let scale_log2 = (sm_scale * std::f64::consts::LOG2_E) as f32;
    let count = |n: usize| u32::try_from(n).expect("work items are few");
    let (n_decode, n_merge) = (count(decode.len()), count(merge.len()));
    let mut step: Vec<u32> = bytemuck::cast_slice(&decode).to_vec();
    let merge_at = count(step.len() / 4);
    step.extend_from_slice(bytemuck::cast_slice(&merge));
    let poison = |n: usize| vec![0xff_u8; n * 4];
    let (state_o, state_ml) = (poison(n_states as usize * narrow), poison(n_states as usize * 2));
    let q_stride = num_qo_heads * width_qk;
    let params = AttentionParams { items: 0, n_items: n_decode, layer: 0, q_stride, scale_log2, angles: 0 };
    let mut cache = PipelineCache::default();
    let step = bytemuck::cast_slice(&step);
    let operands: [&[u8]; 7] = [
        step,
        bytemuck::cast_slice(&tables),
        bytemuck::cast_slice(&arena),
        bytemuck::cast_slice(&q),
        &state_o,
        &state_ml,
        &[0; 16],
    ];
    let states = run_once(device, &mut cache, &spec.kernel(), &operands, &params, flat_grid(n_decode))?;
    let rows = LENGTHS.len() * num_qo_heads as usize;
    let (o, lse) = (poison(rows * narrow), poison(rows));
    let params = MergeParams { items: merge_at, n_items: n_merge, o_stride: num_qo_heads * width_vo };
    let operands: [&[u8]; 5] = [step, &states[4], &states[5], &o, &lse];
    let kernel = merge_states::kernel(&spec.merge_shape());
    let merged =
        run_once(device, &mut cache, &kernel, &operands, &params, merge_states::grid(&spec.merge_shape(), n_merge))?;
    let got: Vec<f32> = bytemuck::pod_collect_to_vec(&merged[3]);

    let mut worst = 0.0_f64;
    let mut all = Vec::new();
    for (r, query) in q.chunks_exact(wide).enumerate() {
        let keys = &decoded[r / num_qo_heads as usize];
        let n = keys.len() / wide;
        let (o, absolute) = attend(query, keys, narrow, sm_scale);
        let tolerance = Tolerance::attention(n, width_qk, 4.0 / 3.0);
        worst = worst.max(tolerance.worst(&got[r * narrow..(r + 1) * narrow], &o, &absolute));
        all.extend(o);
    }
    let lengths: Vec<_> = lengths.iter().map(ToString::to_string).collect();
    let case = format!("{codec}, {num_qo_heads} heads on one latent of 576/512, contexts {}", lengths.join("/"));
    Ok(Check {
        kernel: "latent decode",
        case,
        compared: all.len(),
        error_over_bound: worst,
        nmse: Some(nmse(&got, &all)),
    })
}

/// One query against keys whose first `narrow` channels are the values; the output, and the sum of p times |value|.
fn attend(query: &[f32], keys: &[f32], narrow: usize, sm_scale: f64) -> (Vec<f64>, Vec<f64>) {
    let product = |key: &[f32]| key.iter().zip(query).map(|(k, q)| f64::from(*k) * f64::from(*q)).sum::<f64>();
    let scores: Vec<f64> = keys.chunks_exact(query.len()).map(|key| product(key) * sm_scale).collect();
    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scores.iter().map(|s| (s - top).exp()).sum();
    let (mut o, mut absolute) = (vec![0.0; narrow], vec![0.0; narrow]);
    for (key, score) in keys.chunks_exact(query.len()).zip(&scores) {
        let p = (score - top).exp() / total;
        for (channel, v) in key[..narrow].iter().enumerate() {
            o[channel] += p * f64::from(*v);
            absolute[channel] += p * f64::from(*v).abs();
        }
    }
    (o, absolute)
}
