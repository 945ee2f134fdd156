// y = x * W^T for many rows on cooperative matrices: f16 operands, f32 sums. Specification: src/kernels/matmul_coop.rs.
//
// Four subgroups, two by two; each has ROW_BLOCKS by COL_BLOCKS matrices of 16 x 16. A step takes 32 input features; the loads of the
// next step are under way while this one is multiplied. Control flow is the same in all lanes, which cooperative operations
// demand.

enable f16;
enable wgpu_cooperative_matrix;

const STEP_CELLS = 4u;
// vec4<f16> between rows: 16 bytes more than needed, so that neighbouring ones lie in different banks.
const STRIDE = STEP_CELLS * 2u + 2u;
const Y_STRIDE = 20u;

var<workgroup> x_tile: array<vec4<f16>, TILE_ROWS * STRIDE>;
var<workgroup> w_tile: array<vec4<f16>, TILE_COLS * STRIDE>;
var<workgroup> y_tile: array<f32, 4u * 16u * Y_STRIDE>;  // a matrix of each subgroup

@compute @workgroup_size(128)
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
  var x_next: array<vec4<f32>, X_LOADS>;
  var w_next: array<Cell, W_LOADS>;
  var acc: array<coop_mat16x16<f32, C>, ROW_BLOCKS * COL_BLOCKS>;

  for (var step = 0u; step < par.cells + STEP_CELLS; step += STEP_CELLS) {
    // Features past the end are zeros.
    for (var i = 0u; i < X_LOADS; i++) {  // unroll
      let at = i * 128u + li;
      let vec = step * 2u + at % (STEP_CELLS * 2u);
      let value = x[row_base(first_row + at / (STEP_CELLS * 2u)) + min(vec, par.cells * 2u - 1u)];
      x_next[i] = select(vec4<f32>(0.0), value, vec < par.cells * 2u);
    }
    for (var i = 0u; i < W_LOADS; i++) {  // unroll
      let at = i * 128u + li;
      let cell = step + at / TILE_COLS;
      w_next[i] = weight(min(cell, par.cells - 1u) * par.cols + min(first_col + at % TILE_COLS, par.cols - 1u));
    }
    // The step before.
    if (step > 0u) {
      for (var k = 0u; k < STEP_CELLS / 2u; k++) {
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
    }
    workgroupBarrier();
    for (var i = 0u; i < X_LOADS; i++) {  // unroll
      let at = i * 128u + li;
      x_tile[at / (STEP_CELLS * 2u) * STRIDE + at % (STEP_CELLS * 2u)] = vec4<f16>(x_next[i]);
    }
    for (var i = 0u; i < W_LOADS; i++) {  // unroll
      let at = i * 128u + li;
      let to = at % TILE_COLS * STRIDE + at / TILE_COLS * 2u;
      w_tile[to] = vec4<f16>(w_next[i].low);
      w_tile[to + 1u] = vec4<f16>(w_next[i].high);
    }
    workgroupBarrier();
  }

  let y_rows = subgroup * 16u * Y_STRIDE;
  let y_stride = Y_STRIDE;
  for (var i = 0u; i < ROW_BLOCKS; i++) {  // unroll
    for (var j = 0u; j < COL_BLOCKS; j++) {  // unroll
      let sums = acc[i * COL_BLOCKS + j];
      coopStoreT(sums, &y_tile[y_rows], y_stride);
      workgroupBarrier();
      for (var e = lane; e < 256u; e += 32u) {
        put(
          first_row + row + i * 16u + e / 16u, first_col + col + j * 16u + e % 16u,
          y_tile[y_rows + e / 16u * Y_STRIDE + e % 16u]);
      }
      workgroupBarrier();
    }
  }
}
