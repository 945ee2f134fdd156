// Sealing of pruned keys, of latents, and as f32. Joined for a side.
//
// One strip is a page. It is encoded in spans of tokens: numbers are transformed where the codec asks for it, each group's scale is
// measured by one lane, and each word of codes is put together by one lane. Every sum has its order in the definition.

const SIDE_SPAN = select(max(16u, CODEC_GROUP_TOKENS), 8u, SIDE_LIFTS);
// Numbers of a span, `[token][channel]`, where they are projected; then latents `[token][latent]` behind them.
const SIDE_TILE = select(0u, (SIDE_SPAN * (HEAD_DIM + SIDE_WIDTH) + 3u) / 4u, SIDE_LIFTS);
// Groups along the tokens of a span, and across channels.
const SIDE_GROUP_ROWS = select(0u, SIDE_SPAN / max(CODEC_GROUP_TOKENS, 1u), CODEC_GROUP_TOKENS > 0u);
const SIDE_GROUP_COLUMNS = (SIDE_WIDTH + max(CODEC_GROUP_CHANNELS, 1u) - 1u) / max(CODEC_GROUP_CHANNELS, 1u);
const SIDE_GROUPS = SIDE_GROUP_ROWS * SIDE_GROUP_COLUMNS;

var<workgroup> side_scales: array<u32, max(SIDE_GROUPS, 1u)>;
// Channel numbers of the slots that pruning keeps, and scores.
var<workgroup> side_kept_channels: array<u32, select(1u, SIDE_WIDTH, SIDE_PICKS)>;
var<workgroup> side_channel_scores: array<f32, select(1u, HEAD_DIM, SIDE_PICKS)>;
var<workgroup> side_channel_kept: array<u32, select(1u, HEAD_DIM, SIDE_PICKS)>;

fn side_tile(at: u32) -> f32 {
  return tile[at / 4u][at % 4u];
}

fn side_put_tile(at: u32, x: f32) {
  tile[at / 4u][at % 4u] = x;
}

// A number of the open page.
fn side_number(page: Page, token: u32, channel: u32) -> f32 {
  var cell = channel / 8u * PAGE_SIZE + token;
  if (!SIDE_IS_KEY) { cell = (PAGE_SIZE + token) * (HEAD_DIM / 8u) + channel / 8u; }
  let word = open_arena[page.open + cell][channel % 8u / 2u];
  return f16_value((word >> (channel % 2u * 16u)) & 0xffffu);
}

// A number that the quantiser sees.
fn side_value(page: Page, first: u32, token: u32, slot: u32) -> f32 {
  if (SIDE_LIFTS) { return side_tile(SIDE_SPAN * HEAD_DIM + token * SIDE_WIDTH + slot); }
  if (SIDE_PICKS) { return side_number(page, first + token, side_kept_channels[slot]); }
  return side_number(page, first + token, slot);
}

// The upper 12 bits of the mantissa: products with f16 are then exact.
fn side_upper_half(x: f32) -> f32 {
  return bitcast<f32>(bitcast<u32>(x) & 0xfffff000u);
}

// Turns keys back by their positions, or copies values, then projects them.
fn side_project(li: u32, page: Page, first: u32) {
  for (var i = li; i < SIDE_SPAN * HEAD_DIM / 2u; i += WORKGROUP_SIZE) {
    let token = i / (HEAD_DIM / 2u);
    let pair = i % (HEAD_DIM / 2u);
    let a = side_number(page, first + token, 2u * pair);
    let b = side_number(page, first + token, 2u * pair + 1u);
    var x = a;
    var y = b;
    if (SIDE_IS_KEY) {
      let at = (first + token) * (HEAD_DIM / 2u) + pair;
      let words = step[page.angles + at / 2u];
      let turn = bitcast<vec2<f32>>(select(words.xy, words.zw, at % 2u == 1u));
      let ch = side_upper_half(turn.x);
      let cl = turn.x - ch;
      let sh = side_upper_half(turn.y);
      let sl = turn.y - sh;
      x = f16_value(f16_bits(((a * ch + a * cl) + b * sh) + b * sl));
      y = f16_value(f16_bits(((b * ch + b * cl) - a * sh) - a * sl));
    }
    side_put_tile(token * HEAD_DIM + 2u * pair, x);
    side_put_tile(token * HEAD_DIM + 2u * pair + 1u, y);
  }
  workgroupBarrier();
  let basis = (page.list + par.layer * NUM_KV_HEADS) * HEAD_PARAMETERS + SIDE_BASIS;
  for (var i = li; i < SIDE_SPAN * SIDE_WIDTH; i += WORKGROUP_SIZE) {
    let token = i / SIDE_WIDTH;
    let r = i % SIDE_WIDTH;
    var sum = 0.0;
    for (var c = 0u; c < HEAD_DIM; c++) {
      let at = c * SIDE_WIDTH + r;
      sum += side_tile(token * HEAD_DIM + c) * parameters[basis + at / 4u][at % 4u];
    }
    // Devices disagree about the sign of a NaN.
    side_put_tile(SIDE_SPAN * HEAD_DIM + i, f16_value(select(0x7e00u, f16_bits(sum), is_finite(sum))));
  }
  workgroupBarrier();
}

// Which channels stay: those with fewer than SIDE_WIDTH others before them.
fn side_choose(li: u32, page: Page) {
  for (var c = li; c < HEAD_DIM; c += WORKGROUP_SIZE) {
    var energy = 0.0;
    for (var token = 0u; token < PAGE_SIZE; token++) {
      let x = side_number(page, token, c);
      energy += x * x;
    }
    side_channel_scores[c] = select(3.4028234663852886e38, energy, is_finite(energy));
  }
  workgroupBarrier();
  for (var c = li; c < HEAD_DIM; c += WORKGROUP_SIZE) {
    var rank = 0u;
    for (var o = 0u; o < HEAD_DIM; o++) { rank += select(0u, 1u, side_goes_before(o, c)); }
    side_channel_kept[c] = select(0u, 1u, rank < SIDE_WIDTH);
  }
  workgroupBarrier();
  for (var c = li; c < HEAD_DIM; c += WORKGROUP_SIZE) {
    var slot = 0u;
    for (var below = 0u; below < c; below++) { slot += side_channel_kept[below]; }
    if (side_channel_kept[c] == 1u) { side_kept_channels[slot] = c; }
  }
  workgroupBarrier();
  for (var i = li; i < (SIDE_WIDTH + 15u) / 16u * 4u; i += WORKGROUP_SIZE) {
    var word = 0u;
    for (var j = 0u; j < 4u; j++) {
      if (i * 4u + j < SIDE_WIDTH) { word |= side_kept_channels[i * 4u + j] << (8u * j); }
    }
    put_word((page.sealed + SIDE_AT) * 4u + SIDE_MASK + i, word);
  }
}

fn side_goes_before(o: u32, c: u32) -> bool {
  let other = side_channel_scores[o];
  let own = side_channel_scores[c];
  return other > own || (other == own && o < c);
}

// Scales of the span's groups, one lane each. Groups of tokens are rows of scales, groups of channels columns.
fn side_measure(li: u32, page: Page, first: u32) {
  for (var i = li; i < SIDE_GROUPS; i += WORKGROUP_SIZE) {
    let row = i / SIDE_GROUP_COLUMNS;
    let column = i % SIDE_GROUP_COLUMNS;
    var stat = codec_start();
    for (var t = 0u; t < CODEC_GROUP_TOKENS; t++) {
      for (var c = column * CODEC_GROUP_CHANNELS; c < min((column + 1u) * CODEC_GROUP_CHANNELS, SIDE_WIDTH); c++) {
        stat = codec_add(stat, side_value(page, first, row * CODEC_GROUP_TOKENS + t, c));
      }
    }
    side_scales[i] = codec_finish(stat);
  }
  workgroupBarrier();
  for (var i = li; i < SIDE_GROUPS; i += WORKGROUP_SIZE) {
    // Keys in groups of tokens: [group of tokens][channel]. Otherwise [group of channels][token].
    var at = first / max(CODEC_GROUP_TOKENS, 1u) * SIDE_GROUP_COLUMNS + i;
    if (CODEC_GROUP_TOKENS == 1u) { at = i % SIDE_GROUP_COLUMNS * PAGE_SIZE + first + i / SIDE_GROUP_COLUMNS; }
    put_word((page.sealed + SIDE_AT) * 4u + SIDE_SCALES + at, side_scales[i]);
  }
}

fn side_code(page: Page, first: u32, token: u32, slot: u32) -> u32 {
  var scale = 0u;
  if (SIDE_GROUPS > 0u) {
    let row = token / max(CODEC_GROUP_TOKENS, 1u);
    scale = side_scales[row * SIDE_GROUP_COLUMNS + slot / max(CODEC_GROUP_CHANNELS, 1u)];
  }
  return codec_code(side_value(page, first, token, slot), scale);
}

// Words of the span's codes. Layout: src/compression/hidden/plane.rs.
fn side_write(li: u32, page: Page, first: u32) {
  const BITS = CODEC_PLANES[0];
  const CODES = 32u / BITS;
  const TOKEN_WORDS = (SIDE_WIDTH * BITS + 31u) / 32u;
  const WHOLE = TOKEN_WORDS / 4u * 4u;
  const WORDS = select(SIDE_SPAN * SIDE_WIDTH * BITS / 32u, SIDE_SPAN * TOKEN_WORDS, SIDE_IS_KEY);
  let base = (page.sealed + SIDE_AT) * 4u;
  for (var i = li; i < WORDS; i += WORKGROUP_SIZE) {
    var word = 0u;
    var at = 0u;
    if (SIDE_IS_KEY) {
      let token = i / TOKEN_WORDS;
      let w = i % TOKEN_WORDS;
      for (var j = 0u; j < CODES; j++) {
        let slot = w * CODES + j;
        if (slot < SIDE_WIDTH) { word |= side_code(page, first, token, slot) << (j * BITS & 31u); }
      }
      at = (w / 4u * PAGE_SIZE + first + token) * 4u + w % 4u;
      if (w >= WHOLE) { at = WHOLE * PAGE_SIZE + (first + token) * (TOKEN_WORDS - WHOLE) + w - WHOLE; }
    } else if (BITS == 32u) {
      word = side_code(page, first, i / SIDE_WIDTH, i % SIDE_WIDTH);
      at = first * SIDE_WIDTH + i;
    } else {
      const TAU = max(16u / BITS, 1u);
      const CELLS = SIDE_WIDTH / 8u;
      let block = i / 4u;
      for (var j = 0u; j < CODES; j++) {
        let bit = i % 4u * 32u + j * BITS;
        let token = block / CELLS * TAU + bit / (8u * BITS);
        let slot = block % CELLS * 8u + bit % (8u * BITS) / BITS;
        word |= side_code(page, first, token, slot) << (j * BITS & 31u);
      }
      at = first / TAU * CELLS * 4u + i;
    }
    put_word(base + at, word);
  }
}

fn side_seal(li: u32, page: Page, strip: u32) {
  if (SIDE_PICKS) { side_choose(li, page); }
  if (SIDE_LIFTS && SIDE_IS_KEY) {
    // Consecutive positions, or those of a list of words in `step`.
    for (var token = li; token < PAGE_SIZE; token += WORKGROUP_SIZE) {
      let at = page.positions + token;
      let position = select(page.first_position + token, step[at / 4u][at % 4u], page.positions > 0u);
      put_word((page.sealed + SIDE_AT) * 4u + SIDE_MASK + token, position);
    }
  }
  for (var first = 0u; first < PAGE_SIZE; first += SIDE_SPAN) {
    if (SIDE_LIFTS) { side_project(li, page, first); }
    if (SIDE_GROUPS > 0u) { side_measure(li, page, first); }
    side_write(li, page, first);
    workgroupBarrier();
  }
}
