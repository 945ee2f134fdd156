// Planes of codes of 1, 2, 4, 8, 16 or 32 bits. Layout: src/compression/hidden/plane.rs.
//
// `arena_cell` and `arena_word` come from the kernel. Every count here is a constant once a kernel is specialised.

// Eight channels of one token.
struct Cell {
  low: vec4<f32>,
  high: vec4<f32>,
}

// Eight neighbouring codes.
struct Codes {
  low: vec4<u32>,
  high: vec4<u32>,
}

// 16 bytes of one token's codes in a plane of keys that begins at cell `base`. The last block may be shorter.
fn plane_load_key(base: u32, width: u32, bits: u32, token: u32, block: u32) -> vec4<u32> {
  let words = (width * bits + 31u) / 32u;
  let whole = words / 4u;
  if (block < whole) { return arena_cell(base + block * PAGE_SIZE + token); }
  let rest = words - whole * 4u;
  let at = (base + whole * PAGE_SIZE) * 4u + token * rest;
  var raw = vec4<u32>(0u);
  if (rest > 0u) { raw.x = arena_word(at); }
  if (rest > 1u) { raw.y = arena_word(at + 1u); }
  if (rest > 2u) { raw.z = arena_word(at + 2u); }
  return raw;
}

// 16 bytes of one cell of channels in a plane of values: 16 / bits tokens.
fn plane_load_value(base: u32, width: u32, block: u32, cell: u32) -> vec4<u32> {
  return arena_cell(base + block * (width / 8u) + cell);
}

// The eight codes at place `unit` of 16 bytes.
fn plane_codes(raw: vec4<u32>, bits: u32, unit: u32) -> Codes {
  if (bits == 8u) {
    let low = raw[unit * 2u];
    let high = raw[unit * 2u + 1u];
    let shift = vec4<u32>(0u, 8u, 16u, 24u);
    return Codes((vec4<u32>(low) >> shift) & vec4<u32>(255u), (vec4<u32>(high) >> shift) & vec4<u32>(255u));
  }
  if (bits == 4u) {
    let word = vec4<u32>(raw[unit]);
    return Codes(
      (word >> vec4<u32>(0u, 4u, 8u, 12u)) & vec4<u32>(15u), (word >> vec4<u32>(16u, 20u, 24u, 28u)) & vec4<u32>(15u));
  }
  if (bits == 2u) {
    let word = vec4<u32>(raw[unit / 2u] >> (unit % 2u * 16u));
    return Codes(
      (word >> vec4<u32>(0u, 2u, 4u, 6u)) & vec4<u32>(3u), (word >> vec4<u32>(8u, 10u, 12u, 14u)) & vec4<u32>(3u));
  }
  let word = vec4<u32>(raw[unit / 4u] >> (unit % 4u * 8u));
  return Codes((word >> vec4<u32>(0u, 1u, 2u, 3u)) & vec4<u32>(1u), (word >> vec4<u32>(4u, 5u, 6u, 7u)) & vec4<u32>(1u));
}

// Four codes, lowest bits first.
fn plane_pack_four(codes: vec4<u32>, bits: u32) -> u32 {
  return codes.x | (codes.y << bits) | (codes.z << (2u * bits)) | (codes.w << (3u * bits));
}

// Eight codes, lowest bits first: two words of 8 bits, or the lowest bits of one.
fn plane_pack(codes: Codes, bits: u32) -> vec4<u32> {
  let low = plane_pack_four(codes.low, bits);
  let high = plane_pack_four(codes.high, bits);
  if (bits == 8u) { return vec4<u32>(low, high, 0u, 0u); }
  return vec4<u32>(low | (high << (4u * bits & 31u)), 0u, 0u, 0u);
}

// Eight codes of 4 bits as numbers, each 16 more than its code: the code's bits behind those of 16.0, in two operations,
// where a conversion takes more.
fn plane_nibbles(word: u32) -> Cell {
  const BITS = vec4<u32>(0x780000u);
  const BASE = vec4<u32>(0x41800000u);
  let low = vec4<u32>(word << 19u, word << 15u, word << 11u, word << 7u);
  let high = vec4<u32>(word << 3u, word >> 1u, word >> 5u, word >> 9u);
  return Cell(bitcast<vec4<f32>>((low & BITS) | BASE), bitcast<vec4<f32>>((high & BITS) | BASE));
}

// Eight codes of 2 bits, in a half of a word, as numbers: each 4 more than its code.
fn plane_crumbs(word: u32, half: u32) -> Cell {
  const BITS = vec4<u32>(0x600000u);
  const BASE = vec4<u32>(0x40800000u);
  let bits = word >> (half * 16u);
  let low = vec4<u32>(bits << 21u, bits << 19u, bits << 17u, bits << 15u);
  let high = vec4<u32>(bits << 13u, bits << 11u, bits << 9u, bits << 7u);
  return Cell(bitcast<vec4<f32>>((low & BITS) | BASE), bitcast<vec4<f32>>((high & BITS) | BASE));
}

// Codes of 8, 4 or 2 bits, four to a word, as signed numbers: those of 8 bits are 128 less than they were. A unit is eight
// channels in two words, or sixteen of 2 bits in four; word i of n has the codes at places i, i + n, i + 2n and i + 3n of a group of
// 4 n, but those of 8 bits in their order.
fn plane_digits(raw: vec4<u32>, bits: u32, unit: u32) -> vec4<u32> {
  if (bits == 8u) { return vec4<u32>(raw[unit * 2u] ^ 0x80808080u, raw[unit * 2u + 1u] ^ 0x80808080u, 0u, 0u); }
  if (bits == 4u) { return vec4<u32>(raw[unit] & 0x0f0f0f0fu, (raw[unit] >> 4u) & 0x0f0f0f0fu, 0u, 0u); }
  return (vec4<u32>(raw[unit]) >> vec4<u32>(0u, 2u, 4u, 6u)) & vec4<u32>(0x03030303u);
}

// Two f16 as f32, for scales. Attention may read them by the driver's conversion.
fn plane_pair(word: u32) -> vec2<f32> {
  return unpack2x16float(word);
}

// e4m3 codes as numbers. Below the smallest normal number the mantissa alone counts, in steps of 2^-9.
fn plane_e4m3(codes: vec4<u32>) -> vec4<f32> {
  let magnitude = codes & vec4<u32>(127u);
  let normal = bitcast<vec4<f32>>((magnitude << vec4<u32>(20u)) + vec4<u32>(120u << 23u));
  let small = vec4<f32>(magnitude) * 0.001953125;
  // Not from a constant, which may not be NaN.
  let nan = bitcast<vec4<f32>>(vec4<u32>(0x7fc00000u) | (codes & vec4<u32>(1u)));
  let positive = select(select(normal, small, magnitude < vec4<u32>(8u)), nan, magnitude == vec4<u32>(127u));
  return select(positive, -positive, codes >= vec4<u32>(128u));
}
