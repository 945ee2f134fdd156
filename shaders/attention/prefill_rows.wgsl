// Rows of a tile whose rotated channels are made before the first token and undone after the last, in the tile's own
// output slots: workgroup memory holds ROTATED_ROWS rows at a time. See rotate_rows.wgsl for what the kernel declares.

// Four channels of a query as the keys have them.
fn query(tile: Tile, r: u32, vec: u32) -> vec4<f32> {
  if (!KEY_ROTATES) { return scaled_query(tile, r, vec); }
  return state_o[(tile.slot + min(r, tile.n_rows - 1u)) * ROW_VECS + vec];
}

// Turns the queries, which stay in the output slots until these are needed.
fn turn_queries(li: u32, tile: Tile) {
  for (var first = 0u; first < tile.n_rows; first += ROTATED_ROWS) {
    for (var i = li; i < ROTATED_ROWS * ROW_VECS; i += WORKGROUP_SIZE) {
      put_row_vec(i, scaled_query(tile, first + i / ROW_VECS, i % ROW_VECS));
    }
    workgroupBarrier();
    rotate(li);
    put_rows(li, tile, first);
  }
  storageBarrier();
}

// Turns the outputs back, in place.
fn turn_outputs(li: u32, tile: Tile) {
  storageBarrier();
  for (var first = 0u; first < tile.n_rows; first += ROTATED_ROWS) {
    for (var i = li; i < ROTATED_ROWS * ROW_VECS; i += WORKGROUP_SIZE) {
      let r = min(first + i / ROW_VECS, tile.n_rows - 1u);
      put_row_vec(i, state_o[(tile.slot + r) * ROW_VECS + i % ROW_VECS]);
    }
    workgroupBarrier();
    rotate_back(li);
    put_rows(li, tile, first);
  }
}

fn put_rows(li: u32, tile: Tile, first: u32) {
  let n = min(ROTATED_ROWS, tile.n_rows - first) * ROW_VECS;
  for (var i = li; i < n; i += WORKGROUP_SIZE) { state_o[(tile.slot + first) * ROW_VECS + i] = row_vec(i); }
  workgroupBarrier();
}
