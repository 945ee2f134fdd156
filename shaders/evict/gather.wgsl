// Kept tokens of one list into fresh pages, as f16. Specification: src/kernels/gather.rs.
// Workgroup = one work item = a page of the target against one run of the source; lane = token.

struct GatherParams {
  items: u32,    // first vec4 of the work list in `step`
  n_items: u32,
  layer: u32,    // always 0: items name pages of their own layer
  angles: u32,   // first vec4 of the rotary tables in `parameters`
}

const CELLS = HEAD_DIM / 8u;

var<immediate> par: GatherParams;
@group(0) @binding(0) var<storage, read> step: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> tables: array<u32>;
@group(0) @binding(2) var<storage, read> parameters: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> kept: array<u32>;
// Both may be the same buffer, which one dispatch can only use in one way.
@group(0) @binding(4) var<storage, read_write> arena: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read_write> target_arena: array<vec4<u32>>;

fn packed(row: ptr<function, Row>, cell: u32) -> vec4<u32> {
  let at = cell * 8u;
  return vec4<u32>(
    f16_pack((*row).x[at], (*row).x[at + 1u]), f16_pack((*row).x[at + 2u], (*row).x[at + 3u]),
    f16_pack((*row).x[at + 4u], (*row).x[at + 5u]), f16_pack((*row).x[at + 6u], (*row).x[at + 7u]));
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
  let list = a.w;
  let page = tables[b.x];
  let kept_at = b.y;     // of the page's first token
  let n_kept = b.z;      // tokens of the page
  let basis = head_parameters(list);
  for (var slot = li; slot < PAGE_SIZE; slot += WORKGROUP_SIZE) {
    // Slots behind the last token repeat it, so that they change no scale.
    let origin = kept[kept_at + min(slot, n_kept - 1u)];
    if (origin < index || origin >= index + n_tokens) { continue; }
    let token = origin - index;
    let source_page = tables[source + token / PAGE_SIZE];
    var key = key_row(source_page, token % PAGE_SIZE, basis);
    if (turn.x > 0u) {
      // The angle from its position to its place in the cache, (cos, sin) per pair; `turn` counts vec4s.
      let at = turn.x + select(turn.y, turn.z, origin >= turn.w) * (HEAD_DIM / 4u);
      for (var pair = 0u; pair < HEAD_DIM / 2u; pair++) {
        let words = step[at + pair / 2u];
        let angle = bitcast<vec2<f32>>(select(words.xy, words.zw, pair % 2u == 1u));
        let x = key.x[2u * pair];
        let y = key.x[2u * pair + 1u];
        key.x[2u * pair] = x * angle.x - y * angle.y;
        key.x[2u * pair + 1u] = x * angle.y + y * angle.x;
      }
    }
    var value = value_row(source_page, token % PAGE_SIZE, basis);
    for (var cell = 0u; cell < CELLS; cell++) {
      target_arena[page + cell * PAGE_SIZE + slot] = packed(&key, cell);
      target_arena[page + CELLS * PAGE_SIZE + slot * CELLS + cell] = packed(&value, cell);
    }
  }
}
