// Asymmetric rounding of a group, for int8 and kivi. Definition and reasons: src/compression/hidden/affine.rs.

// What has been seen of a group.
struct AffineStat {
  low: f32,
  high: f32,
  poisoned: bool,
}

fn affine_start() -> AffineStat {
  return AffineStat(3e38, -3e38, false);
}

fn affine_add(stat: AffineStat, x: f32) -> AffineStat {
  return AffineStat(min(stat.low, x), max(stat.high, x), stat.poisoned || !is_finite(x));
}

// Scale in the lower half, minimum in the upper.
fn affine_finish(stat: AffineStat, levels: u32, reciprocal: f32) -> u32 {
  if (stat.poisoned) { return 0x7e007e00u; }
  return affine_word(f16_bits(stat.low), f16_bits(stat.high), levels, reciprocal);
}

// The same from the f16 bits of the smallest and the largest value, one of which is no number where any value is none.
fn affine_word(low: u32, high: u32, levels: u32, reciprocal: f32) -> u32 {
  if (!f16_is_finite(low) || !f16_is_finite(high)) { return 0x7e007e00u; }
  let range = f16_value(high) - f16_value(low);
  let nearest = f16_bits(range * reciprocal);
  let scale = select(nearest + 1u, nearest, f16_value(nearest) * f32(levels) >= range);
  return scale | (select(low, 0u, (low & 0x7fffu) == 0u) << 16u);
}

// What coding needs of a group: minimum, scale, and a little less than 1 / scale, which is 0 where all codes are 0.
//
// WGSL's division is wrong by 2.5 units at most and each product by half a unit, together less than 4 * 2^-23. So with 2^-20
// taken off, no product of a difference with this reciprocal is above the true quotient.
fn affine_coder(word: u32) -> vec4<f32> {
  let scale = f16_value(word & 0xffffu);
  if (!f16_is_finite(word & 0xffffu) || scale == 0.0) { return vec4<f32>(0.0); }
  return vec4<f32>(f16_value(word >> 16u), scale, (1.0 / scale) * 0.99999904632568359375, 0.0);
}

// The largest codes whose lower edges are not above x - zero.
//
// The quotient is never above the true one, and at most 255 * 1.5 * 2^-20 below. Adding 2^23 rounds it to a whole number in the
// lowest bits: the code, or one less. The lower edge of the next code, an odd multiple of half a step, is exact
// however it is rounded (9 bits by 11), and so decides. Codes need no limit: a group's range is at most `levels` steps.
// Where the reciprocal is 0 the codes are for the caller to clear.
fn affine_codes(x: vec4<f32>, zero: vec4<f32>, scale: vec4<f32>, inverse: vec4<f32>) -> vec4<u32> {
  let difference = x - zero;
  let estimate = bitcast<vec4<u32>>(fma(difference, inverse, vec4<f32>(8388608.0))) & vec4<u32>(255u);
  let whole = bitcast<vec4<f32>>(estimate | vec4<u32>(0x4b000000u)) - 8388608.0;
  let next_edge = fma(whole, scale, scale * 0.5);
  return estimate + select(vec4<u32>(0u), vec4<u32>(1u), difference >= next_edge);
}

// The code of one value.
fn affine_code(x: f32, word: u32) -> u32 {
  let coder = affine_coder(word);
  let codes = affine_codes(vec4<f32>(x), vec4<f32>(coder.x), vec4<f32>(coder.y), vec4<f32>(coder.z));
  return select(0u, codes.x, coder.z > 0.0);
}

// The codes of a cell of f16 in one group.
fn affine_pack(raw: vec4<u32>, coder: vec4<f32>, bits: u32) -> vec4<u32> {
  let x = f16_cell(raw);
  let zero = vec4<f32>(coder.x);
  let scale = vec4<f32>(coder.y);
  let inverse = vec4<f32>(coder.z);
  let codes = Codes(affine_codes(x.low, zero, scale, inverse), affine_codes(x.high, zero, scale, inverse));
  return select(vec4<u32>(0u), plane_pack(codes, bits), coder.z > 0.0);
}
