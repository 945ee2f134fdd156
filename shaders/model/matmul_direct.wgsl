// y = x * W^T for many rows, straight from storage. Specification: src/kernels/matmul.rs.
//
// Workgroup of 8 x 8 lanes = 64 rows by 64 columns; a lane keeps 8 rows by 8 columns in registers, 24 loads of 16 bytes feeding
// 512 multiply-adds. The tile is written out because a loop over an array of accumulators is left in memory by drivers
// that bound loops. Each output is one chain over k in order, so a row's result does not depend on the rows beside it.

// Eight numbers of k.
struct Cell {
  low: vec4<f32>,
  high: vec4<f32>,
}

// Columns come in pairs, 16 apart.
struct Row {
  low: vec4<f32>,   // first and second pair of the lane
  high: vec4<f32>,  // third and fourth
}

// Sums of squares of the workgroup's rows.
var<workgroup> squares: array<f32, 64>;

fn weight(at: u32) -> Cell {
  let bits = w[at];
  return Cell(half_cell(bits, 0u), half_cell(bits, 1u));
}

fn input(base: u32, c: u32, gains: Cell) -> Cell {
  if (NORMED) { return Cell(x[base + c * 2u] * gains.low, x[base + c * 2u + 1u] * gains.high); }
  return Cell(x[base + c * 2u], x[base + c * 2u + 1u]);
}

fn dot8(a: Cell, b: Cell) -> f32 {
  return dot(a.low, b.low) + dot(a.high, b.high);
}

// One cell of a row against the same cell of four columns.
fn dot8x4(v: Cell, w0: Cell, w1: Cell, w2: Cell, w3: Cell) -> vec4<f32> {
  return vec4<f32>(dot8(v, w0), dot8(v, w1), dot8(v, w2), dot8(v, w3));
}

fn put_pair(row: u32, col: u32, pair: vec2<f32>) {
  if (ACTIVATE) {
    put(row, col / 2u, activated(pair.x, pair.y));
  } else {
    put(row, col, pair.x);
    put(row, col + 1u, pair.y);
  }
}

// `place` is the row in the workgroup.
fn put_row(row: u32, place: u32, col: u32, r: Row) {
  var scale = 1.0;
  if (NORMED) { scale = norm_scale(squares[place]); }
  put_pair(row + place, col, r.low.xy * scale);
  put_pair(row + place, col + 16u, r.low.zw * scale);
  put_pair(row + place, col + 32u, r.high.xy * scale);
  put_pair(row + place, col + 48u, r.high.zw * scale);
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let first = group.y * 64u;
  if (NORMED) {
    let base = row_base(first + li);
    var sum = vec4<f32>(0.0);
    for (var i = 0u; i < par.cells * 2u; i++) {
      let v = x[base + i];
      sum += v * v;
    }
    squares[li] = (sum.x + sum.y) + (sum.z + sum.w);
    workgroupBarrier();
  }
  let place = li / 8u * 8u;
  let row = first + place;
  let col = par.first_col + group.x * 64u + li % 8u * 2u;
  let last = par.cols - 1u;
  let n0 = min(col, last); let n1 = min(col + 1u, last); let n2 = min(col + 16u, last); let n3 = min(col + 17u, last);
  let n4 = min(col + 32u, last); let n5 = min(col + 33u, last); let n6 = min(col + 48u, last);
  let n7 = min(col + 49u, last);
  let b0 = row_base(row); let b1 = row_base(row + 1u); let b2 = row_base(row + 2u); let b3 = row_base(row + 3u);
  let b4 = row_base(row + 4u); let b5 = row_base(row + 5u); let b6 = row_base(row + 6u); let b7 = row_base(row + 7u);
  var r0: Row; var r1: Row; var r2: Row; var r3: Row; var r4: Row; var r5: Row; var r6: Row; var r7: Row;
  for (var c = 0u; c < par.cells; c++) {
    let at = c * par.cols;
    let g = Cell(gain(c * 2u), gain(c * 2u + 1u));
    let w0 = weight(at + n0); let w1 = weight(at + n1); let w2 = weight(at + n2); let w3 = weight(at + n3);
    let w4 = weight(at + n4); let w5 = weight(at + n5); let w6 = weight(at + n6); let w7 = weight(at + n7);
    let x0 = input(b0, c, g);
    r0.low += dot8x4(x0, w0, w1, w2, w3);
    r0.high += dot8x4(x0, w4, w5, w6, w7);
    let x1 = input(b1, c, g);
    r1.low += dot8x4(x1, w0, w1, w2, w3);
    r1.high += dot8x4(x1, w4, w5, w6, w7);
    let x2 = input(b2, c, g);
    r2.low += dot8x4(x2, w0, w1, w2, w3);
    r2.high += dot8x4(x2, w4, w5, w6, w7);
    let x3 = input(b3, c, g);
    r3.low += dot8x4(x3, w0, w1, w2, w3);
    r3.high += dot8x4(x3, w4, w5, w6, w7);
    let x4 = input(b4, c, g);
    r4.low += dot8x4(x4, w0, w1, w2, w3);
    r4.high += dot8x4(x4, w4, w5, w6, w7);
    let x5 = input(b5, c, g);
    r5.low += dot8x4(x5, w0, w1, w2, w3);
    r5.high += dot8x4(x5, w4, w5, w6, w7);
    let x6 = input(b6, c, g);
    r6.low += dot8x4(x6, w0, w1, w2, w3);
    r6.high += dot8x4(x6, w4, w5, w6, w7);
    let x7 = input(b7, c, g);
    r7.low += dot8x4(x7, w0, w1, w2, w3);
    r7.high += dot8x4(x7, w4, w5, w6, w7);
  }
  put_row(first, place, col, r0); put_row(first, place + 1u, col, r1);
  put_row(first, place + 2u, col, r2); put_row(first, place + 3u, col, r3);
  put_row(first, place + 4u, col, r4); put_row(first, place + 5u, col, r5);
  put_row(first, place + 6u, col, r6); put_row(first, place + 7u, col, r7);
}
