// Sealing of numbers as they are, whose scales, if there are any, belong to tokens: f16, fp8, int8, values of kivi. Joined for a side.
//
// A lane makes blocks, 16 bytes of codes, each from SIDE_SPAN cells of f16: neighbouring cells of a token (keys) or a cell of
// neighbouring tokens (values). It loads all of them first and keeps them; neighbouring lanes load and store neighbouring cells.
// Ranges of groups go through workgroup memory.

const SIDE_TILE = 0u;
const SIDE_CELLS = SIDE_WIDTH / 8u;
// Blocks of a token (keys), or of SIDE_SPAN tokens (values). In each a token has a range of its own.
const SIDE_ACROSS = select(SIDE_CELLS, (SIDE_CELLS + SIDE_SPAN - 1u) / SIDE_SPAN, SIDE_IS_KEY);
const SIDE_BLOCKS = select(SIDE_STRIP / SIDE_SPAN, SIDE_STRIP, SIDE_IS_KEY) * SIDE_ACROSS;
const SIDE_HAS_GROUPS = CODEC_GROUP_TOKENS == 1u;
const SIDE_GROUPS = (SIDE_WIDTH + max(CODEC_GROUP_CHANNELS, 1u) - 1u) / max(CODEC_GROUP_CHANNELS, 1u);
const SIDE_GROUP_PARTS = select(CODEC_GROUP_CHANNELS / 8u, SIDE_ACROSS, SIDE_IS_KEY);
// An odd number of words, so that lanes that own tokens read from different banks.
const SIDE_RANGE_ROW = SIDE_ACROSS | 1u;
const SIDE_TOKEN_WORDS = (SIDE_WIDTH * CODEC_PLANES[0] + 31u) / 32u;

// Smallest and largest number of a token in a block: f16 keys, the smallest in the lower half.
var<workgroup> side_ranges: array<u32, select(1u, SIDE_STRIP * SIDE_RANGE_ROW, SIDE_HAS_GROUPS)>;
// What coding needs of each group, [group][token].
var<workgroup> side_coders: array<vec4<f32>, select(1u, SIDE_GROUPS * SIDE_STRIP, SIDE_HAS_GROUPS)>;

fn side_block_token(block: u32) -> u32 {
  if (SIDE_IS_KEY) { return block % SIDE_STRIP; }
  return block / SIDE_ACROSS * SIDE_SPAN;
}

fn side_block_across(block: u32) -> u32 {
  if (SIDE_IS_KEY) { return block / SIDE_STRIP; }
  return block % SIDE_ACROSS;
}

// Cell `j` of a block; zeros behind the last channel, and for lanes without a block those of the last one.
fn side_load(page: Page, strip: u32, lane_block: u32, j: u32) -> vec4<u32> {
  let block = min(lane_block, SIDE_BLOCKS - 1u);
  let token = strip * SIDE_STRIP + side_block_token(block);
  let across = side_block_across(block);
  if (!SIDE_IS_KEY) { return open_value(page, token + j, across); }
  let cell = across * SIDE_SPAN + j;
  if (SIDE_CELLS % SIDE_SPAN != 0u && cell >= SIDE_CELLS) { return vec4<u32>(0u); }
  return open_key(page, token, cell);
}

fn side_put_range(token: u32, across: u32, range: vec2<u32>) {
  side_ranges[token * SIDE_RANGE_ROW + across] = f16_range_word(range);
}

// Scales of the strip's groups, a lane each.
fn side_measure(li: u32, page: Page, strip: u32) {
  for (var i = li; i < SIDE_GROUPS * SIDE_STRIP; i += WORKGROUP_SIZE) {
    let token = i % SIDE_STRIP;
    let group = i / SIDE_STRIP;
    var low = 0xffffu;
    var high = 0u;
    for (var part = group * SIDE_GROUP_PARTS; part < min((group + 1u) * SIDE_GROUP_PARTS, SIDE_ACROSS); part++) {
      let range = side_ranges[token * SIDE_RANGE_ROW + part];
      low = min(low, range & 0xffffu);
      high = max(high, range >> 16u);
    }
    let word = side_word(f16_of_key(low), f16_of_key(high));
    side_coders[i] = affine_coder(word);
    put_word((page.sealed + SIDE_AT) * 4u + SIDE_SCALES + group * PAGE_SIZE + strip * SIDE_STRIP + token, word);
  }
}

fn side_store(page: Page, strip: u32, block: u32, codes: vec4<u32>) {
  let token = strip * SIDE_STRIP + side_block_token(block);
  let across = side_block_across(block);
  let base = page.sealed + SIDE_AT;
  if (!SIDE_IS_KEY) {
    sealed_arena[base + token / SIDE_SPAN * SIDE_ACROSS + across] = codes;
    return;
  }
  const WHOLE = SIDE_TOKEN_WORDS / 4u;
  if (across < WHOLE) {
    sealed_arena[base + across * PAGE_SIZE + token] = codes;
    return;
  }
  const REST = SIDE_TOKEN_WORDS % 4u;
  let at = (base + WHOLE * PAGE_SIZE) * 4u + token * REST;
  if (REST > 0u) { put_word(at, codes.x); }
  if (REST > 1u) { put_word(at + 1u, codes.y); }
  if (REST > 2u) { put_word(at + 2u, codes.z); }
}

fn side_seal(li: u32, page: Page, strip: u32) {
  var raw: array<vec4<u32>, SIDE_LANE_BLOCKS * SIDE_SPAN>;
  for (var n = 0u; n < SIDE_LANE_BLOCKS; n++) {  // unroll
    for (var j = 0u; j < SIDE_SPAN; j++) {  // unroll
      raw[n * SIDE_SPAN + j] = side_load(page, strip, li + n * WORKGROUP_SIZE, j);
    }
  }
  if (SIDE_HAS_GROUPS) {
    for (var n = 0u; n < SIDE_LANE_BLOCKS; n++) {  // unroll
      let block = li + n * WORKGROUP_SIZE;
      if (block < SIDE_BLOCKS) {
        let token = side_block_token(block);
        let across = side_block_across(block);
        var range = f16_range(raw[n * SIDE_SPAN]);
        for (var j = 0u; j < SIDE_SPAN; j++) {  // unroll
          if (SIDE_IS_KEY) {
            if (across * SIDE_SPAN + j < SIDE_CELLS) { range = f16_range_join(range, f16_range(raw[n * SIDE_SPAN + j])); }
          } else {
            side_put_range(token + j, across, f16_range(raw[n * SIDE_SPAN + j]));
          }
        }
        if (SIDE_IS_KEY) { side_put_range(token, across, range); }
      }
    }
    workgroupBarrier();
    side_measure(li, page, strip);
    workgroupBarrier();
  }
  for (var n = 0u; n < SIDE_LANE_BLOCKS; n++) {  // unroll
    let block = li + n * WORKGROUP_SIZE;
    if (block < SIDE_BLOCKS) {
      let token = side_block_token(block);
      let group = side_block_across(block) / max(SIDE_GROUP_PARTS, 1u);
      var codes = vec4<u32>(0u);
      for (var j = 0u; j < SIDE_SPAN; j++) {  // unroll
        var coder = vec4<f32>(0.0);
        if (SIDE_HAS_GROUPS) { coder = side_coders[group * SIDE_STRIP + token + select(j, 0u, SIDE_IS_KEY)]; }
        let cell = side_pack(raw[n * SIDE_SPAN + j], coder);
        if (CODEC_PLANES[0] == 16u) { codes = cell; }
        if (CODEC_PLANES[0] == 8u) {
          codes[2u * j % 4u] = cell.x;
          codes[(2u * j + 1u) % 4u] = cell.y;
        }
        if (CODEC_PLANES[0] == 4u) { codes[j % 4u] = cell.x; }
        if (CODEC_PLANES[0] == 2u) { codes[j / 2u % 4u] |= cell.x << (j % 2u * 16u); }
      }
      side_store(page, strip, block, codes);
    }
  }
}
