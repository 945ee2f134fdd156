// int8. Definition: src/compression/hidden/int8.rs. Same function set as every file here.

const CODEC_SPAN = 2u;
const CODEC_PLANES = array<u32, 2>(8u, 0u);
const CODEC_GROUP_TOKENS = 1u;
const CODEC_GROUP_CHANNELS = SIDE_WIDTH;
const CODEC_TOKEN_SCALES = 1u;
const CODEC_CHANNEL_SCALES = false;
const CODEC_OFFSET = 0.0;

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
  return CodecRow(plane_pair(arena_word((page + SIDE_AT) * 4u + SIDE_SCALES + token)));
}

fn codec_load(page: u32, token: u32, cell: u32) -> CodecRaw {
  if (SIDE_IS_KEY) { return CodecRaw(plane_load_key(page + SIDE_AT, SIDE_WIDTH, 8u, token, cell / CODEC_SPAN)); }
  return CodecRaw(plane_load_value(page + SIDE_AT, SIDE_WIDTH, token / CODEC_SPAN, cell));
}

fn codec_cell(page: u32, token: u32, cell: u32, row: CodecRow, raw: CodecRaw) -> Cell {
  let codes = plane_codes(raw.codes, 8u, select(token, cell, SIDE_IS_KEY) % CODEC_SPAN);
  return Cell(vec4<f32>(codes.low) * row.scale.x + row.scale.y, vec4<f32>(codes.high) * row.scale.x + row.scale.y);
}

struct CodecScale {
  scale: vec4<f32>,
  zero: vec4<f32>,
}

fn codec_numbers(raw: CodecRaw, unit: u32) -> Cell {
  let codes = plane_codes(raw.codes, 8u, unit);
  return Cell(vec4<f32>(codes.low), vec4<f32>(codes.high));
}

fn codec_token_scale(page: u32, token: u32, group: u32) -> vec2<f32> {
  return plane_pair(arena_word((page + SIDE_AT) * 4u + SIDE_SCALES + token));
}

fn codec_channel_scale(page: u32, token: u32, quad: u32) -> CodecScale {
  return CodecScale(vec4<f32>(1.0), vec4<f32>(0.0));
}


fn codec_start() -> CodecStat {
  return CodecStat(affine_start());
}

fn codec_add(stat: CodecStat, x: f32) -> CodecStat {
  return CodecStat(affine_add(stat.affine, x));
}

fn codec_finish(stat: CodecStat) -> u32 {
  return affine_finish(stat.affine, 255u, CODEC_FACTOR);
}

fn codec_code(x: f32, scale: u32) -> u32 {
  return affine_code(x, scale);
}

fn side_word(low: u32, high: u32) -> u32 {
  return affine_word(low, high, 255u, CODEC_FACTOR);
}

fn side_pack(raw: vec4<u32>, coder: vec4<f32>) -> vec4<u32> {
  return affine_pack(raw, coder, 8u);
}
