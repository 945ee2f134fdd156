// Tokens of two layers as directions in common and lengths of their own; or how far apart they point.
// Specification: src/kernels/merge_layers.rs. Workgroup = one work item = a page; lane = token.

struct MergeLayersParams {
  items: u32,    // first vec4 of the work list in `step`
  n_items: u32,
  merges: u32,   // 1: pages are merged; 0: distances are measured
  lengths: u32,  // first word of the lengths in a merged page
}

const CELLS = HEAD_DIM / 8u;

var<immediate> par: MergeLayersParams;
@group(0) @binding(0) var<storage, read> step: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> tables: array<u32>;
@group(0) @binding(2) var<storage, read_write> window: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> merged: array<u32>;
@group(0) @binding(4) var<storage, read_write> distances: array<f32>;

// Eight numbers of a token of an f16 page; side 0 is keys.
fn cell_at(page: u32, side: u32, token: u32, cell: u32) -> u32 {
  return page + select(CELLS * PAGE_SIZE + token * CELLS + cell, cell * PAGE_SIZE + token, side == 0u);
}

fn half(word: u32, at: u32) -> f32 {
  return f16_value((word >> (16u * at)) & 0xffffu);
}

struct Sums {
  a: f32,   // squares of the lower layer
  b: f32,   // of the upper
  ab: f32,  // products
}

fn sums(lower: u32, upper: u32, side: u32, token: u32) -> Sums {
  var sums: Sums;
  for (var cell = 0u; cell < CELLS; cell++) {
    let a = window[cell_at(lower, side, token, cell)];
    let b = window[cell_at(upper, side, token, cell)];
    for (var i = 0u; i < 8u; i++) {
      let x = half(a[i / 2u], i % 2u);
      let y = half(b[i / 2u], i % 2u);
      sums.a += x * x;
      sums.b += y * y;
      sums.ab += x * y;
    }
  }
  return sums;
}

fn cosine(s: Sums) -> f32 {
  return clamp(s.ab / sqrt(max(s.a * s.b, 1e-30)), -1.0, 1.0);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let item = group.y * GRID_WIDTH + group.x;
  if (item >= par.n_items) { return; }
  let a = step[par.items + item * 2u];
  let b = step[par.items + item * 2u + 1u];
  let lower = tables[a.x];
  let upper = tables[a.y];
  for (var token = li; token < PAGE_SIZE; token += WORKGROUP_SIZE) {
    if (par.merges == 0u) {
      if (token < b.x) {
        let k = cosine(sums(lower, upper, 0u, token));
        let v = cosine(sums(lower, upper, 1u, token));
        distances[a.w + token] = (1.0 - k) + (1.0 - v);
      }
      continue;
    }
    let page = tables[a.z] * 4u + par.lengths;
    for (var side = 0u; side < 2u; side++) {
      let s = sums(lower, upper, side, token);
      // On the sphere, from the lower layer's direction 0.6 of the way to the upper one's.
      let angle = acos(cosine(s));
      var from_lower = 0.4;
      var from_upper = 0.6;
      if (angle > 1e-2) {
        from_lower = sin(0.4 * angle) / sin(angle);
        from_upper = sin(0.6 * angle) / sin(angle);
      }
      let scale_lower = from_lower / sqrt(max(s.a, 1e-30));
      let scale_upper = from_upper / sqrt(max(s.b, 1e-30));
      for (var cell = 0u; cell < CELLS; cell++) {
        let at = cell_at(lower, side, token, cell);
        let x = window[at];
        let y = window[cell_at(upper, side, token, cell)];
        var out: vec4<u32>;
        for (var i = 0u; i < 4u; i++) {
          out[i] = f16_pack(
            half(x[i], 0u) * scale_lower + half(y[i], 0u) * scale_upper,
            half(x[i], 1u) * scale_lower + half(y[i], 1u) * scale_upper);
        }
        window[at] = out;
      }
      merged[page + side * PAGE_SIZE + token] = f16_pack(sqrt(s.a), sqrt(s.b));
    }
  }
}
