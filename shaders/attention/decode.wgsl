// Split-KV decode: one query row per sequence against a run of cached tokens of one KV head.
// Specification: src/kernels/decode.rs.
//
// Workgroup = one work item = (row, KV head, run of tokens). In QK a lane owns whole tokens, so a score needs no
// exchange between lanes; in PV a lane owns a cell of 8 channels and a stripe of tokens. The GROUP_SIZE query heads
// that share the KV head are packed four to a vec4, so one load of K or V serves all of them.

const CELLS = HEAD_DIM / 8u;
const HEAD_VECS = (GROUP_SIZE + 3u) / 4u;
const TILE = WORKGROUP_SIZE * TOKENS_PER_LANE;
const STRIPES = WORKGROUP_SIZE / CELLS;

var<workgroup> q_tile: array<vec4<f32>, HEAD_DIM * HEAD_VECS>;  // [channel][head vec]
var<workgroup> p_tile: array<vec4<f32>, TILE * HEAD_VECS>;      // [token][head vec]
var<workgroup> o_tile: array<vec4<f32>, WORKGROUP_SIZE * 8u>;   // [lane][channel]

fn load_query(head: u32, row: u32, kv_head: u32, channel: u32) -> f32 {
  if (head >= GROUP_SIZE) { return 0.0; }
  let at = row * par.q_stride + (kv_head * GROUP_SIZE + head) * HEAD_DIM + channel;
  return q[at / 4u][at % 4u] * par.scale_log2;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, lanes: Lanes) {
  let item = group.y * GRID_WIDTH + group.x;
  if (item >= par.n_items) { return; }
  let li = lanes.index;
  let head_item = step[par.items + item * 2u];
  let row = head_item.x / NUM_KV_HEADS;
  let kv_head = head_item.x % NUM_KV_HEADS;
  let n_tokens = head_item.y;
  let pages = head_item.z + par.layer * step[par.items + item * 2u + 1u].x;
  let slot = head_item.w;

  for (var i = li; i < HEAD_DIM * HEAD_VECS; i += WORKGROUP_SIZE) {
    let channel = i / HEAD_VECS;
    let head = i % HEAD_VECS * 4u;
    q_tile[i] = vec4<f32>(
      load_query(head, row, kv_head, channel), load_query(head + 1u, row, kv_head, channel),
      load_query(head + 2u, row, kv_head, channel), load_query(head + 3u, row, kv_head, channel));
  }
  workgroupBarrier();

  var m: array<vec4<f32>, HEAD_VECS>;
  var l: array<vec4<f32>, HEAD_VECS>;
  var acc: array<Channels, HEAD_VECS>;
  for (var h = 0u; h < HEAD_VECS; h++) { m[h] = vec4<f32>(MASKED); }
  let cell = li % CELLS;
  let stripe = li / CELLS;

  for (var tile = 0u; tile < n_tokens; tile += TILE) {
    var top: array<vec4<f32>, HEAD_VECS>;
    for (var h = 0u; h < HEAD_VECS; h++) { top[h] = vec4<f32>(MASKED); }
    for (var i = 0u; i < TOKENS_PER_LANE; i++) {
      let place = i * WORKGROUP_SIZE + li;
      let token = min(tile + place, n_tokens - 1u);
      let page = tables[pages + token / PAGE_SIZE];
      var s: array<vec4<f32>, HEAD_VECS>;
      for (var c = 0u; c < CELLS; c++) {
        let k = codec_decode(arena[codec_k_index(page, token % PAGE_SIZE, c)]);
        for (var h = 0u; h < HEAD_VECS; h++) {
          let at = c * 8u * HEAD_VECS + h;
          s[h] = s[h] + k.low.x * q_tile[at] + k.low.y * q_tile[at + HEAD_VECS]
            + k.low.z * q_tile[at + 2u * HEAD_VECS] + k.low.w * q_tile[at + 3u * HEAD_VECS]
            + k.high.x * q_tile[at + 4u * HEAD_VECS] + k.high.y * q_tile[at + 5u * HEAD_VECS]
            + k.high.z * q_tile[at + 6u * HEAD_VECS] + k.high.w * q_tile[at + 7u * HEAD_VECS];
        }
      }
      let inside = tile + place < n_tokens;
      for (var h = 0u; h < HEAD_VECS; h++) {
        let score = select(vec4<f32>(MASKED), s[h], inside);
        p_tile[place * HEAD_VECS + h] = score;
        top[h] = max(top[h], score);
      }
    }
    for (var h = 0u; h < HEAD_VECS; h++) {
      let higher = max(m[h], lanes_max(lanes, top[h]));
      let fade = exp2(m[h] - higher);
      m[h] = higher;
      l[h] *= fade;
      acc[h] = faded(acc[h], fade);
      for (var i = 0u; i < TOKENS_PER_LANE; i++) {
        let place = i * WORKGROUP_SIZE + li;
        let at = place * HEAD_VECS + h;
        let p = select(vec4<f32>(0.0), exp2(p_tile[at] - higher), tile + place < n_tokens);
        p_tile[at] = p;
        l[h] += p;
      }
    }
    workgroupBarrier();
    // Stops at the last token: an unused slot may hold anything, and zero times NaN is NaN.
    let end = min(TILE, n_tokens - tile);
    if (stripe < STRIPES) {
      for (var place = stripe; place < end; place += STRIPES) {
        let token = tile + place;
        let page = tables[pages + token / PAGE_SIZE];
        let v = codec_decode(arena[codec_v_index(page, token % PAGE_SIZE, cell)]);
        for (var h = 0u; h < HEAD_VECS; h++) {
          acc[h] = weighted(acc[h], p_tile[place * HEAD_VECS + h], v);
        }
      }
    }
    workgroupBarrier();
  }

  for (var h = 0u; h < HEAD_VECS; h++) {
    let total = lanes_sum(lanes, l[h]);
    let at = li * 8u;
    o_tile[at] = acc[h].c0; o_tile[at + 1u] = acc[h].c1; o_tile[at + 2u] = acc[h].c2; o_tile[at + 3u] = acc[h].c3;
    o_tile[at + 4u] = acc[h].c4; o_tile[at + 5u] = acc[h].c5; o_tile[at + 6u] = acc[h].c6; o_tile[at + 7u] = acc[h].c7;
    workgroupBarrier();
    for (var channel = li; channel < HEAD_DIM; channel += WORKGROUP_SIZE) {
      var sum = vec4<f32>(0.0);
      for (var i = 0u; i < STRIPES; i++) { sum += o_tile[(i * CELLS + channel / 8u) * 8u + channel % 8u]; }
      for (var j = 0u; j < 4u; j++) {
        let head = h * 4u + j;
        if (head < GROUP_SIZE) { state_o[(slot + head) * HEAD_DIM + channel] = sum[j]; }
      }
    }
    if (li < 4u && h * 4u + li < GROUP_SIZE) {
      state_ml[slot + h * 4u + li] = vec2<f32>(m[h][li], total[li]);
    }
    workgroupBarrier();
  }
}
