// Rotates the pairs (2i, 2i + 1) of query and key heads by their row's angles, in place.
// Specification: src/kernels/elementwise.rs. Workgroup = row.

struct RopeParams {
  angles: u32,    // first vec2 of the [row][head_dim / 2] table of (cos, sin) in `step`
  n_rows: u32,
  stride: u32,    // f32 values between rows
  n_heads: u32,   // query heads followed by key heads
  half_dim: u32,  // head_dim / 2
}

var<immediate> par: RopeParams;
@group(0) @binding(0) var<storage, read> step: array<vec2<f32>>;
@group(0) @binding(1) var<storage, read_write> x: array<vec2<f32>>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let row = group.y * GRID_WIDTH + group.x;
  if (row >= par.n_rows) { return; }
  for (var i = li; i < par.n_heads * par.half_dim; i += WORKGROUP_SIZE) {
    let turn = step[par.angles + row * par.half_dim + i % par.half_dim];
    let at = row * (par.stride / 2u) + i;
    let pair = x[at];
    x[at] = vec2<f32>(pair.x * turn.x - pair.y * turn.y, pair.x * turn.y + pair.y * turn.x);
  }
}
