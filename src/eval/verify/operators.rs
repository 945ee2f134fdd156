//! The transformer's operators and the sampler against plain f64 loops.

use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Check;
use crate::compression::hidden::{HiddenCodec, Side, SideShape, float16};
use crate::device::{Device, Tier};
use crate::engine::EngineError;
use crate::engine::paged_attention::{NewRows, PagedAttention, PagedAttentionConfig};
use crate::geometry::{Bytes, HeadGeometry};
use crate::kernels::abi::{AppendItem, AppendParams, EmbedParams, MatmulParams, MergeItem, MergeParams, SampleParams};
use crate::kernels::append::{self, Positions};
use crate::kernels::attention::CacheShape;
use crate::kernels::matmul::{self, Input, NO_LIST, Output, Product};
use crate::kernels::product_tuning::{CooperativeRows, FewRows, ProductTuning};
use crate::kernels::run_once::run_once;
use crate::kernels::sample::Sampling;
use crate::kernels::{KernelSpec, PipelineCache, embed, flat_grid, merge_states, sample};
use crate::reference::compare::Tolerance;
use crate::reference::sampling::distribution;
use crate::weights::Matrix;

/// Rows of a product for many: fewer than a tile, and past it.
const MANY_ROWS: [u32; 2] = [5, 130];
/// Rows of a product for few: one, some, and past a workgroup.
const FEW_ROWS: [u32; 3] = [1, 3, 21];
/// Draws from each sampling setting.
const DRAWS: u32 = 4096;

/// Embedding and appending, the samplers, merging and rounding.
const OTHERS: usize = 2 + SAMPLING.len() + 2;

pub(super) fn count(tier: Tier) -> usize {
    let tiles = if tier == Tier::Cooperative { CooperativeRows::ALL.len() } else { 0 };
    let cooperative = tiles * Product::ALL.len() * MANY_ROWS.len();
    let of_tuning = |tuning| {
        let rows = MANY_ROWS.len() + few_forms(tuning).count() * FEW_ROWS.len();
        kinds(tuning).count() * rows
    };
    OTHERS + cooperative + ProductTuning::candidates().into_iter().map(of_tuning).sum::<usize>()
}

const SAMPLING: [(&str, Sampling); 5] = [
    ("greedy", Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 1 }),
    ("temperature 1", Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 2 }),
    ("temperature 0.7, top-k 5", Sampling { temperature: 0.7, top_k: 5, top_p: 1.0, seed: 3 }),
    ("temperature 1.3, top-p 0.8", Sampling { temperature: 1.3, top_k: 0, top_p: 0.8, seed: 4 }),
    ("temperature 1, top-k 20, top-p 0.9", Sampling { temperature: 1.0, top_k: 20, top_p: 0.9, seed: 5 }),
];

pub(super) fn run(device: &Device, each: &mut dyn FnMut(Check)) -> Result<(), EngineError> {
    let mut bench = Bench { device, cache: PipelineCache::default(), rng: ChaCha8Rng::seed_from_u64(7) };
    each(embedding(&mut bench)?);
    each(append_turned(&mut bench)?);
    for tuning in ProductTuning::candidates() {
        products(&mut bench, tuning, each)?;
    }
    for tile in CooperativeRows::ALL.into_iter().filter(|_| device.tier() == Tier::Cooperative) {
        for product in Product::ALL {
            for rows in MANY_ROWS {
                let case = ProductCase::new(&mut bench, product, rows);
                let spec = product.matmul_coop(tile);
                each(case.run(&mut bench, &spec, [tile.rows, tile.cols], &tile.to_string())?);
            }
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

fn embedding(bench: &mut Bench<'_>) -> Result<Check, EngineError> {
    let (vocab, hidden, tokens) = (50_u32, 72_u32, [3_u32, 49, 0, 3, 17]);
    let (matrix, packed) = random_matrix(bench, vocab, hidden);
    let n = tokens.len() * hidden as usize;
    let params = EmbedParams { tokens: 0, n_rows: 5, cells: hidden / 8, vocab };
    let unwritten = poison(n);
    let inputs = [bytes(&tokens), bytes(&packed), bytes(&unwritten)];
    let got = floats(&bench.run(&embed::kernel(), &inputs, &params, flat_grid(5))?);
    let want: Vec<f64> = tokens.iter().flat_map(|t| matrix.row(*t).iter().map(|v| v.to_f64())).collect();
    // A copy of f16 values is exact.
    let case = format!("{} rows of {hidden}", tokens.len());
    Ok(check("embed", case, &got, &want, &vec![0.0; n], Tolerance::dot(1)))
}

/// Appending one row: its queries turned in place, its keys turned and rounded in their page, values rounded alone.
fn append_turned(bench: &mut Bench<'_>) -> Result<Check, EngineError> {
    let heads = HeadGeometry { num_qo_heads: 6, num_kv_heads: 2, head_dim: 24 };
    let shape = CacheShape { heads, page_size: 16 };
    let (n_rows, slot, dim) = (3_u32, 5_u32, 24_usize);
    let (q_width, kv_width) = (heads.q_width() as usize, heads.kv_width() as usize);
    let stride = q_width + 2 * kv_width;
    let rows = bench.values(n_rows as usize * stride);
    let angles: Vec<f64> = (0..n_rows as usize * dim / 2).map(|i| i as f64 * 0.37).collect();
    #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is what is wanted")]
    let mut step: Vec<u32> = angles.iter().flat_map(|a| [a.cos() as f32, a.sin() as f32]).map(f32::to_bits).collect();
    let item = |kv_head| AppendItem {
        row_lo: 0,
        n_rows,
        kv_head,
        page_entry: kv_head,
        layer_stride: 0,
        slot_in_page: slot,
        pad: [0; 2],
    };
    let at = u32::try_from(step.len() / 4).expect("a short table");
    step.extend_from_slice(bytemuck::cast_slice(&[item(0), item(1)]));
    let page_cells = u32::try_from(2 * 16 * dim / 8).expect("a small page");
    let to_u32 = |n: usize| u32::try_from(n).expect("a small row");
    let params = AppendParams {
        items: at,
        n_items: 2,
        layer: 0,
        stride: to_u32(stride),
        k_offset: to_u32(q_width),
        v_offset: to_u32(q_width + kv_width),
        angles: 0,
        n_rows,
    };
    let unwritten = vec![f16::NAN; page_cells as usize * 2 * 8];
    let table = [0, page_cells];
    let operands = [bytes(&step), bytes(&table), bytes(&rows), bytes(&unwritten)];
    let spec = append::kernel(&shape, Positions::Rotary);
    let results = bench.run_all(&spec, &operands, &params, flat_grid(n_rows + 2))?;
    let pages: Vec<f16> = bytemuck::pod_collect_to_vec(&results[3]);
    let (mut got, mut want, mut scale) = (floats(&results[2]), Vec::new(), Vec::new());
    let mut in_pages = Vec::new();
    for (row, values) in rows.chunks_exact(stride).enumerate() {
        for (i, pair) in values.chunks_exact(2).enumerate() {
            let angle = angles[row * dim / 2 + i % (dim / 2)];
            let (a, b) = (f64::from(pair[0]), f64::from(pair[1]));
            let turned = [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()];
            // Keys and values must not move at all where they came from.
            let is_query = 2 * i < q_width;
            want.extend(if is_query { turned } else { [a, b] });
            scale.extend([if is_query { a.abs() + b.abs() } else { 0.0 }; 2]);
        }
        for channel in 0..2 * kv_width {
            let (is_value, head, c) = (channel >= kv_width, channel % kv_width / dim, channel % dim);
            let from = values[q_width + channel];
            let pair = &values[q_width + channel / 2 * 2..][..2];
            let (a, b) = (f64::from(pair[0]), f64::from(pair[1]));
            let (sin, cos) = angles[row * dim / 2 + c / 2].sin_cos();
            let exact = match (is_value, c % 2) {
                (true, _) => f16::from_f32(from).to_f64(),
                (false, 0) => a * cos - b * sin,
                (false, _) => a * sin + b * cos,
            };
            let (side, token) = (usize::from(is_value), slot as usize + row);
            let cell = if is_value { token * dim / 8 + c / 8 } else { c / 8 * 16 + token };
            let place = ((head * 2 + side) * 16 * dim / 8 + cell) * 8 + c % 8;
            // A value is rounded exactly; half a unit of f16 in a key is 2^12 of f32.
            let magnitude = if is_value { 0.0 } else { (a.abs() + b.abs()) * f64::from(1 << 12) };
            in_pages.push((pages[place].to_f32(), exact, magnitude));
        }
    }
    for (stored, exact, magnitude) in in_pages {
        got.push(stored);
        want.push(exact);
        scale.push(magnitude);
    }
    let written = pages.iter().filter(|value| !value.is_nan()).count();
    let mut result =
        check("append", format!("{n_rows} rows, turned, 6 heads of {dim}"), &got, &want, &scale, Tolerance::dot(2));
    if written != n_rows as usize * 2 * kv_width {
        result.error_over_bound = f64::INFINITY;
    }
    Ok(result)
}

/// Operands of a product, and what it should leave.
struct ProductCase {
    product: Product,
    n_rows: u32,
    x: Vec<f32>,
    gains: Vec<f32>,
    list: Vec<u32>,
    packed: Vec<f16>,
    before: Vec<f32>,
    want: Vec<f64>,
    scale: Vec<f64>,
}

impl ProductCase {
    // 200 outputs leave a ragged tile; x and y begin at different rows.
    const COLS: u32 = 200;
    const K: u32 = 264;
    const X_ROW: u32 = 2;
    const Y_ROW: u32 = 1;
    const EPS: f32 = 1e-5;

    fn new(bench: &mut Bench<'_>, product: Product, n_rows: u32) -> Self {
        let (cols, k) = (Self::COLS, Self::K);
        let (matrix, mut packed) = random_matrix(bench, cols, k);
        let activates = product.output == Output::Activate;
        if activates {
            packed.clear();
            matmul::pack_pairs(&matrix, &mut packed);
        }
        let rows = n_rows + Self::X_ROW;
        let x = bench.values((rows * k) as usize);
        let gains = bench.values(k as usize);
        // Every row, from the last to the first.
        let list: Vec<u32> = (0..rows).rev().collect();
        let width = if activates { cols / 2 } else { cols };
        let size = ((n_rows + Self::Y_ROW + 1) * width) as usize;
        let before = if product.output == Output::Accumulate { bench.values(size) } else { poison(size) };
        let mut case = Self { product, n_rows, x, gains, list, packed, before, want: Vec::new(), scale: Vec::new() };
        case.expect(&matrix, width);
        case
    }

    fn expect(&mut self, matrix: &Matrix, width: u32) {
        for row in 0..self.n_rows {
            let source = self.source(row);
            for col in 0..width {
                let start = match self.product.output {
                    Output::Accumulate => f64::from(self.before[((Self::Y_ROW + row) * width + col) as usize]),
                    Output::Replace | Output::Activate => 0.0,
                };
                let (sum, scale) = sum_of(&source, matrix.row(col), start);
                if self.product.output == Output::Activate {
                    let (up, up_scale) = sum_of(&source, matrix.row(width + col), 0.0);
                    let silu = sum / (1.0 + (-sum).exp());
                    self.want.push(silu * up);
                    // The slope of silu is at most 1.1. exp carries 3 + 2|x| ULP (WGSL, accuracy of built-in functions),
                    // of which Tolerance::dot grants 18 per unit of scale and 1 ULP is 2 u.
                    let exp = (3.0 + 2.0 * sum.abs()) * 2.0 / (8.0 * (f64::from(Self::K).sqrt() + 2.0));
                    self.scale.push(1.1 * scale * up.abs() + silu.abs() * up_scale + (silu * up).abs() * exp);
                } else {
                    self.want.push(sum);
                    self.scale.push(scale);
                }
            }
        }
    }

    /// A row of x as it is multiplied.
    fn source(&self, row: u32) -> Vec<f64> {
        let k = Self::K as usize;
        let normed = self.product.input == Input::Normed;
        let place = (Self::X_ROW + row) as usize;
        let from = if normed { self.list[place] as usize } else { place };
        let x = self.x[from * k..(from + 1) * k].iter().map(|v| f64::from(*v));
        if !normed {
            return x.collect();
        }
        let mean = x.clone().map(|v| v * v).sum::<f64>() / k as f64;
        let scale = 1.0 / (mean + f64::from(Self::EPS)).sqrt();
        x.zip(&self.gains).map(|(v, gain)| v * scale * f64::from(*gain)).collect()
    }

    fn params(&self) -> MatmulParams {
        let normed = self.product.input == Input::Normed;
        MatmulParams {
            x_row: Self::X_ROW,
            y_row: Self::Y_ROW,
            n_rows: self.n_rows,
            cols: Self::COLS,
            cells: Self::K / 8,
            first_col: 0,
            list: if normed { 0 } else { NO_LIST },
            eps: Self::EPS,
        }
    }

    fn run(
        &self,
        bench: &mut Bench<'_>,
        spec: &KernelSpec,
        [rows, cols]: [u32; 2],
        layout: &str,
    ) -> Result<Check, EngineError> {
        let mut inputs = vec![bytes(&self.x), bytes(&self.packed), bytes(&self.before)];
        if self.product.input == Input::Normed {
            inputs.insert(0, bytes(&self.list));
            inputs.insert(2, bytes(&self.gains));
        }
        let params = self.params();
        let got = floats(&bench.run(spec, &inputs, &params, matmul::grid(&params, rows, cols))?);
        let width = self.want.len() / self.n_rows as usize;
        let first = Self::Y_ROW as usize * width;
        let written = &got[first..first + self.want.len()];
        let Product { input, output } = self.product;
        let (n, k, cols) = (self.n_rows, Self::K, Self::COLS);
        let case = format!("{n} x {k} by {k} x {cols}, {input:?}, {output:?}, {layout}");
        let bound = if spec.is_cooperative() { Tolerance::dot_f16 } else { Tolerance::dot };
        let mut result = check(spec.name, case, written, &self.want, &self.scale, bound(k as usize));
        let outside = got[..first].iter().chain(&got[first + self.want.len()..]);
        let untouched = self.before[..first].iter().chain(&self.before[first + self.want.len()..]);
        if !outside.zip(untouched).all(|(a, b)| a.to_bits() == b.to_bits()) {
            result.error_over_bound = f64::INFINITY;
        }
        Ok(result)
    }
}

/// A sum of products, and the magnitude that its rounding is in proportion to: the root of their squares, as for a
/// sum of independent products.
fn sum_of(row: &[f64], weights: &[f16], start: f64) -> (f64, f64) {
    let products = row.iter().zip(weights).map(|(x, w)| x * w.to_f64());
    let (sum, squares) = products.fold((start, start * start), |(s, q), p| (s + p, q + p * p));
    (sum, squares.sqrt())
}

/// The kinds of products that a layout is checked with: all of those that are defaults, and of the others the two kinds
/// which together have everything that a product can have.
fn kinds(tuning: ProductTuning) -> impl Iterator<Item = Product> {
    let all = [ProductTuning::GPU, ProductTuning::CPU].contains(&tuning);
    Product::ALL.into_iter().filter(move |product| all || product.output != Output::Replace)
}

/// The layouts of few rows that candidates before this one do not have.
fn few_forms(tuning: ProductTuning) -> impl Iterator<Item = FewRows> {
    let others = ProductTuning::candidates().into_iter().take_while(move |other| *other != tuning);
    let known: Vec<_> = others.flat_map(|other| other.few.forms()).collect();
    tuning.few.forms().filter(move |form| !known.contains(form))
}

/// The products of one layout: some kinds, of few rows and of many.
fn products(bench: &mut Bench<'_>, tuning: ProductTuning, each: &mut dyn FnMut(Check)) -> Result<(), EngineError> {
    let layout = tuning.to_string();
    for product in kinds(tuning) {
        for rows in MANY_ROWS {
            let case = ProductCase::new(bench, product, rows);
            each(case.run(bench, &product.matmul(tuning.many), tuning.many.size(), &layout)?);
        }
        for few in few_forms(tuning) {
            for rows in FEW_ROWS {
                let case = ProductCase::new(bench, product, rows);
                let per_group = few.rows_for(rows);
                let size = [per_group, few.width(per_group)];
                each(case.run(bench, &product.matvec(per_group, few), size, &format!("few{few}"))?);
            }
        }
    }
    Ok(())
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
    let results = bench.run_all(&spec, &operands, &params, merge_states::grid(&shape, rows * 2))?;
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
