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
  let range = stat.high - stat.low;
  let nearest = f16_bits(range * reciprocal);
  let scale = select(nearest + 1u, nearest, f16_value(nearest) * f32(levels) >= range);
  let low = select(f16_bits(stat.low), 0u, stat.low == 0.0);
  return scale | (low << 16u);
}

// The largest code whose lower edge is not above x - min. The estimate is off by one at most, and the products are exact.
fn affine_code(x: f32, word: u32, levels: u32) -> u32 {
  let scale = f16_value(word & 0xffffu);
  if (!f16_is_finite(word & 0xffffu) || scale == 0.0) { return 0u; }
  let difference = x - f16_value(word >> 16u);
  let half_step = scale * 0.5;
  var code = min(u32(max(difference / scale + 0.5, 0.0)), levels);
  if (code > 0u && difference < f32(2u * code - 1u) * half_step) { code -= 1u; }
  if (code < levels && difference >= f32(2u * code + 1u) * half_step) { code += 1u; }
  return code;
}
