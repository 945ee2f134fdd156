// rot4, rot3 and rot2: the quantiser of rotated channels. Definition: src/compression/hidden/rot.rs. Same function set
// as every file here. Three bits are a plane of 2 and a plane of 1.

const CODEC_CUBIC = select(select(19u, 51u, CODEC_BITS == 3u), 116u, CODEC_BITS == 2u);
const CODEC_LOW_BITS = select(CODEC_BITS, 2u, CODEC_BITS == 3u);
const CODEC_SPAN = 16u / CODEC_LOW_BITS;
const CODEC_PLANES = array<u32, 2>(CODEC_LOW_BITS, CODEC_BITS - CODEC_LOW_BITS);
const CODEC_GROUP_TOKENS = 1u;
const CODEC_GROUP_CHANNELS = SIDE_WIDTH;
const CODEC_TOKEN_SCALES = 1u;
const CODEC_CHANNEL_SCALES = false;
const CODEC_OFFSET = 0.0;
// Cells of the plane of low bits.
const CODEC_LOW_CELLS = select(
  PAGE_SIZE * CODEC_LOW_BITS / 16u * (SIDE_WIDTH / 8u),
  (SIDE_WIDTH * CODEC_LOW_BITS + 31u) / 32u * PAGE_SIZE / 4u,
  SIDE_IS_KEY);

struct CodecRow {
  scale: f32,
}

struct CodecRaw {
  low: vec4<u32>,
  high: vec4<u32>,
}

struct CodecStat {
  sum: f32,
}

fn codec_row(page: u32, token: u32, cell: u32) -> CodecRow {
  let pair = plane_pair(arena_word((page + SIDE_AT) * 4u + SIDE_SCALES + token / 2u));
  return CodecRow(select(pair.x, pair.y, token % 2u == 1u));
}

fn codec_load(page: u32, token: u32, cell: u32) -> CodecRaw {
  let low = page + SIDE_AT;
  let high = low + CODEC_LOW_CELLS;
  var raw: CodecRaw;
  if (SIDE_IS_KEY) {
    raw.low = plane_load_key(low, SIDE_WIDTH, CODEC_LOW_BITS, token, cell / CODEC_SPAN);
    if (CODEC_BITS == 3u) { raw.high = plane_load_key(high, SIDE_WIDTH, 1u, token, cell / 16u); }
  } else {
    raw.low = plane_load_value(low, SIDE_WIDTH, token / CODEC_SPAN, cell);
    if (CODEC_BITS == 3u) { raw.high = plane_load_value(high, SIDE_WIDTH, token / 16u, cell); }
  }
  return raw;
}

fn codec_cell(page: u32, token: u32, cell: u32, row: CodecRow, raw: CodecRaw) -> Cell {
  let unit = select(token, cell, SIDE_IS_KEY);
  var codes = plane_codes(raw.low, CODEC_LOW_BITS, unit % CODEC_SPAN);
  if (CODEC_BITS == 3u) {
    let high = plane_codes(raw.high, 1u, unit % 16u);
    codes = Codes(codes.low | (high.low << vec4<u32>(2u)), codes.high | (high.high << vec4<u32>(2u)));
  }
  let middle = f32((1u << CODEC_BITS) - 1u);
  let low_m = vec4<f32>(2u * codes.low) - middle;
  let high_m = vec4<f32>(2u * codes.high) - middle;
  let bend = row.scale * (f32(CODEC_CUBIC) / 8192.0);
  let low_y = low_m * (row.scale + bend * (low_m * low_m));
  let high_y = high_m * (row.scale + bend * (high_m * high_m));
  if (!SIDE_CENTRES) { return Cell(low_y, high_y); }
  let mean = arena_cell(page + SIDE_AT + SIDE_MASK / 4u + cell);
  return Cell(
    low_y + vec4<f32>(plane_pair(mean.x), plane_pair(mean.y)), high_y + vec4<f32>(plane_pair(mean.z), plane_pair(mean.w)));
}

struct CodecScale {
  scale: vec4<f32>,
  zero: vec4<f32>,
}

fn codec_numbers(raw: CodecRaw, unit: u32) -> Cell {
  var low: vec4<f32>;
  var high: vec4<f32>;
  // Three bits are two planes of which a load holds different numbers of cells: no kernel reads them this way.
  if (CODEC_BITS == 4u) {
    let numbers = plane_nibbles(raw.low[unit % CODEC_SPAN]);
    low = 2.0 * numbers.low - 47.0;
    high = 2.0 * numbers.high - 47.0;
  } else {
    let numbers = plane_crumbs(raw.low[unit % CODEC_SPAN / 2u], unit % 2u);
    low = 2.0 * numbers.low - 11.0;
    high = 2.0 * numbers.high - 11.0;
  }
  const BEND = f32(CODEC_CUBIC) / 8192.0;
  return Cell(low * (1.0 + BEND * (low * low)), high * (1.0 + BEND * (high * high)));
}

fn codec_token_scale(page: u32, token: u32, group: u32) -> vec2<f32> {
  return vec2<f32>(codec_row(page, token, 0u).scale, 0.0);
}

fn codec_channel_scale(page: u32, token: u32, quad: u32) -> CodecScale {
  return CodecScale(vec4<f32>(1.0), vec4<f32>(0.0));
}


fn codec_start() -> CodecStat {
  return CodecStat(0.0);
}

fn codec_add(stat: CodecStat, x: f32) -> CodecStat {
  return CodecStat(stat.sum + abs(x));
}

fn codec_finish(stat: CodecStat) -> u32 {
  let scale = f16_bits(stat.sum * CODEC_FACTOR);
  return select(0x7e00u, scale, f16_is_finite(scale));
}

fn codec_code(x: f32, scale: u32) -> u32 {
  return side_codes(vec4<f32>(x), scale).x;
}

// The k-th positive edge between levels: 64ths of the scale, a whole number of them, so that the product is exact in f32. As bits,
// which are in the order of the numbers.
fn side_edge(k: u32, unit: f32) -> vec4<u32> {
  let low = 2u * k - 1u;
  let high = 2u * k + 1u;
  let edge = 128u * k + (CODEC_CUBIC * (low * low * low + high * high * high) + 128u) / 256u;
  return vec4<u32>(bitcast<u32>(f32(edge) * unit));
}

// How many edges between levels are not above x. A positive number is compared with the positive edges; a negative one
// is below as many as its magnitude is above, where a magnitude on an edge does not count: hence one less.
fn side_codes(x: vec4<f32>, scale: u32) -> vec4<u32> {
  if (!f16_is_finite(scale)) { return vec4<u32>(0u); }
  const HALF = 1u << (CODEC_BITS - 1u);
  let unit = f16_value(scale) * 0.015625;
  let bits = bitcast<vec4<u32>>(x);
  let negative = bits > vec4<u32>(0x80000000u);
  let magnitude = (bits & vec4<u32>(0x7fffffffu)) - select(vec4<u32>(0u), vec4<u32>(1u), negative);
  var above = vec4<u32>(0u);
  // The middle edge, then the middle one of those that remain.
  if (CODEC_BITS == 4u) {
    let upper = magnitude >= side_edge(4u, unit);
    let next = magnitude >= select(side_edge(2u, unit), side_edge(6u, unit), upper);
    let lower_edge = select(side_edge(1u, unit), side_edge(3u, unit), next);
    let upper_edge = select(side_edge(5u, unit), side_edge(7u, unit), next);
    let last = magnitude >= select(lower_edge, upper_edge, upper);
    above = side_bit(upper, 4u) | side_bit(next, 2u) | side_bit(last, 1u);
  } else if (CODEC_BITS == 3u) {
    let upper = magnitude >= side_edge(2u, unit);
    let last = magnitude >= select(side_edge(1u, unit), side_edge(3u, unit), upper);
    above = side_bit(upper, 2u) | side_bit(last, 1u);
  } else {
    above = side_bit(magnitude >= side_edge(1u, unit), 1u);
  }
  return above ^ select(vec4<u32>(HALF), vec4<u32>(HALF - 1u), negative);
}

fn side_bit(condition: vec4<bool>, bit: u32) -> vec4<u32> {
  return select(vec4<u32>(0u), vec4<u32>(bit), condition);
}
