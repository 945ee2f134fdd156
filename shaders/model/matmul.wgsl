// y = x * W^T for many rows. Specification: src/kernels/matmul.rs.
//
// Workgroup of 8 x 8 lanes = 64 rows by 64 columns; a lane keeps 8 rows by 8 columns in registers, straight from
// storage: 24 loads of 16 bytes feed 512 multiply-adds. The tile is written out because a loop over an array of
// accumulators is left in memory by drivers that bound loops. Each output is one chain over k in order, so a row's
// result does not depend on the rows beside it.

struct Row {
  low: vec4<f32>,   // columns 0 to 3 of the lane
  high: vec4<f32>,  // columns 4 to 7
}

fn put_row(row: u32, col: u32, r: Row) {
  put(row, col, r.low.x); put(row, col + 8u, r.low.y); put(row, col + 16u, r.low.z); put(row, col + 24u, r.low.w);
  put(row, col + 32u, r.high.x); put(row, col + 40u, r.high.y);
  put(row, col + 48u, r.high.z); put(row, col + 56u, r.high.w);
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let row = group.y * 64u + li / 8u * 8u;
  let col = par.first_col + group.x * 64u + li % 8u;
  let last = par.cols - 1u;
  let n0 = min(col, last); let n1 = min(col + 8u, last); let n2 = min(col + 16u, last); let n3 = min(col + 24u, last);
  let n4 = min(col + 32u, last); let n5 = min(col + 40u, last); let n6 = min(col + 48u, last);
  let n7 = min(col + 56u, last);
  let b0 = row_base(row); let b1 = row_base(row + 1u); let b2 = row_base(row + 2u); let b3 = row_base(row + 3u);
  let b4 = row_base(row + 4u); let b5 = row_base(row + 5u); let b6 = row_base(row + 6u); let b7 = row_base(row + 7u);
  var r0: Row; var r1: Row; var r2: Row; var r3: Row; var r4: Row; var r5: Row; var r6: Row; var r7: Row;
  for (var c = 0u; c < par.cells; c++) {
    let at = c * par.cols;
    let w0 = weight(at + n0); let w1 = weight(at + n1); let w2 = weight(at + n2); let w3 = weight(at + n3);
    let w4 = weight(at + n4); let w5 = weight(at + n5); let w6 = weight(at + n6); let w7 = weight(at + n7);
    let x0 = input(b0, c);
    r0.low += dot8x4(x0, w0, w1, w2, w3);
    r0.high += dot8x4(x0, w4, w5, w6, w7);
    let x1 = input(b1, c);
    r1.low += dot8x4(x1, w0, w1, w2, w3);
    r1.high += dot8x4(x1, w4, w5, w6, w7);
    let x2 = input(b2, c);
    r2.low += dot8x4(x2, w0, w1, w2, w3);
    r2.high += dot8x4(x2, w4, w5, w6, w7);
    let x3 = input(b3, c);
    r3.low += dot8x4(x3, w0, w1, w2, w3);
    r3.high += dot8x4(x3, w4, w5, w6, w7);
    let x4 = input(b4, c);
    r4.low += dot8x4(x4, w0, w1, w2, w3);
    r4.high += dot8x4(x4, w4, w5, w6, w7);
    let x5 = input(b5, c);
    r5.low += dot8x4(x5, w0, w1, w2, w3);
    r5.high += dot8x4(x5, w4, w5, w6, w7);
    let x6 = input(b6, c);
    r6.low += dot8x4(x6, w0, w1, w2, w3);
    r6.high += dot8x4(x6, w4, w5, w6, w7);
    let x7 = input(b7, c);
    r7.low += dot8x4(x7, w0, w1, w2, w3);
    r7.high += dot8x4(x7, w4, w5, w6, w7);
  }
  put_row(row, col, r0); put_row(row + 1u, col, r1); put_row(row + 2u, col, r2); put_row(row + 3u, col, r3);
  put_row(row + 4u, col, r4); put_row(row + 5u, col, r5); put_row(row + 6u, col, r6); put_row(row + 7u, col, r7);
}
