// x[row] = embedding[token[row]]. Specification: src/kernels/embed.rs. Workgroup = row.

struct EmbedParams {
  tokens: u32,  // first u32 of the token list in `step`
  n_rows: u32,
  cells: u32,   // hidden_size / 8
  vocab: u32,
}

var<immediate> par: EmbedParams;
@group(0) @binding(0) var<storage, read> step: array<u32>;
@group(0) @binding(1) var<storage, read> embedding: array<vec4<u32>>;  // [hidden_size / 8][vocab] cells
@group(0) @binding(2) var<storage, read_write> x: array<vec4<f32>>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let row = group.y * GRID_WIDTH + group.x;
  if (row >= par.n_rows) { return; }
  let token = step[par.tokens + row];
  for (var c = li; c < par.cells; c += WORKGROUP_SIZE) {
    let bits = embedding[c * par.vocab + token];
    x[(row * par.cells + c) * 2u] = vec4<f32>(unpack2x16float(bits.x), unpack2x16float(bits.y));
    x[(row * par.cells + c) * 2u + 1u] = vec4<f32>(unpack2x16float(bits.z), unpack2x16float(bits.w));
  }
}
