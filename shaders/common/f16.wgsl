// f32 to f16 bits, rounding to nearest even.
//
// WGSL leaves the rounding of pack2x16float to the driver; pages must hold the same bits on every device and on the
// CPU, so the conversion is spelled out in integers. Mirrors half::f16::from_f32, NaN payloads included.

fn f16_bits(value: f32) -> u32 {
  let bits = bitcast<u32>(value);
  let sign = (bits >> 16u) & 0x8000u;
  let magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) { return sign | 0x7e00u | ((magnitude >> 13u) & 0x3ffu); }
  // 65520 and above round to infinity.
  if (magnitude >= 0x477ff000u) { return sign | 0x7c00u; }
  if (magnitude >= 0x38800000u) {
    return sign | ((magnitude + 0xfffu + ((magnitude >> 13u) & 1u) - 0x38000000u) >> 13u);
  }
  // Half of the smallest subnormal is a tie with zero, which is even.
  if (magnitude <= 0x33000000u) { return sign; }
  let mantissa = (magnitude & 0x7fffffu) | 0x800000u;
  let shift = 126u - (magnitude >> 23u);
  let quotient = mantissa >> shift;
  let rest = mantissa & ((1u << shift) - 1u);
  let half = 1u << (shift - 1u);
  let up = rest > half || (rest == half && (quotient & 1u) == 1u);
  return sign | (quotient + select(0u, 1u, up));
}

fn f16_pack(low: f32, high: f32) -> u32 {
  return f16_bits(low) | (f16_bits(high) << 16u);
}
