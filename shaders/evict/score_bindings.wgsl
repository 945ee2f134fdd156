// Parameters and bindings of both texts of score.

struct ScoreParams {
  items: u32,        // first vec4 of the work list in `step`
  n_items: u32,
  layer: u32,        // layers after the one whose pages the items name
  q_stride: u32,     // f32 values between query rows
  scale_log2: f32,   // sm_scale * log2(e)
  angles: u32,       // first vec4 of the rotary tables in `parameters`
  list_stride: u32,  // scores between one layer's list and the next
  largest: u32,      // 1: the largest probability over rows and heads; 0: the sum over rows of the mean over heads
}

var<immediate> par: ScoreParams;
@group(0) @binding(0) var<storage, read> step: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> tables: array<u32>;
@group(0) @binding(2) var<storage, read> arena: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> lse: array<f32>;
@group(0) @binding(5) var<storage, read> parameters: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> scores: array<f32>;
