//! Whether cooperative matrices compute what they should on this device.
//!
//! Kernels with cooperative matrices pass numbers between lanes and matrices through workgroup memory. Whether a driver makes
//! these writes visible in time is not settled by what wgpu emits today (gfx-rs/wgpu#8805), so a wrong result would be a race:
//! rare, and gone in the next run. [`PipelineCache`] compiles no such kernel before this test has run prefill and a product [`RUNS`]
//! times over random numbers, found every run equal to the first, bit by bit, and the first equal to the portable kernel's
//! result: prefill within what the rounding of probabilities explains.
//!
//! Numbers of the test are short enough for f16, so that nothing else is rounded, and sums of products are exact in f32.

use super::abi::{AttentionParams, MatmulParams, PrefillItem};
use super::attention::{CacheShape, Format};
use super::matmul::{self, Input, NO_LIST, Output, Product};
use super::prefill::{ITEM_ROWS, PrefillSpec, PrefillTuning};
use super::product_tuning::{CooperativeRows, ProductTuning};
use super::run_once::run_once;
use super::{KernelError, KernelSpec, PipelineCache, flat_grid};
use crate::compression::hidden::HiddenCodec;
use crate::device::{Device, Tier};
use crate::geometry::HeadGeometry;
use half::f16;

/// Runs that must be equal.
pub const RUNS: usize = 16;
/// Largest difference of an output whose values are at most 1: a probability is rounded by at most 2^-11 of itself (2^-10
/// where a driver cuts off), and sums differ in their order by far less.
const BOUND: f32 = 1.0 / 512.0;

const HEADS: HeadGeometry = HeadGeometry { num_qo_heads: 8, num_kv_heads: 2, head_dim: 128 };
const PAGE_SIZE: u32 = 64;
const CONTEXT: u32 = 300;
const ROWS: u32 = 256;

/// Runs the test.
///
/// # Errors
/// [`KernelError::SelfTest`] with what differed.
pub fn run(device: &Device) -> Result<(), KernelError> {
    let mut cache = PipelineCache::for_self_test();
    let product = Product { input: Input::Plain, output: Output::Replace };
    let (portable, cooperative) = (ProductTuning::GPU.many, CooperativeRows::ALL[0]);
    let multiply = Multiply::new();
    let mut times = |spec: KernelSpec, tile| multiply.run(device, &mut cache, &spec, tile);
    let expected = times(product.matmul(portable), portable.size())?;
    let spec = product.matmul_coop(cooperative);
    repeated(spec.name, 0.0, &expected, || times(spec.clone(), [cooperative.rows, cooperative.cols]))?;

    let format = CacheShape { heads: HEADS, page_size: PAGE_SIZE }.format(HiddenCodec::F16);
    let prefill = Prefill::new(&format);
    let spec = |tier| PrefillSpec::new(format, PrefillTuning::of_tier(tier));
    let expected = prefill.run(device, &mut cache, &spec(Tier::Portable))?;
    let kernel = spec(Tier::Cooperative);
    repeated(kernel.kernel().name, BOUND, &expected, || prefill.run(device, &mut cache, &kernel))
}

/// Runs a kernel again and again: the first result is as expected, and all are the same.
fn repeated(
    kernel: &'static str,
    bound: f32,
    expected: &[f32],
    mut run: impl FnMut() -> Result<Vec<f32>, KernelError>,
) -> Result<(), KernelError> {
    let fail = |reason| KernelError::SelfTest { kernel, reason };
    let first = run()?;
    within(bound, &first, expected).map_err(fail)?;
    for again in 1..RUNS {
        equal_bits(&run()?, &first).map_err(|reason| fail(format!("run {}: {reason}", again + 1)))?;
    }
    Ok(())
}

/// A product, as operands.
struct Multiply {
    x: Vec<f32>,
    w: Vec<f16>,
}

impl Multiply {
    const SIZE: u32 = 512;

    fn new() -> Self {
        let mut noise = Noise(2);
        let n = Self::SIZE * Self::SIZE;
        let x = (0..n).map(|_| noise.next()).collect();
        Self { x, w: (0..n).map(|_| f16::from_f32(noise.next())).collect() }
    }

    fn run(
        &self,
        device: &Device,
        cache: &mut PipelineCache,
        spec: &KernelSpec,
        [rows, cols]: [u32; 2],
    ) -> Result<Vec<f32>, KernelError> {
        let (size, list) = (Self::SIZE, NO_LIST);
        let params = MatmulParams {
            x_row: 0,
            y_row: 0,
            n_rows: size,
            cols: size,
            cells: size / 8,
            first_col: 0,
            list,
            eps: 0.0,
        };
        let unwritten = vec![f32::NAN; self.x.len()];
        let operands: [&[u8]; 3] =
            [bytemuck::cast_slice(&self.x), bytemuck::cast_slice(&self.w), bytemuck::cast_slice(&unwritten)];
        let results = run_once(device, cache, spec, &operands, &params, matmul::grid(&params, rows, cols))?;
        Ok(bytemuck::pod_collect_to_vec(&results[2]))
    }
}

/// One chunk of a sequence, as operands.
struct Prefill {
    items: Vec<PrefillItem>,
    tables: Vec<u32>,
    arena: Vec<f16>,
    q: Vec<f32>,
    n_states: usize,
}

impl Prefill {
    fn new(format: &Format) -> Self {
        let group = HEADS.group_size();
        let positions = ITEM_ROWS / group;
        let n_pages = (CONTEXT + ROWS).div_ceil(PAGE_SIZE);
        let mut items = Vec::new();
        for kv_head in 0..HEADS.num_kv_heads {
            for row_lo in (0..ROWS).step_by(positions as usize) {
                let first_index = CONTEXT + row_lo;
                items.push(PrefillItem {
                    row_lo,
                    n_rows: positions,
                    kv_head,
                    page_lo: kv_head * n_pages,
                    n_tokens: first_index + positions,
                    first_token: 0,
                    first_index,
                    slot: (kv_head * ROWS + row_lo) * group,
                    layer_stride: 0,
                    list: kv_head,
                    member: 0,
                    pad: 0,
                });
            }
        }
        let pages = HEADS.num_kv_heads * n_pages;
        let cells = format.codec.side_words(format.shape.page()) / 4;
        let mut noise = Noise(1);
        Self {
            items,
            tables: (0..pages).map(|page| page * cells).collect(),
            arena: (0..pages * cells * 8).map(|_| f16::from_f32(noise.next())).collect(),
            q: (0..ROWS * HEADS.q_width()).map(|_| noise.next() / 2.0).collect(),
            n_states: (HEADS.num_qo_heads * ROWS) as usize,
        }
    }

    /// Outputs of all states, normalised, `[state][head_dim]`.
    fn run(&self, device: &Device, cache: &mut PipelineCache, spec: &PrefillSpec) -> Result<Vec<f32>, KernelError> {
        let n_items = u32::try_from(self.items.len()).expect("a few items");
        let kernel: KernelSpec = spec.kernel();
        let params =
            AttentionParams { items: 0, n_items, layer: 0, q_stride: HEADS.q_width(), scale_log2: 1.0, angles: 0 };
        let unwritten = vec![f32::NAN; self.n_states * HEADS.head_dim as usize];
        let no_sums = vec![f32::NAN; self.n_states * 2];
        let operands: [&[u8]; 7] = [
            bytemuck::cast_slice(&self.items),
            bytemuck::cast_slice(&self.tables),
            bytemuck::cast_slice(&self.arena),
            bytemuck::cast_slice(&self.q),
            bytemuck::cast_slice(&unwritten),
            bytemuck::cast_slice(&no_sums),
            &[0; 16],
        ];
        let results = run_once(device, cache, &kernel, &operands, &params, flat_grid(n_items * spec.tiles()))?;
        let floats = |i: usize| -> Vec<f32> { bytemuck::pod_collect_to_vec(&results[i]) };
        let sums = floats(5);
        let outputs = floats(4).into_iter().enumerate();
        Ok(outputs.map(|(i, o)| o / sums[i / HEADS.head_dim as usize * 2 + 1]).collect())
    }
}

/// Numbers from -1 to 1 in steps of 1/64, which f16 holds exactly.
struct Noise(u32);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        // The high bits of a linear congruence are the random ones.
        f32::from(u8::try_from(self.0 >> 25).expect("seven bits")) / 64.0 - 1.0
    }
}

fn within(bound: f32, got: &[f32], expected: &[f32]) -> Result<(), String> {
    let worst = got.iter().zip(expected).map(|(a, b)| if a.is_finite() { (a - b).abs() } else { f32::INFINITY });
    let worst = worst.fold(0.0, f32::max);
    if worst <= bound {
        Ok(())
    } else {
        Err(format!("outputs differ from the portable kernel's by {worst}; at most {bound} is explained"))
    }
}

fn equal_bits(got: &[f32], first: &[f32]) -> Result<(), String> {
    let n = got.iter().zip(first).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
    if n == 0 { Ok(()) } else { Err(format!("{n} of {} outputs differ from the first run's", got.len())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wrong_number_is_found() {
        let expected = vec![0.25; 64];
        assert!(within(BOUND, &expected, &expected).is_ok() && equal_bits(&expected, &expected).is_ok(), "equal");
        let mut near = expected.clone();
        near[40] += BOUND / 2.0;
        assert!(within(BOUND, &near, &expected).is_ok(), "rounding");
        assert!(equal_bits(&near, &expected).is_err(), "no run may differ");
        // A matrix that was added twice.
        near[40] *= 2.0;
        assert!(within(BOUND, &near, &expected).is_err(), "twice");
        near[40] = f32::NAN;
        assert!(within(BOUND, &near, &expected).is_err(), "nothing was written");
    }

    #[test]
    fn the_noise_is_exact_in_f16_and_fills_its_range() {
        let mut noise = Noise(1);
        let values: Vec<f32> = (0..4096).map(|_| noise.next()).collect();
        assert!(values.iter().all(|x| f16::from_f32(*x).to_f32() == *x), "short");
        assert!(values.contains(&-1.0) && values.contains(&(63.0 / 64.0)), "both ends");
    }
}
