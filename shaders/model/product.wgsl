// What matmul and matvec share: parameters, the product of four numbers, and what becomes of a sum.

struct MatmulParams {
  x_row: u32,      // first row of x, or of the list of rows
  y_row: u32,      // first row of y
  n_rows: u32,
  cols: u32,       // rows of W
  cells: u32,      // columns of W / 8
  first_col: u32,  // outputs before it are left as they are
  list: u32,       // first u32 of a list of rows of x in `step`; NO_LIST where rows follow each other
  eps: f32,        // of the norm
}

const NO_LIST = 0xffffffffu;

var<immediate> par: MatmulParams;

// Four numbers of a cell of weights: of its first half, or of its second.
fn half_cell(bits: vec4<u32>, half: u32) -> vec4<f32> {
  return vec4<f32>(unpack2x16float(bits[2u * half]), unpack2x16float(bits[2u * half + 1u]));
}

fn fma4(a: vec4<f32>, b: vec4<f32>, sum: f32) -> f32 {
  return fma(a.w, b.w, fma(a.z, b.z, fma(a.y, b.y, fma(a.x, b.x, sum))));
}

// 1 / sqrt(mean + eps) of a row whose squares are summed up.
fn norm_scale(squares: f32) -> f32 {
  return 1.0 / sqrt(squares / f32(par.cells * 8u) + par.eps);
}

fn activated(gate: f32, up: f32) -> f32 {
  return gate / (1.0 + exp(-gate)) * up;
}

// Outputs of a row of y.
fn y_cols() -> u32 {
  return select(par.cols, par.cols / 2u, ACTIVATE);
}

fn put(row: u32, col: u32, value: f32) {
  if (row < par.n_rows && col < y_cols()) {
    let at = (par.y_row + row) * y_cols() + col;
    if (ACCUMULATE) { y[at] += value; } else { y[at] = value; }
  }
}
