// What the prefill kernels share: the rows that a workgroup computes. Specification: src/kernels/prefill.rs.
//
// A work item has up to ITEM_ROWS rows, (position, query head of the group) pairs; a kernel whose tiles are smaller has
// TILES workgroups per item.

const TILES = ITEM_ROWS / TILE_ROWS;

@group(0) @binding(4) var<storage, read_write> state_o: array<vec4<f32>>;

struct Tile {
  first_row: u32,    // row of the step that holds the item's first position
  row: u32,          // first row of the tile among those of the item
  n_rows: u32,       // rows of the tile
  kv_head: u32,
  pages: u32,        // entry of the run's first page
  n_tokens: u32,     // tokens of the run that the tile's last row may see
  first_token: u32,  // position of the run's first token, or one that it does not exceed
  first_index: u32,  // position of the item's first row
  slot: u32,         // attention state of the tile's first row
  list: u32,
  member: u32,
}

// Tile `place` of the dispatch. The last items of a prompt read most, so they come first. No rows where there is nothing to do.
fn read_tile(place: u32) -> Tile {
  if (place / TILES >= par.n_items) { return Tile(); }
  let item = par.n_items - 1u - place / TILES;
  let a = step[par.items + item * 3u];
  let b = step[par.items + item * 3u + 1u];
  let c = step[par.items + item * 3u + 2u];
  let row = place % TILES * TILE_ROWS;
  let item_rows = a.y * GROUP_SIZE;
  let n_rows = min(item_rows - min(row, item_rows), TILE_ROWS);
  let last_seen = b.z + (max(row + n_rows, 1u) - 1u) / GROUP_SIZE;
  let n_seen = select(0u, last_seen + 1u - b.y, last_seen >= b.y);
  return Tile(
    a.x, row, n_rows, a.z, a.w + par.layer * c.x, min(b.x, n_seen), b.y, b.z, b.w + row, c.y, c.z);
}

// Position that row `r` of the tile sees up to, its own.
fn last_seen(tile: Tile, r: u32) -> u32 {
  return tile.first_index + (tile.row + r) / GROUP_SIZE;
}

// Four channels of the query of row `r`, scaled. Rows past the tile's end repeat the last one, and are never written.
fn scaled_query(tile: Tile, r: u32, vec: u32) -> vec4<f32> {
  let row = tile.row + min(r, tile.n_rows - 1u);
  let head = tile.kv_head * GROUP_SIZE + row % GROUP_SIZE;
  return q[(tile.first_row + row / GROUP_SIZE) * (par.q_stride / 4u) + head * ROW_VECS + vec] * par.scale_log2;
}
