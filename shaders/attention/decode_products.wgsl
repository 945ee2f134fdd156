// Scores of a tile of decode as sums of f32 products. Same function set as decode_digits.wgsl.
//
// One query value from workgroup memory serves TOKENS scores.

// One more than a multiple of 8, so that neighbouring rows begin in different banks.
const FOLD_ROW = GROUP_SIZE * QUADS + 1u;
const FOLD_VECS = select(0u, TILE / BLOCK * FOLD_ROW, KEY_CODEC_CHANNEL_SCALES);
// What a score lacks for each unit of its token's scale and of the query's sum.
const SCORE_OFFSET = 0.0;

var<workgroup> zeros: array<vec4<f32>, WORKGROUP_SIZE * HEAD_VECS>;

// Once per item, from rows of `q_tile`: nothing, numbers are used as they are.
fn prepare_queries(lanes: Lanes) {}

// Adds scores of a lane's tokens in one block, [token][head].
fn scores(li: u32, block: u32, block_lane: u32, page: u32, token: u32, s: ptr<function, array<f32, SCORES>>) {
  if (KEY_CODEC_CHANNEL_SCALES) {
    var zero: array<vec4<f32>, HEAD_VECS>;
    for (var i = 0u; i < QUADS; i += BLOCK_LANES) {
      let c = i + block_lane;
      if (c < QUADS) {
        let channels = key_codec_channel_scale(page, token, c);
        let offset = channels.zero - KEY_CODEC_OFFSET * channels.scale;
        for (var g = 0u; g < GROUP_SIZE; g++) {  // unroll
          let q4 = q_tile[g * QUADS + c];
          put_tile_vec(block * FOLD_ROW + g * QUADS + c, q4 * channels.scale);
          zero[g / 4u][g % 4u] += dot(q4, offset);
        }
      }
    }
    for (var h = 0u; h < HEAD_VECS; h++) {  // unroll
      zeros[li * HEAD_VECS + h] = zero[h];
    }
    workgroupBarrier();
    var sums: array<vec4<f32>, HEAD_VECS>;
    for (var i = 0u; i < BLOCK_LANES; i++) {
      for (var h = 0u; h < HEAD_VECS; h++) {  // unroll
        sums[h] += zeros[(block * BLOCK_LANES + i) * HEAD_VECS + h];
      }
    }
    for (var g = 0u; g < GROUP_SIZE; g++) {  // unroll
      for (var j = 0u; j < TOKENS; j++) {  // unroll
        (*s)[j * GROUP_SIZE + g] = sums[g / 4u][g % 4u];
      }
    }
  }
  let q_from = select(0u, block * FOLD_ROW, KEY_CODEC_CHANNEL_SCALES);
  for (var first_raw = 0u; first_raw < KEY_RAWS; first_raw += KEY_LOADS) {
    var raw: array<KeyCodecRaw, KEY_IN_FLIGHT>;
    for (var u = 0u; u < KEY_LOADS; u++) {  // unroll
      for (var j = 0u; j < TOKENS; j++) {  // unroll
        raw[u * TOKENS + j] = key_codec_load(page, token + j * BLOCK_LANES, (first_raw + u) * KEY_CODEC_SPAN);
      }
    }
    for (var u = 0u; u < KEY_LOADS; u++) {  // unroll
      for (var unit = 0u; unit < KEY_UNITS; unit++) {  // unroll
        let c = q_from + ((first_raw + u) * KEY_CODEC_SPAN + unit) * 2u;
        var k: array<Cell, TOKENS>;
        for (var j = 0u; j < TOKENS; j++) {  // unroll
          k[j] = key_codec_numbers(raw[u * TOKENS + j], unit);
        }
        for (var g = 0u; g < GROUP_SIZE; g++) {  // unroll
          var a: vec4<f32>;
          var b: vec4<f32>;
          if (KEY_CODEC_CHANNEL_SCALES) {
            a = tile_vec(c + g * QUADS);
            b = tile_vec(c + g * QUADS + 1u);
          } else {
            a = q_tile[c + g * QUADS];
            b = q_tile[c + g * QUADS + 1u];
          }
          for (var j = 0u; j < TOKENS; j++) {  // unroll
            (*s)[j * GROUP_SIZE + g] =
              chain(k[j].high, b, chain(k[j].low, a, (*s)[j * GROUP_SIZE + g]));
          }
        }
      }
    }
  }
}
