// Chunked causal prefill: a tile of query rows against a run of cached tokens of one KV head.
// Specification: src/kernels/prefill.rs.
//
// Workgroup = one work item = (tile of query positions, KV head, run of tokens). The tile's rows are (position, query
// head of the group) pairs, at most TILE_ROWS of them, so that one load of K or V serves the whole group. In QK a
// lane owns a register tile of 4 rows by 8 tokens; in PV a cell of 8 channels and some quads of rows.

const TILE_TOKENS = 64u;
const QUADS = TILE_ROWS / 4u;
const TOKEN_LANES = WORKGROUP_SIZE / QUADS;
const LANE_TOKENS = TILE_TOKENS / TOKEN_LANES;
const QUAD_GROUPS = WORKGROUP_SIZE / VALUE_CELLS;
const LANE_QUADS = (QUADS + QUAD_GROUPS - 1u) / QUAD_GROUPS;

var<workgroup> q_tile: array<vec4<f32>, TILE_ROWS * HEAD_DIM / 4u>;  // [row][channel / 4]
var<workgroup> p_tile: array<vec4<f32>, QUADS * TILE_TOKENS>;        // [quad][token], four rows each
var<workgroup> part: array<vec4<f32>, WORKGROUP_SIZE>;               // [quad][token lane]
var<workgroup> fade: array<vec4<f32>, QUADS>;

// Four rows of a quad against one cell of one token.
fn score(quad: u32, page: u32, cell: u32, k: Cell) -> vec4<f32> {
  if (KEY_PICKS) {
    let slots = key_slots(page, cell);
    var sum = vec4<f32>(0.0);
    for (var j = 0u; j < 4u; j++) {
      let at = (quad * 4u + j) * (HEAD_DIM / 4u);
      let low = vec4<f32>(
        picked(at, slots.low.x), picked(at, slots.low.y), picked(at, slots.low.z), picked(at, slots.low.w));
      let high = vec4<f32>(
        picked(at, slots.high.x), picked(at, slots.high.y), picked(at, slots.high.z), picked(at, slots.high.w));
      sum[j] = dot(k.low, low) + dot(k.high, high);
    }
    return sum;
  }
  let at = quad * HEAD_DIM + cell * 2u;
  return vec4<f32>(
    dot(k.low, q_tile[at]) + dot(k.high, q_tile[at + 1u]),
    dot(k.low, q_tile[at + HEAD_DIM / 4u]) + dot(k.high, q_tile[at + HEAD_DIM / 4u + 1u]),
    dot(k.low, q_tile[at + HEAD_DIM / 2u]) + dot(k.high, q_tile[at + HEAD_DIM / 2u + 1u]),
    dot(k.low, q_tile[at + HEAD_DIM / 4u * 3u]) + dot(k.high, q_tile[at + HEAD_DIM / 4u * 3u + 1u]));
}

fn picked(row_at: u32, channel: u32) -> f32 {
  return q_tile[row_at + channel / 4u][channel % 4u];
}

// Hadamard transform of SPAN channels of every row of the tile. The first two strides lie inside a vec4.
fn hadamard(li: u32, first: u32) {
  const VECS = max(SPAN / 4u, 1u);
  for (var i = li; i < TILE_ROWS * VECS; i += WORKGROUP_SIZE) {
    let at = i / VECS * (HEAD_DIM / 4u) + first / 4u + i % VECS;
    let x = q_tile[at];
    let y = vec4<f32>(x.x + x.y, x.x - x.y, x.z + x.w, x.z - x.w);
    q_tile[at] = vec4<f32>(y.x + y.z, y.y + y.w, y.x - y.z, y.y - y.w);
  }
  workgroupBarrier();
  for (var stride = 1u; stride < VECS; stride *= 2u) {
    for (var i = li; i < TILE_ROWS * (VECS / 2u); i += WORKGROUP_SIZE) {
      let pair = i % (VECS / 2u);
      let low = i / (VECS / 2u) * (HEAD_DIM / 4u) + first / 4u + pair / stride * 2u * stride + pair % stride;
      let a = q_tile[low];
      let b = q_tile[low + stride];
      q_tile[low] = a + b;
      q_tile[low + stride] = a - b;
    }
    workgroupBarrier();
  }
  for (var i = li; i < TILE_ROWS * VECS; i += WORKGROUP_SIZE) {
    q_tile[i / VECS * (HEAD_DIM / 4u) + first / 4u + i % VECS] *= NORMALISATION;
  }
  workgroupBarrier();
}

fn turn_signs(li: u32) {
  for (var i = li; i < TILE_ROWS * HEAD_DIM / 4u; i += WORKGROUP_SIZE) {
    let c = i % (HEAD_DIM / 4u) * 4u;
    q_tile[i] *= vec4<f32>(rotation_sign(c), rotation_sign(c + 1u), rotation_sign(c + 2u), rotation_sign(c + 3u));
  }
  workgroupBarrier();
}

fn rotate(li: u32) {
  turn_signs(li);
  hadamard(li, 0u);
  if (SPAN < HEAD_DIM) { hadamard(li, HEAD_DIM - SPAN); }
}

fn rotate_back(li: u32) {
  if (SPAN < HEAD_DIM) { hadamard(li, HEAD_DIM - SPAN); }
  hadamard(li, 0u);
  turn_signs(li);
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
  let c = step[par.items + item * 3u + 2u];
  let pages = a.w + par.layer * c.x;
  let n_tokens = b.x;
  let first_token = b.y;   // position of the run's first token, or one that it does not exceed
  let first_index = b.z;   // position of the first query row
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
  if (KEY_ROTATES) { rotate(li); }
  let basis = head_parameters(c.y);

  let quad = li / TOKEN_LANES;
  let token_lane = li % TOKEN_LANES;
  // A row sees the cache up to its own index. Rows past the tile's end see one token and are never written.
  let rows = vec4<u32>(quad * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
  let last_seen = vec4<u32>(first_index) + rows / GROUP_SIZE;
  var m = vec4<f32>(MASKED);
  var l = vec4<f32>(0.0);
  var acc: array<Channels, LANE_QUADS>;
  let cell = li % VALUE_CELLS;
  let quad_group = li / VALUE_CELLS;

  for (var tile = 0u; tile < n_tokens; tile += TILE_TOKENS) {
    var s: array<vec4<f32>, LANE_TOKENS>;
    var page_of: array<u32, LANE_TOKENS>;
    for (var i = 0u; i < LANE_TOKENS; i++) {
      page_of[i] = tables[pages + min(tile + i * TOKEN_LANES + token_lane, n_tokens - 1u) / PAGE_SIZE];
    }
    if (KEY_LIFTS) {
      for (var i = 0u; i < LANE_TOKENS; i++) {
        let token = min(tile + i * TOKEN_LANES + token_lane, n_tokens - 1u);
        var latents = load_latents(page_of[i], token % PAGE_SIZE);
        let position = key_position(page_of[i], token % PAGE_SIZE);
        for (var c = 0u; c < KEY_CELLS; c++) {
          s[i] += score(quad, page_of[i], c, lifted_cell(&latents, basis, position, c));
        }
      }
    } else {
      var key_rows: array<KeyCodecRow, LANE_TOKENS>;
      for (var i = 0u; i < LANE_TOKENS; i++) {
        let token = min(tile + i * TOKEN_LANES + token_lane, n_tokens - 1u);
        key_rows[i] = key_codec_row(page_of[i], token % PAGE_SIZE, 0u);
      }
      for (var first = 0u; first < KEY_CELLS; first += KEY_CODEC_SPAN) {
        for (var i = 0u; i < LANE_TOKENS; i++) {
          let token = min(tile + i * TOKEN_LANES + token_lane, n_tokens - 1u) % PAGE_SIZE;
          let raw = key_codec_load(page_of[i], token, first);
          for (var c = first; c < min(first + KEY_CODEC_SPAN, KEY_CELLS); c++) {
            s[i] += score(quad, page_of[i], c, key_codec_cell(page_of[i], token, c, key_rows[i], raw));
          }
        }
      }
    }
    var top = vec4<f32>(MASKED);
    for (var i = 0u; i < LANE_TOKENS; i++) {
      let place = tile + i * TOKEN_LANES + token_lane;
      if (PAIRED) { s[i] *= merged_length(page_of[i], min(place, n_tokens - 1u) % PAGE_SIZE, 0u, c.z); }
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
    // Stops at the last token: an unused slot may hold anything, and zero times NaN is NaN. Runs of sealed pages are
    // whole pages, so a block of several tokens is never cut.
    let end = min(TILE_TOKENS, n_tokens - tile);
    if (quad_group < QUAD_GROUPS) {
      for (var i = 0u; i < LANE_QUADS; i++) {
        acc[i] = faded(acc[i], fade[min(quad_group + i * QUAD_GROUPS, QUADS - 1u)]);
      }
      for (var block = 0u; block < end; block += VALUE_CODEC_SPAN) {
        let page = tables[pages + (tile + block) / PAGE_SIZE];
        let first = (tile + block) % PAGE_SIZE;
        let raw = value_codec_load(page, first, cell);
        for (var u = 0u; u < VALUE_CODEC_SPAN; u++) {
          var v = value_codec_cell(page, first + u, cell, value_codec_row(page, first + u, cell), raw);
          if (PAIRED) {
            let length = merged_length(page, first + u, 1u, c.z);
            v = Cell(v.low * length, v.high * length);
          }
          for (var i = 0u; i < LANE_QUADS; i++) {
            let quad_here = min(quad_group + i * QUAD_GROUPS, QUADS - 1u);
            acc[i] = weighted(acc[i], p_tile[quad_here * TILE_TOKENS + block + u], v);
          }
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
  // Queries are done with: their tile takes the outputs, `[row][channel]`, so that rows are whole again.
  if (quad_group < QUAD_GROUPS) {
    for (var i = 0u; i < LANE_QUADS; i++) {
      let first = (quad_group + i * QUAD_GROUPS) * 4u;
      for (var j = 0u; j < 4u; j++) {
        if (first + j < TILE_ROWS) {
          let to = (first + j) * (HEAD_DIM / 4u) + cell * 2u;
          q_tile[to] = vec4<f32>(acc[i].c0[j], acc[i].c1[j], acc[i].c2[j], acc[i].c3[j]);
          q_tile[to + 1u] = vec4<f32>(acc[i].c4[j], acc[i].c5[j], acc[i].c6[j], acc[i].c7[j]);
        }
      }
    }
  }
  workgroupBarrier();
  if (VALUE_ROTATES) { rotate_back(li); }
  for (var i = li; i < n_rows * HEAD_DIM; i += WORKGROUP_SIZE) {
    let r = i / HEAD_DIM;
    let channel = i % HEAD_DIM;
    var o = q_tile[i / 4u][i % 4u];
    if (VALUE_LIFTS) {
      o = 0.0;
      for (var z = 0u; z < VALUE_WIDTH / 4u; z++) {
        o += dot(q_tile[r * (HEAD_DIM / 4u) + z], parameters[basis + VALUE_BASIS + channel * (VALUE_WIDTH / 4u) + z]);
      }
    }
    state_o[slot * HEAD_DIM + i] = o;
  }
}
