// Sealing of rotated channels: rot and mean+rot. Joined for a side.
//
// A span of tokens is rotated in workgroup memory. Strides of the transform within a cell are taken in registers when the cell is loaded,
// all others by the lane that holds every eighth channel. A token's magnitudes are added by one lane, in the order of channels; then
// lanes make whole blocks of codes, as in seal_blocks. One strip is a span, or the page where its mean is taken out.

const SIDE_TOKENS = 16u;
const SIDE_CELLS = HEAD_DIM / 8u;
const SIDE_VECS = HEAD_DIM / 4u;
// One vec4 more than a token has, so that lanes that own tokens read from different banks.
const SIDE_ROW = SIDE_VECS + 1u;
const SIDE_TILE = SIDE_TOKENS * SIDE_ROW;

// Bit i: the sign of channel i of a cell is turned.
var<workgroup> side_signs: array<u32, SIDE_CELLS>;
var<workgroup> side_scales: array<u32, SIDE_TOKENS>;
// Mean of each channel, where it is taken out.
var<workgroup> side_means: array<vec4<f32>, select(1u, SIDE_VECS, SIDE_CENTRES)>;

// Definition: src/compression/hidden/rot.rs.
fn side_turns(channel: u32) -> u32 {
  var x = (channel + 1u) * 0x9e3779b1u;
  x ^= x >> 15u;
  return (x * 0x85ebca6bu) >> 31u;
}

fn side_make_signs(li: u32) {
  for (var cell = li; cell < SIDE_CELLS; cell += WORKGROUP_SIZE) {
    var signs = 0u;
    for (var i = 0u; i < 8u; i++) { signs |= side_turns(cell * 8u + i) << i; }
    side_signs[cell] = signs;
  }
  workgroupBarrier();
}

fn side_turned(x: vec4<f32>, signs: u32) -> vec4<f32> {
  return bitcast<vec4<f32>>(bitcast<vec4<u32>>(x) ^ ((vec4<u32>(signs) << vec4<u32>(31u, 30u, 29u, 28u)) & vec4<u32>(0x80000000u)));
}

// Strides 1 and 2.
fn side_quad(x: vec4<f32>) -> vec4<f32> {
  let y = vec4<f32>(x.x + x.y, x.x - x.y, x.z + x.w, x.z - x.w);
  return vec4<f32>(y.x + y.z, y.y + y.w, y.x - y.z, y.y - y.w);
}

// Strides 1, 2 and 4.
fn side_near(x: Cell) -> Cell {
  let low = side_quad(x.low);
  let high = side_quad(x.high);
  return Cell(low + high, low - high);
}

// Strides from 8 on, of the transform that begins at a vec4 of each token, and its factor.
fn side_far(li: u32, first: u32) {
  for (var i = li; i < SIDE_TOKENS * 2u; i += WORKGROUP_SIZE) {
    let at = i / 2u * SIDE_ROW + first + i % 2u;
    var v: array<vec4<f32>, SIDE_SPAN_CELLS>;
    for (var k = 0u; k < SIDE_SPAN_CELLS; k++) {  // unroll
      v[k] = tile[at + 2u * k];
    }
    for (var e = 0u; e < SIDE_FAR_STAGES; e++) {  // unroll
      for (var p = 0u; p < SIDE_SPAN_PAIRS; p++) {  // unroll
        const LOW = ((p >> e) << (e + 1u)) + (p & ((1u << e) - 1u));
        const HIGH = LOW + (1u << e);
        let a = v[LOW];
        let b = v[HIGH];
        v[LOW] = a + b;
        v[HIGH] = a - b;
      }
    }
    for (var k = 0u; k < SIDE_SPAN_CELLS; k++) {  // unroll
      tile[at + 2u * k] = v[k] * NORMALISATION;
    }
  }
  workgroupBarrier();
}

fn side_rotate(li: u32, page: Page, first: u32) {
  for (var n = 0u; n < SIDE_LANE_CELLS; n++) {  // unroll
    let i = li + n * WORKGROUP_SIZE;
    if (i < SIDE_TOKENS * SIDE_CELLS) {
      var raw: vec4<u32>;
      var token = i % SIDE_TOKENS;
      var cell = i / SIDE_TOKENS;
      if (SIDE_IS_KEY) {
        raw = open_key(page, first + token, cell);
      } else {
        token = i / SIDE_CELLS;
        cell = i % SIDE_CELLS;
        raw = open_value(page, first + token, cell);
      }
      let x = f16_cell(raw);
      let signs = side_signs[cell];
      var y = Cell(side_turned(x.low, signs), side_turned(x.high, signs >> 4u));
      if (cell < SPAN / 8u) { y = side_near(y); }
      tile[token * SIDE_ROW + 2u * cell] = y.low;
      tile[token * SIDE_ROW + 2u * cell + 1u] = y.high;
    }
  }
  workgroupBarrier();
  side_far(li, 0u);
  if (SPAN < HEAD_DIM) {
    const FIRST = (HEAD_DIM - SPAN) / 4u;
    for (var i = li; i < SIDE_TOKENS * (SPAN / 8u); i += WORKGROUP_SIZE) {
      let at = i / (SPAN / 8u) * SIDE_ROW + FIRST + i % (SPAN / 8u) * 2u;
      let y = side_near(Cell(tile[at], tile[at + 1u]));
      tile[at] = y.low;
      tile[at + 1u] = y.high;
    }
    workgroupBarrier();
    side_far(li, FIRST);
  }
}

// Means of the page's rotated channels, summed token by token. The page at position 0 keeps zeros.
fn side_take_means(li: u32, page: Page) {
  for (var q = li; q < SIDE_VECS; q += WORKGROUP_SIZE) { side_means[q] = vec4<f32>(0.0); }
  for (var first = 0u; first < PAGE_SIZE; first += SIDE_TOKENS) {
    side_rotate(li, page, first);
    for (var q = li; q < SIDE_VECS; q += WORKGROUP_SIZE) {
      var sum = side_means[q];
      for (var token = 0u; token < SIDE_TOKENS; token++) { sum += tile[token * SIDE_ROW + q]; }
      side_means[q] = sum;
    }
    workgroupBarrier();
  }
  for (var q = li; q < SIDE_VECS; q += WORKGROUP_SIZE) {
    var words = vec2<u32>(0u);
    var mean = vec4<f32>(0.0);
    for (var j = 0u; j < 4u; j++) {  // unroll
      let bits = f16_bits(side_means[q][j] * (1.0 / f32(PAGE_SIZE)));
      if (page.first_position > 0u && f16_is_finite(bits)) {
        mean[j] = f16_value(bits);
        words[j / 2u] |= bits << (j % 2u * 16u);
      }
    }
    side_means[q] = mean;
    put_word((page.sealed + SIDE_AT) * 4u + SIDE_MASK + 2u * q, words.x);
    put_word((page.sealed + SIDE_AT) * 4u + SIDE_MASK + 2u * q + 1u, words.y);
  }
  workgroupBarrier();
}

// Numbers that the quantiser sees.
fn side_vec(token: u32, quad: u32) -> vec4<f32> {
  let x = tile[token * SIDE_ROW + quad];
  if (SIDE_CENTRES) { return x - side_means[quad]; }
  return x;
}

fn side_measure(li: u32, page: Page, first: u32) {
  for (var token = li; token < SIDE_TOKENS; token += WORKGROUP_SIZE) {
    var stat = codec_start();
    for (var quad = 0u; quad < SIDE_VECS; quad++) {
      let x = side_vec(token, quad);
      for (var j = 0u; j < 4u; j++) {  // unroll
        stat = codec_add(stat, x[j]);
      }
    }
    side_scales[token] = codec_finish(stat);
  }
  workgroupBarrier();
  for (var i = li; i < SIDE_TOKENS / 2u; i += WORKGROUP_SIZE) {
    let word = side_scales[2u * i] | (side_scales[2u * i + 1u] << 16u);
    put_word((page.sealed + SIDE_AT) * 4u + SIDE_SCALES + first / 2u + i, word);
  }
}

// A plane's blocks of a span, from the cells of the planes before it and of those between.
fn side_write(li: u32, page: Page, first: u32, base: u32, bits: u32, shift: u32) {
  let span = 16u / bits;
  let token_words = (HEAD_DIM * bits + 31u) / 32u;
  let across = select(SIDE_CELLS, (SIDE_CELLS + span - 1u) / span, SIDE_IS_KEY);
  let n_blocks = select(SIDE_TOKENS / span, SIDE_TOKENS, SIDE_IS_KEY) * across;
  for (var i = li; i < n_blocks; i += WORKGROUP_SIZE) {
    let token = select(i / across * span, i % SIDE_TOKENS, SIDE_IS_KEY);
    let cell = select(i % across, i / SIDE_TOKENS * span, SIDE_IS_KEY);
    var codes = vec4<u32>(0u);
    for (var w = 0u; w < 4u; w++) {  // unroll
      // Cells, or tokens, of a word.
      let n = span / 4u;
      for (var j = w * n; j < (w + 1u) * n; j++) {
        let t = select(token + j, token, SIDE_IS_KEY);
        let c = select(cell, cell + j, SIDE_IS_KEY);
        if (c < SIDE_CELLS) {
          let scale = side_scales[t];
          let low = side_codes(side_vec(t, 2u * c), scale) >> vec4<u32>(shift);
          let high = side_codes(side_vec(t, 2u * c + 1u), scale) >> vec4<u32>(shift);
          let mask = vec4<u32>((1u << bits) - 1u);
          codes[w] |= plane_pack(Codes(low & mask, high & mask), bits).x << (j % n * 8u * bits);
        }
      }
    }
    let whole = token_words / 4u;
    if (!SIDE_IS_KEY) {
      sealed_arena[base + (first + token) / span * SIDE_CELLS + cell] = codes;
    } else if (cell / span < whole) {
      sealed_arena[base + cell / span * PAGE_SIZE + first + token] = codes;
    } else {
      let rest = token_words % 4u;
      let at = (base + whole * PAGE_SIZE) * 4u + (first + token) * rest;
      if (rest > 0u) { put_word(at, codes.x); }
      if (rest > 1u) { put_word(at + 1u, codes.y); }
      if (rest > 2u) { put_word(at + 2u, codes.z); }
    }
  }
}

fn side_seal_span(li: u32, page: Page, first: u32) {
  side_rotate(li, page, first);
  side_measure(li, page, first);
  side_write(li, page, first, page.sealed + SIDE_AT, CODEC_PLANES[0], 0u);
  if (CODEC_PLANES[1] > 0u) {
    side_write(li, page, first, page.sealed + SIDE_AT + CODEC_LOW_CELLS, CODEC_PLANES[1], CODEC_PLANES[0]);
  }
}

fn side_seal(li: u32, page: Page, strip: u32) {
  side_make_signs(li);
  if (!SIDE_CENTRES) {
    side_seal_span(li, page, strip * SIDE_TOKENS);
    return;
  }
  side_take_means(li, page);
  for (var first = 0u; first < PAGE_SIZE; first += SIDE_TOKENS) {
    side_seal_span(li, page, first);
    workgroupBarrier();
  }
}
