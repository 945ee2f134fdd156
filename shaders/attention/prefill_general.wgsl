// Chunked causal prefill for keys that are pruned channels or latents, and for values that are latents.
// Specification: src/kernels/prefill.rs.
//
// Queries of the tile stay in workgroup memory whole, so that a key may pick channels; keys and values are decoded into
// registers. In QK a lane owns a register tile of 4 rows by 8 tokens; in PV a cell of 8 channels and some quads of rows.

const TILE_TOKENS = 64u;
const ROTATED_ROWS = TILE_ROWS;
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

// One channel of a row's output from its latents, which lie at the row's beginning.
fn lifted_value(row: u32, basis: u32, channel: u32) -> f32 {
  var sum = 0.0;
  for (var z = 0u; z < VALUE_WIDTH / 4u; z++) {
    sum += dot(q_tile[row * ROW_VECS + z], parameters[basis + VALUE_BASIS + channel * (VALUE_WIDTH / 4u) + z]);
  }
  return sum;
}

fn row_vec(i: u32) -> vec4<f32> {
  return q_tile[i];
}

fn put_row_vec(i: u32, value: vec4<f32>) {
  q_tile[i] = value;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let tile = read_tile(workgroup.y * GRID_WIDTH + workgroup.x);
  if (tile.n_rows == 0u) { return; }
  for (var i = li; i < TILE_ROWS * ROW_VECS; i += WORKGROUP_SIZE) {
    q_tile[i] = scaled_query(tile, i / ROW_VECS, i % ROW_VECS);
  }
  workgroupBarrier();
  if (KEY_ROTATES) { rotate(li); }
  let basis = head_parameters(tile.list);
  let pages = tile.pages;
  let n_tokens = tile.n_tokens;

  let quad = li / TOKEN_LANES;
  let token_lane = li % TOKEN_LANES;
  let seen_to = vec4<u32>(
    last_seen(tile, quad * 4u), last_seen(tile, quad * 4u + 1u),
    last_seen(tile, quad * 4u + 2u), last_seen(tile, quad * 4u + 3u));
  var m = vec4<f32>(MASKED);
  var l = vec4<f32>(0.0);
  var acc: array<Channels, LANE_QUADS>;
  let cell = li % VALUE_CELLS;
  let quad_group = li / VALUE_CELLS;

  for (var start = 0u; start < n_tokens; start += TILE_TOKENS) {
    var s: array<vec4<f32>, LANE_TOKENS>;
    var page_of: array<u32, LANE_TOKENS>;
    for (var i = 0u; i < LANE_TOKENS; i++) {
      page_of[i] = tables[pages + min(start + i * TOKEN_LANES + token_lane, n_tokens - 1u) / PAGE_SIZE];
    }
    if (KEY_LIFTS) {
      for (var i = 0u; i < LANE_TOKENS; i++) {
        let token = min(start + i * TOKEN_LANES + token_lane, n_tokens - 1u);
        var latents = load_latents(page_of[i], token % PAGE_SIZE);
        let position = key_position(page_of[i], token % PAGE_SIZE);
        for (var c = 0u; c < KEY_CELLS; c++) {
          s[i] += score(quad, page_of[i], c, lifted_cell(&latents, basis, position, c));
        }
      }
    } else {
      var key_rows: array<KeyCodecRow, LANE_TOKENS>;
      for (var i = 0u; i < LANE_TOKENS; i++) {
        let token = min(start + i * TOKEN_LANES + token_lane, n_tokens - 1u);
        key_rows[i] = key_codec_row(page_of[i], token % PAGE_SIZE, 0u);
      }
      for (var first = 0u; first < KEY_CELLS; first += KEY_CODEC_SPAN) {
        for (var i = 0u; i < LANE_TOKENS; i++) {
          let token = min(start + i * TOKEN_LANES + token_lane, n_tokens - 1u) % PAGE_SIZE;
          let raw = key_codec_load(page_of[i], token, first);
          for (var c = first; c < min(first + KEY_CODEC_SPAN, KEY_CELLS); c++) {
            s[i] += score(quad, page_of[i], c, key_codec_cell(page_of[i], token, c, key_rows[i], raw));
          }
        }
      }
    }
    var top = vec4<f32>(MASKED);
    for (var i = 0u; i < LANE_TOKENS; i++) {
      let place = start + i * TOKEN_LANES + token_lane;
      if (PAIRED) { s[i] *= merged_length(page_of[i], min(place, n_tokens - 1u) % PAGE_SIZE, 0u, tile.member); }
      let seen = vec4<u32>(tile.first_token + place) <= seen_to & vec4<bool>(place < n_tokens);
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
    let end = min(TILE_TOKENS, n_tokens - start);
    if (quad_group < QUAD_GROUPS) {
      for (var i = 0u; i < LANE_QUADS; i++) {
        acc[i] = faded(acc[i], fade[min(quad_group + i * QUAD_GROUPS, QUADS - 1u)]);
      }
      for (var block = 0u; block < end; block += VALUE_CODEC_SPAN) {
        let page = tables[pages + (start + block) / PAGE_SIZE];
        let first = (start + block) % PAGE_SIZE;
        let raw = value_codec_load(page, first, cell);
        for (var u = 0u; u < VALUE_CODEC_SPAN; u++) {
          var v = value_codec_cell(page, first + u, cell, value_codec_row(page, first + u, cell), raw);
          if (PAIRED) {
            let length = merged_length(page, first + u, 1u, tile.member);
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
      if (quad * 4u + j < tile.n_rows) { state_ml[tile.slot + quad * 4u + j] = vec2<f32>(m[j], total[j]); }
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
  for (var i = li; i < tile.n_rows * ROW_VECS; i += WORKGROUP_SIZE) {
    var o = q_tile[i];
    if (VALUE_LIFTS) {
      for (var j = 0u; j < 4u; j++) { o[j] = lifted_value(i / ROW_VECS, basis, i % ROW_VECS * 4u + j); }
    }
    state_o[tile.slot * ROW_VECS + i] = o;
  }
}
