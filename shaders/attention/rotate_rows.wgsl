// Random rotations of ROTATED_ROWS rows of channels in workgroup memory: signs, then a Hadamard transform of SPAN channels, twice where
// the width is no power of two. Definition: src/compression/hidden/rot.rs. The kernel declares ROTATED_ROWS, and `row_vec`
// and `put_row_vec`: four channels, by `row * ROW_VECS + channel / 4`.

const ROW_VECS = HEAD_DIM / 4u;

// The first two strides lie inside a vec4.
fn hadamard(li: u32, first: u32) {
  const VECS = max(SPAN / 4u, 1u);
  for (var i = li; i < ROTATED_ROWS * VECS; i += WORKGROUP_SIZE) {
    let at = i / VECS * ROW_VECS + first / 4u + i % VECS;
    let x = row_vec(at);
    let y = vec4<f32>(x.x + x.y, x.x - x.y, x.z + x.w, x.z - x.w);
    put_row_vec(at, vec4<f32>(y.x + y.z, y.y + y.w, y.x - y.z, y.y - y.w));
  }
  workgroupBarrier();
  for (var stride = 1u; stride < VECS; stride *= 2u) {
    for (var i = li; i < ROTATED_ROWS * (VECS / 2u); i += WORKGROUP_SIZE) {
      let pair = i % (VECS / 2u);
      let low = i / (VECS / 2u) * ROW_VECS + first / 4u + pair / stride * 2u * stride + pair % stride;
      let a = row_vec(low);
      let b = row_vec(low + stride);
      put_row_vec(low, a + b);
      put_row_vec(low + stride, a - b);
    }
    workgroupBarrier();
  }
  for (var i = li; i < ROTATED_ROWS * VECS; i += WORKGROUP_SIZE) {
    let at = i / VECS * ROW_VECS + first / 4u + i % VECS;
    put_row_vec(at, row_vec(at) * NORMALISATION);
  }
  workgroupBarrier();
}

fn turn_signs(li: u32) {
  for (var i = li; i < ROTATED_ROWS * ROW_VECS; i += WORKGROUP_SIZE) {
    let c = i % ROW_VECS * 4u;
    let signs = vec4<f32>(rotation_sign(c), rotation_sign(c + 1u), rotation_sign(c + 2u), rotation_sign(c + 3u));
    put_row_vec(i, row_vec(i) * signs);
  }
  workgroupBarrier();
}

fn rotate(li: u32) {
  turn_signs(li);
  hadamard(li, 0u);
  if (SPAN < HEAD_DIM) { hadamard(li, HEAD_DIM - SPAN); }
}

fn rotate_back(li: u32) {
  if (SPAN < HEAD_DIM) { hadamard(li, HEAD_DIM - SPAN); }
  hadamard(li, 0u);
  turn_signs(li);
}
