// y = x * W^T for many rows, straight from storage. Specification: src/kernels/matmul.rs.
//
// Workgroup of 8 x 8 lanes = 64 rows by 64 columns; a lane keeps 8 rows by 8 columns in registers, 24 loads of 16 bytes feeding
// 512 multiply-adds. Each output is one chain over k in order, so a row's result does not depend on the rows beside it.

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
  var columns: array<u32, 8>;
  var bases: array<u32, 8>;
  var rows: array<Row, 8>;
  for (var i = 0u; i < 8u; i++) {  // unroll
    columns[i] = min(col + i / 2u * 16u + i % 2u, last);
    bases[i] = row_base(row + i);
  }
  for (var c = 0u; c < par.cells; c++) {
    let at = c * par.cols;
    let g = Cell(gain(c * 2u), gain(c * 2u + 1u));
    var cells: array<Cell, 8>;
    for (var i = 0u; i < 8u; i++) {  // unroll
      cells[i] = weight(at + columns[i]);
    }
    for (var i = 0u; i < 8u; i++) {  // unroll
      let v = input(bases[i], c, g);
      rows[i].low += dot8x4(v, cells[0], cells[1], cells[2], cells[3]);
      rows[i].high += dot8x4(v, cells[4], cells[5], cells[6], cells[7]);
    }
  }
  for (var i = 0u; i < 8u; i++) {  // unroll
    put_row(first, place + i, col, rows[i]);
  }
}
