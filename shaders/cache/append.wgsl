// New tokens' keys and values into open pages, which are f16: layout in src/compression/hidden/float16.rs.
// Specification: src/kernels/append.rs. Workgroup = one work item = consecutive rows in one page of one KV head;
// lane = one cell of one row.

struct AppendParams {
  items: u32,     // first vec4 of the work list in `step`
  n_items: u32,
  layer: u32,     // layers after the one whose pages the items name
  stride: u32,    // f32 values between rows
  k_offset: u32,  // f32 values before the keys in a row
  v_offset: u32,  // f32 values before the values in a row
}

const CELLS = HEAD_DIM / 8u;

var<immediate> par: AppendParams;
@group(0) @binding(0) var<storage, read> step: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> tables: array<u32>;
@group(0) @binding(2) var<storage, read> kv: array<f32>;
@group(0) @binding(3) var<storage, read_write> arena: array<vec4<u32>>;

fn encode(at: u32) -> vec4<u32> {
  return vec4<u32>(
    f16_pack(kv[at], kv[at + 1u]), f16_pack(kv[at + 2u], kv[at + 3u]),
    f16_pack(kv[at + 4u], kv[at + 5u]), f16_pack(kv[at + 6u], kv[at + 7u]));
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let index = group.y * GRID_WIDTH + group.x;
  if (index >= par.n_items) { return; }
  let item = step[par.items + index * 2u];
  let place = step[par.items + index * 2u + 1u];
  let page = tables[item.w + par.layer * place.x];
  for (var i = li; i < item.y * CELLS; i += WORKGROUP_SIZE) {
    let r = i / CELLS;
    let cell = i % CELLS;
    let token = place.y + r;
    let at = (item.x + r) * par.stride + item.z * HEAD_DIM + cell * 8u;
    arena[page + cell * PAGE_SIZE + token] = encode(at + par.k_offset);
    arena[page + CELLS * PAGE_SIZE + token * CELLS + cell] = encode(at + par.v_offset);
  }
}
