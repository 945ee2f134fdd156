// What decode and prefill share: parameters, bindings, and eight channels of an accumulator.

// Finite, so that no infinity meets a zero.
const MASKED = -1e30;

struct AttentionParams {
  items: u32,       // first vec4 of the work list in `step`
  n_items: u32,
  layer: u32,
  q_stride: u32,    // f32 values between query rows
  scale_log2: f32,  // sm_scale * log2(e)
}

// One cell of channels for four rows (or heads) at a time.
struct Channels {
  c0: vec4<f32>, c1: vec4<f32>, c2: vec4<f32>, c3: vec4<f32>,
  c4: vec4<f32>, c5: vec4<f32>, c6: vec4<f32>, c7: vec4<f32>,
}

var<immediate> par: AttentionParams;
@group(0) @binding(0) var<storage, read> step: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> tables: array<u32>;
@group(0) @binding(2) var<storage, read> arena: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> state_o: array<f32>;
@group(0) @binding(5) var<storage, read_write> state_ml: array<vec2<f32>>;

fn faded(acc: Channels, factor: vec4<f32>) -> Channels {
  return Channels(
    acc.c0 * factor, acc.c1 * factor, acc.c2 * factor, acc.c3 * factor,
    acc.c4 * factor, acc.c5 * factor, acc.c6 * factor, acc.c7 * factor);
}

fn weighted(acc: Channels, p: vec4<f32>, v: Cell) -> Channels {
  return Channels(
    acc.c0 + p * v.low.x, acc.c1 + p * v.low.y, acc.c2 + p * v.low.z, acc.c3 + p * v.low.w,
    acc.c4 + p * v.high.x, acc.c5 + p * v.high.y, acc.c6 + p * v.high.z, acc.c7 + p * v.high.w);
}
