//! The transformer's operators and the sampler against plain f64 loops.

use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Check;
use crate::compression::hidden::{HiddenCodec, Side, SideShape, float16};
use crate::device::Device;
use crate::engine::EngineError;
use crate::engine::paged_attention::{NewRows, PagedAttention, PagedAttentionConfig};
use crate::geometry::{Bytes, HeadGeometry};
use crate::kernels::abi::{
    EmbedParams, GatedActivationParams, MatmulParams, MergeItem, MergeParams, RmsNormParams, RopeParams, SampleParams,
};
use crate::kernels::attention::CacheShape;
use crate::kernels::matmul::{self, Output};
use crate::kernels::run_once::run_once;
use crate::kernels::sample::Sampling;
use crate::kernels::{KernelSpec, PipelineCache, elementwise, flat_grid, merge_states, sample};
use crate::reference::compare::Tolerance;
use crate::reference::sampling::distribution;
use crate::weights::Matrix;

/// Rows of the products: one, a few, exactly a tile, and past it.
const PRODUCT_ROWS: [u32; 4] = [1, 5, 64, 130];
/// Draws from each sampling setting.
const DRAWS: u32 = 4096;

const ROW_WISE: usize = 4;
pub(super) const COUNT: usize = ROW_WISE + PRODUCT_ROWS.len() * 4 + SAMPLING.len() + 2;

const SAMPLING: [(&str, Sampling); 5] = [
    ("greedy", Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 1 }),
    ("temperature 1", Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 2 }),
    ("temperature 0.7, top-k 5", Sampling { temperature: 0.7, top_k: 5, top_p: 1.0, seed: 3 }),
    ("temperature 1.3, top-p 0.8", Sampling { temperature: 1.3, top_k: 0, top_p: 0.8, seed: 4 }),
    ("temperature 1, top-k 20, top-p 0.9", Sampling { temperature: 1.0, top_k: 20, top_p: 0.9, seed: 5 }),
];

pub(super) fn run(device: &Device, each: &mut dyn FnMut(Check)) -> Result<(), EngineError> {
    let mut bench = Bench { device, cache: PipelineCache::default(), rng: ChaCha8Rng::seed_from_u64(7) };
    each(embed(&mut bench)?);
    each(rms_norm(&mut bench)?);
    each(rope(&mut bench)?);
    each(gated_activation(&mut bench)?);
    for rows in PRODUCT_ROWS {
        for output in [Output::Replace, Output::Accumulate] {
            each(product(&mut bench, matmul::matmul(output), output, rows, matmul::TILE_ROWS)?);
            let per_group = if rows == 1 { 1 } else { 4 };
            each(product(&mut bench, matmul::matvec(output, per_group), output, rows, per_group)?);
        }
    }
    for (name, sampling) in SAMPLING {
        each(draws(&mut bench, name, sampling)?);
    }
    each(merge(&mut bench)?);
    each(rounding(&mut bench)?);
    Ok(())
}

/// Runs single kernels over buffers made for them.
struct Bench<'d> {
    device: &'d Device,
    cache: PipelineCache,
    rng: ChaCha8Rng,
}

impl Bench<'_> {
    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.rng.random_range(-2.0_f32..2.0)).collect()
    }

    /// Dispatches once over `inputs` in binding order; the contents of every binding afterwards.
    fn run_all<I: bytemuck::Pod>(
        &mut self,
        spec: &KernelSpec,
        inputs: &[&[u8]],
        params: &I,
        grid: [u32; 3],
    ) -> Result<Vec<Vec<u8>>, EngineError> {
        Ok(run_once(self.device, &mut self.cache, spec, inputs, params, grid)?)
    }

    /// The same; the contents of the last binding, which is the result of most kernels.
    fn run<I: bytemuck::Pod>(
        &mut self,
        spec: &KernelSpec,
        inputs: &[&[u8]],
        params: &I,
        grid: [u32; 3],
    ) -> Result<Vec<u8>, EngineError> {
        Ok(self.run_all(spec, inputs, params, grid)?.pop().unwrap_or_default())
    }
}

fn bytes<T: bytemuck::Pod>(values: &[T]) -> &[u8] {
    bytemuck::cast_slice(values)
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytemuck::pod_collect_to_vec(bytes)
}

/// A result that no kernel has written.
fn poison(n: usize) -> Vec<f32> {
    vec![f32::NAN; n]
}

fn random_matrix(bench: &mut Bench<'_>, rows: u32, cols: u32) -> (Matrix, Vec<f16>) {
    let values = bench.values((rows * cols) as usize);
    let matrix = Matrix::new(rows, cols, values.into_iter().map(f16::from_f32).collect());
    let mut packed = Vec::new();
    matmul::pack(&matrix, &mut packed);
    (matrix, packed)
}

fn check(kernel: &'static str, case: String, got: &[f32], want: &[f64], scale: &[f64], tolerance: Tolerance) -> Check {
    Check { kernel, case, compared: got.len(), error_over_bound: tolerance.worst(got, want, scale), nmse: None }
}

fn embed(bench: &mut Bench<'_>) -> Result<Check, EngineError> {
    let (vocab, hidden, tokens) = (50_u32, 72_u32, [3_u32, 49, 0, 3, 17]);
    let (matrix, packed) = random_matrix(bench, vocab, hidden);
    let n = tokens.len() * hidden as usize;
    let params = EmbedParams { tokens: 0, n_rows: 5, cells: hidden / 8, vocab };
    let unwritten = poison(n);
    let inputs = [bytes(&tokens), bytes(&packed), bytes(&unwritten)];
    let got = floats(&bench.run(&elementwise::embed(), &inputs, &params, flat_grid(5))?);
    let want: Vec<f64> = tokens.iter().flat_map(|t| matrix.row(*t).iter().map(|v| v.to_f64())).collect();
    // A copy of f16 values is exact.
    let case = format!("{} rows of {hidden}", tokens.len());
    Ok(check("embed", case, &got, &want, &vec![0.0; n], Tolerance::dot(1)))
}

fn rms_norm(bench: &mut Bench<'_>) -> Result<Check, EngineError> {
    let (rows, width, eps) = (7_usize, 584_usize, 1e-5_f32);
    let x = bench.values(rows * width);
    let weight = bench.values(width);
    let list = [6_u32, 0, 3];
    let params = RmsNormParams { rows: 0, identity: 0, n_rows: 3, width: 584, eps };
    let unwritten = poison(3 * width);
    let inputs = [bytes(&list), bytes(&x), bytes(&weight), bytes(&unwritten)];
    let spec = elementwise::rms_norm(bench.device.tier());
    let got = floats(&bench.run(&spec, &inputs, &params, flat_grid(3))?);
    let mut want = Vec::new();
    for row in list {
        let row = &x[row as usize * width..(row as usize + 1) * width];
        let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / width as f64;
        let scale = 1.0 / (mean + f64::from(eps)).sqrt();
        want.extend(row.iter().zip(&weight).map(|(v, w)| f64::from(*v) * scale * f64::from(*w)));
    }
    let scale: Vec<f64> = want.iter().map(|v| v.abs()).collect();
    Ok(check("rms_norm", format!("3 of {rows} rows of {width}"), &got, &want, &scale, Tolerance::dot(width)))
}

fn rope(bench: &mut Bench<'_>) -> Result<Check, EngineError> {
    let (rows, heads, dim, stride) = (3_usize, 5_usize, 16_usize, 104_usize);
    let x = bench.values(rows * stride);
    let angles: Vec<f64> = (0..rows * dim / 2).map(|i| i as f64 * 0.37).collect();
    #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is what is wanted")]
    let table: Vec<f32> = angles.iter().flat_map(|a| [a.cos() as f32, a.sin() as f32]).collect();
    let params = RopeParams { angles: 0, n_rows: 3, stride: 104, n_heads: 5, half_dim: 8 };
    let got = floats(&bench.run(&elementwise::rope(), &[bytes(&table), bytes(&x)], &params, flat_grid(3))?);
    let mut want: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
    let mut scale = vec![0.0; want.len()];
    for row in 0..rows {
        for i in 0..heads * dim / 2 {
            let angle = angles[row * dim / 2 + i % (dim / 2)];
            let at = row * stride + 2 * i;
            let (a, b) = (want[at], want[at + 1]);
            want[at] = a * angle.cos() - b * angle.sin();
            want[at + 1] = a * angle.sin() + b * angle.cos();
            scale[at..at + 2].fill(a.abs() + b.abs());
        }
    }
    // Values after the rotated heads have scale zero: they must not move at all.
    let case = format!("{rows} rows, {heads} of {} heads of {dim}", stride / dim);
    Ok(check("rope", case, &got, &want, &scale, Tolerance::dot(2)))
}

fn gated_activation(bench: &mut Bench<'_>) -> Result<Check, EngineError> {
    let (rows, width) = (3_usize, 136_usize);
    let mut gate_up = bench.values(rows * width * 2);
    // Both tails of the sigmoid.
    gate_up[0] = 80.0;
    gate_up[1] = -80.0;
    let params = GatedActivationParams { n_rows: 3, width: 136 };
    let unwritten = poison(rows * width);
    let inputs = [bytes(&gate_up), bytes(&unwritten)];
    let got = floats(&bench.run(&elementwise::gated_activation(), &inputs, &params, flat_grid(3))?);
    let mut want = Vec::new();
    for row in gate_up.chunks_exact(2 * width) {
        let (gate, up) = row.split_at(width);
        want.extend(gate.iter().zip(up).map(|(g, u)| {
            let g = f64::from(*g);
            g / (1.0 + (-g).exp()) * f64::from(*u)
        }));
    }
    let scale: Vec<f64> = want.iter().map(|v| v.abs()).collect();
    // exp carries up to 3 + 2|x| ULP (WGSL, accuracy of built-in functions); at |x| <= 80 that is what 500 roundings give.
    Ok(check("gated_activation", format!("{rows} rows of {width}"), &got, &want, &scale, Tolerance::dot(500)))
}

fn product(
    bench: &mut Bench<'_>,
    spec: KernelSpec,
    output: Output,
    n_rows: u32,
    tile_rows: u32,
) -> Result<Check, EngineError> {
    // 200 outputs leave a ragged tile; x and y begin at different rows.
    let (cols, k, x_row, y_row) = (200_u32, 264_u32, 2_u32, 1_u32);
    let (matrix, packed) = random_matrix(bench, cols, k);
    let x = bench.values(((n_rows + x_row) * k) as usize);
    let size = ((n_rows + y_row + 1) * cols) as usize;
    let before = if output == Output::Accumulate { bench.values(size) } else { poison(size) };
    let params = MatmulParams { x_row, y_row, n_rows, cols, cells: k / 8, first_col: 0 };
    let inputs = [bytes(&x), bytes(&packed), bytes(&before)];
    let got = floats(&bench.run(&spec, &inputs, &params, matmul::grid(&params, tile_rows))?);
    let mut want = Vec::new();
    let mut scale = Vec::new();
    for row in x[(x_row * k) as usize..].chunks_exact(k as usize) {
        for col in 0..cols {
            let start = before[y_row as usize * cols as usize + want.len()];
            let start = if output == Output::Accumulate { f64::from(start) } else { 0.0 };
            let products = row.iter().zip(matrix.row(col)).map(|(x, w)| f64::from(*x) * w.to_f64());
            let (sum, squares) = products.fold((start, start * start), |(s, q), p| (s + p, q + p * p));
            want.push(sum);
            // A sum of independent products rounds in proportion to the root of their squares.
            scale.push(squares.sqrt());
        }
    }
    let first = (y_row * cols) as usize;
    let written = &got[first..first + want.len()];
    let mut result = check(
        spec.name,
        format!("{n_rows} x {k} by {k} x {cols}, {output:?}"),
        written,
        &want,
        &scale,
        Tolerance::dot(k as usize),
    );
    let outside = got[..first].iter().chain(&got[first + want.len()..]);
    let untouched = before[..first].iter().chain(&before[first + want.len()..]);
    if !outside.zip(untouched).all(|(a, b)| a.to_bits() == b.to_bits()) {
        result.error_over_bound = f64::INFINITY;
    }
    Ok(result)
}

/// Every drawn token must be one that the cuts keep, and the frequencies must follow the distribution.
fn draws(bench: &mut Bench<'_>, name: &str, sampling: Sampling) -> Result<Check, EngineError> {
    let vocab = 1000_u32;
    let logits: Vec<f32> = bench.values(vocab as usize).iter().map(|x| x * 3.0).collect();
    let items: Vec<_> = (0..DRAWS).map(|position| sampling.item(0, position)).collect();
    let params = SampleParams { items: 0, n_items: DRAWS, vocab };
    let unwritten = vec![u32::MAX; DRAWS as usize];
    let inputs = [bytes(&items), bytes(&logits), bytes(&unwritten)];
    let spec = sample::kernel(bench.device.tier());
    let tokens: Vec<u32> = bytemuck::pod_collect_to_vec(&bench.run(&spec, &inputs, &params, flat_grid(DRAWS))?);
    let p = distribution(&logits, sampling.temperature, sampling.top_k, sampling.top_p);
    let mut counts = vec![0_u32; vocab as usize];
    let mut outside = 0_u32;
    for token in &tokens {
        match p.get(*token as usize) {
            Some(p) if *p > 0.0 => counts[*token as usize] += 1,
            _ => outside += 1,
        }
    }
    // Chi-squared over tokens expected at least five times, the rest together; its mean is the number of cells - 1 and its
    // variance twice that. Six standard deviations are far beyond chance.
    let (mut chi, mut cells, mut rest) = (0.0, 0.0, (0.0, 0.0));
    for (count, p) in counts.iter().zip(&p) {
        let expected = p * f64::from(DRAWS);
        if expected >= 5.0 {
            chi += (f64::from(*count) - expected).powi(2) / expected;
            cells += 1.0;
        } else {
            rest = (rest.0 + f64::from(*count), rest.1 + expected);
        }
    }
    if rest.1 >= 5.0 {
        chi += (rest.0 - rest.1).powi(2) / rest.1;
        cells += 1.0;
    }
    let freedom = f64::max(cells - 1.0, 0.0);
    let bound = freedom + 6.0 * f64::sqrt(2.0 * freedom);
    let over = if freedom == 0.0 { 0.0 } else { chi / bound };
    let error_over_bound = if outside > 0 { f64::INFINITY } else { over };
    let case = format!("{name}: {DRAWS} draws of {vocab}");
    Ok(Check { kernel: "sample", case, compared: tokens.len(), error_over_bound, nmse: None })
}

/// States of several runs per (row, KV head), some of them empty, and a row that saw nothing at all.
fn merge(bench: &mut Bench<'_>) -> Result<Check, EngineError> {
    let heads = HeadGeometry { num_qo_heads: 6, num_kv_heads: 2, head_dim: 24 };
    let shape = CacheShape { heads, page_size: 16 };
    let (rows, runs, group, dim) = (3_u32, 5_u32, 3_u32, 24_usize);
    let n_states = (rows * 2 * runs * group) as usize;
    let o = bench.values(n_states * dim);
    let mut ml = Vec::new();
    for state in 0..n_states {
        let row = state / (2 * runs * group) as usize;
        // Every fourth state is empty, and so are all of the last row.
        let empty = state % 4 == 1 || row + 1 == rows as usize;
        let (m, l) = (bench.rng.random_range(-40.0_f32..40.0), bench.rng.random_range(0.1_f32..9.0));
        ml.push(if empty { [-1e30, 0.0] } else { [m, l] });
    }
    let o: Vec<f32> = o.iter().zip(0..).map(|(x, i)| if ml[i / dim][1] == 0.0 { 0.0 } else { *x }).collect();
    let item = |q_row| MergeItem { q_row, state_lo: q_row * runs * group, n_states: runs, stride: group };
    let items: Vec<_> = (0..rows * 2).map(item).collect();
    let n = rows as usize * heads.q_width() as usize;
    let params = MergeParams { items: 0, n_items: rows * 2, o_stride: heads.q_width() };
    let (unwritten, no_lse) = (poison(n), poison(rows as usize * 6));
    let spec = merge_states::kernel(&shape);
    let operands = [bytes(&items), bytes(&o), bytes(&ml), bytes(&unwritten), bytes(&no_lse)];
    let results = bench.run_all(&spec, &operands, &params, flat_grid(rows * 2))?;
    let (got, lse) = (floats(&results[3]), floats(&results[4]));
    let (mut want, mut scale, mut want_lse) = (Vec::new(), Vec::new(), Vec::new());
    for head in 0..(rows * 6) as usize {
        let (q_row, g) = (head / group as usize, head % group as usize);
        let states: Vec<usize> = (0..runs as usize).map(|i| (q_row * runs as usize + i) * group as usize + g).collect();
        let weight = |s: &usize| f64::from(ml[*s][0]).exp2();
        let total: f64 = states.iter().map(|s| weight(s) * f64::from(ml[*s][1])).sum();
        want_lse.push(if total > 0.0 { total.log2() } else { -1e30 });
        for channel in 0..dim {
            let terms = states.iter().map(|s| weight(s) * f64::from(o[s * dim + channel]));
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()));
            want.push(if total > 0.0 { sum / total } else { 0.0 });
            scale.push(if total > 0.0 { size / total } else { 0.0 });
        }
    }
    // Each weight is one exp2 of at most 80, which WGSL grants 3 + 2 * 80 ULP.
    let tolerance = Tolerance::dot(500);
    let mut result =
        check("merge_states", format!("{rows} rows, {runs} runs, some empty"), &got, &want, &scale, tolerance);
    let sizes: Vec<f64> = want_lse.iter().map(|x| f64::max(x.abs(), 1.0)).collect();
    result.error_over_bound = result.error_over_bound.max(tolerance.worst(&lse, &want_lse, &sizes));
    Ok(result)
}

/// f32 to f16 at every edge: ties, subnormals, overflow, infinities, NaN, each beside its neighbours.
fn rounding(bench: &mut Bench<'_>) -> Result<Check, EngineError> {
    let mut edges = Vec::new();
    for exponent in 0_u32..=255 {
        for mantissa in [
            0_u32, 1, 0xfff, 0x1000, 0x1001, 0x1fff, 0x2000, 0x2fff, 0x3000, 0x3001, 0x3f_ffff, 0x40_0000, 0x7f_efff,
            0x7f_f000, 0x7f_ffff,
        ] {
            for sign in [0_u32, 1] {
                let bits = sign << 31 | exponent << 23 | mantissa;
                // Devices may flush f32 subnormals; all of them are zero in f16 either way.
                edges.push(f32::from_bits(bits));
            }
        }
    }
    edges.resize(edges.len().next_multiple_of(64), 0.0);
    let heads = HeadGeometry { num_qo_heads: 1, num_kv_heads: 1, head_dim: 64 };
    let shape = CacheShape { heads, page_size: 16 };
    let rows = u32::try_from(edges.len() / 64).expect("a few thousand values");
    let config = PagedAttentionConfig::new(shape, Bytes::mib(8), rows, 1);
    let mut attention = PagedAttention::new(bench.device, &mut bench.cache, config)?;
    let sequence = attention.admit(HiddenCodec::F16, rows)?;
    attention.step(&[NewRows { sequence, q: &[], k: &edges, v: &edges, decode: false }])?;
    let mut wrong = 0_usize;
    let side = |side| SideShape { side, page_size: 16, width: 64 };
    for (page, words) in attention.pages(sequence, 0)?.open.iter().enumerate() {
        let values: &[f16] = bytemuck::cast_slice(words);
        let (keys, v_values) = values.split_at(16 * 64);
        for token in 0..16_u32 {
            let row = page * 16 + token as usize;
            let Some(expected) = edges.get(row * 64..(row + 1) * 64) else { continue };
            for (channel, expected) in (0..).zip(expected) {
                let bits = f16::from_f32(*expected).to_bits();
                let k = keys[float16::index(side(Side::Key), token, channel)].to_bits();
                let v = v_values[float16::index(side(Side::Value), token, channel)].to_bits();
                // NaN stays NaN; which one is the device's choice once it has passed through a register.
                let nan = expected.is_nan() && [k, v].iter().all(|b| f16::from_bits(*b).is_nan());
                wrong += usize::from(!(nan || (k == bits && v == bits)));
            }
        }
    }
    let error_over_bound = if wrong == 0 { 0.0 } else { f64::INFINITY };
    let case = "f32 to f16 at every edge".to_owned();
    Ok(Check { kernel: "append", case, compared: edges.len() * 2, error_over_bound, nmse: None })
}
