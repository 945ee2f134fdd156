// f16. Definition: src/compression/hidden/float16.rs. Same function set as every file here.

const CODEC_SPAN = 1u;
const CODEC_PLANES = array<u32, 2>(16u, 0u);
const CODEC_GROUP_TOKENS = 0u;
const CODEC_GROUP_CHANNELS = 0u;
const CODEC_TOKEN_SCALES = 0u;
const CODEC_CHANNEL_SCALES = false;
const CODEC_OFFSET = 0.0;

struct CodecRow {
  unused: u32,
}

struct CodecRaw {
  bits: vec4<u32>,
}

struct CodecStat {
  unused: u32,
}

fn codec_row(page: u32, token: u32, cell: u32) -> CodecRow {
  return CodecRow(0u);
}

fn codec_load(page: u32, token: u32, cell: u32) -> CodecRaw {
  let at = select(token * (SIDE_WIDTH / 8u) + cell, cell * PAGE_SIZE + token, SIDE_IS_KEY);
  return CodecRaw(arena_cell(page + SIDE_AT + at));
}

fn codec_cell(page: u32, token: u32, cell: u32, row: CodecRow, raw: CodecRaw) -> Cell {
  return Cell(
    vec4<f32>(unpack2x16float(raw.bits.x), unpack2x16float(raw.bits.y)),
    vec4<f32>(unpack2x16float(raw.bits.z), unpack2x16float(raw.bits.w)));
}

struct CodecScale {
  scale: vec4<f32>,
  zero: vec4<f32>,
}

fn codec_numbers(raw: CodecRaw, unit: u32) -> Cell {
  return Cell(
    vec4<f32>(unpack2x16float(raw.bits.x), unpack2x16float(raw.bits.y)),
    vec4<f32>(unpack2x16float(raw.bits.z), unpack2x16float(raw.bits.w)));
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
  return f16_bits(x);
}

fn side_word(low: u32, high: u32) -> u32 {
  return 0u;
}

fn side_pack(raw: vec4<u32>, coder: vec4<f32>) -> vec4<u32> {
  return raw;
}
