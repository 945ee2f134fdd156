// y = x * W^T for few rows. Specification: src/kernels/matmul.rs.
//
// Workgroup of 16 column lanes x 4 slices of k = ROWS rows (1 or 4) by 64 columns; a lane keeps ROWS rows by 4 columns.
// The slices are added in a fixed order, so a row's result does not depend on how many rows are computed.

const COL_LANES = 16u;
const SLICES = 4u;

var<workgroup> part: array<vec4<f32>, ROWS * 64u>;  // [row][slice][column lane], four columns each

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let row = group.y * ROWS;
  let lane = li % COL_LANES;
  let slice = li / COL_LANES;
  let col = group.x * 64u + lane;
  let last = par.cols - 1u;
  let n0 = min(col, last); let n1 = min(col + 16u, last); let n2 = min(col + 32u, last); let n3 = min(col + 48u, last);
  let b0 = row_base(row);
  let b1 = row_base(row + 1u);
  let b2 = row_base(row + 2u);
  let b3 = row_base(row + 3u);
  var r0 = vec4<f32>(0.0); var r1 = vec4<f32>(0.0); var r2 = vec4<f32>(0.0); var r3 = vec4<f32>(0.0);
  for (var c = slice; c < par.cells; c += SLICES) {
    let at = c * par.cols;
    let w0 = weight(at + n0); let w1 = weight(at + n1); let w2 = weight(at + n2); let w3 = weight(at + n3);
    r0 += dot8x4(input(b0, c), w0, w1, w2, w3);
    if (ROWS > 1u) {
      r1 += dot8x4(input(b1, c), w0, w1, w2, w3);
      r2 += dot8x4(input(b2, c), w0, w1, w2, w3);
      r3 += dot8x4(input(b3, c), w0, w1, w2, w3);
    }
  }
  part[li] = r0;
  if (ROWS > 1u) {
    part[64u % (ROWS * 64u) + li] = r1;
    part[128u % (ROWS * 64u) + li] = r2;
    part[192u % (ROWS * 64u) + li] = r3;
  }
  workgroupBarrier();
  for (var i = li; i < ROWS * COL_LANES; i += 64u) {
    let r = i / COL_LANES;
    let at = r * 64u + i % COL_LANES;
    let sum = (part[at] + part[at + COL_LANES]) + (part[at + 2u * COL_LANES] + part[at + 3u * COL_LANES]);
    let to = group.x * 64u + i % COL_LANES;
    put(row + r, to, sum.x); put(row + r, to + 16u, sum.y); put(row + r, to + 32u, sum.z); put(row + r, to + 48u, sum.w);
  }
}
