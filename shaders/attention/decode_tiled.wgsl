// Split-KV decode in register tiles. Specification: src/kernels/decode.rs.
//
// Workgroup = one work item = (row, KV head, run of tokens), walked in tiles of TILE tokens.
//
// QK: a lane owns TOKENS tokens of one block of 32, all in one page, so a score needs no exchange between lanes. How scores
//   are computed is in the file joined to this one: decode_products.wgsl or decode_digits.wgsl.
// PV: a lane owns a cell of 8 channels and a stripe of tokens; one weight from workgroup memory serves 8 channels.
//
// Numbers are used as they lie in the codes. Scales of key channels are folded into the query, once per block of tokens;
// those of tokens into scores and weights; what is added to all numbers of a group (zero points, and the offset that codes
// have as floats) is summed once per group. Reads of workgroup memory limit this kernel: one costs a subgroup as much as 16
// multiply-adds even when all lanes read one address.

const VALUES_AHEAD = AHEAD == 1u;
const TILE = WORKGROUP_SIZE * TOKENS;
const BLOCK = 32u;
const BLOCK_LANES = BLOCK / TOKENS;
const QUADS = HEAD_DIM / 4u;
const STRIPES = WORKGROUP_SIZE / VALUE_CELLS;
const KEY_RAWS = KEY_CELLS / KEY_CODEC_SPAN;
// One more than a multiple of 8, so that neighbouring rows begin in different banks.
const WEIGHT_ROW = TILE + 1u;

@group(0) @binding(4) var<storage, read_write> state_o: array<f32>;

var<workgroup> q_tile: array<vec4<f32>, GROUP_SIZE * QUADS>;  // [head][channel / 4]; at the end outputs
// In turn: queries folded for each block (FOLD_VECS), weights [channel group][head vec][token], and outputs [lane][2]. The less
// of this memory a workgroup takes, the more of them run at once. Bits, since some of it is no numbers.
var<workgroup> tile_of: array<vec4<u32>, max(max(FOLD_VECS, WEIGHT_ROWS * WEIGHT_ROW), WORKGROUP_SIZE * 2u)>;

fn tile_vec(i: u32) -> vec4<f32> {
  return bitcast<vec4<f32>>(tile_of[i]);
}

fn put_tile_vec(i: u32, value: vec4<f32>) {
  tile_of[i] = bitcast<vec4<u32>>(value);
}

fn place_of(block: u32, lane: u32, j: u32) -> u32 {
  return block * BLOCK + lane + j * BLOCK_LANES;
}

fn row_vec(i: u32) -> vec4<f32> {
  return q_tile[i];
}

fn put_row_vec(i: u32, value: vec4<f32>) {
  q_tile[i] = value;
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

  let q_at = (row * par.q_stride + kv_head * (GROUP_SIZE * HEAD_DIM)) / 4u;
  for (var i = li; i < GROUP_SIZE * QUADS; i += WORKGROUP_SIZE) { q_tile[i] = q[q_at + i] * par.scale_log2; }
  workgroupBarrier();
  if (KEY_ROTATES) { rotate(li); }
  prepare_queries(lanes);

  let block = li / BLOCK_LANES;
  let block_lane = li % BLOCK_LANES;
  let cell = li % VALUE_CELLS;
  let stripe = li / VALUE_CELLS;
  // Queries summed over channels: what a token's zero point meets.
  var q_sum: array<vec4<f32>, HEAD_VECS>;
  if (KEY_CODEC_TOKEN_SCALES > 0u) {
    for (var c = li; c < QUADS; c += WORKGROUP_SIZE) {
      for (var g = 0u; g < GROUP_SIZE; g++) {  // unroll
        q_sum[g / 4u][g % 4u] += dot(q_tile[g * QUADS + c], vec4<f32>(1.0));
      }
    }
    for (var h = 0u; h < HEAD_VECS; h++) {  // unroll
      q_sum[h] = lanes_sum(lanes, q_sum[h]);
    }
  }
  var m: array<vec4<f32>, HEAD_VECS>;
  var l: array<vec4<f32>, HEAD_VECS>;
  var low: array<vec4<f32>, GROUP_SIZE>;
  var high: array<vec4<f32>, GROUP_SIZE>;
  var added: array<vec4<f32>, WEIGHT_ROWS>;  // sums of weights times zero points, [channel group][head vec]
  for (var h = 0u; h < HEAD_VECS; h++) {  // unroll
    m[h] = vec4<f32>(MASKED);
  }

  for (var tile = 0u; tile < n_tokens; tile += TILE) {
    // A block behind the last token reads the last one's.
    let first = min(tile + block * BLOCK, (n_tokens - 1u) / BLOCK * BLOCK);
    let page = tables[pages + first / PAGE_SIZE];
    let token = first % PAGE_SIZE + block_lane;

    let last = (min(TILE, n_tokens - tile) - 1u) / VALUE_CODEC_SPAN;
    // What does not wait for scores is asked for at once.
    var values: array<ValueCodecRaw, VALUE_LOADS>;
    if (VALUES_AHEAD) {
      for (var u = 0u; u < VALUE_LOADS; u++) {  // unroll
        values[u] = load_values(pages, tile, min(stripe + u * STRIPES, last), cell);
      }
    }
    var token_scale: array<vec2<f32>, TOKENS>;
    if (KEY_CODEC_TOKEN_SCALES > 0u) {
      for (var j = 0u; j < TOKENS; j++) {  // unroll
        token_scale[j] = key_codec_token_scale(page, token + j * BLOCK_LANES, 0u);
      }
    }
    var value_scale: array<vec2<f32>, LANE_SCALES>;  // [token][channel group]
    if (VALUE_CODEC_TOKEN_SCALES > 0u) {
      for (var j = 0u; j < TOKENS; j++) {  // unroll
        for (var r = 0u; r < WEIGHT_GROUPS; r++) {  // unroll
          value_scale[j * WEIGHT_GROUPS + r] = value_codec_token_scale(page, token + j * BLOCK_LANES, r);
        }
      }
    }

    var s: array<f32, SCORES>;  // [token][head]
    scores(li, block, block_lane, page, token, &s);
    var inside: array<bool, TOKENS>;
    var top: array<vec4<f32>, HEAD_VECS>;
    for (var h = 0u; h < HEAD_VECS; h++) {  // unroll
      top[h] = vec4<f32>(MASKED);
    }
    for (var j = 0u; j < TOKENS; j++) {  // unroll
      inside[j] = tile + place_of(block, block_lane, j) < n_tokens;
      for (var g = 0u; g < GROUP_SIZE; g++) {  // unroll
        var score = s[j * GROUP_SIZE + g];
        if (KEY_CODEC_TOKEN_SCALES > 0u) { score = score * token_scale[j].x + q_sum[g / 4u][g % 4u] * (token_scale[j].y + SCORE_OFFSET * token_scale[j].x); }
        score = select(MASKED, score, inside[j]);
        s[j * GROUP_SIZE + g] = score;
        top[g / 4u][g % 4u] = max(top[g / 4u][g % 4u], score);
      }
    }
    var fade: array<vec4<f32>, HEAD_VECS>;
    for (var h = 0u; h < HEAD_VECS; h++) {  // unroll
      let higher = max(m[h], lanes_max(lanes, top[h]));
      fade[h] = exp2(m[h] - higher);
      m[h] = higher;
      l[h] *= fade[h];
    }
    for (var g = 0u; g < GROUP_SIZE; g++) {  // unroll
      low[g] *= fade[g / 4u][g % 4u];
      high[g] *= fade[g / 4u][g % 4u];
    }
    if (VALUE_CODEC_TOKEN_SCALES > 0u) {
      for (var r = 0u; r < WEIGHT_ROWS; r++) {  // unroll
        added[r] *= fade[r % HEAD_VECS];
      }
    }
    for (var j = 0u; j < TOKENS; j++) {  // unroll
      let place = place_of(block, block_lane, j);
      var p: array<vec4<f32>, HEAD_VECS>;
      for (var g = 0u; g < GROUP_SIZE; g++) {  // unroll
        p[g / 4u][g % 4u] = select(0.0, exp2(s[j * GROUP_SIZE + g] - m[g / 4u][g % 4u]), inside[j]);
      }
      for (var h = 0u; h < HEAD_VECS; h++) {  // unroll
        l[h] += p[h];
      }
      for (var r = 0u; r < WEIGHT_GROUPS; r++) {  // unroll
        var scale = vec2<f32>(1.0, 0.0);
        // Scales of a slot that was never written may be anything.
        if (VALUE_CODEC_TOKEN_SCALES > 0u) { scale = select(vec2<f32>(0.0), value_scale[j * WEIGHT_GROUPS + r], inside[j]); }
        for (var h = 0u; h < HEAD_VECS; h++) {  // unroll
          put_tile_vec((r * HEAD_VECS + h) * WEIGHT_ROW + place, p[h] * scale.x);
          if (VALUE_CODEC_TOKEN_SCALES > 0u) {
            added[r * HEAD_VECS + h] += p[h] * (scale.y - VALUE_CODEC_OFFSET * scale.x);
          }
        }
      }
    }
    workgroupBarrier();
    // Blocks behind the last token have no weight; they read the last one, since what was never written may be NaN.
    let weight_row = cell * WEIGHT_GROUPS / VALUE_CELLS * HEAD_VECS * WEIGHT_ROW;
    for (var i = stripe; i <= last; i += STRIPES * VALUE_LOADS) {
      if (!VALUES_AHEAD || i > stripe) {
        for (var u = 0u; u < VALUE_LOADS; u++) {  // unroll
          values[u] = load_values(pages, tile, min(i + u * STRIPES, last), cell);
        }
      }
      for (var u = 0u; u < VALUE_LOADS; u++) {  // unroll
        let at = weight_row + (i + u * STRIPES) * VALUE_CODEC_SPAN;
        for (var unit = 0u; unit < VALUE_UNITS; unit++) {  // unroll
          let v = value_codec_numbers(values[u], unit);
          var p: array<vec4<f32>, HEAD_VECS>;
          for (var h = 0u; h < HEAD_VECS; h++) {  // unroll
            p[h] = tile_vec(at + h * WEIGHT_ROW + unit);
          }
          for (var g = 0u; g < GROUP_SIZE; g++) {  // unroll
            low[g] = fma(v.low, vec4<f32>(p[g / 4u][g % 4u]), low[g]);
            high[g] = fma(v.high, vec4<f32>(p[g / 4u][g % 4u]), high[g]);
          }
        }
      }
    }
    workgroupBarrier();
  }

  // What was added to all channels of a group, over all lanes.
  for (var r = 0u; r < WEIGHT_ROWS; r++) {  // unroll
    if (VALUE_CODEC_TOKEN_SCALES > 0u) { added[r] = lanes_sum(lanes, added[r]); }
  }
  for (var g = 0u; g < GROUP_SIZE; g++) {  // unroll
    put_tile_vec(li * 2u, low[g]);
    put_tile_vec(li * 2u + 1u, high[g]);
    workgroupBarrier();
    for (var c = li; c < QUADS; c += WORKGROUP_SIZE) {
      var sum = vec4<f32>(0.0);
      for (var i = 0u; i < STRIPES; i++) { sum += tile_vec(i * VALUE_CELLS * 2u + c); }
      if (VALUE_CODEC_TOKEN_SCALES > 0u) {
        for (var r = 0u; r < WEIGHT_GROUPS; r++) {  // unroll
          if (c * WEIGHT_GROUPS / QUADS == r) { sum += added[r * HEAD_VECS + g / 4u][g % 4u]; }
        }
      }
      q_tile[g * QUADS + c] = sum;
    }
    workgroupBarrier();
  }
  if (VALUE_ROTATES) { rotate_back(li); }
  for (var i = li; i < GROUP_SIZE * QUADS; i += WORKGROUP_SIZE) {
    let o = q_tile[i];
    let at = slot * HEAD_DIM + i * 4u;
    state_o[at] = o.x; state_o[at + 1u] = o.y; state_o[at + 2u] = o.z; state_o[at + 3u] = o.w;
  }
  for (var h = 0u; h < HEAD_VECS; h++) {  // unroll
    let total = lanes_sum(lanes, l[h]);
    // An array that is indexed by a lane does not stay in registers; a value may be.
    let top = m[h];
    if (li < 4u && h * 4u + li < GROUP_SIZE) {
      state_ml[slot + h * 4u + li] = vec2<f32>(top[li], total[li]);
    }
  }
}

// 16 bytes of values of the block at a place in the tile.
fn load_values(pages: u32, tile: u32, block: u32, cell: u32) -> ValueCodecRaw {
  let token = tile + block * VALUE_CODEC_SPAN;
  return value_codec_load(tables[pages + token / PAGE_SIZE], token % PAGE_SIZE, cell);
}
