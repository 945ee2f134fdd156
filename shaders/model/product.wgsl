// What matmul and matvec share: parameters, bindings, and the product of cells.

struct MatmulParams {
  x_row: u32,    // first row of x
  y_row: u32,    // first row of y
  n_rows: u32,
  cols: u32,     // rows of W
  cells: u32,    // columns of W / 8
  first_col: u32,  // outputs before it are left as they are
}

// Eight input features.
struct Cell {
  low: vec4<f32>,
  high: vec4<f32>,
}

var<immediate> par: MatmulParams;
@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;  // [k / 8][column] cells
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

fn weight(at: u32) -> Cell {
  let bits = w[at];
  return Cell(
    vec4<f32>(unpack2x16float(bits.x), unpack2x16float(bits.y)),
    vec4<f32>(unpack2x16float(bits.z), unpack2x16float(bits.w)));
}

// Rows past the end repeat the last one, and are never written.
fn row_base(row: u32) -> u32 {
  return (par.x_row + min(row, par.n_rows - 1u)) * par.cells * 2u;
}

fn input(base: u32, c: u32) -> Cell {
  return Cell(x[base + c * 2u], x[base + c * 2u + 1u]);
}

fn dot8(a: Cell, b: Cell) -> f32 {
  return dot(a.low, b.low) + dot(a.high, b.high);
}

// One cell of a row against the same cell of four columns.
fn dot8x4(v: Cell, w0: Cell, w1: Cell, w2: Cell, w3: Cell) -> vec4<f32> {
  return vec4<f32>(dot8(v, w0), dot8(v, w1), dot8(v, w2), dot8(v, w3));
}

fn put(row: u32, col: u32, value: f32) {
  if (row < par.n_rows && col < par.cols) {
    let at = (par.y_row + row) * par.cols + col;
    if (ACCUMULATE) { y[at] += value; } else { y[at] = value; }
  }
}
