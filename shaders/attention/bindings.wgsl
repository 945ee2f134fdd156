// Parameters and bindings of decode and prefill. Each declares `state_o`, binding 4, in the units that it writes.

struct AttentionParams {
  items: u32,       // first vec4 of the work list in `step`
  n_items: u32,
  layer: u32,       // layers after the one whose pages the items name
  q_stride: u32,    // f32 values between query rows
  scale_log2: f32,  // sm_scale * log2(e)
  angles: u32,      // first vec4 of the rotary tables in `parameters`
}

var<immediate> par: AttentionParams;
@group(0) @binding(0) var<storage, read> step: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> tables: array<u32>;
@group(0) @binding(2) var<storage, read> arena: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> state_ml: array<vec2<f32>>;
@group(0) @binding(6) var<storage, read> parameters: array<vec4<f32>>;
