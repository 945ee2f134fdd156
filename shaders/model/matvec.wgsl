// y = x * W^T for few rows. Specification: src/kernels/matmul.rs.
//
// Workgroup = SLICES slices of k by ROW_GROUPS groups of rows by COLUMN_LANES lanes = ROWS rows by WIDTH columns. A lane has
// LANE_ROWS rows by COLS columns in registers, of one slice. Slice s owns the cells s, s + SLICES, ... of k, STEPS of them at a
// time; their inputs come through workgroup memory. While a tile is multiplied, the inputs and weights of the next are on their
// way. Slices are added in an order that they alone decide, so a row's result does not depend on how many rows are computed.

const WIDTH = COLUMN_LANES * COLS;
const TEAMS = SLICES * ROW_GROUPS;    // lanes beside each other that read the same inputs
const TILE = STEPS * SLICES;          // cells of a row that are staged at once
const BUFFER = 2u * LANE_ROWS * STEPS * TEAMS;
const HALVES = 2u * SLICES;           // half cells of a row that are staged at once
const SQUARES = 8u;                   // sums of squares that are left of a row

// Inputs [buffer][row of a lane][half of a cell][step][team]; then sums [row of a lane][four columns][lane], of SUMMED rows of a
// lane at a time.
var<workgroup> pad: array<vec4<f32>, PAD_VECS>;
var<workgroup> squares: array<f32, ROWS * HALVES>;

fn sum_of(row: u32, column: u32) -> f32 {
  let vec = column / COLUMN_LANES;
  let at = (row / ROW_GROUPS * COL_VECS + vec / 4u) * LANES + row % ROW_GROUPS * COLUMN_LANES + column % COLUMN_LANES;
  return pad[at][vec % 4u];
}

// 1 / sqrt(mean + eps) of a row.
fn scale_of(row: u32) -> f32 {
  var sum = squares[row * HALVES];
  for (var i = 1u; i < SQUARES; i++) { sum += squares[row * HALVES + i]; }
  return norm_scale(sum);
}

// The sums of SUMMED rows of each lane, which all lanes have left in `pad`, become outputs. `first` is the first of these rows
// in the first group.
fn finish(row: u32, first: u32, group: u32, li: u32) {
  // Up to four slices are added at once, so that there are few barriers.
  for (var left = SLICES; left > 1u;) {
    let fan = min(left, 4u);
    left /= fan;
    let n = left * ROW_GROUPS * COLUMN_LANES;
    workgroupBarrier();
    for (var i = li; i < SUMMED * COL_VECS * n; i += LANES) {
      let at = i / n * LANES + i % n;
      var sum = pad[at] + pad[at + n];
      for (var f = 2u; f < fan; f++) { sum += pad[at + f * n]; }
      pad[at] = sum;
    }
  }
  workgroupBarrier();
  for (var o = li; o < SUMMED * ROW_GROUPS * OUTPUTS; o += LANES) {
    let r = o / OUTPUTS;
    let n = o % OUTPUTS;
    let of_group = r % ROW_GROUPS * LANE_ROWS + first + r / ROW_GROUPS;
    var scale = 1.0;
    if (NORMED) { scale = scale_of(of_group); }
    if (ACTIVATE) {
      let value = activated(sum_of(r, 2u * n) * scale, sum_of(r, 2u * n + 1u) * scale);
      put(row + of_group, group * OUTPUTS + n, value);
    } else {
      put(row + of_group, par.first_col + group * OUTPUTS + n, sum_of(r, n) * scale);
    }
  }
  workgroupBarrier();
}

// Weights past the last column are those of the next cell, and nobody uses them.
fn fetch_weights(raw: ptr<function, array<vec4<u32>, STEPS * COLS>>, step: u32, cell: u32, col: u32) {
  if (cell < par.cells) {
    for (var j = 0u; j < COLS; j++) {  // unroll
      (*raw)[step * COLS + j] = w[cell * par.cols + col + j * COLUMN_LANES];
    }
  }
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let row = group.y * ROWS;
  let team = li / COLUMN_LANES;
  let slice = team / ROW_GROUPS;
  let col = par.first_col + group.x * WIDTH + li % COLUMN_LANES;
  // A lane stages a half cell of one slice, of the rows `staging`, `staging + STAGERS`, ...
  let half_cell_at = li % HALVES;
  let staging = li / HALVES;
  let staged_at = half_cell_at % 2u * STEPS * TEAMS + half_cell_at / 2u * ROW_GROUPS;
  var bases: array<u32, STAGED_ROWS>;
  var square: array<f32, STAGED_ROWS>;
  var inputs: array<vec4<f32>, STAGED_ROWS * STEPS>;
  var gains_of: array<vec4<f32>, STEPS>;
  var raw: array<vec4<u32>, STEPS * COLS>;
  var acc: array<f32, LANE_ROWS * COLS>;
  for (var u = 0u; u < STEPS; u++) { fetch_weights(&raw, u, u * SLICES + slice, col); }  // unroll
  for (var i = 0u; i < STAGED_ROWS; i++) {  // unroll
    bases[i] = row_base(row + staging + i * STAGERS);
  }
  for (var u = 0u; u < STEPS; u++) {  // unroll
    let at = u * HALVES + half_cell_at;
    if (at < 2u * par.cells && staging < ROWS) {
      for (var i = 0u; i < STAGED_ROWS; i++) { inputs[u * STAGED_ROWS + i] = x[bases[i] + at]; }  // unroll
      if (NORMED) { gains_of[u] = gain(at); }
    }
  }
  var buffer = 0u;
  for (var first = 0u; first < par.cells; first += TILE) {
    if (BUFFERS == 1u) {
      // Nobody reads the tile before any more.
      workgroupBarrier();
    }
    for (var u = 0u; u < STEPS; u++) {  // unroll
      let inside = first * 2u + u * HALVES + half_cell_at < 2u * par.cells;
      for (var i = 0u; i < STAGED_ROWS; i++) {  // unroll
        let r = staging + i * STAGERS;
        var value = inputs[u * STAGED_ROWS + i];
        if (NORMED) {
          if (inside) { square[i] = fma4(value, value, square[i]); }
          value *= gains_of[u];
        }
        if (r < ROWS) {
          pad[buffer + r % LANE_ROWS * 2u * STEPS * TEAMS + staged_at + u * TEAMS + r / LANE_ROWS] = value;
        }
      }
    }
    workgroupBarrier();
    for (var u = 0u; u < STEPS; u++) {  // unroll
      let at = (first + TILE) * 2u + u * HALVES + half_cell_at;
      if (at < 2u * par.cells && staging < ROWS) {
        for (var i = 0u; i < STAGED_ROWS; i++) { inputs[u * STAGED_ROWS + i] = x[bases[i] + at]; }  // unroll
        if (NORMED) { gains_of[u] = gain(at); }
      }
    }
    for (var u = 0u; u < STEPS; u++) {  // unroll
      let cell = first + u * SLICES + slice;
      for (var h = 0u; h < 2u; h++) {  // unroll
        var columns: array<vec4<f32>, COLS>;
        for (var j = 0u; j < COLS; j++) {  // unroll
          columns[j] = half_cell(raw[u * COLS + j], h);
        }
        if (h == 1u) { fetch_weights(&raw, u, cell + TILE, col); }
        if (cell < par.cells) {
          for (var r = 0u; r < LANE_ROWS; r++) {  // unroll
            let v = pad[buffer + ((r * 2u + h) * STEPS + u) * TEAMS + team];
            for (var j = 0u; j < COLS; j++) {  // unroll
              acc[r * COLS + j] = fma4(v, columns[j], acc[r * COLS + j]);
            }
          }
        }
      }
    }
    if (BUFFERS == 2u) { buffer = BUFFER - buffer; }
  }
  workgroupBarrier();
  if (NORMED) {
    for (var i = 0u; i < STAGED_ROWS; i++) {  // unroll
      let r = staging + i * STAGERS;
      if (r < ROWS) { squares[r * HALVES + half_cell_at] = square[i]; }
    }
    workgroupBarrier();
    for (var i = li; i < ROWS * SQUARES; i += LANES) {
      let at = i / SQUARES * HALVES + i % SQUARES;
      for (var s = SQUARES; s < HALVES; s += SQUARES) { squares[at] += squares[at + s]; }
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
