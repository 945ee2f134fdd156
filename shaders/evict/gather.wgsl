// Kept tokens of one list into fresh pages, as f16. Specification: src/kernels/gather.rs.
// Workgroup = one work item = a page of the target against one run of the source; lane = cells of 8 channels.

struct GatherParams {
  items: u32,    // first vec4 of the work list in `step`
  n_items: u32,
  layer: u32,    // always 0: items name pages of their own layer
  angles: u32,   // first vec4 of the rotary tables in `parameters`
}

const CELLS = HEAD_DIM / 8u;
const PAGE_CELLS = PAGE_SIZE * CELLS;  // of one side
const ROTATED_ROWS = 16u;
const KEY_BLOCKS = (CELLS + KEY_CODEC_SPAN - 1u) / KEY_CODEC_SPAN;
// Sides whose cells hold the channels in order.
const KEY_IN_ORDER = !(KEY_ROTATES || KEY_PICKS || KEY_LIFTS);
const VALUE_IN_ORDER = !(VALUE_ROTATES || VALUE_LIFTS);
// Of these, those that are f16 already.
const KEY_COPIES = KEY_IN_ORDER && KEY_CODEC_PLANES[0] == 16u;
const VALUE_COPIES = VALUE_IN_ORDER && VALUE_CODEC_PLANES[0] == 16u;

// Where a token of the page comes from.
struct Origin {
  page: u32,    // first cell of its page
  token: u32,   // its place there
  turn: u32,    // first vec4 in `step` of the angles by which its key is turned
  is_here: u32, // 1: of this run
}

var<immediate> par: GatherParams;
@group(0) @binding(0) var<storage, read> step: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> tables: array<u32>;
@group(0) @binding(2) var<storage, read> parameters: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> kept: array<u32>;
// Both may be the same buffer, which one dispatch can only use in one way.
@group(0) @binding(4) var<storage, read_write> arena: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read_write> target_arena: array<vec4<u32>>;

var<workgroup> origins: array<Origin, PAGE_SIZE>;
var<workgroup> rotated: array<vec4<f32>, ROTATED_ROWS * HEAD_DIM / 4u>;  // [row][channel / 4]

fn row_vec(i: u32) -> vec4<f32> {
  return rotated[i];
}

fn put_row_vec(i: u32, value: vec4<f32>) {
  rotated[i] = value;
}

// Where a cell of an f16 page lies.
fn key_cell_at(origin: Origin, cell: u32) -> u32 {
  return origin.page + KEY_AT + cell * PAGE_SIZE + origin.token;
}

fn value_cell_at(origin: Origin, cell: u32) -> u32 {
  return origin.page + VALUE_AT + origin.token * CELLS + cell;
}

fn packed(cell: Cell) -> vec4<u32> {
  return vec4<u32>(
    f16_pack(cell.low.x, cell.low.y), f16_pack(cell.low.z, cell.low.w),
    f16_pack(cell.high.x, cell.high.y), f16_pack(cell.high.z, cell.high.w));
}

fn row_cell(row: ptr<function, Row>, cell: u32) -> Cell {
  let at = cell * 8u;
  return Cell(
    vec4<f32>((*row).x[at], (*row).x[at + 1u], (*row).x[at + 2u], (*row).x[at + 3u]),
    vec4<f32>((*row).x[at + 4u], (*row).x[at + 5u], (*row).x[at + 6u], (*row).x[at + 7u]));
}

// Two rotary pairs turned by two angles, (cos, sin) each.
fn turned(x: vec4<f32>, angles: vec4<u32>) -> vec4<f32> {
  let a = bitcast<vec4<f32>>(angles);
  return vec4<f32>(x.x * a.x - x.y * a.y, x.x * a.y + x.y * a.x, x.z * a.z - x.w * a.w, x.z * a.w + x.w * a.z);
}

// Writes eight channels of the key of a slot, in its place in the cache where `turns`.
fn put_key(page: u32, slot: u32, cell: u32, key: Cell, turns: bool) {
  var k = key;
  if (turns) {
    let at = origins[slot].turn + cell * 2u;
    k = Cell(turned(k.low, step[at]), turned(k.high, step[at + 1u]));
  }
  target_arena[page + cell * PAGE_SIZE + slot] = packed(k);
}

fn put_value(page: u32, slot: u32, cell: u32, value: Cell) {
  target_arena[page + PAGE_CELLS + slot * CELLS + cell] = packed(value);
}

// Keys that are f16 already: whole cells, lanes on neighbouring tokens. Where all tokens are of this run nothing is asked of single
// ones, because compilers move a load behind the question whether it is stored, and then wait for one after another. Cells past the
// last repeat it.
fn copy_keys(li: u32, page: u32, is_whole: bool) {
  if (!is_whole) {
    for (var i = li; i < PAGE_CELLS; i += WORKGROUP_SIZE) {
      let origin = origins[i % PAGE_SIZE];
      if (origin.is_here == 1u) { target_arena[page + i] = arena_cell(key_cell_at(origin, i / PAGE_SIZE)); }
    }
    return;
  }
  for (var first = li; first < PAGE_CELLS; first += WORKGROUP_SIZE * LOADS) {
    var cells: array<vec4<u32>, LOADS>;
    for (var u = 0u; u < LOADS; u++) {  // unroll
      let i = min(first + u * WORKGROUP_SIZE, PAGE_CELLS - 1u);
      cells[u] = arena_cell(key_cell_at(origins[i % PAGE_SIZE], i / PAGE_SIZE));
    }
    for (var u = 0u; u < LOADS; u++) {  // unroll
      target_arena[page + min(first + u * WORKGROUP_SIZE, PAGE_CELLS - 1u)] = cells[u];
    }
  }
}

// The same of values, lanes on neighbouring cells.
fn copy_values(li: u32, page: u32, is_whole: bool) {
  if (!is_whole) {
    for (var i = li; i < PAGE_CELLS; i += WORKGROUP_SIZE) {
      let origin = origins[i / CELLS];
      if (origin.is_here == 1u) { target_arena[page + PAGE_CELLS + i] = arena_cell(value_cell_at(origin, i % CELLS)); }
    }
    return;
  }
  for (var first = li; first < PAGE_CELLS; first += WORKGROUP_SIZE * LOADS) {
    var cells: array<vec4<u32>, LOADS>;
    for (var u = 0u; u < LOADS; u++) {  // unroll
      let i = min(first + u * WORKGROUP_SIZE, PAGE_CELLS - 1u);
      cells[u] = arena_cell(value_cell_at(origins[i / CELLS], i % CELLS));
    }
    for (var u = 0u; u < LOADS; u++) {  // unroll
      target_arena[page + PAGE_CELLS + min(first + u * WORKGROUP_SIZE, PAGE_CELLS - 1u)] = cells[u];
    }
  }
}

// Keys through their codec: a lane decodes the cells of one load.
fn decode_keys(li: u32, page: u32, turns: bool) {
  for (var i = li; i < PAGE_SIZE * KEY_BLOCKS; i += WORKGROUP_SIZE) {
    let slot = i % PAGE_SIZE;
    let first = i / PAGE_SIZE * KEY_CODEC_SPAN;
    let origin = origins[slot];
    if (origin.is_here == 1u) {
      let row = key_codec_row(origin.page, origin.token, first);
      let raw = key_codec_load(origin.page, origin.token, first);
      for (var u = 0u; u < KEY_CODEC_SPAN; u++) {
        if (first + u < CELLS) {
          put_key(page, slot, first + u, key_codec_cell(origin.page, origin.token, first + u, row, raw), turns);
        }
      }
    }
  }
}

fn decoded_value(origin: Origin, cell: u32) -> Cell {
  let row = value_codec_row(origin.page, origin.token, cell);
  return value_codec_cell(origin.page, origin.token, cell, row, value_codec_load(origin.page, origin.token, cell));
}

// Values through their codec: a lane decodes a cell of one token, of a load that holds several.
fn decode_values(li: u32, page: u32, is_whole: bool) {
  if (!is_whole) {
    for (var i = li; i < PAGE_CELLS; i += WORKGROUP_SIZE) {
      let origin = origins[i / CELLS];
      if (origin.is_here == 1u) { put_value(page, i / CELLS, i % CELLS, decoded_value(origin, i % CELLS)); }
    }
    return;
  }
  for (var first = li; first < PAGE_CELLS; first += WORKGROUP_SIZE * LOADS) {
    var rows: array<ValueCodecRow, LOADS>;
    var raws: array<ValueCodecRaw, LOADS>;
    for (var u = 0u; u < LOADS; u++) {  // unroll
      let i = min(first + u * WORKGROUP_SIZE, PAGE_CELLS - 1u);
      let origin = origins[i / CELLS];
      rows[u] = value_codec_row(origin.page, origin.token, i % CELLS);
      raws[u] = value_codec_load(origin.page, origin.token, i % CELLS);
    }
    for (var u = 0u; u < LOADS; u++) {  // unroll
      let i = min(first + u * WORKGROUP_SIZE, PAGE_CELLS - 1u);
      let origin = origins[i / CELLS];
      put_value(page, i / CELLS, i % CELLS, value_codec_cell(origin.page, origin.token, i % CELLS, rows[u], raws[u]));
    }
  }
}

// Keys whose channels are rotated, some rows at a time through workgroup memory.
fn rotated_keys(li: u32, page: u32, turns: bool) {
  for (var first = 0u; first < PAGE_SIZE; first += ROTATED_ROWS) {
    for (var i = li; i < ROTATED_ROWS * CELLS; i += WORKGROUP_SIZE) {
      let place = i % ROTATED_ROWS;
      let cell = i / ROTATED_ROWS;
      let origin = origins[first + place];
      let row = key_codec_row(origin.page, origin.token, cell);
      let raw = key_codec_load(origin.page, origin.token, cell);
      let k = key_codec_cell(origin.page, origin.token, cell, row, raw);
      rotated[place * ROW_VECS + cell * 2u] = k.low;
      rotated[place * ROW_VECS + cell * 2u + 1u] = k.high;
    }
    workgroupBarrier();
    rotate_back(li);
    for (var i = li; i < ROTATED_ROWS * CELLS; i += WORKGROUP_SIZE) {
      let place = i % ROTATED_ROWS;
      let at = place * ROW_VECS + i / ROTATED_ROWS * 2u;
      if (origins[first + place].is_here == 1u) {
        put_key(page, first + place, i / ROTATED_ROWS, Cell(rotated[at], rotated[at + 1u]), turns);
      }
    }
    workgroupBarrier();
  }
}

fn rotated_values(li: u32, page: u32) {
  for (var first = 0u; first < PAGE_SIZE; first += ROTATED_ROWS) {
    for (var i = li; i < ROTATED_ROWS * CELLS; i += WORKGROUP_SIZE) {
      let origin = origins[first + i / CELLS];
      let cell = i % CELLS;
      let v = decoded_value(origin, cell);
      rotated[i * 2u] = v.low;
      rotated[i * 2u + 1u] = v.high;
    }
    workgroupBarrier();
    rotate_back(li);
    for (var i = li; i < ROTATED_ROWS * CELLS; i += WORKGROUP_SIZE) {
      if (origins[first + i / CELLS].is_here == 1u) {
        put_value(page, first + i / CELLS, i % CELLS, Cell(rotated[i * 2u], rotated[i * 2u + 1u]));
      }
    }
    workgroupBarrier();
  }
}

// Keys that are picked channels or latents: a lane has a whole row.
fn whole_keys(li: u32, page: u32, basis: u32, turns: bool) {
  for (var slot = li; slot < PAGE_SIZE; slot += WORKGROUP_SIZE) {
    let origin = origins[slot];
    if (origin.is_here == 1u) {
      var key = key_row(origin.page, origin.token, basis);
      for (var cell = 0u; cell < CELLS; cell++) { put_key(page, slot, cell, row_cell(&key, cell), turns); }
    }
  }
}

fn whole_values(li: u32, page: u32, basis: u32) {
  for (var slot = li; slot < PAGE_SIZE; slot += WORKGROUP_SIZE) {
    let origin = origins[slot];
    if (origin.is_here == 1u) {
      var value = value_row(origin.page, origin.token, basis);
      for (var cell = 0u; cell < CELLS; cell++) { put_value(page, slot, cell, row_cell(&value, cell)); }
    }
  }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let item = group.y * GRID_WIDTH + group.x;
  if (item >= par.n_items) { return; }
  let a = step[par.items + item * 3u];
  let b = step[par.items + item * 3u + 1u];
  let turn = step[par.items + item * 3u + 2u];
  let source = a.x;      // table entry of the run's first page
  let index = a.y;       // tokens before the run in its list
  let n_tokens = a.z;
  let page = tables[b.x];
  let kept_at = b.y;     // of the page's first token
  let n_kept = b.z;      // tokens of the page
  let turns = turn.x > 0u;
  for (var slot = li; slot < PAGE_SIZE; slot += WORKGROUP_SIZE) {
    // Slots behind the last token repeat it, so that they change no scale.
    let at = kept[kept_at + min(slot, n_kept - 1u)];
    let is_here = at >= index && at < index + n_tokens;
    // Tokens of other runs stand for the first of this one, so that what is loaded lies in its pages.
    let token = select(0u, at - index, is_here);
    let angles = turn.x + select(turn.y, turn.z, at >= turn.w) * (HEAD_DIM / 4u);
    origins[slot] = Origin(tables[source + token / PAGE_SIZE], token % PAGE_SIZE, angles, select(0u, 1u, is_here));
  }
  workgroupBarrier();
  // Indices ascend.
  let is_whole = kept[kept_at] >= index && kept[kept_at + n_kept - 1u] < index + n_tokens;
  let basis = head_parameters(a.w);
  if (KEY_COPIES && !turns) {
    copy_keys(li, page, is_whole);
  } else if (KEY_IN_ORDER) {
    decode_keys(li, page, turns);
  } else if (KEY_ROTATES) {
    rotated_keys(li, page, turns);
  } else {
    whole_keys(li, page, basis, turns);
  }
  if (VALUE_COPIES) {
    copy_values(li, page, is_whole);
  } else if (VALUE_IN_ORDER) {
    decode_values(li, page, is_whole);
  } else if (VALUE_ROTATES) {
    rotated_values(li, page);
  } else {
    whole_values(li, page, basis);
  }
}
