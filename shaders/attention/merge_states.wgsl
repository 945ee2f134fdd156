// Merges the attention states of one (row, query head) into its output.
// Specification: src/kernels/merge_states.rs.
//
// Workgroup = (row, query head). First lanes own states: maximum and sum are joined in a tree. Then a lane owns four channels and
// a stripe of states, four of which are asked for at once; stripes are added in order at the end.

struct MergeParams {
  items: u32,     // first vec4 of the work list in `step`
  n_items: u32,
  o_stride: u32,  // f32 values between output rows
}

var<immediate> par: MergeParams;
@group(0) @binding(0) var<storage, read> step: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> state_o: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> state_ml: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read_write> o: array<f32>;
@group(0) @binding(4) var<storage, read_write> lse: array<f32>;  // [row][query head], base 2

const EMPTY = -1e30;
const VECS = HEAD_DIM / 4u;
const STRIPES = WORKGROUP_SIZE / VECS;

var<workgroup> joined: array<vec2<f32>, WORKGROUP_SIZE>;  // (m, l) of a lane's states
var<workgroup> factors: array<f32, WORKGROUP_SIZE>;       // of the states at hand
var<workgroup> part: array<vec4<f32>, WORKGROUP_SIZE>;    // [stripe][channel / 4]

fn join(a: vec2<f32>, b: vec2<f32>) -> vec2<f32> {
  let m = max(a.x, b.x);
  return vec2<f32>(m, exp2(a.x - m) * a.y + exp2(b.x - m) * b.y);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let index = group.y * GRID_WIDTH + group.x;
  if (index >= par.n_items * GROUP_SIZE) { return; }
  let item = step[par.items + index / GROUP_SIZE];
  let row = item.x / NUM_KV_HEADS;
  let head = item.x % NUM_KV_HEADS * GROUP_SIZE + index % GROUP_SIZE;
  let first = item.y + index % GROUP_SIZE;
  let n_states = item.z;
  let stride = item.w;

  var mine = vec2<f32>(EMPTY, 0.0);
  for (var i = li; i < n_states; i += WORKGROUP_SIZE) { mine = join(mine, state_ml[first + i * stride]); }
  joined[li] = mine;
  workgroupBarrier();
  for (var half = WORKGROUP_SIZE / 2u; half > 0u; half /= 2u) {
    if (li < half) { joined[li] = join(joined[li], joined[li + half]); }
    workgroupBarrier();
  }
  let all = joined[0];
  // No token seen: the output is zero and the log-sum-exp is EMPTY.
  let some = all.y > 0.0;
  if (li == 0u) { lse[row * (NUM_KV_HEADS * GROUP_SIZE) + head] = select(EMPTY, all.x + log2(all.y), some); }

  let channel = li % VECS;
  let stripe = li / VECS;
  var sum = vec4<f32>(0.0);
  for (var base = 0u; base < n_states; base += WORKGROUP_SIZE) {
    let end = min(WORKGROUP_SIZE, n_states - base);
    workgroupBarrier();
    if (li < end) { factors[li] = exp2(state_ml[first + (base + li) * stride].x - all.x); }
    workgroupBarrier();
    if (stripe < STRIPES) {
      for (var i = stripe; i < end; i += 4u * STRIPES) {
        var states: array<vec4<f32>, 4>;
        for (var u = 0u; u < 4u; u++) {  // unroll
          states[u] = state_o[(first + (base + min(i + u * STRIPES, end - 1u)) * stride) * VECS + channel];
        }
        for (var u = 0u; u < 4u; u++) {  // unroll
          let factor = select(0.0, factors[min(i + u * STRIPES, end - 1u)], i + u * STRIPES < end);
          sum += factor * states[u];
        }
      }
    }
  }
  part[li] = sum;
  workgroupBarrier();
  if (li < VECS) {
    var total = vec4<f32>(0.0);
    for (var i = 0u; i < STRIPES; i++) { total += part[i * VECS + li]; }
    total = select(vec4<f32>(0.0), total / all.y, some);
    let at = row * par.o_stride + head * HEAD_DIM + li * 4u;
    o[at] = total.x; o[at + 1u] = total.y; o[at + 2u] = total.z; o[at + 3u] = total.w;
  }
}
