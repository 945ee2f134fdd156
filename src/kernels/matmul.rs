//! Matrix products with f16 weights and f32 accumulation: `matmul` for many rows, `matvec` for few.
//!
//! ```text
//! y[r, n] (+)= sum_k x[r, k] * w[n, k]
//! of normed rows      y[r, n] = 1 / sqrt(mean_k(x[s, k]^2) + eps) * sum_k x[s, k] * gain[k] * w[n, k]     (arXiv:1910.07467)
//!                     s = r, or an entry of a list of rows
//! activated           y[r, i] = silu(gate) * up,  gate and up the outputs 2i and 2i + 1                   (arXiv:2002.05202)
//! x [rows][k] f32     w [k / 8][n] cells of 8 f16     y [rows][n] f32, activated [rows][n / 2]
//! ```
//!
//! **Layout.** Weights are stored in cells of 8 input features, `[k / 8][n]`: lanes on neighbouring outputs load neighbouring
//! 16-byte cells in both kernels. [`pack`] makes it.
//!
//! **Norm and activation** are part of the product that needs them. The gain is multiplied while a row is read, its
//! squares are added up on the way, and their root divides the finished sum: a row's norm costs no dispatch and no
//! second reading. Gate and up stand beside each other, so that one lane has both.
//!
//! **Mapping.** `matvec`: a workgroup has all rows, 1 to 16, so that weights are read once; lanes beside each other own columns, and
//! the others rows, 8 to a lane, and slices of k, which are added at the end. `matmul`: tiles of 64 or 128 rows and columns staged
//! through workgroup memory, 8 x 8 outputs in a lane's registers; `matmul_direct` the same without staging, which is faster on
//! software Vulkan. In all, the order in which products are added depends on neither the number of rows nor the row's place, which
//! is what batch invariance needs; decode rows always go through `matvec` and prefill rows always through `matmul`. Sizes are those
//! of a [`ProductTuning`](super::product_tuning::ProductTuning).
//!
//! **What limits 16 rows.** Workgroup memory and the first cache return 128 bytes per clock of a multiprocessor. A lane of 8 rows by
//! 8 columns reads 24 vec4 (16 of inputs, 8 of weights) for 512 multiply-adds, which is 96 clocks of that port beside 128 of
//! arithmetic; one of 16 rows by 4 columns needs 144. Every workgroup reads all inputs, `2 * rows / width` of the bytes of its
//! weights: half of them at 64 columns, as many at 32.
//!
//! **Cooperative matrices** (`matmul_coop`, tier `cooperative` alone): inputs, after their gain, are rounded to f16, weights are f16
//! anyway, sums are f32. An input beyond 65,504 becomes infinite. The bound is
//! [`Tolerance::dot_f16`](crate::reference::compare::Tolerance::dot_f16). Tiles of 64 or 128 rows and columns, four subgroups, 4 to
//! 16 matrices of 16 x 16 in each one's registers.
//!
//! **Bytes.** `2 * k * n` of weights per workgroup's rows, `4 * k` and `4 * n` per row. **FLOPs.** `2 * rows * k * n`.

use half::f16;

use super::abi::{Immediates as _, MatmulParams};
use super::product_tuning::{CooperativeRows, FewRows, ManyRows, Tile};
use super::{Access, Binding, Constant, KernelSpec, Module, modules};
use crate::weights::Matrix;

const PLAIN: &[Binding] = &[("x", Access::Read), ("w", Access::Read), ("y", Access::ReadWrite)];
const NORMED: &[Binding] = &[
    ("step", Access::Read),
    ("x", Access::Read),
    ("gains", Access::Read),
    ("w", Access::Read),
    ("y", Access::ReadWrite),
];

/// [`MatmulParams::list`] where rows follow each other.
pub const NO_LIST: u32 = u32::MAX;

/// What is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// Rows as they are.
    Plain,
    /// Their RMS norm.
    Normed,
}

/// What becomes of the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    /// `y = x * W^T`.
    Replace,
    /// `y += x * W^T`.
    Accumulate,
    /// `y = silu(gate) * up` of alternating columns.
    Activate,
}

/// A kind of product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Product {
    /// What is multiplied.
    pub input: Input,
    /// What becomes of it.
    pub output: Output,
}

impl Product {
    /// The kinds that a decoder has: projections, residual additions, gate and up.
    pub const ALL: [Self; 4] = [
        Self { input: Input::Plain, output: Output::Replace },
        Self { input: Input::Normed, output: Output::Replace },
        Self { input: Input::Plain, output: Output::Accumulate },
        Self { input: Input::Normed, output: Output::Activate },
    ];

    fn kernel(self, name: &'static str, kernel: &'static Module, numbers: &[(&'static str, u32)]) -> KernelSpec {
        let flags = [("ACCUMULATE", Output::Accumulate), ("ACTIVATE", Output::Activate)];
        let flags = flags.map(|(name, output)| (name.into(), Constant::Bool(self.output == output)));
        let numbers = numbers.iter().map(|(name, value)| ((*name).into(), Constant::U32(*value)));
        let (rows, bindings) = match self.input {
            Input::Plain => (&modules::ROWS_PLAIN, PLAIN),
            Input::Normed => (&modules::ROWS_NORMED, NORMED),
        };
        KernelSpec {
            name,
            constants: flags.into_iter().chain(numbers).collect(),
            parts: [&modules::PRODUCT, rows, kernel].map(Into::into).into(),
            bindings,
            immediate_bytes: MatmulParams::BYTES,
        }
    }

    /// The product for many rows.
    pub fn matmul(self, tuning: ManyRows) -> KernelSpec {
        let ManyRows::Tiled(tile) = tuning else {
            return self.kernel("matmul_direct", &modules::MATMUL_DIRECT, &[]);
        };
        let (Tile { rows, cols, depth, buffers }, lanes) = (tile, tile.lanes());
        let numbers = [
            ("TILE_ROWS", rows),
            ("TILE_COLS", cols),
            ("DEPTH", depth),
            ("BUFFERS", buffers),
            ("LANES", lanes),
            ("LEFT_LOADS", rows * depth / 4 / lanes),
            ("RIGHT_LOADS", (cols * depth / 8).div_ceil(lanes)),
        ];
        self.kernel("matmul", &modules::MATMUL, &numbers)
    }

    /// The product for many rows on cooperative matrices.
    pub fn matmul_coop(self, tile: CooperativeRows) -> KernelSpec {
        let CooperativeRows { rows, cols } = tile;
        let lanes = CooperativeRows::LANES;
        let numbers = [
            ("TILE_ROWS", rows),
            ("TILE_COLS", cols),
            ("ROW_BLOCKS", rows / 32),
            ("COL_BLOCKS", cols / 32),
            ("LEFT_LOADS", rows * CooperativeRows::DEPTH / 4 / lanes),
            ("RIGHT_LOADS", cols * CooperativeRows::DEPTH / 8 / lanes),
        ];
        self.kernel("matmul_coop", &modules::MATMUL_COOP, &numbers)
    }

    /// The product for few rows, `rows` to a workgroup: one of [`FewRows::rows`]; `layout` is one of [`FewRows::forms`].
    pub fn matvec(self, rows: u32, layout: FewRows) -> KernelSpec {
        let width = layout.width(rows);
        let outputs = if self.output == Output::Activate { width / 2 } else { width };
        let (row_groups, summed) = (layout.row_groups(rows), layout.summed(rows));
        let stagers = layout.stagers(rows);
        let numbers = [
            ("ROWS", rows),
            ("LANE_ROWS", rows / row_groups),
            ("ROW_GROUPS", row_groups),
            ("COLS", layout.cols(rows)),
            ("COL_VECS", layout.cols(rows) / 4),
            ("COLUMN_LANES", layout.column_lanes),
            ("SLICES", layout.slices),
            ("LANES", layout.lanes(rows)),
            ("STEPS", layout.steps(rows)),
            ("BUFFERS", layout.buffers(rows)),
            ("STAGERS", stagers),
            ("STAGED_ROWS", rows.div_ceil(stagers)),
            ("SUMMED", summed),
            ("PARTS", rows / row_groups / summed),
            ("OUTPUTS", outputs),
            ("PAD_VECS", layout.pad_vecs(rows)),
        ];
        self.kernel("matvec", &modules::MATVEC, &numbers)
    }
}

/// Workgroups for `params`, of so many rows and columns each.
pub const fn grid(params: &MatmulParams, rows: u32, cols: u32) -> [u32; 3] {
    [(params.cols - params.first_col).div_ceil(cols), params.n_rows.div_ceil(rows), 1]
}

/// Appends a row-major matrix to `out`, reordered into cells `[cols / 8][rows][8]`; `cols` must be a multiple of 8.
pub fn pack(matrix: &Matrix, out: &mut Vec<f16>) {
    pack_rows(matrix, out, |row| row);
}

/// The same for gate above up: their rows alternate.
///
/// # Panics
/// When the number of rows is odd.
pub fn pack_pairs(matrix: &Matrix, out: &mut Vec<f16>) {
    assert!(matrix.rows.is_multiple_of(2), "gate and up should have equally many rows, not {} together", matrix.rows);
    let half = matrix.rows as usize / 2;
    pack_rows(matrix, out, |row| if row < half { 2 * row } else { 2 * (row - half) + 1 });
}

/// The matrix's row `r` becomes output `place(r)`.
fn pack_rows(matrix: &Matrix, out: &mut Vec<f16>, place: impl Fn(usize) -> usize) {
    let (rows, cols) = (matrix.rows as usize, matrix.cols as usize);
    let start = out.len();
    out.resize(start + rows * cols, f16::ZERO);
    let target = &mut out[start..];
    for (r, row) in matrix.data.chunks_exact(cols).enumerate() {
        for (c, cell) in row.chunks_exact(8).enumerate() {
            let at = (c * rows + place(r)) * 8;
            target[at..at + 8].copy_from_slice(cell);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn firsts(pack: fn(&Matrix, &mut Vec<f16>), rows: u32) -> Vec<f32> {
        let data: Vec<f16> = (0_u8..32).map(|v| f16::from_f32(f32::from(v))).collect();
        let mut out = Vec::new();
        pack(&Matrix::new(rows, 32 / rows, data), &mut out);
        out.chunks_exact(8).map(|c| c[0].to_f32()).collect()
    }

    #[test]
    fn pack_puts_neighbouring_outputs_beside_each_other() {
        assert_eq!(firsts(pack, 2), [0.0, 16.0, 8.0, 24.0], "cells in [k / 8][n] order");
    }

    #[test]
    fn pairs_alternate_between_gate_and_up() {
        assert_eq!(firsts(pack_pairs, 4), [0.0, 16.0, 8.0, 24.0], "gate 0, up 0, gate 1, up 1");
        assert_ne!(firsts(pack_pairs, 4), firsts(pack, 4));
    }
}
