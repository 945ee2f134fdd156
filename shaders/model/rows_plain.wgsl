// Rows of x as they are. Same function set as rows_normed.wgsl.

const NORMED = false;

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;  // [k / 8][column] cells
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

// First vec4 of a row. Rows past the end repeat the last one, and are never written.
fn row_base(row: u32) -> u32 {
  return (par.x_row + min(row, par.n_rows - 1u)) * par.cells * 2u;
}

fn gain(at: u32) -> vec4<f32> {
  return vec4<f32>(1.0);
}
