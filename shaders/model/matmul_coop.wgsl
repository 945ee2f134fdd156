// y = x * W^T for many rows on cooperative matrices: f16 operands, f32 sums. Specification: src/kernels/matmul.rs.
//
// Four subgroups, two by two; each has ROW_BLOCKS by COL_BLOCKS matrices of 16 x 16. A step takes 32 numbers of k; the loads of
// the next step are under way while this one is multiplied. Control flow is the same in all lanes, which cooperative
// operations demand.

enable f16;
enable wgpu_cooperative_matrix;

const LANES = 128u;
const STEP_CELLS = 4u;
const STEP_VECS = STEP_CELLS * 2u;
// vec4<f16> between rows: 16 bytes more than needed, so that neighbouring ones lie in different banks.
const STRIDE = STEP_VECS + 2u;
const Y_STRIDE = 20u;

var<workgroup> x_tile: array<vec4<f16>, TILE_ROWS * STRIDE>;
var<workgroup> w_tile: array<vec4<f16>, TILE_COLS * STRIDE>;
var<workgroup> y_tile: array<f32, 4u * 16u * Y_STRIDE>;  // a matrix of each subgroup
var<workgroup> squares: array<f32, TILE_ROWS * STEP_VECS>;

// What is on its way from storage to a tile.
var<private> inputs: array<vec4<f32>, LEFT_LOADS>;
var<private> bases: array<u32, LEFT_LOADS>;
var<private> square: array<f32, LEFT_LOADS>;
var<private> raw: array<vec4<u32>, RIGHT_LOADS>;

// The step that begins at cell `begin` comes to registers.
fn fetch(begin: u32, first_col: u32, li: u32) {
  for (var i = 0u; i < LEFT_LOADS; i++) {  // unroll
    inputs[i] = x[bases[i] + min(begin * 2u + li % STEP_VECS, par.cells * 2u - 1u)];
  }
  for (var i = 0u; i < RIGHT_LOADS; i++) {  // unroll
    let at = i * LANES + li;
    let cell = min(begin + at / TILE_COLS, par.cells - 1u);
    raw[i] = w[cell * par.cols + min(first_col + at % TILE_COLS, par.cols - 1u)];
  }
}

// From registers to the tiles, as f16. Past the end of k zeros.
fn store(begin: u32, li: u32) {
  let vec = begin * 2u + li % STEP_VECS;
  for (var i = 0u; i < LEFT_LOADS; i++) {  // unroll
    var v = select(vec4<f32>(0.0), inputs[i], vec < par.cells * 2u);
    if (NORMED) {
      square[i] = fma4(v, v, square[i]);
      v *= gain(min(vec, par.cells * 2u - 1u));
    }
    x_tile[(i * LANES + li) / STEP_VECS * STRIDE + li % STEP_VECS] = vec4<f16>(v);
  }
  for (var i = 0u; i < RIGHT_LOADS; i++) {  // unroll
    let at = i * LANES + li;
    let to = at % TILE_COLS * STRIDE + at / TILE_COLS * 2u;
    w_tile[to] = vec4<f16>(half_cell(raw[i], 0u));
    w_tile[to + 1u] = vec4<f16>(half_cell(raw[i], 1u));
  }
}

// One row's scale: 1, or that of its norm.
fn row_scale(place: u32) -> f32 {
  if (!NORMED) { return 1.0; }
  var sum = 0.0;
  for (var i = 0u; i < STEP_VECS; i++) { sum += squares[place * STEP_VECS + i]; }
  return norm_scale(sum);
}

@compute @workgroup_size(LANES)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) li: u32,
  @builtin(subgroup_id) subgroup: u32,
  @builtin(subgroup_invocation_id) lane: u32,
) {
  let first_row = group.y * TILE_ROWS;
  let first_col = par.first_col + group.x * TILE_COLS;
  let row = subgroup / 2u * (ROW_BLOCKS * 16u);  // of the subgroup in the tile
  let col = subgroup % 2u * (COL_BLOCKS * 16u);
  let stride = STRIDE;
  var acc: array<coop_mat16x16<f32, C>, ROW_BLOCKS * COL_BLOCKS>;
  for (var i = 0u; i < LEFT_LOADS; i++) {  // unroll
    bases[i] = row_base(first_row + (i * LANES + li) / STEP_VECS);
  }
  fetch(0u, first_col, li);
  store(0u, li);
  workgroupBarrier();
  for (var begin = 0u; begin < par.cells; begin += STEP_CELLS) {
    // Past the last step zeros, which nobody multiplies.
    fetch(begin + STEP_CELLS, first_col, li);
    for (var k = 0u; k < 2u; k++) {  // unroll
      var x_part: array<coop_mat16x16<f16, A>, ROW_BLOCKS>;
      for (var i = 0u; i < ROW_BLOCKS; i++) {  // unroll
        x_part[i] = coopLoadT<coop_mat16x16<f16, A>>(&x_tile[(row + i * 16u) * STRIDE + k * 4u], stride);
      }
      for (var j = 0u; j < COL_BLOCKS; j++) {  // unroll
        let w_part = coopLoad<coop_mat16x16<f16, B>>(&w_tile[(col + j * 16u) * STRIDE + k * 4u], stride);
        for (var i = 0u; i < ROW_BLOCKS; i++) {  // unroll
          acc[i * COL_BLOCKS + j] = coopMultiplyAdd(x_part[i], w_part, acc[i * COL_BLOCKS + j]);
        }
      }
    }
    workgroupBarrier();
    store(begin + STEP_CELLS, li);
    workgroupBarrier();
  }

  if (NORMED) {
    for (var i = 0u; i < LEFT_LOADS; i++) {  // unroll
      squares[i * LANES + li] = square[i];
    }
  }
  let y_rows = subgroup * 16u * Y_STRIDE;
  let y_stride = Y_STRIDE;
  for (var i = 0u; i < ROW_BLOCKS; i++) {  // unroll
    for (var j = 0u; j < COL_BLOCKS; j++) {  // unroll
      let sums = acc[i * COL_BLOCKS + j];
      coopStoreT(sums, &y_tile[y_rows], y_stride);
      workgroupBarrier();
      // A lane has eight neighbouring columns of a row.
      let place = row + i * 16u + lane / 2u;
      let scale = row_scale(place);
      let first = y_rows + lane / 2u * Y_STRIDE + lane % 2u * 8u;
      let to = first_col + col + j * 16u + lane % 2u * 8u;
      for (var e = 0u; e < 8u; e += 2u) {
        let a = y_tile[first + e] * scale;
        let b = y_tile[first + e + 1u] * scale;
        if (ACTIVATE) {
          put(first_row + place, (to + e) / 2u, activated(a, b));
        } else {
          put(first_row + place, to + e, a);
          put(first_row + place, to + e + 1u, b);
        }
      }
      workgroupBarrier();
    }
  }
}
