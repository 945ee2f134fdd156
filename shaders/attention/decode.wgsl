// Split-KV decode: one query row per sequence against a run of cached tokens of one KV head.
// Specification: src/kernels/decode.rs.
//
// Workgroup = one work item = (row, KV head, run of tokens). In QK a lane owns whole tokens, so a score needs no
// exchange between lanes; in PV a lane owns a cell of 8 channels and a stripe of tokens. The GROUP_SIZE query heads
// that share the KV head are packed four to a vec4, so one load of K or V serves all of them. Codes become numbers in
// registers: a lane loads 16 bytes and uses them whole. Where values are the first channels of keys (latent attention),
// pages hold keys alone and PV reads them once more.

const HEAD_VECS = (GROUP_SIZE + 3u) / 4u;
const TILE = WORKGROUP_SIZE * TOKENS_PER_LANE;
const STRIPES = WORKGROUP_SIZE / VALUE_CELLS;

@group(0) @binding(4) var<storage, read_write> state_o: array<f32>;

var<workgroup> q_tile: array<vec4<f32>, HEAD_DIM * HEAD_VECS>;  // [channel][head vec]; at the end [channel]
var<workgroup> p_tile: array<vec4<f32>, TILE * HEAD_VECS>;      // [token][head vec]
var<workgroup> o_tile: array<vec4<f32>, WORKGROUP_SIZE * 8u>;   // [lane][channel]

fn load_query(head: u32, row: u32, kv_head: u32, channel: u32) -> f32 {
  if (head >= GROUP_SIZE) { return 0.0; }
  let at = row * par.q_stride + (kv_head * GROUP_SIZE + head) * HEAD_DIM + channel;
  return q[at / 4u][at % 4u] * par.scale_log2;
}

// Hadamard transform of SPAN channels of the query tile, which has `vecs` vec4 to a channel.
fn hadamard(li: u32, first: u32, vecs: u32) {
  for (var stride = 1u; stride < SPAN; stride *= 2u) {
    for (var i = li; i < SPAN / 2u * vecs; i += WORKGROUP_SIZE) {
      let pair = i / vecs;
      let low = (first + pair / stride * 2u * stride + pair % stride) * vecs + i % vecs;
      let high = low + stride * vecs;
      let a = q_tile[low];
      let b = q_tile[high];
      q_tile[low] = a + b;
      q_tile[high] = a - b;
    }
    workgroupBarrier();
  }
  for (var i = li; i < SPAN * vecs; i += WORKGROUP_SIZE) { q_tile[first * vecs + i] *= NORMALISATION; }
  workgroupBarrier();
}

fn rotate(li: u32, vecs: u32) {
  for (var i = li; i < HEAD_DIM * vecs; i += WORKGROUP_SIZE) { q_tile[i] *= rotation_sign(i / vecs); }
  workgroupBarrier();
  hadamard(li, 0u, vecs);
  if (SPAN < HEAD_DIM) { hadamard(li, HEAD_DIM - SPAN, vecs); }
}

fn rotate_back(li: u32) {
  if (SPAN < HEAD_DIM) { hadamard(li, HEAD_DIM - SPAN, 1u); }
  hadamard(li, 0u, 1u);
  for (var i = li; i < HEAD_DIM; i += WORKGROUP_SIZE) { q_tile[i] *= rotation_sign(i); }
  workgroupBarrier();
}

// What a cell of keys adds to the scores of four heads.
fn products(k: Cell, slots: Slots, h: u32) -> vec4<f32> {
  return k.low.x * q_tile[slots.low.x * HEAD_VECS + h] + k.low.y * q_tile[slots.low.y * HEAD_VECS + h]
    + k.low.z * q_tile[slots.low.z * HEAD_VECS + h] + k.low.w * q_tile[slots.low.w * HEAD_VECS + h]
    + k.high.x * q_tile[slots.high.x * HEAD_VECS + h] + k.high.y * q_tile[slots.high.y * HEAD_VECS + h]
    + k.high.z * q_tile[slots.high.z * HEAD_VECS + h] + k.high.w * q_tile[slots.high.w * HEAD_VECS + h];
}

struct Scores {
  s: array<vec4<f32>, HEAD_VECS>,
}

fn scores(page: u32, token: u32, basis: u32) -> Scores {
  var scores: Scores;
  if (KEY_LIFTS) {
    let position = key_position(page, token);
    var latents = load_latents(page, token);
    for (var c = 0u; c < KEY_CELLS; c++) {
      let k = lifted_cell(&latents, basis, position, c);
      for (var h = 0u; h < HEAD_VECS; h++) { scores.s[h] += products(k, key_slots(page, c), h); }
    }
    return scores;
  }
  let row = key_codec_row(page, token, 0u);
  for (var first = 0u; first < KEY_CELLS; first += KEY_CODEC_SPAN) {
    let raw = key_codec_load(page, token, first);
    for (var c = first; c < min(first + KEY_CODEC_SPAN, KEY_CELLS); c++) {
      let k = key_codec_cell(page, token, c, row, raw);
      let slots = key_slots(page, c);
      for (var h = 0u; h < HEAD_VECS; h++) { scores.s[h] += products(k, slots, h); }
    }
  }
  return scores;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, lanes: Lanes) {
  let item = group.y * GRID_WIDTH + group.x;
  if (item >= par.n_items) { return; }
  let li = lanes.index;
  let head_item = step[par.items + item * 2u];
  let place_item = step[par.items + item * 2u + 1u];
  let row = head_item.x / NUM_KV_HEADS;
  let kv_head = head_item.x % NUM_KV_HEADS;
  let n_tokens = head_item.y;
  let pages = head_item.z + par.layer * place_item.x;
  let slot = head_item.w;
  let basis = head_parameters(place_item.y);

  for (var i = li; i < HEAD_DIM * HEAD_VECS; i += WORKGROUP_SIZE) {
    let channel = i / HEAD_VECS;
    let head = i % HEAD_VECS * 4u;
    q_tile[i] = vec4<f32>(
      load_query(head, row, kv_head, channel), load_query(head + 1u, row, kv_head, channel),
      load_query(head + 2u, row, kv_head, channel), load_query(head + 3u, row, kv_head, channel));
  }
  workgroupBarrier();
  if (KEY_ROTATES) { rotate(li, HEAD_VECS); }

  var m: array<vec4<f32>, HEAD_VECS>;
  var l: array<vec4<f32>, HEAD_VECS>;
  var acc: array<Channels, HEAD_VECS>;
  for (var h = 0u; h < HEAD_VECS; h++) { m[h] = vec4<f32>(MASKED); }
  let cell = li % VALUE_CELLS;
  let stripe = li / VALUE_CELLS;

  for (var tile = 0u; tile < n_tokens; tile += TILE) {
    var top: array<vec4<f32>, HEAD_VECS>;
    for (var h = 0u; h < HEAD_VECS; h++) { top[h] = vec4<f32>(MASKED); }
    for (var i = 0u; i < TOKENS_PER_LANE; i++) {
      let place = i * WORKGROUP_SIZE + li;
      let token = min(tile + place, n_tokens - 1u);
      let page = tables[pages + token / PAGE_SIZE];
      let all = scores(page, token % PAGE_SIZE, basis);
      let inside = tile + place < n_tokens;
      var length = 1.0;
      if (PAIRED) { length = merged_length(page, token % PAGE_SIZE, 0u, place_item.z); }
      for (var h = 0u; h < HEAD_VECS; h++) {
        let score = select(vec4<f32>(MASKED), all.s[h] * length, inside);
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
    // Stops at the last token: an unused slot may hold anything, and zero times NaN is NaN. Runs of sealed pages are
    // whole pages, so a block of several tokens is never cut.
    let end = min(TILE, n_tokens - tile);
    if (stripe < STRIPES) {
      for (var block = stripe * VALUE_CODEC_SPAN; block < end; block += STRIPES * VALUE_CODEC_SPAN) {
        let page = tables[pages + (tile + block) / PAGE_SIZE];
        let first = (tile + block) % PAGE_SIZE;
        let raw = value_codec_load(page, first, cell);
        for (var u = 0u; u < VALUE_CODEC_SPAN; u++) {
          var v: Cell;
          if (VALUES_ARE_KEYS) {
            let keys = key_codec_load(page, first + u, cell / KEY_CODEC_SPAN * KEY_CODEC_SPAN);
            v = key_codec_cell(page, first + u, cell, key_codec_row(page, first + u, 0u), keys);
          } else {
            v = value_codec_cell(page, first + u, cell, value_codec_row(page, first + u, cell), raw);
          }
          if (PAIRED) {
            let length = merged_length(page, first + u, 1u, place_item.z);
            v = Cell(v.low * length, v.high * length);
          }
          for (var h = 0u; h < HEAD_VECS; h++) {
            acc[h] = weighted(acc[h], p_tile[(block + u) * HEAD_VECS + h], v);
          }
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
    for (var channel = li; channel < VALUE_WIDTH; channel += WORKGROUP_SIZE) {
      var sum = vec4<f32>(0.0);
      for (var i = 0u; i < STRIPES; i++) { sum += o_tile[(i * VALUE_CELLS + channel / 8u) * 8u + channel % 8u]; }
      if (VALUE_ROTATES || VALUE_LIFTS) {
        q_tile[channel] = sum;
      } else {
        write_state(slot, h, channel, sum);
      }
    }
    if (VALUE_ROTATES || VALUE_LIFTS) {
      workgroupBarrier();
      if (VALUE_ROTATES) { rotate_back(li); }
      for (var channel = li; channel < HEAD_DIM; channel += WORKGROUP_SIZE) {
        var sum = q_tile[channel];
        if (VALUE_LIFTS) {
          sum = vec4<f32>(0.0);
          for (var r = 0u; r < VALUE_WIDTH; r++) {
            let at = basis + VALUE_BASIS + (channel * VALUE_WIDTH + r) / 4u;
            sum += q_tile[r] * parameters[at][r % 4u];
          }
        }
        write_state(slot, h, channel, sum);
      }
    }
    if (li < 4u && h * 4u + li < GROUP_SIZE) {
      state_ml[slot + h * 4u + li] = vec2<f32>(m[h][li], total[li]);
    }
    workgroupBarrier();
  }
}

// One channel of the outputs of four heads.
fn write_state(slot: u32, h: u32, channel: u32, o: vec4<f32>) {
  for (var j = 0u; j < 4u; j++) {
    let head = h * 4u + j;
    if (head < GROUP_SIZE) { state_o[(slot + head) * OUT_DIM + channel] = o[j]; }
  }
}
