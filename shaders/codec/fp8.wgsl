// fp8, e4m3. Definition: src/compression/hidden/fp8.rs. Same function set as every file here.

const CODEC_SPAN = 2u;
const CODEC_PLANES = array<u32, 2>(8u, 0u);
const CODEC_GROUP_TOKENS = 0u;
const CODEC_GROUP_CHANNELS = 0u;
const CODEC_TOKEN_SCALES = 0u;
const CODEC_CHANNEL_SCALES = false;
const CODEC_OFFSET = 0.0;

struct CodecRow {
  unused: u32,
}

struct CodecRaw {
  codes: vec4<u32>,
}

struct CodecStat {
  unused: u32,
}

fn codec_row(page: u32, token: u32, cell: u32) -> CodecRow {
  return CodecRow(0u);
}

fn codec_load(page: u32, token: u32, cell: u32) -> CodecRaw {
  if (SIDE_IS_KEY) { return CodecRaw(plane_load_key(page + SIDE_AT, SIDE_WIDTH, 8u, token, cell / CODEC_SPAN)); }
  return CodecRaw(plane_load_value(page + SIDE_AT, SIDE_WIDTH, token / CODEC_SPAN, cell));
}

fn codec_cell(page: u32, token: u32, cell: u32, row: CodecRow, raw: CodecRaw) -> Cell {
  let codes = plane_codes(raw.codes, 8u, select(token, cell, SIDE_IS_KEY) % CODEC_SPAN);
  return Cell(plane_e4m3(codes.low), plane_e4m3(codes.high));
}

struct CodecScale {
  scale: vec4<f32>,
  zero: vec4<f32>,
}

fn codec_numbers(raw: CodecRaw, unit: u32) -> Cell {
  let codes = plane_codes(raw.codes, 8u, unit);
  return Cell(plane_e4m3(codes.low), plane_e4m3(codes.high));
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
  let bits = bitcast<u32>(x);
  let sign = (bits >> 24u) & 0x80u;
  let magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x7f800000u) { return sign | 127u; }
  if (magnitude >= 0x3c800000u) {
    let rebased = magnitude - (120u << 23u);
    return sign | min((rebased + 0x7ffffu + ((rebased >> 20u) & 1u)) >> 20u, 126u);
  }
  let steps = bitcast<f32>(magnitude) * 512.0;
  let whole = u32(steps);
  let rest = steps - f32(whole);
  return sign | (whole + select(0u, 1u, rest > 0.5 || (rest == 0.5 && (whole & 1u) == 1u)));
}
