// New tokens' keys and values into open pages, which are f16: layout in src/compression/hidden/float16.rs.
// Specification: src/kernels/append.rs. The first `n_items` workgroups take a work item each = consecutive rows in one page of one KV
// head; each of the others turns the queries of a row.

struct AppendParams {
  items: u32,     // first vec4 of the work list in `step`
  n_items: u32,
  layer: u32,     // layers after the one whose pages the items name
  stride: u32,    // f32 values between rows
  k_offset: u32,  // f32 values before the keys in a row
  v_offset: u32,  // f32 values before the values in a row
  angles: u32,    // first vec4 of the [row][head_dim / 2] table of (cos, sin) in `step`
  n_rows: u32,    // rows whose queries are turned
}

struct Cell {
  low: vec4<f32>,
  high: vec4<f32>,
}

const CELLS = HEAD_DIM / 8u;
const QUADS = HEAD_DIM / 4u;
// Tokens that neighbouring lanes take: their cells of K are neighbours, and those of V are whole lines over the lanes beside them.
const NEAR = 4u;

var<immediate> par: AppendParams;
@group(0) @binding(0) var<storage, read> step: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> tables: array<u32>;
@group(0) @binding(2) var<storage, read_write> rows: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> arena: array<vec4<u32>>;

// Turns the pairs (x, y) and (z, w) by (cos, sin, cos, sin).
fn turned_pairs(pairs: vec4<f32>, turn: vec4<f32>) -> vec4<f32> {
  return vec4<f32>(
    pairs.x * turn.x - pairs.y * turn.y, pairs.x * turn.y + pairs.y * turn.x,
    pairs.z * turn.z - pairs.w * turn.w, pairs.z * turn.w + pairs.w * turn.z);
}

// Four channels of a head of a row, at the row's position.
fn turned(x: vec4<f32>, row: u32, quad: u32) -> vec4<f32> {
  return turned_pairs(x, bitcast<vec4<f32>>(step[par.angles + row * QUADS + quad]));
}

fn encode(cell: Cell) -> vec4<u32> {
  return vec4<u32>(
    f16_pack(cell.low.x, cell.low.y), f16_pack(cell.low.z, cell.low.w),
    f16_pack(cell.high.x, cell.high.y), f16_pack(cell.high.z, cell.high.w));
}

// Neighbouring lanes take neighbouring vec4s. All loads of a round come before its stores, because a driver must assume that they
// overlap.
fn turn_queries(row: u32, li: u32) {
  const VECS = NUM_KV_HEADS * GROUP_SIZE * QUADS;
  let first = row * (par.stride / 4u);
  for (var i = li; i < VECS; i += WORKGROUP_SIZE * QUERY_LOADS) {
    var x: array<vec4<f32>, QUERY_LOADS>;
    for (var u = 0u; u < QUERY_LOADS; u++) {  // unroll
      let at = min(i + u * WORKGROUP_SIZE, VECS - 1u);
      x[u] = turned(rows[first + at], row, at % QUADS);
    }
    for (var u = 0u; u < QUERY_LOADS; u++) {  // unroll
      let at = i + u * WORKGROUP_SIZE;
      if (at < VECS) { rows[first + at] = x[u]; }
    }
  }
}

// The token and the cell of lane `i`, which may be behind the last token.
fn token_of(i: u32) -> u32 {
  return i / (NEAR * CELLS) * NEAR + i % NEAR;
}

fn cell_of(i: u32) -> u32 {
  return i / NEAR % CELLS;
}

fn load_key(at: u32, row: u32, cell: u32) -> Cell {
  let key = Cell(rows[at], rows[at + 1u]);
  if (!TURNS) { return key; }
  return Cell(turned(key.low, row, cell * 2u), turned(key.high, row, cell * 2u + 1u));
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let index = group.y * GRID_WIDTH + group.x;
  if (index >= par.n_items + par.n_rows) { return; }
  if (index >= par.n_items) {
    if (TURNS) { turn_queries(index - par.n_items, li); }
    return;
  }
  let item = step[par.items + index * 2u];
  let place = step[par.items + index * 2u + 1u];
  let page = tables[item.w + par.layer * place.x];
  let n = (item.y + NEAR - 1u) / NEAR * NEAR * CELLS;
  for (var i = li; i < n; i += WORKGROUP_SIZE * CELL_LOADS) {
    var key: array<Cell, CELL_LOADS>;
    var value: array<Cell, CELL_LOADS>;
    for (var u = 0u; u < CELL_LOADS; u++) {  // unroll
      let row = item.x + min(token_of(i + u * WORKGROUP_SIZE), item.y - 1u);
      let cell = cell_of(i + u * WORKGROUP_SIZE);
      let at = (row * par.stride + item.z * HEAD_DIM + cell * 8u) / 4u;
      key[u] = load_key(at + par.k_offset / 4u, row, cell);
      value[u] = Cell(rows[at + par.v_offset / 4u], rows[at + par.v_offset / 4u + 1u]);
    }
    for (var u = 0u; u < CELL_LOADS; u++) {  // unroll
      let token = token_of(i + u * WORKGROUP_SIZE);
      let cell = cell_of(i + u * WORKGROUP_SIZE);
      if (token < item.y) {
        arena[page + cell * PAGE_SIZE + place.y + token] = encode(key[u]);
        arena[page + (PAGE_SIZE + place.y + token) * CELLS + cell] = encode(value[u]);
      }
    }
  }
}
