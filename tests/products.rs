//! A row of a product does not depend on the rows beside it, bit by bit, in any layout: what batch invariance rests on.

mod common;

use std::collections::HashSet;

use concertina::kernels::abi::MatmulParams;
use concertina::kernels::matmul::{self, Input, NO_LIST, Output, Product};
use concertina::kernels::product_tuning::ProductTuning;
use concertina::kernels::run_once::run_once;
use concertina::kernels::{KernelSpec, PipelineCache};
use concertina::weights::Matrix;
use half::f16;
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

// Neither is a multiple of what a workgroup takes at once.
const K: u32 = 584;
const COLS: u32 = 152;
const ROWS: u32 = 17;

struct Operands {
    x: Vec<f32>,
    gains: Vec<f32>,
    packed: Vec<f16>,
}

fn operands() -> Operands {
    let mut rng = ChaCha8Rng::seed_from_u64(12);
    let mut values = |n: u32| -> Vec<f32> { (0..n).map(|_| rng.random_range(-2.0_f32..2.0)).collect() };
    let (x, gains) = (values(ROWS * K), values(K));
    let matrix = Matrix::new(COLS, K, values(COLS * K).into_iter().map(f16::from_f32).collect());
    let mut packed = Vec::new();
    matmul::pack(&matrix, &mut packed);
    Operands { x, gains, packed }
}

/// `n_rows` rows of the product from one on, as bits.
fn product(cache: &mut PipelineCache, spec: &KernelSpec, grid: [u32; 2], first: u32, n_rows: u32) -> Vec<u32> {
    let Operands { x, gains, packed } = operands();
    let normed = spec.bindings.len() == 5;
    let (step, y) = ([0_u32; 4], vec![f32::NAN; (n_rows * COLS) as usize]);
    let (x, gains, packed) = (bytemuck::cast_slice(&x), bytemuck::cast_slice(&gains), bytemuck::cast_slice(&packed));
    let (step, y) = (bytemuck::cast_slice(&step), bytemuck::cast_slice(&y));
    let operands: &[&[u8]] = if normed { &[step, x, gains, packed, y] } else { &[x, packed, y] };
    let (list, eps) = (NO_LIST, 1e-5);
    let params = MatmulParams { x_row: first, y_row: 0, n_rows, cols: COLS, cells: K / 8, first_col: 0, list, eps };
    let grid = matmul::grid(&params, grid[0], grid[1]);
    let mut results = run_once(common::device(), cache, spec, operands, &params, grid).expect("the product runs");
    bytemuck::pod_collect_to_vec(&results.pop().expect("y is the last binding"))
}

fn check(product_of: &mut dyn FnMut(u32, u32, u32) -> Vec<u32>, sizes: &[u32], what: &str) {
    let n = COLS as usize;
    let all = product_of(sizes[sizes.len() - 1], 0, ROWS);
    assert!(all.iter().all(|bits| f32::from_bits(*bits).is_finite()), "{what}: every output is written");
    assert_ne!(all[..n], all[n..2 * n], "{what}: rows differ");
    for rows in sizes {
        // Alone, with some, and all.
        for (first, n_rows) in [(3, 1), (16, 1), (2, 3), (0, ROWS)] {
            let some = product_of(*rows, first, n_rows);
            let same = &all[first as usize * n..(first + n_rows) as usize * n];
            assert!(some == same, "{what}: rows {first} to {} of workgroups of {rows} rows", first + n_rows);
        }
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn a_row_does_not_depend_on_the_rows_beside_it_gpu() {
    let mut cache = PipelineCache::default();
    let (mut seen, mut fews) = (Vec::new(), HashSet::new());
    for tuning in ProductTuning::candidates() {
        for input in [Input::Plain, Input::Normed] {
            let kind = Product { input, output: Output::Replace };
            let many = tuning.many;
            for few in tuning.few.forms().filter(|form| fews.insert((input, *form))) {
                let sizes: Vec<u32> = few.rows(u32::MAX).collect();
                let mut of_few = |rows, first, n_rows| {
                    product(&mut cache, &kind.matvec(rows, few), [rows, few.width(rows)], first, n_rows)
                };
                check(&mut of_few, &sizes, &format!("{few}, {input:?}"));
                seen.push(of_few(sizes[0], 0, ROWS));
            }
            let spec = kind.matmul(many);
            let mut of_many = |_, first, n_rows| product(&mut cache, &spec, many.size(), first, n_rows);
            check(&mut of_many, &[many.size()[0]], &format!("many, {input:?}, {tuning}"));
        }
    }
    // Layouts add in different orders, which bits show: the comparison can fail.
    assert!(seen.iter().any(|bits| *bits != seen[0]), "all layouts give the same bits");
}
