// Rows of x whose RMS norm is multiplied: the gain while they are read, the scale of a row once its sums are complete.
// Same function set as rows_plain.wgsl.

const NORMED = true;

@group(0) @binding(0) var<storage, read> step: array<u32>;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> gains: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> w: array<vec4<u32>>;  // [k / 8][column] cells
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

// First vec4 of a row. Rows past the end repeat the last one, and are never written.
fn row_base(row: u32) -> u32 {
  let place = par.x_row + min(row, par.n_rows - 1u);
  if (par.list == NO_LIST) { return place * par.cells * 2u; }
  return step[par.list + place] * par.cells * 2u;
}

fn gain(at: u32) -> vec4<f32> {
  return gains[at];
}
