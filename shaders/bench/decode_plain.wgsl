// Decode as one would write it first, to compare with: token after token, each query head by itself.
//
// Workgroup = one work item, lane = a cell of 8 channels. A score is a sum over lanes, and every token moves the running
// maximum, so each token waits for the one before it, and a page is read again for every head of the group.

@group(0) @binding(4) var<storage, read_write> state_o: array<f32>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, lanes: Lanes) {
  let item = group.y * GRID_WIDTH + group.x;
  if (item >= par.n_items) { return; }
  let head_item = step[par.items + item * 2u];
  let row = head_item.x / NUM_KV_HEADS;
  let kv_head = head_item.x % NUM_KV_HEADS;
  let n_tokens = head_item.y;
  let pages = head_item.z + par.layer * step[par.items + item * 2u + 1u].x;
  let slot = head_item.w;
  let cell = min(lanes.index, KEY_CELLS - 1u);
  let mine = lanes.index < KEY_CELLS;

  for (var head = 0u; head < GROUP_SIZE; head++) {
    let q_at = (row * par.q_stride + (kv_head * GROUP_SIZE + head) * HEAD_DIM) / 4u + cell * 2u;
    let q_low = q[q_at] * par.scale_log2;
    let q_high = q[q_at + 1u] * par.scale_log2;
    var m = MASKED;
    var l = 0.0;
    var low = vec4<f32>(0.0);
    var high = vec4<f32>(0.0);
    for (var token = 0u; token < n_tokens; token++) {
      let page = tables[pages + token / PAGE_SIZE];
      let place = token % PAGE_SIZE;
      let raw = key_codec_load(page, place, cell / KEY_CODEC_SPAN * KEY_CODEC_SPAN);
      let k = key_codec_cell(page, place, cell, key_codec_row(page, place, 0u), raw);
      let part = select(0.0, dot(k.low, q_low) + dot(k.high, q_high), mine);
      let score = lanes_sum(lanes, vec4<f32>(part)).x;
      let higher = max(m, score);
      let fade = exp2(m - higher);
      let p = exp2(score - higher);
      m = higher;
      l = l * fade + p;
      let values = value_codec_load(page, place / VALUE_CODEC_SPAN * VALUE_CODEC_SPAN, cell);
      let v = value_codec_cell(page, place, cell, value_codec_row(page, place, cell), values);
      low = low * fade + p * v.low;
      high = high * fade + p * v.high;
    }
    if (mine) {
      for (var i = 0u; i < 4u; i++) {
        state_o[(slot + head) * HEAD_DIM + cell * 8u + i] = low[i];
        state_o[(slot + head) * HEAD_DIM + cell * 8u + 4u + i] = high[i];
      }
    }
    if (lanes.index == 0u) { state_ml[slot + head] = vec2<f32>(m, l); }
  }
}
