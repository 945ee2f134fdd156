// What every reader of pages shares: cells of keys and values through their codecs, and accumulators of eight channels.
// The kernel declares `par` (with `layer` and `angles`), `arena` and `parameters`.

// Finite, so that no infinity meets a zero.
const MASKED = -1e30;

// One cell of channels for four rows (or heads) at a time.
struct Channels {
  c0: vec4<f32>, c1: vec4<f32>, c2: vec4<f32>, c3: vec4<f32>,
  c4: vec4<f32>, c5: vec4<f32>, c6: vec4<f32>, c7: vec4<f32>,
}

// Four products, each added to the last: one operation a product.
fn chain(q: vec4<f32>, k: vec4<f32>, sum: f32) -> f32 {
  return fma(q.w, k.w, fma(q.z, k.z, fma(q.y, k.y, fma(q.x, k.x, sum))));
}

fn arena_cell(at: u32) -> vec4<u32> {
  return arena[at];
}

fn arena_word(at: u32) -> u32 {
  return arena[at / 4u][at % 4u];
}

// Channels of the query that the eight slots of a cell of keys meet.
struct Slots {
  low: vec4<u32>,
  high: vec4<u32>,
}

// Lengths of a merged token's key and value in one of the two layers.
fn merged_length(page: u32, token: u32, side: u32, member: u32) -> f32 {
  let pair = unpack2x16float(arena_word(page * 4u + LENGTHS + side * PAGE_SIZE + token));
  return select(pair.x, pair.y, member == 1u);
}

fn key_slots(page: u32, cell: u32) -> Slots {
  if (KEY_PICKS) {
    let at = (page + KEY_AT) * 4u + KEY_MASK + cell * 2u;
    let shift = vec4<u32>(0u, 8u, 16u, 24u);
    return Slots(
      (vec4<u32>(arena_word(at)) >> shift) & vec4<u32>(255u), (vec4<u32>(arena_word(at + 1u)) >> shift) & vec4<u32>(255u));
  }
  let first = vec4<u32>(cell * 8u);
  return Slots(first + vec4<u32>(0u, 1u, 2u, 3u), first + vec4<u32>(4u, 5u, 6u, 7u));
}

// Cells that a key's score is summed over.
const KEY_CELLS = select(KEY_WIDTH, HEAD_DIM, KEY_LIFTS) / 8u;
const VALUE_CELLS = VALUE_WIDTH / 8u;

// First vec4 of the bases in a head's parameters, [HEAD_DIM][latents]; that of keys comes first.
const VALUE_BASIS = select(0u, HEAD_DIM * KEY_WIDTH / 4u, KEY_LIFTS);
const HEAD_PARAMETERS = VALUE_BASIS + select(0u, HEAD_DIM * VALUE_WIDTH / 4u, VALUE_LIFTS);

// `list` is that of the first layer of the work list.
fn head_parameters(list: u32) -> u32 {
  return (list + par.layer * NUM_KV_HEADS) * HEAD_PARAMETERS;
}

// Position of a key whose page keeps it: latents are turned when they are read.
fn key_position(page: u32, token: u32) -> u32 {
  return arena_word((page + KEY_AT) * 4u + KEY_MASK + token);
}

// Latents of one key.
struct Latents {
  z: array<vec4<f32>, KEY_WIDTH / 4u>,
}

fn load_latents(page: u32, token: u32) -> Latents {
  var latents: Latents;
  let row = key_codec_row(page, token, 0u);
  for (var c = 0u; c < KEY_WIDTH / 8u; c++) {
    let cell = key_codec_cell(page, token, c, row, key_codec_load(page, token, c));
    latents.z[c * 2u] = cell.low;
    latents.z[c * 2u + 1u] = cell.high;
  }
  return latents;
}

// One channel of a key before rotary positions.
fn lift_key(latents: ptr<function, Latents>, basis: u32, channel: u32) -> f32 {
  var sum = 0.0;
  for (var i = 0u; i < KEY_WIDTH / 4u; i++) {
    sum += dot((*latents).z[i], parameters[basis + channel * (KEY_WIDTH / 4u) + i]);
  }
  return sum;
}

// Cosine and sine of a rotary pair at a position: those of the page's start and of the place in it, joined.
fn angle(position: u32, pair: u32) -> vec2<f32> {
  let at = position / PAGE_SIZE * (HEAD_DIM / 2u) + pair;
  let start = parameters[par.angles + PAGE_SIZE * (HEAD_DIM / 2u) / 2u + at / 2u];
  let place_at = position % PAGE_SIZE * (HEAD_DIM / 2u) + pair;
  let place = parameters[par.angles + place_at / 2u];
  let a = select(start.xy, start.zw, at % 2u == 1u);
  let b = select(place.xy, place.zw, place_at % 2u == 1u);
  return vec2<f32>(a.x * b.x - a.y * b.y, a.y * b.x + a.x * b.y);
}

// Eight channels of a key from its latents, turned by its position.
fn lifted_cell(latents: ptr<function, Latents>, basis: u32, position: u32, cell: u32) -> Cell {
  var x: array<f32, 8>;
  for (var i = 0u; i < 4u; i++) {
    let a = lift_key(latents, basis, cell * 8u + 2u * i);
    let b = lift_key(latents, basis, cell * 8u + 2u * i + 1u);
    let turn = angle(position, cell * 4u + i);
    x[2u * i] = a * turn.x - b * turn.y;
    x[2u * i + 1u] = a * turn.y + b * turn.x;
  }
  return Cell(vec4<f32>(x[0], x[1], x[2], x[3]), vec4<f32>(x[4], x[5], x[6], x[7]));
}

// Where rotated channels change sign. Same as src/compression/hidden/rot.rs.
fn rotation_sign(channel: u32) -> f32 {
  var x = (channel + 1u) * 0x9e3779b1u;
  x ^= x >> 15u;
  return select(1.0, -1.0, (x * 0x85ebca6bu) >> 31u == 1u);
}

fn faded(acc: Channels, factor: vec4<f32>) -> Channels {
  return Channels(
    acc.c0 * factor, acc.c1 * factor, acc.c2 * factor, acc.c3 * factor,
    acc.c4 * factor, acc.c5 * factor, acc.c6 * factor, acc.c7 * factor);
}

fn weighted(acc: Channels, p: vec4<f32>, v: Cell) -> Channels {
  return Channels(
    acc.c0 + p * v.low.x, acc.c1 + p * v.low.y, acc.c2 + p * v.low.z, acc.c3 + p * v.low.w,
    acc.c4 + p * v.high.x, acc.c5 + p * v.high.y, acc.c6 + p * v.high.z, acc.c7 + p * v.high.w);
}
