// f32. Definition: src/compression/hidden/float32.rs. Same function set as every file here.

const CODEC_SPAN = 1u;
const CODEC_PLANES = array<u32, 2>(32u, 0u);
const CODEC_GROUP_TOKENS = 0u;
const CODEC_GROUP_CHANNELS = 0u;
const CODEC_TOKEN_SCALES = 0u;
const CODEC_CHANNEL_SCALES = false;
const CODEC_OFFSET = 0.0;

struct CodecRow {
  unused: u32,
}

struct CodecRaw {
  low: vec4<u32>,
  high: vec4<u32>,
}

struct CodecStat {
  unused: u32,
}

fn codec_row(page: u32, token: u32, cell: u32) -> CodecRow {
  return CodecRow(0u);
}

fn codec_load(page: u32, token: u32, cell: u32) -> CodecRaw {
  let at = page + SIDE_AT + select(token * (SIDE_WIDTH / 4u) + 2u * cell, 2u * cell * PAGE_SIZE + token, SIDE_IS_KEY);
  return CodecRaw(arena_cell(at), arena_cell(at + select(1u, PAGE_SIZE, SIDE_IS_KEY)));
}

fn codec_cell(page: u32, token: u32, cell: u32, row: CodecRow, raw: CodecRaw) -> Cell {
  return Cell(bitcast<vec4<f32>>(raw.low), bitcast<vec4<f32>>(raw.high));
}

struct CodecScale {
  scale: vec4<f32>,
  zero: vec4<f32>,
}

fn codec_numbers(raw: CodecRaw, unit: u32) -> Cell {
  return Cell(bitcast<vec4<f32>>(raw.low), bitcast<vec4<f32>>(raw.high));
}

fn codec_token_scale(page: u32, token: u32, group: u32) -> vec2<f32> {
  return vec2<f32>(1.0, 0.0);
}

fn codec_channel_scale(page: u32, token: u32, quad: u32) -> CodecScale {
  return CodecScale(vec4<f32>(1.0), vec4<f32>(0.0));
}


fn codec_start() -> CodecStat {
  return CodecStat(0u);
}

fn codec_add(stat: CodecStat, x: f32) -> CodecStat {
  return stat;
}

fn codec_finish(stat: CodecStat) -> u32 {
  return 0u;
}

fn codec_code(x: f32, scale: u32) -> u32 {
  return bitcast<u32>(x);
}
