// Chunked causal prefill: a tile of query rows against a run of cached tokens of one KV head.
// Specification: src/kernels/prefill.rs.
//
// Workgroup = one work item = (tile of query positions, KV head, run of tokens). The tile's rows are (position, query
// head of the group) pairs, at most TILE_ROWS of them, so that one load of K or V serves the whole group. In QK a
// lane owns a register tile of 4 rows by 8 tokens; in PV a cell of 8 channels and some quads of rows.

const CELLS = HEAD_DIM / 8u;
const TILE_TOKENS = 64u;
const QUADS = TILE_ROWS / 4u;
const TOKEN_LANES = WORKGROUP_SIZE / QUADS;
const LANE_TOKENS = TILE_TOKENS / TOKEN_LANES;
const QUAD_GROUPS = WORKGROUP_SIZE / CELLS;
const LANE_QUADS = (QUADS + QUAD_GROUPS - 1u) / QUAD_GROUPS;

var<workgroup> q_tile: array<vec4<f32>, TILE_ROWS * HEAD_DIM / 4u>;  // [row][channel / 4]
var<workgroup> p_tile: array<vec4<f32>, QUADS * TILE_TOKENS>;        // [quad][token], four rows each
var<workgroup> part: array<vec4<f32>, WORKGROUP_SIZE>;               // [quad][token lane]
var<workgroup> fade: array<vec4<f32>, QUADS>;

// Four rows of a quad against one cell of one token.
fn score(quad: u32, cell: u32, k: Cell) -> vec4<f32> {
  let at = quad * HEAD_DIM + cell * 2u;
  return vec4<f32>(
    dot(k.low, q_tile[at]) + dot(k.high, q_tile[at + 1u]),
    dot(k.low, q_tile[at + HEAD_DIM / 4u]) + dot(k.high, q_tile[at + HEAD_DIM / 4u + 1u]),
    dot(k.low, q_tile[at + HEAD_DIM / 2u]) + dot(k.high, q_tile[at + HEAD_DIM / 2u + 1u]),
    dot(k.low, q_tile[at + HEAD_DIM / 4u * 3u]) + dot(k.high, q_tile[at + HEAD_DIM / 4u * 3u + 1u]));
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let item = group.y * GRID_WIDTH + group.x;
  if (item >= par.n_items) { return; }
  let a = step[par.items + item * 3u];
  let b = step[par.items + item * 3u + 1u];
  let first_row = a.x;
  let n_rows = a.y * GROUP_SIZE;
  let kv_head = a.z;
  let pages = a.w + par.layer * step[par.items + item * 3u + 2u].x;
  let n_tokens = b.x;
  let first_token = b.y;   // cache index of the run's first token
  let first_index = b.z;   // cache index of the first query row
  let slot = b.w;

  for (var i = li; i < TILE_ROWS * HEAD_DIM / 4u; i += WORKGROUP_SIZE) {
    let r = i / (HEAD_DIM / 4u);
    var value = vec4<f32>(0.0);
    if (r < n_rows) {
      let head = kv_head * GROUP_SIZE + r % GROUP_SIZE;
      let at = (first_row + r / GROUP_SIZE) * (par.q_stride / 4u) + head * (HEAD_DIM / 4u) + i % (HEAD_DIM / 4u);
      value = q[at] * par.scale_log2;
    }
    q_tile[i] = value;
  }
  workgroupBarrier();

  let quad = li / TOKEN_LANES;
  let token_lane = li % TOKEN_LANES;
  // A row sees the cache up to its own index. Rows past the tile's end see one token and are never written.
  let rows = vec4<u32>(quad * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
  let last_seen = vec4<u32>(first_index) + rows / GROUP_SIZE;
  var m = vec4<f32>(MASKED);
  var l = vec4<f32>(0.0);
  var acc: array<Channels, LANE_QUADS>;
  let cell = li % CELLS;
  let quad_group = li / CELLS;

  for (var tile = 0u; tile < n_tokens; tile += TILE_TOKENS) {
    var s: array<vec4<f32>, LANE_TOKENS>;
    var at: array<u32, LANE_TOKENS>;
    for (var i = 0u; i < LANE_TOKENS; i++) {
      let token = min(tile + i * TOKEN_LANES + token_lane, n_tokens - 1u);
      at[i] = codec_k_index(tables[pages + token / PAGE_SIZE], token % PAGE_SIZE, 0u);
    }
    for (var c = 0u; c < CELLS; c++) {
      for (var i = 0u; i < LANE_TOKENS; i++) {
        s[i] += score(quad, c, codec_decode(arena[at[i] + c * PAGE_SIZE]));
      }
    }
    var top = vec4<f32>(MASKED);
    for (var i = 0u; i < LANE_TOKENS; i++) {
      let place = tile + i * TOKEN_LANES + token_lane;
      let seen = vec4<u32>(first_token + place) <= last_seen & vec4<bool>(place < n_tokens);
      s[i] = select(vec4<f32>(MASKED), s[i], seen);
      top = max(top, s[i]);
    }
    part[li] = top;
    workgroupBarrier();
    var higher = m;
    for (var i = 0u; i < TOKEN_LANES; i++) { higher = max(higher, part[quad * TOKEN_LANES + i]); }
    let shrink = exp2(m - higher);
    m = higher;
    l *= shrink;
    for (var i = 0u; i < LANE_TOKENS; i++) {
      let p = select(vec4<f32>(0.0), exp2(s[i] - higher), s[i] > vec4<f32>(MASKED));
      p_tile[quad * TILE_TOKENS + i * TOKEN_LANES + token_lane] = p;
      l += p;
    }
    if (token_lane == 0u) { fade[quad] = shrink; }
    workgroupBarrier();
    // Stops at the last token: an unused slot may hold anything, and zero times NaN is NaN.
    let end = min(TILE_TOKENS, n_tokens - tile);
    if (quad_group < QUAD_GROUPS) {
      for (var i = 0u; i < LANE_QUADS; i++) {
        acc[i] = faded(acc[i], fade[min(quad_group + i * QUAD_GROUPS, QUADS - 1u)]);
      }
      for (var place = 0u; place < end; place++) {
        let token = tile + place;
        let v = codec_decode(arena[codec_v_index(tables[pages + token / PAGE_SIZE], token % PAGE_SIZE, cell)]);
        for (var i = 0u; i < LANE_QUADS; i++) {
          let quad_here = min(quad_group + i * QUAD_GROUPS, QUADS - 1u);
          acc[i] = weighted(acc[i], p_tile[quad_here * TILE_TOKENS + place], v);
        }
      }
    }
    workgroupBarrier();
  }

  part[li] = l;
  workgroupBarrier();
  if (token_lane == 0u) {
    var total = vec4<f32>(0.0);
    for (var i = 0u; i < TOKEN_LANES; i++) { total += part[quad * TOKEN_LANES + i]; }
    for (var j = 0u; j < 4u; j++) {
      if (quad * 4u + j < n_rows) { state_ml[slot + quad * 4u + j] = vec2<f32>(m[j], total[j]); }
    }
  }
  if (quad_group < QUAD_GROUPS) {
    for (var i = 0u; i < LANE_QUADS; i++) {
      let first = (quad_group + i * QUAD_GROUPS) * 4u;
      for (var j = 0u; j < 4u; j++) {
        if (first + j < n_rows) {
          let to = (slot + first + j) * HEAD_DIM + cell * 8u;
          state_o[to] = acc[i].c0[j]; state_o[to + 1u] = acc[i].c1[j];
          state_o[to + 2u] = acc[i].c2[j]; state_o[to + 3u] = acc[i].c3[j];
          state_o[to + 4u] = acc[i].c4[j]; state_o[to + 5u] = acc[i].c5[j];
          state_o[to + 6u] = acc[i].c6[j]; state_o[to + 7u] = acc[i].c7[j];
        }
      }
    }
  }
}
