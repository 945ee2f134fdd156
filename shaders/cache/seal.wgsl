// Encodes one side (keys or values) of full f16 pages.
// Specification: src/kernels/seal.rs. Workgroup = one work item = one page of one KV head.
//
// A page is encoded in strips of tokens: its numbers are transformed where the codec asks for it, each group's scale is
// measured by one lane, and each word of codes is put together by one lane. Every sum has its order in the definition.

struct SealParams {
  items: u32,    // first vec4 of the work list in `step`
  n_items: u32,
  layer: u32,    // layers after the one whose pages the items name
}

const CELLS = HEAD_DIM / 8u;
const SIDE_CELLS = SIDE_WIDTH / 8u;
const TRANSFORMS = SIDE_ROTATES || SIDE_PROJECTS;
const STRIP = select(max(16u, CODEC_GROUP_TOKENS), 8u, SIDE_PROJECTS);
// Groups along the tokens of a strip, and across channels.
const GROUP_ROWS = select(0u, STRIP / max(CODEC_GROUP_TOKENS, 1u), CODEC_GROUP_TOKENS > 0u);
const GROUP_COLUMNS = (SIDE_WIDTH + max(CODEC_GROUP_CHANNELS, 1u) - 1u) / max(CODEC_GROUP_CHANNELS, 1u);
const GROUPS = GROUP_ROWS * GROUP_COLUMNS;

var<immediate> par: SealParams;
@group(0) @binding(0) var<storage, read> step: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> tables: array<u32>;
@group(0) @binding(2) var<storage, read> parameters: array<vec4<f32>>;
// Both may be the same buffer, which one dispatch can only use in one way.
@group(0) @binding(3) var<storage, read_write> open_arena: array<u32>;
@group(0) @binding(4) var<storage, read_write> sealed_arena: array<u32>;

// Numbers of a strip, `[token][channel]`, where they are transformed; then latents `[token][latent]` behind them.
var<workgroup> strip_tile: array<f32, select(1u, STRIP * (HEAD_DIM + select(0u, SIDE_WIDTH, SIDE_PROJECTS)), TRANSFORMS)>;
var<workgroup> scales: array<u32, max(GROUPS, 1u)>;
// Channel numbers of the slots that pruning keeps, and scores.
var<workgroup> kept_channels: array<u32, select(1u, SIDE_WIDTH, SIDE_PICKS)>;
var<workgroup> channel_scores: array<f32, select(1u, HEAD_DIM, SIDE_PICKS)>;
var<workgroup> channel_kept: array<u32, select(1u, HEAD_DIM, SIDE_PICKS)>;

// Mean of each channel, where it is taken out.
var<workgroup> means: array<f32, select(1u, HEAD_DIM, SIDE_CENTRES)>;

// For the reading half of the codec, which sealing does not use.
fn arena_cell(at: u32) -> vec4<u32> {
  return vec4<u32>(arena_word(at * 4u), arena_word(at * 4u + 1u), arena_word(at * 4u + 2u), arena_word(at * 4u + 3u));
}

fn arena_word(at: u32) -> u32 {
  return sealed_arena[at];
}

// A number of the open page.
fn open_value(page: u32, token: u32, channel: u32) -> f32 {
  var cell = channel / 8u * PAGE_SIZE + token;
  if (!SIDE_IS_KEY) { cell = CELLS * PAGE_SIZE + token * CELLS + channel / 8u; }
  let word = open_arena[(page + cell) * 4u + channel % 8u / 2u];
  return f16_value((word >> (channel % 2u * 16u)) & 0xffffu);
}

// A number that the quantiser sees.
fn strip_value(page: u32, strip: u32, token: u32, slot: u32) -> f32 {
  if (SIDE_PROJECTS) { return strip_tile[STRIP * HEAD_DIM + token * SIDE_WIDTH + slot]; }
  if (SIDE_CENTRES) { return strip_tile[token * HEAD_DIM + slot] - means[slot]; }
  if (SIDE_ROTATES) { return strip_tile[token * HEAD_DIM + slot]; }
  if (SIDE_PICKS) { return open_value(page, strip + token, kept_channels[slot]); }
  return open_value(page, strip + token, slot);
}

fn hadamard(li: u32, first: u32) {
  for (var stride = 1u; stride < SPAN; stride *= 2u) {
    for (var i = li; i < STRIP * (SPAN / 2u); i += WORKGROUP_SIZE) {
      let pair = i % (SPAN / 2u);
      let low = i / (SPAN / 2u) * HEAD_DIM + first + pair / stride * 2u * stride + pair % stride;
      let a = strip_tile[low];
      let b = strip_tile[low + stride];
      strip_tile[low] = a + b;
      strip_tile[low + stride] = a - b;
    }
    workgroupBarrier();
  }
  for (var i = li; i < STRIP * SPAN; i += WORKGROUP_SIZE) {
    strip_tile[i / SPAN * HEAD_DIM + first + i % SPAN] *= NORMALISATION;
  }
  workgroupBarrier();
}

fn rotation_turns(channel: u32) -> bool {
  var x = (channel + 1u) * 0x9e3779b1u;
  x ^= x >> 15u;
  return (x * 0x85ebca6bu) >> 31u == 1u;
}

fn rotate_strip(li: u32, page: u32, strip: u32) {
  for (var i = li; i < STRIP * HEAD_DIM; i += WORKGROUP_SIZE) {
    let x = open_value(page, strip + i / HEAD_DIM, i % HEAD_DIM);
    strip_tile[i] = select(x, -x, rotation_turns(i % HEAD_DIM));
  }
  workgroupBarrier();
  hadamard(li, 0u);
  if (SPAN < HEAD_DIM) { hadamard(li, HEAD_DIM - SPAN); }
}

// Means of the page's rotated channels, summed token by token. The page at position 0 keeps zeros.
fn take_means(li: u32, page: u32, sealed: u32, first_position: u32) {
  for (var c = li; c < HEAD_DIM; c += WORKGROUP_SIZE) { means[c] = 0.0; }
  for (var strip = 0u; strip < PAGE_SIZE; strip += STRIP) {
    rotate_strip(li, page, strip);
    for (var c = li; c < HEAD_DIM; c += WORKGROUP_SIZE) {
      for (var token = 0u; token < STRIP; token++) { means[c] += strip_tile[token * HEAD_DIM + c]; }
    }
    workgroupBarrier();
  }
  for (var i = li; i < HEAD_DIM / 2u; i += WORKGROUP_SIZE) {
    var word = 0u;
    for (var j = 0u; j < 2u; j++) {
      var bits = f16_bits(means[2u * i + j] * (1.0 / f32(PAGE_SIZE)));
      if (first_position == 0u || !f16_is_finite(bits)) { bits = 0u; }
      means[2u * i + j] = f16_value(bits);
      word |= bits << (16u * j);
    }
    sealed_arena[sealed + SIDE_MASK + i] = word;
  }
  workgroupBarrier();
}

// The upper 12 bits of the mantissa: products with f16 are then exact.
fn upper_half(x: f32) -> f32 {
  return bitcast<f32>(bitcast<u32>(x) & 0xfffff000u);
}

// Turns keys back by their positions, or copies values, then projects them. `angles` is the first vec4 of (cos, sin)
// of the page's tokens in `step`.
fn project_strip(li: u32, page: u32, strip: u32, angles: u32, list: u32) {
  for (var i = li; i < STRIP * HEAD_DIM / 2u; i += WORKGROUP_SIZE) {
    let token = i / (HEAD_DIM / 2u);
    let pair = i % (HEAD_DIM / 2u);
    let a = open_value(page, strip + token, 2u * pair);
    let b = open_value(page, strip + token, 2u * pair + 1u);
    var x = a;
    var y = b;
    if (SIDE_IS_KEY) {
      let at = (strip + token) * (HEAD_DIM / 2u) + pair;
      let words = step[angles + at / 2u];
      let turn = bitcast<vec2<f32>>(select(words.xy, words.zw, at % 2u == 1u));
      let ch = upper_half(turn.x);
      let cl = turn.x - ch;
      let sh = upper_half(turn.y);
      let sl = turn.y - sh;
      x = f16_value(f16_bits(((a * ch + a * cl) + b * sh) + b * sl));
      y = f16_value(f16_bits(((b * ch + b * cl) - a * sh) - a * sl));
    }
    strip_tile[token * HEAD_DIM + 2u * pair] = x;
    strip_tile[token * HEAD_DIM + 2u * pair + 1u] = y;
  }
  workgroupBarrier();
  let basis = (list + par.layer * NUM_KV_HEADS) * HEAD_PARAMETERS + SIDE_BASIS;
  for (var i = li; i < STRIP * SIDE_WIDTH; i += WORKGROUP_SIZE) {
    let token = i / SIDE_WIDTH;
    let r = i % SIDE_WIDTH;
    var sum = 0.0;
    for (var c = 0u; c < HEAD_DIM; c++) {
      let at = c * SIDE_WIDTH + r;
      sum += strip_tile[token * HEAD_DIM + c] * parameters[basis + at / 4u][at % 4u];
    }
    // Devices disagree about the sign of a NaN.
    strip_tile[STRIP * HEAD_DIM + i] = f16_value(select(0x7e00u, f16_bits(sum), is_finite(sum)));
  }
  workgroupBarrier();
}

// Which channels stay: those with fewer than SIDE_WIDTH others before them.
fn choose_channels(li: u32, page: u32, sealed: u32) {
  for (var c = li; c < HEAD_DIM; c += WORKGROUP_SIZE) {
    var energy = 0.0;
    for (var token = 0u; token < PAGE_SIZE; token++) {
      let x = open_value(page, token, c);
      energy += x * x;
    }
    channel_scores[c] = select(3.4028234663852886e38, energy, is_finite(energy));
  }
  workgroupBarrier();
  for (var c = li; c < HEAD_DIM; c += WORKGROUP_SIZE) {
    var rank = 0u;
    for (var o = 0u; o < HEAD_DIM; o++) { rank += select(0u, 1u, goes_before(o, c)); }
    channel_kept[c] = select(0u, 1u, rank < SIDE_WIDTH);
  }
  workgroupBarrier();
  for (var c = li; c < HEAD_DIM; c += WORKGROUP_SIZE) {
    var slot = 0u;
    for (var below = 0u; below < c; below++) { slot += channel_kept[below]; }
    if (channel_kept[c] == 1u) { kept_channels[slot] = c; }
  }
  workgroupBarrier();
  for (var i = li; i < (SIDE_WIDTH + 15u) / 16u * 4u; i += WORKGROUP_SIZE) {
    var word = 0u;
    for (var j = 0u; j < 4u; j++) {
      if (i * 4u + j < SIDE_WIDTH) { word |= kept_channels[i * 4u + j] << (8u * j); }
    }
    sealed_arena[sealed + SIDE_MASK + i] = word;
  }
}

fn goes_before(o: u32, c: u32) -> bool {
  return channel_scores[o] > channel_scores[c] || (channel_scores[o] == channel_scores[c] && o < c);
}

// Scales of the strip's groups, one lane each. Groups of tokens are rows of scales, groups of channels columns.
fn measure(li: u32, page: u32, sealed: u32, strip: u32) {
  for (var i = li; i < GROUPS; i += WORKGROUP_SIZE) {
    let row = i / GROUP_COLUMNS;
    let column = i % GROUP_COLUMNS;
    var stat = codec_start();
    for (var t = 0u; t < CODEC_GROUP_TOKENS; t++) {
      for (var c = column * CODEC_GROUP_CHANNELS; c < min((column + 1u) * CODEC_GROUP_CHANNELS, SIDE_WIDTH); c++) {
        stat = codec_add(stat, strip_value(page, strip, row * CODEC_GROUP_TOKENS + t, c));
      }
    }
    scales[i] = codec_finish(stat);
  }
  workgroupBarrier();
  if (SCALE_BITS == 16u) {
    for (var i = li; i < STRIP / 2u; i += WORKGROUP_SIZE) {
      sealed_arena[sealed + SIDE_SCALES + strip / 2u + i] = scales[2u * i] | (scales[2u * i + 1u] << 16u);
    }
  } else {
    for (var i = li; i < GROUPS; i += WORKGROUP_SIZE) {
      // Keys in groups of tokens: [group of tokens][channel]. Otherwise [group of channels][token].
      var at = strip / max(CODEC_GROUP_TOKENS, 1u) * GROUP_COLUMNS + i;
      if (CODEC_GROUP_TOKENS == 1u) { at = i % GROUP_COLUMNS * PAGE_SIZE + strip + i / GROUP_COLUMNS; }
      sealed_arena[sealed + SIDE_SCALES + at] = scales[i];
    }
  }
}

fn code(page: u32, strip: u32, token: u32, slot: u32) -> u32 {
  var scale = 0u;
  if (GROUPS > 0u) {
    let row = token / max(CODEC_GROUP_TOKENS, 1u);
    scale = scales[row * GROUP_COLUMNS + slot / max(CODEC_GROUP_CHANNELS, 1u)];
  }
  return codec_code(strip_value(page, strip, token, slot), scale);
}

// Words of the strip's codes in a plane that begins at word `base`. Layout: src/compression/hidden/plane.rs.
fn write_plane(li: u32, page: u32, base: u32, strip: u32, bits: u32, shift: u32) {
  let mask = select((1u << (bits & 31u)) - 1u, 0xffffffffu, bits == 32u);
  let codes = 32u / bits;
  let token_words = (SIDE_WIDTH * bits + 31u) / 32u;
  let whole = token_words / 4u * 4u;
  let n_words = select(STRIP * SIDE_WIDTH * bits / 32u, STRIP * token_words, SIDE_IS_KEY);
  for (var i = li; i < n_words; i += WORKGROUP_SIZE) {
    var word = 0u;
    var at = 0u;
    if (SIDE_IS_KEY) {
      let token = i / token_words;
      let w = i % token_words;
      for (var j = 0u; j < codes; j++) {
        let slot = w * codes + j;
        if (slot < SIDE_WIDTH) { word |= ((code(page, strip, token, slot) >> shift) & mask) << (j * bits & 31u); }
      }
      at = (w / 4u * PAGE_SIZE + strip + token) * 4u + w % 4u;
      if (w >= whole) { at = whole * PAGE_SIZE + (strip + token) * (token_words - whole) + w - whole; }
    } else if (bits == 32u) {
      word = code(page, strip, i / SIDE_WIDTH, i % SIDE_WIDTH);
      at = strip * SIDE_WIDTH + i;
    } else {
      let tau = 16u / bits;
      let block = i / 4u;
      for (var j = 0u; j < codes; j++) {
        let bit = i % 4u * 32u + j * bits;
        let token = block / SIDE_CELLS * tau + bit / (8u * bits);
        let slot = block % SIDE_CELLS * 8u + bit % (8u * bits) / bits;
        word |= ((code(page, strip, token, slot) >> shift) & mask) << (j * bits & 31u);
      }
      at = strip / tau * SIDE_CELLS * 4u + i;
    }
    sealed_arena[base + at] = word;
  }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let index = group.y * GRID_WIDTH + group.x;
  if (index >= par.n_items) { return; }
  let source = step[par.items + index * 2u];
  let to = step[par.items + index * 2u + 1u];
  let page = tables[source.x + par.layer * source.y];
  let sealed = (tables[to.x + par.layer * to.y] + SIDE_AT) * 4u;
  let list = source.z;
  if (SIDE_CENTRES) { take_means(li, page, sealed, source.w); }
  if (SIDE_PICKS) { choose_channels(li, page, sealed); }
  if (SIDE_PROJECTS && SIDE_IS_KEY) {
    // Consecutive positions, or those of a list of words in `step`.
    for (var token = li; token < PAGE_SIZE; token += WORKGROUP_SIZE) {
      let at = to.w + token;
      sealed_arena[sealed + SIDE_MASK + token] = select(source.w + token, step[at / 4u][at % 4u], to.w > 0u);
    }
  }
  for (var strip = 0u; strip < PAGE_SIZE; strip += STRIP) {
    if (SIDE_ROTATES) { rotate_strip(li, page, strip); }
    if (SIDE_PROJECTS) { project_strip(li, page, strip, to.z, list); }
    if (GROUPS > 0u) {
      measure(li, page, sealed, strip);
    }
    write_plane(li, page, sealed, strip, CODEC_PLANES[0], 0u);
    if (CODEC_PLANES[1] > 0u) {
      write_plane(li, page, sealed + PLANE_WORDS, strip, CODEC_PLANES[1], CODEC_PLANES[0]);
    }
    workgroupBarrier();
  }
}
