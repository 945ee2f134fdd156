// Cells of eight f16: as f32, and in an order.

// Eight f16 as f32. The driver's conversion where all exponents are above those of zero and of the subnormal numbers, which
// it might flush: then it is exact.
fn f16_cell(raw: vec4<u32>) -> Cell {
  let above = ((raw & vec4<u32>(0x7c007c00u)) + vec4<u32>(0x7c007c00u)) & vec4<u32>(0x80008000u);
  if ((above.x & above.y & above.z & above.w) == 0x80008000u) {
    return Cell(vec4<f32>(unpack2x16float(raw.x), unpack2x16float(raw.y)), vec4<f32>(unpack2x16float(raw.z), unpack2x16float(raw.w)));
  }
  return Cell(vec4<f32>(f16_pair(raw.x), f16_pair(raw.y)), vec4<f32>(f16_pair(raw.z), f16_pair(raw.w)));
}

// In integers, without branches: the exponent is moved by 112, or to its end where it is at its end, and a subnormal number is
// so many times 2^-24.
fn f16_pair(word: u32) -> vec2<f32> {
  let magnitude = vec2<u32>(word, word >> 16u) & vec2<u32>(0x7fffu);
  let offset = select(vec2<u32>(112u << 23u), vec2<u32>(224u << 23u), magnitude >= vec2<u32>(0x7c00u));
  let normal = (magnitude << vec2<u32>(13u)) + offset;
  let small = bitcast<vec2<u32>>(vec2<f32>(magnitude) * 5.9604644775390625e-8);
  let sign = vec2<u32>(word << 16u, word) & vec2<u32>(0x80000000u);
  return bitcast<vec2<f32>>(select(normal, small, magnitude < vec2<u32>(0x400u)) | sign);
}

// Keys of 16 bits that are in the order of the f16 numbers, -0 below 0 and NaN beyond the infinities, two to a word: bits of
// negative numbers are turned over, those of others get the upper bit.
fn f16_keys(raw: vec4<u32>) -> vec4<u32> {
  let negative = (raw >> vec4<u32>(15u)) & vec4<u32>(0x00010001u);
  return raw ^ (negative * 0xffffu | vec4<u32>(0x80008000u));
}

fn f16_of_key(key: u32) -> u32 {
  return select(key ^ 0xffffu, key & 0x7fffu, key >= 0x8000u);
}

// Smallest and largest key of eight f16, in the upper halves of words whose lower halves are any.
fn f16_range(raw: vec4<u32>) -> vec2<u32> {
  let odd = f16_keys(raw);
  let even = odd << vec4<u32>(16u);
  let low = min(odd, even);
  let high = max(odd, even);
  return vec2<u32>(min(min(low.x, low.y), min(low.z, low.w)), max(max(high.x, high.y), max(high.z, high.w)));
}

fn f16_range_join(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
  return vec2<u32>(min(a.x, b.x), max(a.y, b.y));
}

// The smallest key in the lower half, the largest in the upper.
fn f16_range_word(range: vec2<u32>) -> u32 {
  return (range.x >> 16u) | (range.y & 0xffff0000u);
}
