// Merges the attention states of one (row, KV head) into its output.
// Specification: src/kernels/merge_states.rs. Workgroup = (row, KV head), lane = channel.

struct MergeParams {
  items: u32,     // first vec4 of the work list in `step`
  n_items: u32,
  o_stride: u32,  // f32 values between output rows
}

var<immediate> par: MergeParams;
@group(0) @binding(0) var<storage, read> step: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> state_o: array<f32>;
@group(0) @binding(2) var<storage, read> state_ml: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read_write> o: array<f32>;
@group(0) @binding(4) var<storage, read_write> lse: array<f32>;  // [row][query head], base 2

const EMPTY = -1e30;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let index = group.y * GRID_WIDTH + group.x;
  if (index >= par.n_items) { return; }
  let item = step[par.items + index];
  let row = item.x / NUM_KV_HEADS;
  let first_head = item.x % NUM_KV_HEADS * GROUP_SIZE;
  let n_states = item.z;
  let stride = item.w;
  for (var head = 0u; head < GROUP_SIZE; head++) {
    let first = item.y + head;
    var m = EMPTY;
    for (var i = 0u; i < n_states; i++) { m = max(m, state_ml[first + i * stride].x); }
    var l = 0.0;
    for (var i = 0u; i < n_states; i++) {
      let ml = state_ml[first + i * stride];
      l += exp2(ml.x - m) * ml.y;
    }
    // No token seen: the output is zero and the log-sum-exp is EMPTY.
    let some = l > 0.0;
    for (var channel = li; channel < HEAD_DIM; channel += WORKGROUP_SIZE) {
      var sum = 0.0;
      for (var i = 0u; i < n_states; i++) {
        let state = first + i * stride;
        sum += exp2(state_ml[state].x - m) * state_o[state * HEAD_DIM + channel];
      }
      o[row * par.o_stride + (first_head + head) * HEAD_DIM + channel] = select(0.0, sum / l, some);
    }
    if (li == 0u) {
      lse[row * (NUM_KV_HEADS * GROUP_SIZE) + first_head + head] = select(EMPTY, m + log2(l), some);
    }
  }
}
