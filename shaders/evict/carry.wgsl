// Scores of kept tokens move to their new places; those that come next begin at zero.
// Specification: src/kernels/select.rs. Workgroup = one list.

struct CarryParams {
  items: u32,    // first vec4 of the work list in `step`
  n_items: u32,
  capacity: u32, // scores of a list
}

var<immediate> par: CarryParams;
@group(0) @binding(0) var<storage, read> step: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> kept: array<u32>;
@group(0) @binding(2) var<storage, read_write> raw: array<f32>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let item = group.y * GRID_WIDTH + group.x;
  if (item >= par.n_items) { return; }
  let a = step[par.items + item];
  // No index is below its new place, so that a chunk reads before anything that it needs is overwritten.
  for (var first = 0u; first < par.capacity; first += WORKGROUP_SIZE) {
    let i = first + li;
    var score = 0.0;
    if (i < a.z) { score = raw[a.x + kept[a.y + i]]; }
    storageBarrier();
    workgroupBarrier();
    if (i < par.capacity) { raw[a.x + i] = score; }
    storageBarrier();
    workgroupBarrier();
  }
}
