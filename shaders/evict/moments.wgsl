// Sums of queries and of their products, before rotary positions. Specification: src/kernels/moments.rs.
// Workgroup = one query head of one segment of rows.

struct MomentParams {
  items: u32,    // first vec4 of the work list in `step`
  n_items: u32,
  layer: u32,
  q_stride: u32, // f32 values between query rows
}

const ROWS = 16u;
const NUM_QO_HEADS = NUM_KV_HEADS * GROUP_SIZE;
const SIZE = HEAD_DIM + HEAD_DIM * HEAD_DIM;

var<immediate> par: MomentParams;
@group(0) @binding(0) var<storage, read> step: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> q: array<f32>;
@group(0) @binding(2) var<storage, read_write> moments: array<f32>;  // [slot][layer][query head][SIZE]

var<workgroup> rows: array<f32, ROWS * HEAD_DIM>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let index = group.y * GRID_WIDTH + group.x;
  let item = index / NUM_QO_HEADS;
  let head = index % NUM_QO_HEADS;
  if (item >= par.n_items) { return; }
  let a = step[par.items + item];  // first row, rows, first moment of the slot
  let out = a.z + (par.layer * NUM_QO_HEADS + head) * SIZE;
  for (var first = 0u; first < a.y; first += ROWS) {
    let n = min(ROWS, a.y - first);
    for (var i = li; i < n * HEAD_DIM; i += WORKGROUP_SIZE) {
      rows[i] = q[(a.x + first + i / HEAD_DIM) * par.q_stride + head * HEAD_DIM + i % HEAD_DIM];
    }
    workgroupBarrier();
    for (var i = li; i < SIZE; i += WORKGROUP_SIZE) {
      var sum = 0.0;
      if (i < HEAD_DIM) {
        for (var r = 0u; r < n; r++) { sum += rows[r * HEAD_DIM + i]; }
      } else {
        let x = (i - HEAD_DIM) / HEAD_DIM;
        let y = i % HEAD_DIM;
        for (var r = 0u; r < n; r++) { sum += rows[r * HEAD_DIM + x] * rows[r * HEAD_DIM + y]; }
      }
      moments[out + i] += sum;
    }
    workgroupBarrier();
  }
}
