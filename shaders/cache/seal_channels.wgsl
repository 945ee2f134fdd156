// Sealing of keys as they are whose scales belong to channels, each over a group of tokens: keys of kivi. Joined for that side.
//
// Strip = a group of tokens in the channels of SIDE_UNITS words of codes. Eight lanes share a word's channels and take turns over the
// tokens, so that a lane keeps the scales of its channels in registers; 32 lanes load whole lines of four cells' tokens and store four
// neighbouring words of eight tokens.

const SIDE_TILE = 0u;
const SIDE_CELLS = SIDE_WIDTH / 8u;
const SIDE_SHARERS = 8u;
const SIDE_UNITS = WORKGROUP_SIZE / SIDE_SHARERS;
const SIDE_TOKEN_WORDS = (SIDE_WIDTH * CODEC_BITS + 31u) / 32u;
const SIDE_SLICES = (SIDE_TOKEN_WORDS + SIDE_UNITS - 1u) / SIDE_UNITS;
const SIDE_SLICE_CHANNELS = SIDE_UNITS * SIDE_UNIT_CELLS * 8u;

// Smallest and largest number of each channel over a lane's tokens: f16 keys, the smallest in the lower half. [sharer][channel]
var<workgroup> side_ranges: array<vec4<u32>, SIDE_SHARERS * SIDE_SLICE_CHANNELS / 4u>;
// What coding needs of each channel: minimum, scale, and a little less than the reciprocal of the scale. [3][channel]
var<workgroup> side_coders: array<vec4<f32>, 3u * SIDE_SLICE_CHANNELS / 4u>;

fn side_put_ranges(at: u32, odd_low: vec4<u32>, odd_high: vec4<u32>, even_low: vec4<u32>, even_high: vec4<u32>) {
  let even = (even_low >> vec4<u32>(16u)) | (even_high & vec4<u32>(0xffff0000u));
  let odd = (odd_low >> vec4<u32>(16u)) | (odd_high & vec4<u32>(0xffff0000u));
  side_ranges[at] = vec4<u32>(even.x, odd.x, even.y, odd.y);
  side_ranges[at + 1u] = vec4<u32>(even.z, odd.z, even.w, odd.w);
}

// Scales of the strip's channels, a lane each.
fn side_measure(li: u32, page: Page, token_group: u32, first: u32) {
  for (var i = li; i < SIDE_SLICE_CHANNELS; i += WORKGROUP_SIZE) {
    var low = 0xffffu;
    var high = 0u;
    for (var sharer = 0u; sharer < SIDE_SHARERS; sharer++) {
      let range = side_ranges[sharer * (SIDE_SLICE_CHANNELS / 4u) + i / 4u][i % 4u];
      low = min(low, range & 0xffffu);
      high = max(high, range >> 16u);
    }
    let word = side_word(f16_of_key(low), f16_of_key(high));
    let coder = affine_coder(word);
    for (var part = 0u; part < 3u; part++) {  // unroll
      side_coders[part * (SIDE_SLICE_CHANNELS / 4u) + i / 4u][i % 4u] = coder[part];
    }
    if (first + i < SIDE_WIDTH) {
      put_word((page.sealed + SIDE_AT) * 4u + SIDE_SCALES + token_group * SIDE_WIDTH + first + i, word);
    }
  }
}

// The bits of codes in groups that have any; the others' are 0.
fn side_live(inverse: vec4<f32>) -> u32 {
  let live = select(vec4<u32>(0u), vec4<u32>(CODEC_LEVELS), inverse > vec4<f32>(0.0));
  return plane_pack_four(live, CODEC_BITS);
}

fn side_seal(li: u32, page: Page, strip: u32) {
  let slice = strip % SIDE_SLICES;
  let token_group = strip / SIDE_SLICES;
  let unit = li / SIDE_SHARERS;
  let word = slice * SIDE_UNITS + unit;
  let first_token = token_group * CODEC_GROUP + li % SIDE_SHARERS;
  // The last cell again where there are no more.
  var raw: array<vec4<u32>, SIDE_LANE_TOKENS * SIDE_UNIT_CELLS>;
  for (var v = 0u; v < SIDE_UNIT_CELLS; v++) {  // unroll
    let cell = min(word * SIDE_UNIT_CELLS + v, SIDE_CELLS - 1u);
    for (var k = 0u; k < SIDE_LANE_TOKENS; k++) {  // unroll
      raw[v * SIDE_LANE_TOKENS + k] = open_key(page, first_token + k * SIDE_SHARERS, cell);
    }
  }
  for (var v = 0u; v < SIDE_UNIT_CELLS; v++) {  // unroll
    var odd_low = vec4<u32>(0xffffffffu);
    var even_low = vec4<u32>(0xffffffffu);
    var odd_high = vec4<u32>(0u);
    var even_high = vec4<u32>(0u);
    for (var k = 0u; k < SIDE_LANE_TOKENS; k++) {  // unroll
      let odd = f16_keys(raw[v * SIDE_LANE_TOKENS + k]);
      let even = odd << vec4<u32>(16u);
      odd_low = min(odd_low, odd);
      odd_high = max(odd_high, odd);
      even_low = min(even_low, even);
      even_high = max(even_high, even);
    }
    let at = li % SIDE_SHARERS * (SIDE_SLICE_CHANNELS / 4u) + (unit * SIDE_UNIT_CELLS + v) * 2u;
    side_put_ranges(at, odd_low, odd_high, even_low, even_high);
  }
  workgroupBarrier();
  side_measure(li, page, token_group, slice * SIDE_SLICE_CHANNELS);
  workgroupBarrier();
  if (word >= SIDE_TOKEN_WORDS) { return; }
  var codes: array<u32, SIDE_LANE_TOKENS>;
  for (var v = 0u; v < SIDE_UNIT_CELLS; v++) {  // unroll
    if (word * SIDE_UNIT_CELLS + v < SIDE_CELLS) {
      const ROW = SIDE_SLICE_CHANNELS / 4u;
      let quad = (unit * SIDE_UNIT_CELLS + v) * 2u;
      let low_zero = side_coders[quad];
      let high_zero = side_coders[quad + 1u];
      let low_scale = side_coders[ROW + quad];
      let high_scale = side_coders[ROW + quad + 1u];
      let low_inverse = side_coders[2u * ROW + quad];
      let high_inverse = side_coders[2u * ROW + quad + 1u];
      let live = side_live(low_inverse) | (side_live(high_inverse) << (4u * CODEC_BITS));
      for (var k = 0u; k < SIDE_LANE_TOKENS; k++) {  // unroll
        let x = f16_cell(raw[v * SIDE_LANE_TOKENS + k]);
        let low = affine_codes(x.low, low_zero, low_scale, low_inverse);
        let high = affine_codes(x.high, high_zero, high_scale, high_inverse);
        let cell = plane_pack_four(low, CODEC_BITS) | (plane_pack_four(high, CODEC_BITS) << (4u * CODEC_BITS));
        codes[k] |= (cell & live) << (v * 8u * CODEC_BITS);
      }
    }
  }
  const WHOLE = SIDE_TOKEN_WORDS / 4u * 4u;
  for (var k = 0u; k < SIDE_LANE_TOKENS; k++) {  // unroll
    let token = first_token + k * SIDE_SHARERS;
    var at = (word / 4u * PAGE_SIZE + token) * 4u + word % 4u;
    if (word >= WHOLE) { at = WHOLE * PAGE_SIZE + token * (SIDE_TOKEN_WORDS - WHOLE) + word - WHOLE; }
    put_word((page.sealed + SIDE_AT) * 4u + at, codes[k]);
  }
}
