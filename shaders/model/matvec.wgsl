// y = x * W^T for few rows. Specification: src/kernels/matmul.rs.
//
// Workgroup = COLUMN_LANES lanes by SLICES slices of k = ROWS rows by COLUMN_LANES * COLS columns. Slice s owns the cells
// s, s + SLICES, ... of k, STEPS of them at a time; its inputs come through workgroup memory. What comes next is on its way
// while this is multiplied. Slices are added as a tree, so a row's result does not depend on how many rows are computed.

const WIDTH = COLUMN_LANES * COLS;
const TILE = STEPS * SLICES;  // cells of a row that are staged at once

// Inputs [row][half of a cell][cell]; then sums [row][four columns][lane] of SUMMED rows at a time.
var<workgroup> pad: array<vec4<f32>, PAD_VECS>;
var<workgroup> squares: array<f32, ROWS * SLICES>;

// The cell of W for a column of the lane; past the end the last one.
fn weight_at(cell: u32, col: u32) -> u32 {
  return min(cell, par.cells - 1u) * par.cols + min(col, par.cols - 1u);
}

fn sum_of(row: u32, column: u32) -> f32 {
  let vec = column / COLUMN_LANES;
  return pad[(row * COL_VECS + vec / 4u) * LANES + column % COLUMN_LANES][vec % 4u];
}

// The sums of SUMMED rows from `row` on, which all lanes have left in `pad`, become outputs.
fn finish(row: u32, first: u32, group: u32, li: u32) {
  for (var half = SLICES / 2u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (li < half * COLUMN_LANES) {
      for (var v = 0u; v < SUMMED * COL_VECS; v++) {
        pad[v * LANES + li] += pad[v * LANES + li + half * COLUMN_LANES];
      }
    }
  }
  workgroupBarrier();
  for (var o = li; o < SUMMED * OUTPUTS; o += LANES) {
    let r = o / OUTPUTS;
    let n = o % OUTPUTS;
    var scale = 1.0;
    if (NORMED) { scale = norm_scale(squares[(first + r) * SLICES]); }
    if (ACTIVATE) {
      let value = activated(sum_of(r, 2u * n) * scale, sum_of(r, 2u * n + 1u) * scale);
      put(row + first + r, group * OUTPUTS + n, value);
    } else {
      put(row + first + r, par.first_col + group * OUTPUTS + n, sum_of(r, n) * scale);
    }
  }
  workgroupBarrier();
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let row = group.y * ROWS;
  let slice = li / COLUMN_LANES;
  let col = par.first_col + group.x * WIDTH + li % COLUMN_LANES;
  // A lane stages the cells of this slice, of the rows `staging`, `staging + COLUMN_LANES`, ...
  let staged_slice = li % SLICES;
  let staging = li / SLICES;
  var bases: array<u32, STAGED_ROWS>;
  var square: array<f32, STAGED_ROWS>;
  var inputs: array<vec4<f32>, STAGED_ROWS * STEPS * 2u>;
  var gain_cells: array<vec4<f32>, STEPS * 2u>;
  var raw: array<vec4<u32>, STEPS * COLS>;
  var acc: array<f32, ROWS * COLS>;
  for (var i = 0u; i < STAGED_ROWS; i++) {  // unroll
    bases[i] = row_base(row + staging + i * COLUMN_LANES);
  }
  for (var u = 0u; u < STEPS; u++) {  // unroll
    for (var j = 0u; j < COLS; j++) {  // unroll
      raw[u * COLS + j] = w[weight_at(u * SLICES + slice, col + j * COLUMN_LANES)];
    }
  }
  for (var first = 0u; first < par.cells; first += TILE) {
    for (var u = 0u; u < STEPS; u++) {  // unroll
      let cell = min(first + u * SLICES + staged_slice, par.cells - 1u) * 2u;
      for (var i = 0u; i < STAGED_ROWS; i++) {  // unroll
        inputs[(u * STAGED_ROWS + i) * 2u] = x[bases[i] + cell];
        inputs[(u * STAGED_ROWS + i) * 2u + 1u] = x[bases[i] + cell + 1u];
      }
      if (NORMED) {
        gain_cells[u * 2u] = gain(cell);
        gain_cells[u * 2u + 1u] = gain(cell + 1u);
      }
    }
    // Nobody reads the tile before any more.
    workgroupBarrier();
    for (var u = 0u; u < STEPS; u++) {  // unroll
      let inside = first + u * SLICES + staged_slice < par.cells;
      for (var i = 0u; i < STAGED_ROWS; i++) {  // unroll
        let r = staging + i * COLUMN_LANES;
        var low = inputs[(u * STAGED_ROWS + i) * 2u];
        var high = inputs[(u * STAGED_ROWS + i) * 2u + 1u];
        if (NORMED) {
          if (inside) { square[i] = fma4(high, high, fma4(low, low, square[i])); }
          low *= gain_cells[u * 2u];
          high *= gain_cells[u * 2u + 1u];
        }
        if (r < ROWS) {
          pad[r * 2u * TILE + u * SLICES + staged_slice] = low;
          pad[(r * 2u + 1u) * TILE + u * SLICES + staged_slice] = high;
        }
      }
    }
    workgroupBarrier();
    for (var u = 0u; u < STEPS; u++) {  // unroll
      let cell = first + u * SLICES + slice;
      for (var h = 0u; h < 2u; h++) {  // unroll
        var columns: array<vec4<f32>, COLS>;
        for (var j = 0u; j < COLS; j++) {  // unroll
          columns[j] = half_cell(raw[u * COLS + j], h);
        }
        if (h == 1u) {
          for (var j = 0u; j < COLS; j++) {  // unroll
            raw[u * COLS + j] = w[weight_at(cell + TILE, col + j * COLUMN_LANES)];
          }
        }
        if (cell < par.cells) {
          for (var r = 0u; r < ROWS; r++) {  // unroll
            let v = pad[(r * 2u + h) * TILE + u * SLICES + slice];
            for (var j = 0u; j < COLS; j++) {  // unroll
              acc[r * COLS + j] = fma4(v, columns[j], acc[r * COLS + j]);
            }
          }
        }
      }
    }
  }
  workgroupBarrier();
  if (NORMED) {
    for (var i = 0u; i < STAGED_ROWS; i++) {  // unroll
      let r = staging + i * COLUMN_LANES;
      if (r < ROWS) { squares[r * SLICES + staged_slice] = square[i]; }
    }
    for (var half = SLICES / 2u; half > 0u; half /= 2u) {
      workgroupBarrier();
      for (var i = li; i < ROWS * half; i += LANES) {
        let at = i / half * SLICES + i % half;
        squares[at] += squares[at + half];
      }
    }
  }
  for (var part = 0u; part < PARTS; part++) {  // unroll
    for (var r = 0u; r < SUMMED; r++) {  // unroll
      for (var v = 0u; v < COL_VECS; v++) {  // unroll
        pad[(r * COL_VECS + v) * LANES + li] = vec4<f32>(
          acc[((part * SUMMED + r) * COL_VECS + v) * 4u], acc[((part * SUMMED + r) * COL_VECS + v) * 4u + 1u],
          acc[((part * SUMMED + r) * COL_VECS + v) * 4u + 2u], acc[((part * SUMMED + r) * COL_VECS + v) * 4u + 3u]);
      }
    }
    finish(row, part * SUMMED, group.x, li);
  }
}
