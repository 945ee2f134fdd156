//! Stream: what device memory gives at best, for comparison. No session runs it.
//!
//! ```text
//! read   result[t] = sum over the cells c of tile t of source[c] * (2 c + 1)       wrapping, each of a cell's four words alone
//! copy   result[c] = source[c]
//! ```
//!
//! **Work.** One workgroup of 256 lanes per tile of [`TILE_CELLS`] neighbouring cells, 16 bytes a lane; loads do not wait for each
//! other. A cell's own index is in its term, so that the sum tells cells that were read twice, or in another place.
//!
//! **Bytes.** Read: each cell once; the sums are less than a thousandth. Copy: each cell read once and written once.

use super::abi::{Immediates as _, StreamParams};
use super::{Access, Binding, Constant, KernelSpec, flat_grid, modules};

const BINDINGS: &[Binding] = &[("source", Access::Read), ("result", Access::ReadWrite)];
const WORKGROUP_SIZE: u32 = 256;
/// Cells of a tile: 128 KiB.
pub const TILE_CELLS: u32 = 32 * WORKGROUP_SIZE;

fn kernel(name: &'static str, copies: bool) -> KernelSpec {
    KernelSpec {
        name,
        constants: vec![
            ("WORKGROUP_SIZE".into(), Constant::U32(WORKGROUP_SIZE)),
            ("TILE_CELLS".into(), Constant::U32(TILE_CELLS)),
            ("COPIES".into(), Constant::Bool(copies)),
        ],
        parts: vec![(&modules::STREAM).into()],
        bindings: BINDINGS,
        immediate_bytes: StreamParams::BYTES,
    }
}

/// Reads and adds up.
pub fn read() -> KernelSpec {
    kernel("stream_read", false)
}

/// Copies.
pub fn copy() -> KernelSpec {
    kernel("stream_copy", true)
}

/// Workgroups for so many cells, at least one.
pub fn grid(n_cells: u32) -> [u32; 3] {
    flat_grid(n_cells.div_ceil(TILE_CELLS).max(1))
}

/// The sum that the tiles of a read add up to, of cells from `first` on.
pub fn sum(first: u32, cells: &[[u32; 4]]) -> [u32; 4] {
    let mut sum = [0_u32; 4];
    for (at, cell) in (first..).zip(cells) {
        for (total, word) in sum.iter_mut().zip(cell) {
            *total = total.wrapping_add(word.wrapping_mul(at.wrapping_mul(2).wrapping_add(1)));
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_tells_which_cell_was_read() {
        let cells = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]];
        let right = sum(0, &cells);
        let by_hand = [1 + 3 * 5 + 5 * 9, 2 + 3 * 6 + 5 * 10, 3 + 3 * 7 + 5 * 11, 4 + 3 * 8 + 5 * 12];
        assert_eq!(right, by_hand, "weights 1, 3 and 5");
        assert_ne!(sum(0, &[cells[1], cells[0], cells[2]]), right, "two cells that changed places");
        assert_ne!(sum(0, &[cells[0], cells[1], cells[1]]), right, "one that was read twice");
        let halves = [sum(0, &cells[..1]), sum(1, &cells[1..])];
        assert_eq!([0, 1, 2, 3].map(|i| halves[0][i].wrapping_add(halves[1][i])), right, "parts add up");
    }
}
