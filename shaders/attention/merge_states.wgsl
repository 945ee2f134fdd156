// Merges the attention states of one (row, query head) into its output.
// Specification: src/kernels/merge_states.rs.
//
// Workgroup = (row, query head). Lanes own states, whose maximum and sum are joined in a tree; then a lane owns four channels and
// a stripe of states, LOADS of which are asked for at once. The first of these are asked for before anything else, since a merge
// is short and waits more than it computes. Stripes are added in order at the end.

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

// Callers ask only for states that there are, in all lanes alike, so that loads need not wait for a question.
fn load_state(first: u32, stride: u32, state: u32, channel: u32) -> vec4<f32> {
  return state_o[(first + state * stride) * VECS + channel];
}

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

  let channel = li % VECS;
  let stripe = li / VECS;
  var states: array<vec4<f32>, LOADS>;
  for (var u = 0u; u < LOADS; u++) {  // unroll
    if (u * STRIPES < n_states) { states[u] = load_state(first, stride, min(u * STRIPES + stripe, n_states - 1u), channel); }
  }
  var own = vec2<f32>(EMPTY, 0.0);
  if (li < n_states) { own = state_ml[first + li * stride]; }
  var mine = own;
  for (var i = li + WORKGROUP_SIZE; i < n_states; i += WORKGROUP_SIZE) { mine = join(mine, state_ml[first + i * stride]); }
  joined[li] = mine;
  workgroupBarrier();
  for (var half = WORKGROUP_SIZE / 2u; half > 0u; half /= 2u) {
    // Lanes that have no states are not joined.
    if (half < n_states) {
      if (li < half) { joined[li] = join(joined[li], joined[li + half]); }
      workgroupBarrier();
    }
  }
  let all = joined[0];
  // No token seen: the output is zero and the log-sum-exp is EMPTY.
  let some = all.y > 0.0;
  if (li == 0u) { lse[row * (NUM_KV_HEADS * GROUP_SIZE) + head] = select(EMPTY, all.x + log2(all.y), some); }

  var sum = vec4<f32>(0.0);
  for (var base = 0u; base < n_states; base += WORKGROUP_SIZE) {
    let here = min(WORKGROUP_SIZE, n_states - base);
    if (base > 0u) {
      if (li < here) { own = state_ml[first + (base + li) * stride]; }
      // A slower lane may still be reading what was here.
      workgroupBarrier();
    }
    factors[li] = exp2(own.x - all.x);
    workgroupBarrier();
    for (var batch = 0u; batch < here; batch += LOADS * STRIPES) {
      if (base + batch > 0u) {
        for (var u = 0u; u < LOADS; u++) {  // unroll
          if (batch + u * STRIPES < here) {
            let state = base + min(batch + u * STRIPES + stripe, here - 1u);
            states[u] = load_state(first, stride, state, channel);
          }
        }
      }
      for (var u = 0u; u < LOADS; u++) {  // unroll
        let place = batch + u * STRIPES + stripe;
        if (place < here) { sum += factors[place] * states[u]; }
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
