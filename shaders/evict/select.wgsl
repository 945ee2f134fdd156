// Which tokens stay: the best of a domain of lists, by radix select, and their indices in order.
// Specification: src/kernels/select.rs; definition: src/compression/keep.rs. Workgroup = one domain.

struct SelectParams {
  items: u32,    // first vec4 of the work list in `step`
  n_items: u32,
}

const PROTECTED = 0xffffffffu;

var<immediate> par: SelectParams;
@group(0) @binding(0) var<storage, read> step: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> decided: array<f32>;
@group(0) @binding(2) var<storage, read_write> kept: array<u32>;    // [list][capacity]: flags first, then indices
@group(0) @binding(3) var<storage, read_write> counts: array<u32>;  // [list]

var<workgroup> bins: array<atomic<u32>, 256>;
var<workgroup> sums: array<u32, WORKGROUP_SIZE>;
var<workgroup> found: array<u32, 2>;
var<workgroup> held: u32;

// Order-preserving: NaN below everything, both zeros alike.
fn order_key(score: f32) -> u32 {
  let bits = bitcast<u32>(score);
  if ((bits & 0x7fffffffu) > 0x7f800000u) { return 0u; }
  if ((bits & 0x7fffffffu) == 0u) { return 0x80000000u; }
  return select(bits | 0x80000000u, ~bits, (bits >> 31u) == 1u);
}

// Lists of a domain: (list, tokens, first of `decided` and `kept`, unused) from vec4 `lists` on.
struct Domain {
  lists: u32,
  n_lists: u32,
  total: u32,
  floor: u32,
  sink: u32,
  recent: u32,
}

// The key of a token that has no flag yet; none has PROTECTED.
fn open_key(at: u32, i: u32) -> u32 {
  if (kept[at + i] != 0u) { return PROTECTED; }
  return order_key(decided[at + i]);
}

// Inclusive sum over lanes.
fn scan(li: u32, value: u32) -> u32 {
  sums[li] = value;
  workgroupBarrier();
  for (var stride = 1u; stride < WORKGROUP_SIZE; stride *= 2u) {
    var add = 0u;
    if (li >= stride) { add = sums[li - stride]; }
    workgroupBarrier();
    sums[li] += add;
    workgroupBarrier();
  }
  return sums[li];
}

// Flags the best `n` tokens without a flag of `n_lists` lists; ties by list, then by index.
fn flag_best(li: u32, lists: u32, n_lists: u32, n: u32) {
  // The n-th largest key, eight bits at a time: `prefix` holds the bits found, `rank` what is left to count.
  var prefix = 0u;
  var rank = n;
  for (var shift = 24i; shift >= 0i; shift -= 8i) {
    let low = u32(shift);
    for (var b = li; b < 256u; b += WORKGROUP_SIZE) { atomicStore(&bins[b], 0u); }
    workgroupBarrier();
    for (var s = 0u; s < n_lists; s++) {
      let list = step[lists + s];
      for (var i = li; i < list.y; i += WORKGROUP_SIZE) {
        let key = open_key(list.z, i);
        // Shifting by 32 is not defined, so the first round compares nothing.
        let same = low == 24u || (key >> ((low + 8u) & 31u)) == (prefix >> ((low + 8u) & 31u));
        if (key != PROTECTED && same) { atomicAdd(&bins[(key >> low) & 255u], 1u); }
      }
    }
    workgroupBarrier();
    if (li == 0u) {
      var left = rank;
      var bin = 255u;
      loop {
        let here = atomicLoad(&bins[bin]);
        if (here >= left || bin == 0u) { break; }
        left -= here;
        bin -= 1u;
      }
      found[0] = bin;
      found[1] = left;
    }
    workgroupBarrier();
    prefix |= found[0] << low;
    rank = found[1];
    workgroupBarrier();
  }
  // Everything above the key, and the first `rank` tokens that have it.
  if (li == 0u) { held = 0u; }
  workgroupBarrier();
  for (var s = 0u; s < n_lists; s++) {
    let list = step[lists + s];
    for (var first = 0u; first < list.y; first += WORKGROUP_SIZE) {
      let i = first + li;
      var key = PROTECTED;
      if (i < list.y) { key = open_key(list.z, i); }
      let tie = select(0u, 1u, key == prefix);
      let before = held;
      let through = scan(li, tie);
      let wins = key != PROTECTED && (key > prefix || (tie == 1u && before + through <= rank));
      if (wins) { kept[list.z + i] = 1u; }
      workgroupBarrier();
      if (li == WORKGROUP_SIZE - 1u) { held = before + through; }
      workgroupBarrier();
    }
  }
  storageBarrier();
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let item = group.y * GRID_WIDTH + group.x;
  if (item >= par.n_items) { return; }
  let a = step[par.items + item * 2u];
  let b = step[par.items + item * 2u + 1u];
  let domain = Domain(a.x, a.y, a.z, a.w, b.x, b.y);
  var spent = 0u;
  for (var s = 0u; s < domain.n_lists; s++) {
    let list = step[domain.lists + s];
    let sink = min(domain.sink, list.y);
    let recent = min(domain.recent, list.y - sink);
    for (var i = li; i < list.y; i += WORKGROUP_SIZE) {
      kept[list.z + i] = select(0u, 1u, i < sink || i >= list.y - recent);
    }
    storageBarrier();
    workgroupBarrier();
    // A floor never asks for more than the list or the domain has.
    let protected_here = sink + recent;
    let floor = min(domain.floor, list.y);
    if (floor > protected_here) {
      flag_best(li, domain.lists + s, 1u, floor - protected_here);
      spent += floor;
    } else {
      spent += protected_here;
    }
    workgroupBarrier();
  }
  var all = 0u;
  for (var s = 0u; s < domain.n_lists; s++) { all += step[domain.lists + s].y; }
  let rest = min(domain.total, all);
  if (rest > spent) { flag_best(li, domain.lists, domain.n_lists, rest - spent); }
  workgroupBarrier();
  // Flags become indices; a list's own entries are enough, since no index moves up.
  for (var s = 0u; s < domain.n_lists; s++) {
    let list = step[domain.lists + s];
    if (li == 0u) { held = 0u; }
    workgroupBarrier();
    for (var first = 0u; first < list.y; first += WORKGROUP_SIZE) {
      let i = first + li;
      var flag = 0u;
      if (i < list.y) { flag = kept[list.z + i]; }
      let before = held;
      let through = scan(li, flag);
      if (flag == 1u) { kept[list.z + before + through - 1u] = i; }
      storageBarrier();
      workgroupBarrier();
      if (li == WORKGROUP_SIZE - 1u) { held = before + through; }
      workgroupBarrier();
    }
    if (li == 0u) { counts[list.x] = held; }
    workgroupBarrier();
  }
}
