// Smallest and largest key of a full page, channel by channel, as a token of a page of bounds: the minimum is its key, the
// maximum its value. Specification: src/kernels/quest.rs. Workgroup = one work item = a page; lane = channel.

struct PageBoundsParams {
  items: u32,    // first vec4 of the work list in `step`
  n_items: u32,
  layer: u32,    // layers after the one whose pages the items name
}

const CELLS = HEAD_DIM / 8u;

var<immediate> par: PageBoundsParams;
@group(0) @binding(0) var<storage, read> step: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> tables: array<u32>;
// Both may be the same buffer, which one dispatch can only use in one way.
@group(0) @binding(2) var<storage, read_write> arena: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> bounds: array<vec4<u32>>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let item = group.y * GRID_WIDTH + group.x;
  if (item >= par.n_items) { return; }
  let a = step[par.items + item * 2u];
  let b = step[par.items + item * 2u + 1u];
  let page = tables[a.x + par.layer * a.y];
  let target_page = tables[a.z + par.layer * a.w];
  let slot = b.x;
  for (var cell = li; cell < CELLS; cell += WORKGROUP_SIZE) {
    var low: array<f32, 8>;
    var high: array<f32, 8>;
    for (var token = 0u; token < PAGE_SIZE; token++) {
      let words = arena[page + cell * PAGE_SIZE + token];
      for (var i = 0u; i < 8u; i++) {
        let x = f16_value((words[i / 2u] >> (16u * (i % 2u))) & 0xffffu);
        if (token == 0u || x < low[i]) { low[i] = x; }
        if (token == 0u || x > high[i]) { high[i] = x; }
      }
    }
    bounds[target_page + cell * PAGE_SIZE + slot] = vec4<u32>(
      f16_pack(low[0], low[1]), f16_pack(low[2], low[3]), f16_pack(low[4], low[5]), f16_pack(low[6], low[7]));
    bounds[target_page + CELLS * PAGE_SIZE + slot * CELLS + cell] = vec4<u32>(
      f16_pack(high[0], high[1]), f16_pack(high[2], high[3]), f16_pack(high[4], high[5]), f16_pack(high[6], high[7]));
  }
}
