// Encodes full f16 pages. Specification: src/kernels/seal.rs. Workgroup = a strip of tokens or channels of one side of one page of one KV
// head: KEY_STRIPS of its keys, then VALUE_STRIPS of its values. How a side is encoded is another file, joined under the side's name:
// seal_blocks, seal_channels, seal_rotated or seal_general.

struct SealParams {
  items: u32,    // first vec4 of the work list in `step`
  n_items: u32,
  layer: u32,    // layers after the one whose pages the items name
}

struct Page {
  open: u32,            // first cell
  sealed: u32,          // first cell
  list: u32,            // of the work list's first layer
  first_position: u32,
  angles: u32,          // first vec4 of (cos, sin) of its tokens in `step`
  positions: u32,       // first word of its tokens' positions in `step`; 0 where they are consecutive
}

var<immediate> par: SealParams;
@group(0) @binding(0) var<storage, read> step: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> tables: array<u32>;
@group(0) @binding(2) var<storage, read> parameters: array<vec4<f32>>;
// Both may be the same buffer, which one dispatch can only use in one way.
@group(0) @binding(3) var<storage, read_write> open_arena: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read_write> sealed_arena: array<vec4<u32>>;

// Numbers that a side transforms.
var<workgroup> tile: array<vec4<f32>, max(max(KEY_TILE, VALUE_TILE), 1u)>;

fn arena_cell(at: u32) -> vec4<u32> {
  return sealed_arena[at];
}

fn arena_word(at: u32) -> u32 {
  return sealed_arena[at / 4u][at % 4u];
}

fn put_word(at: u32, word: u32) {
  sealed_arena[at / 4u][at % 4u] = word;
}

// A cell of an open page.
fn open_key(page: Page, token: u32, cell: u32) -> vec4<u32> {
  return open_arena[page.open + cell * PAGE_SIZE + token];
}

fn open_value(page: Page, token: u32, cell: u32) -> vec4<u32> {
  return open_arena[page.open + (PAGE_SIZE + token) * (HEAD_DIM / 8u) + cell];
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  const STRIPS = KEY_STRIPS + VALUE_STRIPS;
  let index = group.y * GRID_WIDTH + group.x;
  if (index >= par.n_items * STRIPS) { return; }
  let source = step[par.items + index / STRIPS * 2u];
  let to = step[par.items + index / STRIPS * 2u + 1u];
  let open = tables[source.x + par.layer * source.y];
  let sealed = tables[to.x + par.layer * to.y];
  let page = Page(open, sealed, source.z, source.w, to.z, to.w);
  let strip = index % STRIPS;
  if (strip < KEY_STRIPS) {
    key_seal(li, page, strip);
  } else {
    value_seal(li, page, strip - KEY_STRIPS);
  }
}
