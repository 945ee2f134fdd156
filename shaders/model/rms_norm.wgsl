// y[row] = weight * x[from(row)] / sqrt(mean(x^2) + eps). Specification: src/kernels/elementwise.rs. Workgroup = row.

struct RmsNormParams {
  rows: u32,   // first u32 of the list of source rows in `step`; ignored when identity is 1
  identity: u32,
  n_rows: u32,
  width: u32,  // f32 values of a row
  eps: f32,
}

var<immediate> par: RmsNormParams;
@group(0) @binding(0) var<storage, read> step: array<u32>;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> weight: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, lanes: Lanes) {
  let row = group.y * GRID_WIDTH + group.x;
  if (row >= par.n_rows) { return; }
  var source = row;
  if (par.identity == 0u) { source = step[par.rows + row]; }
  let vecs = par.width / 4u;
  var squares = vec4<f32>(0.0);
  for (var i = lanes.index; i < vecs; i += WORKGROUP_SIZE) {
    let v = x[source * vecs + i];
    squares += v * v;
  }
  let total = lanes_sum(lanes, squares);
  let mean = (total.x + total.y + total.z + total.w) / f32(par.width);
  let scale = 1.0 / sqrt(mean + par.eps);
  for (var i = lanes.index; i < vecs; i += WORKGROUP_SIZE) {
    y[row * vecs + i] = x[source * vecs + i] * scale * weight[i];
  }
}
