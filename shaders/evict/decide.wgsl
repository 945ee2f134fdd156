// What tokens are ranked by: raw scores, averaged over neighbours, and over the heads that decide together; or chance.
// Specification: src/kernels/select.rs. Workgroup = one work item = a run of tokens of one list; lane = token.

struct DecideParams {
  items: u32,    // first vec4 of the work list in `step`
  n_items: u32,
  kernel: u32,   // tokens that are averaged over, odd
  n_share: u32,  // lists that decide together
  share_stride: u32,  // raw scores between them
  random: u32,   // 1: scores are a hash of (seed, list, token)
  seed: u32,
}

var<immediate> par: DecideParams;
@group(0) @binding(0) var<storage, read> step: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> raw: array<f32>;
@group(0) @binding(2) var<storage, read_write> decided: array<f32>;

// Same as src/compression/token/random.rs.
fn scramble(state: u32, word: u32) -> u32 {
  let mixed = (state ^ word) * 747796405u + 2891336453u;
  let turned = ((mixed >> ((mixed >> 28u) + 4u)) ^ mixed) * 277803737u;
  return (turned >> 22u) ^ turned;
}

fn chance(list: u32, token: u32) -> f32 {
  return f32(scramble(scramble(scramble(par.seed, 0x9e3779b9u), list), token) >> 8u) / 16777216.0;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let item = group.y * GRID_WIDTH + group.x;
  if (item >= par.n_items) { return; }
  let a = step[par.items + item * 2u];
  let b = step[par.items + item * 2u + 1u];
  let raw_at = a.x;    // of the first list that decides
  let n_tokens = a.y;  // of the list
  let out = a.z;
  let list = a.w;
  for (var i = b.x + li; i < min(b.x + b.y, n_tokens); i += WORKGROUP_SIZE) {
    var score = chance(list, i);
    if (par.random == 0u) {
      var sum = 0.0;
      for (var s = 0u; s < par.n_share; s++) {
        for (var k = 0u; k < par.kernel; k++) {
          let at = i + k;
          if (at >= par.kernel / 2u && at - par.kernel / 2u < n_tokens) {
            sum += raw[raw_at + s * par.share_stride + at - par.kernel / 2u];
          }
        }
      }
      score = sum / f32(par.kernel * par.n_share);
    }
    decided[out + i] = score;
  }
}
