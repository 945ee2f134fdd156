// y = x * W^T for many rows. Specification: src/kernels/matmul.rs.
//
// Workgroup = TILE_ROWS rows by TILE_COLS columns; a lane keeps 8 rows by 8 columns in registers, two runs of 4 each. DEPTH
// numbers of k at a time pass through workgroup memory, the next ones being on their way while these are multiplied. Each
// output is one chain over k in order, so a row's result does not depend on the rows beside it.

const COLUMN_LANES = TILE_COLS / 8u;
const ROW_VECS = TILE_ROWS / 4u + 1u;  // one more, so that lanes that store a column of rows meet different banks
const COL_VECS = TILE_COLS / 4u;
const QUARTERS = DEPTH / 4u;

var<workgroup> left: array<vec4<f32>, BUFFERS * DEPTH * ROW_VECS>;   // [buffer][k][four rows]
var<workgroup> right: array<vec4<f32>, BUFFERS * DEPTH * COL_VECS>;  // [buffer][k][four columns]
var<workgroup> squares: array<f32, TILE_ROWS * QUARTERS>;

var<private> inputs: array<vec4<f32>, LEFT_LOADS>;
var<private> bases: array<u32, LEFT_LOADS>;
var<private> square: array<f32, LEFT_LOADS>;
var<private> raw: array<vec4<u32>, RIGHT_LOADS>;

// What is DEPTH * tile numbers into k comes to registers; past the end of k zeros.
fn fetch(tile: u32, col: u32, li: u32) {
  for (var i = 0u; i < LEFT_LOADS; i++) {  // unroll
    let at = tile * QUARTERS + (li + i * LANES) % QUARTERS;
    inputs[i] = vec4<f32>(0.0);
    if (at < par.cells * 2u) {
      inputs[i] = x[bases[i] + at];
    }
  }
  for (var i = 0u; i < RIGHT_LOADS; i++) {  // unroll
    let cell = tile * (DEPTH / 8u) + (li + i * LANES) / TILE_COLS;
    raw[i] = vec4<u32>(0u);
    if (cell < par.cells) {
      raw[i] = w[cell * par.cols + min(col + (li + i * LANES) % TILE_COLS, par.cols - 1u)];
    }
  }
}

// From registers to a buffer.
fn store(tile: u32, li: u32) {
  let buffer = tile % BUFFERS * DEPTH;
  for (var i = 0u; i < LEFT_LOADS; i++) {  // unroll
    let quarter = (li + i * LANES) % QUARTERS;
    let row = (li + i * LANES) / QUARTERS;
    var v = inputs[i];
    if (NORMED) {
      square[i] = fma4(v, v, square[i]);
      v *= gain(min(tile * QUARTERS + quarter, par.cells * 2u - 1u));
    }
    for (var k = 0u; k < 4u; k++) {  // unroll
      left[(buffer + quarter * 4u + k) * ROW_VECS + row / 4u][row % 4u] = v[k];
    }
  }
  for (var i = 0u; i < RIGHT_LOADS; i++) {  // unroll
    let at = li + i * LANES;
    if (at < TILE_COLS * (DEPTH / 8u)) {
      let low = half_cell(raw[i], 0u);
      let high = half_cell(raw[i], 1u);
      let first = buffer + at / TILE_COLS * 8u;
      let column = at % TILE_COLS;
      for (var k = 0u; k < 4u; k++) {  // unroll
        right[(first + k) * COL_VECS + column / 4u][column % 4u] = low[k];
        right[(first + 4u + k) * COL_VECS + column / 4u][column % 4u] = high[k];
      }
    }
  }
}

fn put_vec(row: u32, col: u32, v: vec4<f32>) {
  if (ACTIVATE) {
    put(row, col / 2u, activated(v.x, v.y));
    put(row, col / 2u + 1u, activated(v.z, v.w));
  } else {
    put(row, col, v.x);
    put(row, col + 1u, v.y);
    put(row, col + 2u, v.z);
    put(row, col + 3u, v.w);
  }
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let row = group.y * TILE_ROWS;
  let col = par.first_col + group.x * TILE_COLS;
  let lane_row = li / COLUMN_LANES;
  let lane_col = li % COLUMN_LANES;
  for (var i = 0u; i < LEFT_LOADS; i++) {  // unroll
    bases[i] = row_base(row + (li + i * LANES) / QUARTERS);
  }
  var acc: array<vec4<f32>, 16>;  // [row][half of the columns]
  let tiles = (par.cells * 8u + DEPTH - 1u) / DEPTH;
  fetch(0u, col, li);
  store(0u, li);
  workgroupBarrier();
  for (var tile = 0u; tile < tiles; tile++) {
    // Past the last tile zeros, which nobody reads.
    fetch(tile + 1u, col, li);
    let buffer = tile % BUFFERS * DEPTH;
    for (var k = 0u; k < DEPTH; k++) {  // unroll
      let rows_low = left[(buffer + k) * ROW_VECS + lane_row];
      let rows_high = left[(buffer + k) * ROW_VECS + lane_row + TILE_ROWS / 8u];
      let cols_low = right[(buffer + k) * COL_VECS + lane_col];
      let cols_high = right[(buffer + k) * COL_VECS + lane_col + TILE_COLS / 8u];
      for (var r = 0u; r < 4u; r++) {  // unroll
        acc[2u * r] = fma(vec4<f32>(rows_low[r]), cols_low, acc[2u * r]);
        acc[2u * r + 1u] = fma(vec4<f32>(rows_low[r]), cols_high, acc[2u * r + 1u]);
        acc[2u * r + 8u] = fma(vec4<f32>(rows_high[r]), cols_low, acc[2u * r + 8u]);
        acc[2u * r + 9u] = fma(vec4<f32>(rows_high[r]), cols_high, acc[2u * r + 9u]);
      }
    }
    if (BUFFERS == 1u) { workgroupBarrier(); }
    store(tile + 1u, li);
    workgroupBarrier();
  }
  if (NORMED) {
    for (var i = 0u; i < LEFT_LOADS; i++) {  // unroll
      squares[li + i * LANES] = square[i];
    }
    workgroupBarrier();
  }
  for (var r = 0u; r < 8u; r++) {  // unroll
    let place = lane_row * 4u + r % 4u + r / 4u * (TILE_ROWS / 2u);
    var scale = 1.0;
    if (NORMED) {
      var sum = 0.0;
      for (var q = 0u; q < QUARTERS; q++) { sum += squares[place * QUARTERS + q]; }
      scale = norm_scale(sum);
    }
    put_vec(row + place, col + lane_col * 4u, acc[2u * r] * scale);
    put_vec(row + place, col + lane_col * 4u + TILE_COLS / 2u, acc[2u * r + 1u] * scale);
  }
}
