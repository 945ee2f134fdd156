//! Matrix products with f16 weights and f32 accumulation: `matmul` for many rows, `matvec` for few.
//!
//! ```text
//! y[r, n] (+)= sum_k x[r, k] * w[n, k]
//! x [rows][k] f32      w [k / 8][n] cells of 8 f16      y [rows][n] f32
//! ```
//!
//! **Layout.** Weights are stored in cells of 8 input features, `[k / 8][n]`: lanes on neighbouring outputs load neighbouring
//! 16-byte cells in both kernels, and no reduction over lanes is needed in `matmul`. [`pack`] makes it.
//!
//! **Mapping.** `matmul`: 8 x 8 lanes, 64 rows by 64 outputs, 8 x 8 in a lane's registers. `matvec`: 16 output lanes by 4 slices of
//! k, 1 or 4 rows by 64 outputs. In both, the order in which products are added depends on neither the number of rows
//! nor the row's place, which is what batch invariance needs; decode rows always go through `matvec` and prefill
//! rows always through `matmul`.
//!
//! **Bytes.** `2 * k * n` of weights per 64 (or 4) rows, `4 * k` and `4 * n` per row. **FLOPs.** `2 * rows * k * n`.

use half::f16;

use super::abi::{Immediates as _, MatmulParams};
use super::{Access, Binding, Constant, KernelSpec, modules};
use crate::weights::Matrix;

const BINDINGS: &[Binding] = &[("x", Access::Read), ("w", Access::Read), ("y", Access::ReadWrite)];

/// Outputs of one workgroup, in both kernels.
pub const TILE_COLS: u32 = 64;
/// Rows of one workgroup of `matmul`.
pub const TILE_ROWS: u32 = 64;

/// Whether the product replaces the output or is added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    /// `y = x * W^T`.
    Replace,
    /// `y += x * W^T`.
    Accumulate,
}

/// The product for many rows.
pub fn matmul(output: Output) -> KernelSpec {
    KernelSpec {
        name: "matmul",
        constants: vec![("ACCUMULATE".into(), Constant::Bool(output == Output::Accumulate))],
        parts: vec![(&modules::PRODUCT).into(), (&modules::MATMUL).into()],
        bindings: BINDINGS,
        immediate_bytes: MatmulParams::BYTES,
    }
}

/// The product for few rows, `rows` (1 or 4) to a workgroup.
///
/// # Panics
/// When `rows` is neither 1 nor 4.
pub fn matvec(output: Output, rows: u32) -> KernelSpec {
    assert!(rows == 1 || rows == 4, "matvec is written for 1 or 4 rows, not {rows}");
    KernelSpec {
        name: "matvec",
        constants: vec![
            ("ACCUMULATE".into(), Constant::Bool(output == Output::Accumulate)),
            ("ROWS".into(), Constant::U32(rows)),
        ],
        parts: vec![(&modules::PRODUCT).into(), (&modules::MATVEC).into()],
        bindings: BINDINGS,
        immediate_bytes: MatmulParams::BYTES,
    }
}

/// Workgroups for `params`, `tile_rows` rows each.
pub const fn grid(params: &MatmulParams, tile_rows: u32) -> [u32; 3] {
    [(params.cols - params.first_col).div_ceil(TILE_COLS), params.n_rows.div_ceil(tile_rows), 1]
}

/// Appends a row-major matrix to `out`, reordered into cells `[cols / 8][rows][8]`; `cols` must be a multiple of 8.
pub fn pack(matrix: &Matrix, out: &mut Vec<f16>) {
    let (rows, cols) = (matrix.rows as usize, matrix.cols as usize);
    let start = out.len();
    out.resize(start + rows * cols, f16::ZERO);
    let target = &mut out[start..];
    for (r, row) in matrix.data.chunks_exact(cols).enumerate() {
        for (c, cell) in row.chunks_exact(8).enumerate() {
            let at = (c * rows + r) * 8;
            target[at..at + 8].copy_from_slice(cell);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pack_puts_neighbouring_outputs_beside_each_other() {
        let data: Vec<f16> = (0_u8..32).map(|v| f16::from_f32(f32::from(v))).collect();
        let mut out = Vec::new();
        pack(&Matrix::new(2, 16, data), &mut out);
        let firsts: Vec<f32> = out.chunks_exact(8).map(|c| c[0].to_f32()).collect();
        assert_eq!(firsts, [0.0, 16.0, 8.0, 24.0], "cells in [k / 8][n] order");
    }
}
