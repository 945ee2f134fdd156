// Scores of a tile of decode by integer products of four codes at a time. Same function set as decode_products.wgsl.
//
// A query, with the scales of key channels folded into it for a block of tokens, is rounded to STEPS steps of the largest channel
// of its head, and each count of steps is two digits of 8 bits: q = step * (256 * high + low). Codes are multiplied as they
// lie and sums are exact, so all that is lost is half a step of the query (`Tolerance::attention_digits`). Against products in
// f32 this halves reads of workgroup memory and leaves a third of the instructions.

const STEPS = 32512.0;  // 127 * 256, so that the high digit has 8 bits
const DIGIT_BITS = 16u / KEY_CODEC_SPAN;
const DIGIT_CHANNELS = DIGIT_VECS * 8u;
const HEAD_UNITS = HEAD_DIM / DIGIT_CHANNELS;
const DIGIT_HEAD = HEAD_DIM / 8u;
// One more than a multiple of 8, so that neighbouring rows begin in different banks.
const DIGIT_ROW = GROUP_SIZE * DIGIT_HEAD + 1u;
const FOLD_VECS = select(0u, TILE / BLOCK * DIGIT_ROW, KEY_CODEC_CHANNEL_SCALES);
const SHARE_ROW = WORKGROUP_SIZE + 1u;
// Codes of 8 bits are multiplied as signed numbers, 128 less than they are.
const SCORE_OFFSET = select(0.0, 128.0, DIGIT_BITS == 8u);

// What queries are where no scales are folded into them, [head][channel / 8].
var<workgroup> query_digits: array<vec4<u32>, select(DIGIT_ROW, 1u, KEY_CODEC_CHANNEL_SCALES)>;
var<workgroup> shares: array<f32, 2u * GROUP_SIZE * SHARE_ROW>;  // [zero points, largest channel][head][lane]
var<workgroup> block_heads: array<f32, 2u * GROUP_SIZE * (TILE / BLOCK)>;  // [block][sum of zero points, step][head]

fn head_step(block: u32, g: u32) -> f32 {
  return block_heads[(block * 2u + 1u) * GROUP_SIZE + g];
}

fn digits_at(i: u32) -> vec4<u32> {
  if (KEY_CODEC_CHANNEL_SCALES) { return tile_of[i]; }
  return query_digits[i];
}

fn put_digits_at(i: u32, digits: vec4<u32>) {
  if (KEY_CODEC_CHANNEL_SCALES) { tile_of[i] = digits; } else { query_digits[i] = digits; }
}

// High and low digits of four channels, in the order in which `plane_digits` has their codes: of numbers of steps plus 2^15 + 2^7,
// so that both digits are positive until the last operation.
fn digits_of(a: u32, b: u32, c: u32, d: u32) -> vec2<u32> {
  const EVEN = 0x00ff00ffu;
  let even = (a & 0xffffu) | (c << 16u);
  let odd = (b & 0xffffu) | (d << 16u);
  let high = ((even >> 8u) & EVEN) | (odd & ~EVEN);
  let low = (even & EVEN) | ((odd & EVEN) << 8u);
  return vec2<u32>(high, low) ^ vec2<u32>(0x80808080u);
}

// Digits of the channels of one unit of codes, given what folds into them.
fn put_unit(row: u32, block: u32, unit: u32, scale: array<vec4<f32>, DIGIT_QUADS>) {
  for (var g = 0u; g < GROUP_SIZE; g++) {  // unroll
    let step = head_step(block, g);
    let steps = select(0.0, 1.0 / step, step > 0.0);
    var x: array<vec4<u32>, DIGIT_QUADS>;
    for (var quad = 0u; quad < DIGIT_QUADS; quad++) {  // unroll
      // The sum with 2^23 rounds to a whole number and leaves it in the lower bits.
      let q4 = q_tile[g * QUADS + unit * DIGIT_QUADS + quad] * scale[quad];
      x[quad] = bitcast<vec4<u32>>(fma(q4, vec4<f32>(steps), vec4<f32>(8388608.0 + 32896.0)));
    }
    let at = row + g * DIGIT_HEAD + unit * DIGIT_VECS;
    if (DIGIT_BITS == 8u) {
      put_digits_at(at, vec4<u32>(digits_of(x[0].x, x[0].y, x[0].z, x[0].w), digits_of(x[1].x, x[1].y, x[1].z, x[1].w)));
    } else if (DIGIT_BITS == 4u) {
      put_digits_at(at, vec4<u32>(digits_of(x[0].x, x[0].z, x[1].x, x[1].z), digits_of(x[0].y, x[0].w, x[1].y, x[1].w)));
    } else {
      const THIRD = DIGIT_QUADS - 2u;
      const LAST = DIGIT_QUADS - 1u;
      for (var v = 0u; v < DIGIT_VECS; v++) {  // unroll
        let first = digits_of(x[0][2u * v], x[1][2u * v], x[THIRD][2u * v], x[LAST][2u * v]);
        let second = digits_of(x[0][2u * v + 1u], x[1][2u * v + 1u], x[THIRD][2u * v + 1u], x[LAST][2u * v + 1u]);
        put_digits_at(at + v, vec4<u32>(first, second));
      }
    }
  }
}

fn largest(x: vec4<f32>) -> f32 {
  let pair = max(abs(x.xy), abs(x.zw));
  return max(pair.x, pair.y);
}

// Once per item, from rows of `q_tile`: digits of queries that are the same for all tokens.
fn prepare_queries(lanes: Lanes) {
  if (KEY_CODEC_CHANNEL_SCALES) { return; }
  let li = lanes.index;
  var top: array<vec4<f32>, HEAD_VECS>;
  for (var c = li; c < QUADS; c += WORKGROUP_SIZE) {
    for (var g = 0u; g < GROUP_SIZE; g++) {  // unroll
      top[g / 4u][g % 4u] = max(top[g / 4u][g % 4u], largest(q_tile[g * QUADS + c]));
    }
  }
  for (var h = 0u; h < HEAD_VECS; h++) {  // unroll
    top[h] = lanes_max(lanes, top[h]);
  }
  if (li == 0u) {
    for (var g = 0u; g < GROUP_SIZE; g++) {  // unroll
      block_heads[GROUP_SIZE + g] = top[g / 4u][g % 4u] / STEPS;
    }
  }
  workgroupBarrier();
  var ones: array<vec4<f32>, DIGIT_QUADS>;
  for (var quad = 0u; quad < DIGIT_QUADS; quad++) {  // unroll
    ones[quad] = vec4<f32>(1.0);
  }
  for (var unit = li; unit < HEAD_UNITS; unit += WORKGROUP_SIZE) { put_unit(0u, 0u, unit, ones); }
  workgroupBarrier();
}

// Digits of queries with the channel scales of a block folded into them, and what its zero points add.
fn fold(li: u32, block: u32, block_lane: u32, page: u32, token: u32) {
  var scale: array<array<vec4<f32>, DIGIT_QUADS>, LANE_UNITS>;
  var zero: array<f32, GROUP_SIZE>;
  var top: array<f32, GROUP_SIZE>;
  for (var i = 0u; i < LANE_UNITS; i++) {  // unroll
    let unit = i * BLOCK_LANES + block_lane;
    if (unit < HEAD_UNITS) {
      for (var quad = 0u; quad < DIGIT_QUADS; quad++) {  // unroll
        let c = unit * DIGIT_QUADS + quad;
        let channels = key_codec_channel_scale(page, token, c);
        scale[i][quad] = channels.scale;
        for (var g = 0u; g < GROUP_SIZE; g++) {  // unroll
          let q4 = q_tile[g * QUADS + c];
          zero[g] += dot(q4, channels.zero);
          top[g] = max(top[g], largest(q4 * channels.scale));
        }
      }
    }
  }
  for (var g = 0u; g < GROUP_SIZE; g++) {  // unroll
    shares[g * SHARE_ROW + li] = zero[g];
    shares[(GROUP_SIZE + g) * SHARE_ROW + li] = top[g];
  }
  workgroupBarrier();
  for (var i = block_lane; i < 2u * GROUP_SIZE; i += BLOCK_LANES) {
    let first = i * SHARE_ROW + block * BLOCK_LANES;
    var sum = 0.0;
    var most = 0.0;
    for (var lane = 0u; lane < BLOCK_LANES; lane++) {
      let share = shares[first + lane];
      sum += share;
      most = max(most, share);
    }
    block_heads[block * 2u * GROUP_SIZE + i] = select(most / STEPS, sum, i < GROUP_SIZE);
  }
  workgroupBarrier();
  for (var i = 0u; i < LANE_UNITS; i++) {  // unroll
    let unit = i * BLOCK_LANES + block_lane;
    if (unit < HEAD_UNITS) { put_unit(block * DIGIT_ROW, block, unit, scale[i]); }
  }
  workgroupBarrier();
}

// Adds scores of a lane's tokens in one block, [token][head].
fn scores(li: u32, block: u32, block_lane: u32, page: u32, token: u32, s: ptr<function, array<f32, SCORES>>) {
  // What does not wait for digits is asked for at once.
  var raw: array<KeyCodecRaw, KEY_IN_FLIGHT>;
  for (var u = 0u; u < KEY_LOADS; u++) {  // unroll
    for (var j = 0u; j < TOKENS; j++) {  // unroll
      raw[u * TOKENS + j] = key_codec_load(page, token + j * BLOCK_LANES, u * KEY_CODEC_SPAN);
    }
  }
  var row = 0u;
  var home = 0u;
  if (KEY_CODEC_CHANNEL_SCALES) {
    fold(li, block, block_lane, page, token);
    row = block * DIGIT_ROW;
    home = block;
  }
  var high: array<i32, SCORES>;
  var low: array<i32, SCORES>;
  for (var first = 0u; first < KEY_RAWS; first += KEY_LOADS) {
    var next: array<KeyCodecRaw, KEY_IN_FLIGHT>;
    if (first + KEY_LOADS < KEY_RAWS) {
      for (var u = 0u; u < KEY_LOADS; u++) {  // unroll
        for (var j = 0u; j < TOKENS; j++) {  // unroll
          next[u * TOKENS + j] =
            key_codec_load(page, token + j * BLOCK_LANES, (first + KEY_LOADS + u) * KEY_CODEC_SPAN);
        }
      }
    }
    for (var u = 0u; u < KEY_LOADS; u++) {  // unroll
      for (var unit = 0u; unit < DIGIT_UNITS; unit++) {  // unroll
        let at = row + ((first + u) * DIGIT_UNITS + unit) * DIGIT_VECS;
        var k: array<vec4<u32>, TOKENS>;
        for (var j = 0u; j < TOKENS; j++) {  // unroll
          k[j] = plane_digits(raw[u * TOKENS + j].codes, DIGIT_BITS, unit);
        }
        for (var g = 0u; g < GROUP_SIZE; g++) {  // unroll
          for (var v = 0u; v < DIGIT_VECS; v++) {  // unroll
            let q4 = digits_at(at + g * DIGIT_HEAD + v);
            for (var j = 0u; j < TOKENS; j++) {  // unroll
              let a = k[j][2u * v];
              let b = k[j][2u * v + 1u];
              high[j * GROUP_SIZE + g] += dot4I8Packed(a, q4.x);
              high[j * GROUP_SIZE + g] += dot4I8Packed(b, q4.z);
              low[j * GROUP_SIZE + g] += dot4I8Packed(a, q4.y);
              low[j * GROUP_SIZE + g] += dot4I8Packed(b, q4.w);
            }
          }
        }
      }
    }
    raw = next;
  }
  for (var g = 0u; g < GROUP_SIZE; g++) {  // unroll
    let step = head_step(home, g);
    var zero = 0.0;
    if (KEY_CODEC_CHANNEL_SCALES) { zero = block_heads[block * 2u * GROUP_SIZE + g]; }
    for (var j = 0u; j < TOKENS; j++) {  // unroll
      let i = j * GROUP_SIZE + g;
      (*s)[i] = fma(f32(high[i] * 256 + low[i]), step, zero);
    }
  }
}
