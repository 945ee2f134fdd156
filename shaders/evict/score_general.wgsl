// Attention that tokens receive from rows of the step, for keys whose channels are rotated, picked, or latents.
// Specification: src/kernels/score.rs. Workgroup = one work item = a run of tokens of one KV head; lane = token.

const PAIRS = 16u;

// Queries of (row, head) pairs, and their log-sum-exp.
var<workgroup> q_tile: array<vec4<f32>, PAIRS * HEAD_DIM / 4u>;
var<workgroup> lse_tile: array<f32, PAIRS>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let item = group.y * GRID_WIDTH + group.x;
  if (item >= par.n_items) { return; }
  let a = step[par.items + item * 3u];
  let b = step[par.items + item * 3u + 1u];
  let c = step[par.items + item * 3u + 2u];
  let kv_head = a.z;
  let pages = a.w + par.layer * c.x;
  let n_tokens = b.x;
  let n_pairs = a.y * GROUP_SIZE;
  let basis = head_parameters(c.y);
  for (var tile = 0u; tile < n_tokens; tile += WORKGROUP_SIZE) {
    let token = min(tile + li, n_tokens - 1u);
    var key = key_row(tables[pages + token / PAGE_SIZE], token % PAGE_SIZE, basis);
    var total = 0.0;
    for (var first = 0u; first < n_pairs; first += PAIRS) {
      workgroupBarrier();
      for (var i = li; i < PAIRS * HEAD_DIM / 4u; i += WORKGROUP_SIZE) {
        let pair = min(first + i / (HEAD_DIM / 4u), n_pairs - 1u);
        let head = kv_head * GROUP_SIZE + pair % GROUP_SIZE;
        let at = (a.x + pair / GROUP_SIZE) * (par.q_stride / 4u) + head * (HEAD_DIM / 4u) + i % (HEAD_DIM / 4u);
        q_tile[i] = q[at] * par.scale_log2;
      }
      for (var i = li; i < PAIRS; i += WORKGROUP_SIZE) {
        let pair = min(first + i, n_pairs - 1u);
        lse_tile[i] = lse[(a.x + pair / GROUP_SIZE) * (NUM_KV_HEADS * GROUP_SIZE) + kv_head * GROUP_SIZE + pair % GROUP_SIZE];
      }
      workgroupBarrier();
      for (var i = 0u; i < min(PAIRS, n_pairs - first); i++) {
        var s = 0.0;
        for (var d = 0u; d < HEAD_DIM; d += 8u) {
          let x = q_tile[i * (HEAD_DIM / 4u) + d / 4u];
          let y = q_tile[i * (HEAD_DIM / 4u) + d / 4u + 1u];
          s += x.x * key.x[d] + x.y * key.x[d + 1u] + x.z * key.x[d + 2u] + x.w * key.x[d + 3u];
          s += y.x * key.x[d + 4u] + y.y * key.x[d + 5u] + y.z * key.x[d + 6u] + y.w * key.x[d + 7u];
        }
        let seen = b.y + token <= b.z + (first + i) / GROUP_SIZE;
        let p = select(0.0, exp2(s - lse_tile[i]), seen);
        total = select(total + p, max(total, p), par.largest == 1u);
      }
    }
    if (tile + li < n_tokens) {
      let at = b.w + par.layer * par.list_stride + tile + li;
      if (par.largest == 1u) {
        scores[at] = max(scores[at], total);
      } else {
        scores[at] += total * (1.0 / f32(GROUP_SIZE));
      }
    }
  }
}
