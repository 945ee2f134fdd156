// Pages between an arena and one contiguous buffer, for caches on their way to the host and back.
// Specification: src/kernels/move_pages.rs. Workgroup = one page; lane = every WORKGROUP_SIZE-th cell of it.

struct MovePagesParams {
  items: u32,   // first vec4 of the work list in `step`
  n_items: u32,
  leaves: u32,  // 1: from the arena into the buffer; 0: back
}

var<immediate> par: MovePagesParams;
@group(0) @binding(0) var<storage, read> step: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> arena: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> packed_pages: array<vec4<u32>>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let item = group.y * GRID_WIDTH + group.x;
  if (item >= par.n_items) { return; }
  let a = step[par.items + item];
  for (var cell = li; cell < a.z; cell += WORKGROUP_SIZE) {
    if (par.leaves != 0u) {
      packed_pages[a.y + cell] = arena[a.x + cell];
    } else {
      arena[a.x + cell] = packed_pages[a.y + cell];
    }
  }
}
