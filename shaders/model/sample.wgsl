// One token per row of logits. Specification: src/kernels/sample.rs. Workgroup = row.

struct SampleParams {
  items: u32,    // first vec4 of the work list in `step`
  n_items: u32,
  vocab: u32,
}

const BINS = 256u;
// Probabilities are summed as integers in units of 2^-30, so that the order of the atomics does not matter.
const UNIT = 1073741824.0;

var<immediate> par: SampleParams;
@group(0) @binding(0) var<storage, read> step: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> logits: array<f32>;
@group(0) @binding(2) var<storage, read_write> tokens: array<u32>;

var<workgroup> bins: array<atomic<u32>, BINS>;
var<workgroup> best_value: array<f32, WORKGROUP_SIZE>;
var<workgroup> best_index: array<u32, WORKGROUP_SIZE>;
var<workgroup> chosen_bin: u32;
var<workgroup> remaining: u32;

// Grows with the value, over all finite floats.
fn sort_key(value: f32) -> u32 {
  let bits = bitcast<u32>(value);
  return select(bits | 0x80000000u, ~bits, (bits & 0x80000000u) != 0u);
}

// PCG-RXS-M-XS over a chain of words.
fn scramble(state: u32, word: u32) -> u32 {
  let mixed = (state ^ word) * 747796405u + 2891336453u;
  let turned = ((mixed >> ((mixed >> 28u) + 4u)) ^ mixed) * 277803737u;
  return (turned >> 22u) ^ turned;
}

// Standard Gumbel noise. 23 bits keep the uniform value strictly between 0 and 1.
fn gumbel(seed: vec2<u32>, position: u32, token: u32) -> f32 {
  let bits = scramble(scramble(scramble(scramble(seed.x, 0x9e3779b9u), seed.y), position), token);
  let uniform_value = (f32(bits >> 9u) + 0.5) * (1.0 / 8388608.0);
  return -log(-log(uniform_value));
}

// The lane-wise best becomes the row's best; equal values go to the smaller index.
fn fold_best(li: u32, value: f32, index: u32) -> u32 {
  // A slower lane may still be reading the result of the call before this one.
  workgroupBarrier();
  best_value[li] = value;
  best_index[li] = index;
  workgroupBarrier();
  for (var half = WORKGROUP_SIZE / 2u; half > 0u; half /= 2u) {
    if (li < half) {
      let other = best_value[li + half];
      let other_index = best_index[li + half];
      if (other > best_value[li] || (other == best_value[li] && other_index < best_index[li])) {
        best_value[li] = other;
        best_index[li] = other_index;
      }
    }
    workgroupBarrier();
  }
  return best_index[0];
}

// Walks the bins from the highest until `remaining` is used up: the bin where that happens, and what remains in it.
fn pick_bin(li: u32) {
  workgroupBarrier();
  if (li == 0u) {
    var left = remaining;
    var bin = BINS;
    var found = 0u;
    for (var i = 0u; i < BINS; i++) {
      let at = BINS - 1u - i;
      let here = atomicLoad(&bins[at]);
      if (bin == BINS && here > 0u) {
        found = at;
        if (here >= left) { bin = at; } else { left -= here; }
      }
    }
    // Rounding down can leave the whole mass short of the goal: then the lowest bin in use is it.
    chosen_bin = select(bin, found, bin == BINS);
    remaining = left;
  }
  workgroupBarrier();
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, lanes: Lanes) {
  let item = group.y * GRID_WIDTH + group.x;
  if (item >= par.n_items) { return; }
  let li = lanes.index;
  let a = step[par.items + item * 2u];
  let b = step[par.items + item * 2u + 1u];
  let base = a.x * par.vocab;
  let top_k = a.y;
  let seed = a.zw;
  let inverse_temperature = bitcast<f32>(b.x);
  let top_p = bitcast<f32>(b.y);
  let position = b.z;

  var value = -3.4e38;
  var index = 0xffffffffu;
  for (var i = li; i < par.vocab; i += WORKGROUP_SIZE) {
    let logit = logits[base + i];
    if (logit > value) { value = logit; index = i; }
  }
  let greedy = fold_best(li, value, index);
  // A row without any number above -3.4e38 has no best token; token 0 keeps the result inside the vocabulary.
  if (inverse_temperature == 0.0 || greedy == 0xffffffffu) {
    if (li == 0u) { tokens[item] = select(greedy, 0u, greedy == 0xffffffffu); }
    return;
  }
  let top = logits[base + greedy];

  // The key of the top_k-th logit, 8 bits at a time.
  var threshold = 0u;
  if (top_k > 0u && top_k < par.vocab) {
    if (li == 0u) { remaining = top_k; }
    for (var round = 0u; round < 4u; round++) {
      let shift = 24u - round * 8u;
      for (var i = li; i < BINS; i += WORKGROUP_SIZE) { atomicStore(&bins[i], 0u); }
      workgroupBarrier();
      for (var i = li; i < par.vocab; i += WORKGROUP_SIZE) {
        let key = sort_key(logits[base + i]);
        if (round == 0u || (key >> (shift + 8u)) == (threshold >> (shift + 8u))) {
          atomicAdd(&bins[(key >> shift) & 255u], 1u);
        }
      }
      pick_bin(li);
      threshold |= chosen_bin << shift;
    }
  }

  // The key at which the mass of what is left reaches top_p.
  if (top_p < 1.0) {
    var mass = 0.0;
    for (var i = li; i < par.vocab; i += WORKGROUP_SIZE) {
      let logit = logits[base + i];
      if (sort_key(logit) >= threshold) { mass += exp((logit - top) * inverse_temperature); }
    }
    let total = lanes_sum(lanes, vec4<f32>(mass, 0.0, 0.0, 0.0)).x;
    let kept = threshold;
    threshold = 0u;
    if (li == 0u) { remaining = max(u32(top_p * UNIT), 1u); }
    for (var round = 0u; round < 4u; round++) {
      let shift = 24u - round * 8u;
      for (var i = li; i < BINS; i += WORKGROUP_SIZE) { atomicStore(&bins[i], 0u); }
      workgroupBarrier();
      for (var i = li; i < par.vocab; i += WORKGROUP_SIZE) {
        let logit = logits[base + i];
        let key = sort_key(logit);
        if (key >= kept && (round == 0u || (key >> (shift + 8u)) == (threshold >> (shift + 8u)))) {
          atomicAdd(&bins[(key >> shift) & 255u], u32(exp((logit - top) * inverse_temperature) / total * UNIT));
        }
      }
      pick_bin(li);
      threshold |= chosen_bin << shift;
    }
    threshold = max(threshold, kept);
  }

  // The largest of log-probability plus Gumbel noise is a sample of the distribution over what was kept.
  value = -3.4e38;
  index = 0xffffffffu;
  for (var i = li; i < par.vocab; i += WORKGROUP_SIZE) {
    let logit = logits[base + i];
    if (sort_key(logit) >= threshold) {
      let noisy = (logit - top) * inverse_temperature + gumbel(seed, position, i);
      if (noisy > value) { value = noisy; index = i; }
    }
  }
  let sampled = fold_best(li, value, index);
  if (li == 0u) { tokens[item] = min(sampled, par.vocab - 1u); }
}
