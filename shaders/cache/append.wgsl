// New tokens' keys and values into open pages, which are f16: layout in src/compression/hidden/float16.rs.
// Specification: src/kernels/append.rs. The first `n_rows` workgroups turn the queries of a row each; each of the others takes a
// work item = consecutive rows in one page of one KV head. Lane = one cell of one row.

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

// A cell of a head of a row, which begins at a vec4, at the row's position.
fn turned(at: u32, row: u32, cell: u32) -> Cell {
  let turn = par.angles + row * (HEAD_DIM / 4u) + cell * 2u;
  return Cell(
    turned_pairs(rows[at], bitcast<vec4<f32>>(step[turn])),
    turned_pairs(rows[at + 1u], bitcast<vec4<f32>>(step[turn + 1u])));
}

fn encode(cell: Cell) -> vec4<u32> {
  return vec4<u32>(
    f16_pack(cell.low.x, cell.low.y), f16_pack(cell.low.z, cell.low.w),
    f16_pack(cell.high.x, cell.high.y), f16_pack(cell.high.z, cell.high.w));
}

fn turn_queries(row: u32, li: u32) {
  for (var i = li; i < NUM_KV_HEADS * GROUP_SIZE * CELLS; i += WORKGROUP_SIZE) {
    let at = row * (par.stride / 4u) + i * 2u;
    let cell = turned(at, row, i % CELLS);
    rows[at] = cell.low;
    rows[at + 1u] = cell.high;
  }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let index = group.y * GRID_WIDTH + group.x;
  if (index >= par.n_rows + par.n_items) { return; }
  if (TURNS && index < par.n_rows) {
    turn_queries(index, li);
    return;
  }
  let item = step[par.items + (index - par.n_rows) * 2u];
  let place = step[par.items + (index - par.n_rows) * 2u + 1u];
  let page = tables[item.w + par.layer * place.x];
  for (var i = li; i < item.y * CELLS; i += WORKGROUP_SIZE) {
    let row = item.x + i / CELLS;
    let cell = i % CELLS;
    let token = place.y + i / CELLS;
    let at = (row * par.stride + item.z * HEAD_DIM + cell * 8u) / 4u;
    let k = at + par.k_offset / 4u;
    let v = at + par.v_offset / 4u;
    var key = Cell(rows[k], rows[k + 1u]);
    if (TURNS) { key = turned(k, row, cell); }
    arena[page + cell * PAGE_SIZE + token] = encode(key);
    arena[page + CELLS * PAGE_SIZE + token * CELLS + cell] = encode(Cell(rows[v], rows[v + 1u]));
  }
}
