// Chunked causal prefill by outer products: a tile of query rows against a run of cached tokens of one KV head.
// Specification: src/kernels/prefill.rs.
//
// Lanes are ROW_GROUPS groups of ACROSS. A group owns 8 rows throughout; in QK a lane of it owns LANE_TOKENS tokens, in PV
// LANE_VECS times four channels, ACROSS apart. Queries, keys and values pass through workgroup memory, decoded once for all rows;
// probabilities too, PART_TOKENS at a time, since scores of more tokens fit in registers than there is room for there.

const QUADS = TILE_ROWS / 4u;
const CHUNK_VECS = CHUNK_CELLS * 2u;
// Parts that a row's maximum is found in.
const FOLDS = 4u;
const ROTATED_ROWS = min(PART_TOKENS * (QUADS + 1u) / ROW_VECS, 8u);

var<workgroup> q_tile: array<array<array<vec4<f32>, 8>, ROW_GROUPS>, CHUNK_VECS>;        // four channels each
var<workgroup> k_tile: array<array<array<vec4<f32>, ACROSS>, LANE_TOKENS>, CHUNK_VECS>;  // four channels each
var<workgroup> v_tile: array<array<array<vec4<f32>, ACROSS>, LANE_VECS>, VALUE_TOKENS>;  // four channels each
// Four rows each. One more than there are, so that neighbouring tokens lie in different banks.
var<workgroup> p_tile: array<array<vec4<f32>, QUADS + 1u>, PART_TOKENS>;
var<workgroup> folded: array<array<vec4<f32>, FOLDS>, QUADS>;

fn row_vec(i: u32) -> vec4<f32> {
  return p_tile[i / (QUADS + 1u)][i % (QUADS + 1u)];
}

fn put_row_vec(i: u32, value: vec4<f32>) {
  p_tile[i / (QUADS + 1u)][i % (QUADS + 1u)] = value;
}

fn stage_queries(li: u32, tile: Tile, first: u32) {
  for (var i = li; i < TILE_ROWS * CHUNK_VECS; i += WORKGROUP_SIZE) {
    let r = i / CHUNK_VECS;
    let v = i % CHUNK_VECS;
    q_tile[v][r / 8u][r % 8u] = query(tile, r, min(first + v, ROW_VECS - 1u));
  }
}

fn put_key(place: u32, vec: u32, value: vec4<f32>) {
  k_tile[vec][place / ACROSS][place % ACROSS] = value;
}

fn put_value(place: u32, vec: u32, value: vec4<f32>) {
  v_tile[place][vec / ACROSS][vec % ACROSS] = value;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let tile = read_tile(workgroup.y * GRID_WIDTH + workgroup.x);
  if (tile.n_rows == 0u) { return; }
  if (KEY_ROTATES) { turn_queries(li, tile); }

  let rows = li / ACROSS;   // the lane's group of rows
  let x = li % ACROSS;      // its place in it
  let low_seen = vec4<u32>(
    last_seen(tile, rows * 8u), last_seen(tile, rows * 8u + 1u),
    last_seen(tile, rows * 8u + 2u), last_seen(tile, rows * 8u + 3u));
  let high_seen = vec4<u32>(
    last_seen(tile, rows * 8u + 4u), last_seen(tile, rows * 8u + 5u),
    last_seen(tile, rows * 8u + 6u), last_seen(tile, rows * 8u + 7u));
  // Maxima and sums of the eight rows; a sum is over the lane's own tokens until the end.
  var low_m = vec4<f32>(MASKED);
  var high_m = vec4<f32>(MASKED);
  var low_l = vec4<f32>(0.0);
  var high_l = vec4<f32>(0.0);
  var acc: array<vec4<f32>, 8u * LANE_VECS>;  // [vec][row]

  for (var start = 0u; start < tile.n_tokens; start += TILE_TOKENS) {
    var s: array<vec4<f32>, 2u * LANE_TOKENS>;  // [token][quad of rows]
    for (var first = 0u; first < ROW_VECS; first += CHUNK_VECS) {
      stage_queries(li, tile, first);
      stage_keys(li, tile, start, first / 2u);
      workgroupBarrier();
      for (var v = 0u; v < min(CHUNK_VECS, ROW_VECS - first); v++) {
        let q0 = q_tile[v][rows][0]; let q1 = q_tile[v][rows][1]; let q2 = q_tile[v][rows][2];
        let q3 = q_tile[v][rows][3]; let q4 = q_tile[v][rows][4]; let q5 = q_tile[v][rows][5];
        let q6 = q_tile[v][rows][6]; let q7 = q_tile[v][rows][7];
        for (var j = 0u; j < LANE_TOKENS; j++) {  // unroll
          let k = k_tile[v][j][x];
          let a = s[2u * j];
          let b = s[2u * j + 1u];
          s[2u * j] = vec4<f32>(chain(q0, k, a.x), chain(q1, k, a.y), chain(q2, k, a.z), chain(q3, k, a.w));
          s[2u * j + 1u] = vec4<f32>(chain(q4, k, b.x), chain(q5, k, b.y), chain(q6, k, b.z), chain(q7, k, b.w));
        }
      }
      workgroupBarrier();
    }
    // Maxima of the rows: each lane's, of parts of the lanes, of the parts.
    var low_top = vec4<f32>(MASKED);
    var high_top = vec4<f32>(MASKED);
    for (var j = 0u; j < LANE_TOKENS; j++) {  // unroll
      let token = start + j * ACROSS + x;
      let here = vec4<bool>(token < tile.n_tokens);
      let position = vec4<u32>(tile.first_token + token);
      s[2u * j] = select(vec4<f32>(MASKED), s[2u * j], position <= low_seen & here);
      s[2u * j + 1u] = select(vec4<f32>(MASKED), s[2u * j + 1u], position <= high_seen & here);
      low_top = max(low_top, s[2u * j]);
      high_top = max(high_top, s[2u * j + 1u]);
    }
    p_tile[x][rows * 2u] = low_top;
    p_tile[x][rows * 2u + 1u] = high_top;
    workgroupBarrier();
    for (var i = li; i < QUADS * FOLDS; i += WORKGROUP_SIZE) {
      var top = vec4<f32>(MASKED);
      for (var j = 0u; j < ACROSS / FOLDS; j++) {
        top = max(top, p_tile[i / QUADS * (ACROSS / FOLDS) + j][i % QUADS]);
      }
      folded[i % QUADS][i / QUADS] = top;
    }
    workgroupBarrier();
    low_top = low_m;
    high_top = high_m;
    for (var j = 0u; j < FOLDS; j++) {
      low_top = max(low_top, folded[rows * 2u][j]);
      high_top = max(high_top, folded[rows * 2u + 1u][j]);
    }
    let low_fade = exp2(low_m - low_top);
    let high_fade = exp2(high_m - high_top);
    low_m = low_top;
    high_m = high_top;
    low_l *= low_fade;
    high_l *= high_fade;
    for (var j = 0u; j < LANE_VECS; j++) {  // unroll
      acc[j * 8u] *= low_fade.x; acc[j * 8u + 1u] *= low_fade.y;
      acc[j * 8u + 2u] *= low_fade.z; acc[j * 8u + 3u] *= low_fade.w;
      acc[j * 8u + 4u] *= high_fade.x; acc[j * 8u + 5u] *= high_fade.y;
      acc[j * 8u + 6u] *= high_fade.z; acc[j * 8u + 7u] *= high_fade.w;
    }
    for (var part = 0u; part < PARTS; part++) {  // unroll
      let at = start + part * PART_TOKENS;
      if (at < tile.n_tokens) {
        for (var i = 0u; i < PART_LANE; i++) {  // unroll
          let low = s[2u * (part * PART_LANE + i)];
          let high = s[2u * (part * PART_LANE + i) + 1u];
          let a = select(vec4<f32>(0.0), exp2(low - low_m), low > vec4<f32>(MASKED));
          let b = select(vec4<f32>(0.0), exp2(high - high_m), high > vec4<f32>(MASKED));
          p_tile[i * ACROSS + x][rows * 2u] = a;
          p_tile[i * ACROSS + x][rows * 2u + 1u] = b;
          low_l += a;
          high_l += b;
        }
        for (var first = 0u; first < min(PART_TOKENS, tile.n_tokens - at); first += VALUE_TOKENS) {
          stage_values(li, tile, at + first);
          workgroupBarrier();
          for (var t = 0u; t < VALUE_TOKENS; t++) {
            let a = p_tile[first + t][rows * 2u];
            let b = p_tile[first + t][rows * 2u + 1u];
            for (var j = 0u; j < LANE_VECS; j++) {  // unroll
              let v = v_tile[t][j][x];
              acc[j * 8u] = fma(vec4<f32>(a.x), v, acc[j * 8u]);
              acc[j * 8u + 1u] = fma(vec4<f32>(a.y), v, acc[j * 8u + 1u]);
              acc[j * 8u + 2u] = fma(vec4<f32>(a.z), v, acc[j * 8u + 2u]);
              acc[j * 8u + 3u] = fma(vec4<f32>(a.w), v, acc[j * 8u + 3u]);
              acc[j * 8u + 4u] = fma(vec4<f32>(b.x), v, acc[j * 8u + 4u]);
              acc[j * 8u + 5u] = fma(vec4<f32>(b.y), v, acc[j * 8u + 5u]);
              acc[j * 8u + 6u] = fma(vec4<f32>(b.z), v, acc[j * 8u + 6u]);
              acc[j * 8u + 7u] = fma(vec4<f32>(b.w), v, acc[j * 8u + 7u]);
            }
          }
          workgroupBarrier();
        }
      }
    }
  }

  p_tile[x][rows * 2u] = low_l;
  p_tile[x][rows * 2u + 1u] = high_l;
  workgroupBarrier();
  if (x < 2u) {
    let m = select(low_m, high_m, x == 1u);
    var l = vec4<f32>(0.0);
    for (var i = 0u; i < ACROSS; i++) { l += p_tile[i][rows * 2u + x]; }
    for (var r = 0u; r < 4u; r++) {
      let row = rows * 8u + x * 4u + r;
      if (row < tile.n_rows) { state_ml[tile.slot + row] = vec2<f32>(m[r], l[r]); }
    }
  }
  for (var j = 0u; j < LANE_VECS; j++) {  // unroll
    let vec = j * ACROSS + x;
    for (var r = 0u; r < 8u; r++) {  // unroll
      let row = rows * 8u + r;
      if (row < tile.n_rows && vec < ROW_VECS) { state_o[(tile.slot + row) * ROW_VECS + vec] = acc[j * 8u + r]; }
    }
  }
  if (VALUE_ROTATES) { turn_outputs(li, tile); }
}
