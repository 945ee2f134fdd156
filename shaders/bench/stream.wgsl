// A buffer from its first cell to its last, read or copied. Specification: src/kernels/stream.rs.
// Workgroup = TILE_CELLS cells in a row; a lane takes every WORKGROUP_SIZE-th of them.

struct StreamParams {
  n_cells: u32,
}

var<immediate> par: StreamParams;
@group(0) @binding(0) var<storage, read> source: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> result: array<vec4<u32>>;

var<workgroup> partial: array<vec4<u32>, WORKGROUP_SIZE>;
var<workgroup> folded: array<vec4<u32>, 8>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let tile = group.y * GRID_WIDTH + group.x;
  let first = tile * TILE_CELLS + li;
  var sum = vec4<u32>(0u);
  for (var i = 0u; i < TILE_CELLS; i += WORKGROUP_SIZE) {
    let at = first + i;
    if (at < par.n_cells) {
      if (COPIES) { result[at] = source[at]; } else { sum += source[at] * (2u * at + 1u); }
    }
  }
  if (COPIES) { return; }
  partial[li] = sum;
  workgroupBarrier();
  if (li < 8u) {
    for (var i = li + 8u; i < WORKGROUP_SIZE; i += 8u) { sum += partial[i]; }
    folded[li] = sum;
  }
  workgroupBarrier();
  if (li == 0u && tile * TILE_CELLS < par.n_cells) {
    result[tile] = ((folded[0] + folded[1]) + (folded[2] + folded[3])) +
                   ((folded[4] + folded[5]) + (folded[6] + folded[7]));
  }
}
