// Scores that need no attention: from keys, and from what was gathered about queries.
// Specification: src/kernels/key_scores.rs. Workgroup = one work item = a run of tokens of one list; lane = token.

struct KeyScoreParams {
  items: u32,    // first vec4 of the work list in `step`
  n_items: u32,
  layer: u32,    // always 0: items name pages of their own layer
  angles: u32,   // first vec4 of the rotary tables in `parameters`
  mode: u32,
  skip: u32,     // first tokens of a list that EXPECTED leaves out
}

const NORM = 0u;
const ANCHOR = 1u;
const DIFFERENCE = 2u;
const EXPECTED_SUM = 3u;
const EXPECTED = 4u;
// Numbers of a list's summary: the sum of its normalised keys, or (m, l) of each query head.
const SUMMARY = max(HEAD_DIM, 2u * GROUP_SIZE);
const NEGLIGIBLE = -1e30;
// Whether cells of keys hold the channels in order.
const KEY_IN_ORDER = !(KEY_ROTATES || KEY_PICKS || KEY_LIFTS);

var<immediate> par: KeyScoreParams;
@group(0) @binding(0) var<storage, read> step: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> tables: array<u32>;
@group(0) @binding(2) var<storage, read> arena: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> parameters: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> moments: array<vec4<f32>>;  // [query head of all layers][HEAD_DIM + HEAD_DIM^2] / 4
@group(0) @binding(5) var<storage, read_write> summary: array<f32>;  // [list][SUMMARY]
@group(0) @binding(6) var<storage, read_write> scores: array<f32>;

var<workgroup> folded: array<f32, WORKGROUP_SIZE * 8u>;

fn square(row: ptr<function, Row>) -> f32 {
  var sum = 0.0;
  for (var i = 0u; i < HEAD_DIM; i++) { sum += (*row).x[i] * (*row).x[i]; }
  return sum;
}

// The square of a key, its product with a list's sum of normalised keys, and the square of that.
struct Products {
  key: f32,
  both: f32,
  anchor: f32,
}

fn summed(list: u32, channel: u32) -> vec4<f32> {
  let at = list * SUMMARY + channel;
  return vec4<f32>(summary[at], summary[at + 1u], summary[at + 2u], summary[at + 3u]);
}

fn with_quad(products: Products, key: vec4<f32>, list: u32, channel: u32) -> Products {
  var more = products;
  more.key += dot(key, key);
  if (par.mode == DIFFERENCE) {
    let anchor = summed(list, channel);
    more.both += dot(key, anchor);
    more.anchor += dot(anchor, anchor);
  }
  return more;
}

// Of keys whose cells are in order one cell after another: a whole row does not fit in registers.
fn key_products(page: u32, token: u32, basis: u32, list: u32) -> Products {
  var products: Products;
  if (KEY_IN_ORDER) {
    let row = key_codec_row(page, token, 0u);
    for (var first = 0u; first < KEY_CELLS; first += KEY_CODEC_SPAN) {
      let raw = key_codec_load(page, token, first);
      for (var cell = first; cell < min(first + KEY_CODEC_SPAN, KEY_CELLS); cell++) {
        let key = key_codec_cell(page, token, cell, row, raw);
        products = with_quad(products, key.low, list, cell * 8u);
        products = with_quad(products, key.high, list, cell * 8u + 4u);
      }
    }
    return products;
  }
  var key = key_row(page, token, basis);
  for (var i = 0u; i < HEAD_DIM / 4u; i++) { products = with_quad(products, quad(&key, i), list, i * 4u); }
  return products;
}

fn quad(row: ptr<function, Row>, at: u32) -> vec4<f32> {
  return vec4<f32>((*row).x[at * 4u], (*row).x[at * 4u + 1u], (*row).x[at * 4u + 2u], (*row).x[at * 4u + 3u]);
}

// What a query head is expected to give a key, base 2: log2 of the mean of exp over queries. In squares of four, because
// software Vulkan stops a lane's loops after 65,535 rounds in all.
fn expected_logit(key: ptr<function, Row>, head: u32) -> f32 {
  const QUADS = HEAD_DIM / 4u;
  let at = head * (QUADS + QUADS * HEAD_DIM);
  var mean = 0.0;
  var spread = 0.0;
  for (var i = 0u; i < QUADS; i++) {
    let rows = quad(key, i);
    mean += dot(moments[at + i], rows);
    var sum = vec4<f32>(0.0);
    for (var j = 0u; j < QUADS; j++) {
      let x = quad(key, j);
      let m = at + QUADS + i * HEAD_DIM + j;
      sum += vec4<f32>(
        dot(moments[m], x), dot(moments[m + QUADS], x), dot(moments[m + 2u * QUADS], x), dot(moments[m + 3u * QUADS], x));
    }
    spread += dot(sum, rows);
  }
  return (mean * inverseSqrt(f32(HEAD_DIM)) + spread * (0.5 / f32(HEAD_DIM))) * 1.4426950408889634;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let item = group.y * GRID_WIDTH + group.x;
  if (item >= par.n_items) { return; }
  let a = step[par.items + item * 2u];
  let b = step[par.items + item * 2u + 1u];
  let pages = a.x;
  let n_tokens = a.y;
  let list = a.z;
  let out = a.w;
  let begins = b.x == 1u;
  let index = b.y;     // tokens before the run in its list
  let slot = b.z;      // of the first token in its page
  let first_head = list * GROUP_SIZE;
  let basis = head_parameters(list);
  var sum: Row;
  var m: array<f32, GROUP_SIZE>;
  var l: array<f32, GROUP_SIZE>;
  for (var h = 0u; h < GROUP_SIZE; h++) { m[h] = NEGLIGIBLE; }

  for (var token = li; token < n_tokens; token += WORKGROUP_SIZE) {
    let page = tables[pages + (slot + token) / PAGE_SIZE];
    let place = (slot + token) % PAGE_SIZE;
    if (par.mode == NORM || par.mode == DIFFERENCE) {
      let products = key_products(page, place, basis, list);
      var score = -sqrt(products.key);
      if (par.mode == DIFFERENCE) { score = -products.both / sqrt(max(products.key * products.anchor, 1e-30)); }
      scores[out + token] = score;
      continue;
    }
    var key = key_row(page, place, basis);
    if (par.mode == ANCHOR) {
      let scale = 1.0 / sqrt(max(square(&key), 1e-30));
      for (var i = 0u; i < HEAD_DIM; i++) { sum.x[i] += key.x[i] * scale; }
    } else if (index + token < par.skip) {
      if (par.mode == EXPECTED) { scores[out + token] = 0.0; }
    } else if (par.mode == EXPECTED_SUM) {
      for (var h = 0u; h < GROUP_SIZE; h++) {
        let logit = expected_logit(&key, first_head + h);
        let higher = max(m[h], logit);
        l[h] = l[h] * exp2(m[h] - higher) + exp2(logit - higher);
        m[h] = higher;
      }
    } else {
      var total = 0.0;
      for (var h = 0u; h < GROUP_SIZE; h++) {
        let at = list * SUMMARY + 2u * h;
        total += exp2(expected_logit(&key, first_head + h) - summary[at]) / summary[at + 1u];
      }
      var value = value_row(page, place, basis);
      scores[out + token] = total / f32(GROUP_SIZE) * sqrt(square(&value));
    }
  }
  if (par.mode == ANCHOR) {
    for (var first = 0u; first < HEAD_DIM; first += 8u) {
      workgroupBarrier();
      for (var i = 0u; i < 8u; i++) { folded[li * 8u + i] = sum.x[first + i]; }
      workgroupBarrier();
      if (li < 8u) {
        var all = 0.0;
        for (var i = 0u; i < WORKGROUP_SIZE; i++) { all += folded[i * 8u + li]; }
        let at = list * SUMMARY + first + li;
        summary[at] = select(summary[at], 0.0, begins) + all;
      }
    }
  }
  if (par.mode == EXPECTED_SUM) {
    for (var h = 0u; h < GROUP_SIZE; h++) {
      workgroupBarrier();
      folded[li * 2u] = m[h];
      folded[li * 2u + 1u] = l[h];
      workgroupBarrier();
      if (li == 0u) {
        let at = list * SUMMARY + 2u * h;
        var top = select(summary[at], NEGLIGIBLE, begins);
        var all = select(summary[at + 1u], 0.0, begins);
        for (var i = 0u; i < WORKGROUP_SIZE; i++) {
          let higher = max(top, folded[i * 2u]);
          all = all * exp2(top - higher) + folded[i * 2u + 1u] * exp2(folded[i * 2u] - higher);
          top = higher;
        }
        summary[at] = top;
        summary[at + 1u] = all;
      }
    }
  }
}
