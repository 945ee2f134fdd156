// y = silu(gate) * up for rows of [gate, up]. Specification: src/kernels/elementwise.rs. Workgroup = row.

struct GatedActivationParams {
  n_rows: u32,
  width: u32,  // f32 values of gate
}

var<immediate> par: GatedActivationParams;
@group(0) @binding(0) var<storage, read> gate_up: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> y: array<vec4<f32>>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let row = group.y * GRID_WIDTH + group.x;
  if (row >= par.n_rows) { return; }
  let vecs = par.width / 4u;
  for (var i = li; i < vecs; i += WORKGROUP_SIZE) {
    let gate = gate_up[row * vecs * 2u + i];
    let up = gate_up[row * vecs * 2u + vecs + i];
    y[row * vecs + i] = gate / (1.0 + exp(-gate)) * up;
  }
}
