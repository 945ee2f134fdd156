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
  return side_codes(vec4<u32>(f16_bits(x))).x;
}

fn side_word(low: u32, high: u32) -> u32 {
  return 0u;
}

fn side_pack(raw: vec4<u32>, coder: vec4<f32>) -> vec4<u32> {
  let even = side_codes(raw & vec4<u32>(0xffffu));
  let odd = side_codes(raw >> vec4<u32>(16u));
  return plane_pack(Codes(vec4<u32>(even.x, odd.x, even.y, odd.y), vec4<u32>(even.z, odd.z, even.w, odd.w)), 8u);
}

// Codes of f16 bits. From 2^-6 on 10 bits of mantissa are rounded to 3; below, 11 bits to multiples of 2^-9. Ties to even.
fn side_codes(bits: vec4<u32>) -> vec4<u32> {
  const ONE = vec4<u32>(1u);
  let magnitude = bits & vec4<u32>(0x7fffu);
  let rebased = magnitude - vec4<u32>(8u << 10u);
  let normal = min((rebased + vec4<u32>(63u) + ((rebased >> vec4<u32>(7u)) & ONE)) >> vec4<u32>(7u), vec4<u32>(126u));
  let shift = vec4<u32>(16u) - clamp(magnitude >> vec4<u32>(10u), ONE, vec4<u32>(8u));
  let leading = select(vec4<u32>(0x400u), vec4<u32>(0u), magnitude < vec4<u32>(0x400u));
  let significand = (magnitude & vec4<u32>(0x3ffu)) | leading;
  let small = (significand + (ONE << (shift - ONE)) - ONE + ((significand >> shift) & ONE)) >> shift;
  let finite = select(normal, small, magnitude < vec4<u32>(9u << 10u));
  return ((bits >> vec4<u32>(8u)) & vec4<u32>(128u)) | select(finite, vec4<u32>(127u), magnitude >= vec4<u32>(0x7c00u));
}
