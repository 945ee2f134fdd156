// kivi4 and kivi2. Definition: src/compression/hidden/kivi.rs. Same function set as every file here.

const CODEC_SPAN = 16u / CODEC_BITS;
const CODEC_PLANES = array<u32, 2>(CODEC_BITS, 0u);
const CODEC_GROUP_TOKENS = select(1u, CODEC_GROUP, SIDE_IS_KEY);
const CODEC_GROUP_CHANNELS = select(CODEC_GROUP, 1u, SIDE_IS_KEY);
// A group may be wider than a head.
const CODEC_TOKEN_SCALES = select(max(SIDE_WIDTH / CODEC_GROUP, 1u), 0u, SIDE_IS_KEY);
const CODEC_CHANNEL_SCALES = SIDE_IS_KEY;
const CODEC_OFFSET = select(4.0, 16.0, CODEC_BITS == 4u);
const CODEC_LEVELS = (1u << CODEC_BITS) - 1u;

// Values: scale and minimum of the token's channel group. Keys have one for each channel, read with the cell.
struct CodecRow {
  scale: vec2<f32>,
}

struct CodecRaw {
  codes: vec4<u32>,
}

struct CodecStat {
  affine: AffineStat,
}

fn codec_row(page: u32, token: u32, cell: u32) -> CodecRow {
  if (SIDE_IS_KEY) { return CodecRow(vec2<f32>(0.0)); }
  let group = cell * 8u / CODEC_GROUP;
  return CodecRow(plane_pair(arena_word((page + SIDE_AT) * 4u + SIDE_SCALES + group * PAGE_SIZE + token)));
}

fn codec_load(page: u32, token: u32, cell: u32) -> CodecRaw {
  if (SIDE_IS_KEY) {
    return CodecRaw(plane_load_key(page + SIDE_AT, SIDE_WIDTH, CODEC_BITS, token, cell / CODEC_SPAN));
  }
  return CodecRaw(plane_load_value(page + SIDE_AT, SIDE_WIDTH, token / CODEC_SPAN, cell));
}

fn codec_cell(page: u32, token: u32, cell: u32, row: CodecRow, raw: CodecRaw) -> Cell {
  let codes = plane_codes(raw.codes, CODEC_BITS, select(token, cell, SIDE_IS_KEY) % CODEC_SPAN);
  let low = vec4<f32>(codes.low);
  let high = vec4<f32>(codes.high);
  if (!SIDE_IS_KEY) { return Cell(low * row.scale.x + row.scale.y, high * row.scale.x + row.scale.y); }
  // The same for all lanes whose tokens share a group.
  let at = page + SIDE_AT + SIDE_SCALES / 4u + (token / CODEC_GROUP * SIDE_WIDTH + cell * 8u) / 4u;
  let a = arena_cell(at);
  let b = arena_cell(at + 1u);
  let p0 = plane_pair(a.x); let p1 = plane_pair(a.y); let p2 = plane_pair(a.z); let p3 = plane_pair(a.w);
  let p4 = plane_pair(b.x); let p5 = plane_pair(b.y); let p6 = plane_pair(b.z); let p7 = plane_pair(b.w);
  return Cell(
    low * vec4<f32>(p0.x, p1.x, p2.x, p3.x) + vec4<f32>(p0.y, p1.y, p2.y, p3.y),
    high * vec4<f32>(p4.x, p5.x, p6.x, p7.x) + vec4<f32>(p4.y, p5.y, p6.y, p7.y));
}

struct CodecScale {
  scale: vec4<f32>,
  zero: vec4<f32>,
}

fn codec_numbers(raw: CodecRaw, unit: u32) -> Cell {
  if (CODEC_BITS == 4u) { return plane_nibbles(raw.codes[unit]); }
  return plane_crumbs(raw.codes[unit / 2u], unit % 2u);
}

fn codec_token_scale(page: u32, token: u32, group: u32) -> vec2<f32> {
  return plane_pair(arena_word((page + SIDE_AT) * 4u + SIDE_SCALES + group * PAGE_SIZE + token));
}

fn codec_channel_scale(page: u32, token: u32, quad: u32) -> CodecScale {
  let pairs = arena_cell(page + SIDE_AT + SIDE_SCALES / 4u + token / CODEC_GROUP * (SIDE_WIDTH / 4u) + quad);
  let p0 = plane_pair(pairs.x); let p1 = plane_pair(pairs.y); let p2 = plane_pair(pairs.z); let p3 = plane_pair(pairs.w);
  return CodecScale(vec4<f32>(p0.x, p1.x, p2.x, p3.x), vec4<f32>(p0.y, p1.y, p2.y, p3.y));
}


fn codec_start() -> CodecStat {
  return CodecStat(affine_start());
}

fn codec_add(stat: CodecStat, x: f32) -> CodecStat {
  return CodecStat(affine_add(stat.affine, x));
}

fn codec_finish(stat: CodecStat) -> u32 {
  return affine_finish(stat.affine, CODEC_LEVELS, CODEC_FACTOR);
}

fn codec_code(x: f32, scale: u32) -> u32 {
  return affine_code(x, scale);
}

fn side_word(low: u32, high: u32) -> u32 {
  return affine_word(low, high, CODEC_LEVELS, CODEC_FACTOR);
}

fn side_pack(raw: vec4<u32>, coder: vec4<f32>) -> vec4<u32> {
  return affine_pack(raw, coder, CODEC_BITS);
}
