// Which pages a decode row reads: those whose keys could give it the largest scores.
// Specification: src/kernels/quest.rs. Workgroup = one work item = (row, KV head, run of pages).

struct QuestParams {
  items: u32,     // first vec4 of the work list in `step`
  n_items: u32,
  layer: u32,     // layers after the one whose pages the items name
  q_stride: u32,  // f32 values between query rows
}

const CELLS = HEAD_DIM / 8u;

var<immediate> par: QuestParams;
@group(0) @binding(0) var<storage, read> step: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> tables: array<u32>;
@group(0) @binding(2) var<storage, read> bounds: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> q: array<f32>;
@group(0) @binding(4) var<storage, read_write> page_scores: array<u32>;  // [item][MAX_PAGES] order-preserving

var<workgroup> q_tile: array<f32, GROUP_SIZE * HEAD_DIM>;
var<workgroup> bins: array<atomic<u32>, 256>;
var<workgroup> sums: array<u32, WORKGROUP_SIZE>;
var<workgroup> found: array<u32, 2>;
var<workgroup> held: array<u32, 2>;

fn order_key(score: f32) -> u32 {
  let bits = bitcast<u32>(score);
  if ((bits & 0x7fffffffu) > 0x7f800000u) { return 0u; }
  if ((bits & 0x7fffffffu) == 0u) { return 0x80000000u; }
  return select(bits | 0x80000000u, ~bits, (bits >> 31u) == 1u);
}

// The largest over the group's heads of the score that a key within the bounds could have.
fn bound(page: u32, slot: u32) -> f32 {
  var top: array<f32, GROUP_SIZE>;
  for (var cell = 0u; cell < CELLS; cell++) {
    let low = bounds[page + cell * PAGE_SIZE + slot];
    let high = bounds[page + CELLS * PAGE_SIZE + slot * CELLS + cell];
    for (var i = 0u; i < 4u; i++) {
      let l = unpack2x16float(low[i]);
      let h = unpack2x16float(high[i]);
      for (var g = 0u; g < GROUP_SIZE; g++) {
        let a = q_tile[g * HEAD_DIM + cell * 8u + 2u * i];
        let b = q_tile[g * HEAD_DIM + cell * 8u + 2u * i + 1u];
        top[g] += max(a * l.x, a * h.x) + max(b * l.y, b * h.y);
      }
    }
  }
  var best = top[0];
  for (var g = 1u; g < GROUP_SIZE; g++) { best = max(best, top[g]); }
  return best;
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

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let item = group.y * GRID_WIDTH + group.x;
  if (item >= par.n_items) { return; }
  let a = step[par.items + item * 3u];
  let b = step[par.items + item * 3u + 1u];
  let c = step[par.items + item * 3u + 2u];
  let row = a.x / NUM_KV_HEADS;
  let kv_head = a.x % NUM_KV_HEADS;
  let pages = a.y + par.layer * a.z;        // table entry of the run's first page
  let n_pages = a.w;
  let bounds_at = b.x + par.layer * b.y;    // table entry of the page that holds the bounds of page 0
  let first_page = b.z;                     // of the run, counted from the list's first
  let n_chosen = b.w;
  let out = c.x;                            // first table entry that is written
  let scores = c.y;
  for (var i = li; i < GROUP_SIZE * HEAD_DIM; i += WORKGROUP_SIZE) {
    q_tile[i] = q[row * par.q_stride + kv_head * GROUP_SIZE * HEAD_DIM + i];
  }
  workgroupBarrier();
  for (var i = li; i < n_pages; i += WORKGROUP_SIZE) {
    let page = first_page + i;
    page_scores[scores + i] = order_key(bound(tables[bounds_at + page / PAGE_SIZE], page % PAGE_SIZE));
  }
  storageBarrier();
  workgroupBarrier();
  // The key of the last page that is chosen, eight bits at a time.
  var prefix = 0u;
  var rank = n_chosen;
  for (var shift = 24i; shift >= 0i; shift -= 8i) {
    let low = u32(shift);
    for (var i = li; i < 256u; i += WORKGROUP_SIZE) { atomicStore(&bins[i], 0u); }
    workgroupBarrier();
    for (var i = li; i < n_pages; i += WORKGROUP_SIZE) {
      let key = page_scores[scores + i];
      if (low == 24u || (key >> ((low + 8u) & 31u)) == (prefix >> ((low + 8u) & 31u))) {
        atomicAdd(&bins[(key >> low) & 255u], 1u);
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
  if (li == 0u) {
    held[0] = 0u;
    held[1] = 0u;
  }
  workgroupBarrier();
  for (var first = 0u; first < n_pages; first += WORKGROUP_SIZE) {
    let i = first + li;
    var key = 0u;
    if (i < n_pages) { key = page_scores[scores + i]; }
    let tie = select(0u, 1u, i < n_pages && key == prefix);
    let ties_before = held[0];
    let ties = scan(li, tie);
    workgroupBarrier();
    let wins = select(0u, 1u, i < n_pages && (key > prefix || (tie == 1u && ties_before + ties <= rank)));
    let before = held[1];
    let place = scan(li, wins);
    if (wins == 1u) { tables[out + before + place - 1u] = tables[pages + i]; }
    workgroupBarrier();
    if (li == WORKGROUP_SIZE - 1u) {
      held[0] = ties_before + ties;
      held[1] = before + place;
    }
    workgroupBarrier();
  }
}
