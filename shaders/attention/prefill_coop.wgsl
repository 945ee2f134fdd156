// Chunked causal prefill on cooperative matrices: f16 operands, f32 sums. Specification: src/kernels/prefill_coop.rs.
//
// Four subgroups of 16 rows each. Scores and what a tile of tokens adds to the outputs leave the matrices through workgroup memory;
// there two lanes share a row, and keep its maximum, its sum and its outputs in registers. Control flow is the same in
// all lanes, which cooperative operations demand.

enable f16;
enable wgpu_cooperative_matrix;

// Rows of workgroup memory are 16 bytes longer than they need to be, so that neighbouring ones lie in different banks.
const KV_STRIDE = ROW_VECS + 2u;                              // vec4<f16>
const S_STRIDE = max(TILE_TOKENS, SLICE_BLOCKS * 16u) / 4u + 1u;  // vec4<f32>
const P_STRIDE = TILE_TOKENS / 4u + 2u;                        // vec4<f16>
const CHUNK_CELLS = HEAD_DIM / 8u;
const VALUE_TOKENS = TILE_TOKENS;
const ROTATED_ROWS = min(TILE_ROWS * S_STRIDE / ROW_VECS, 8u);

var<workgroup> kv_tile: array<vec4<f16>, max(TILE_TOKENS, TILE_ROWS) * KV_STRIDE>;  // queries, then keys and values in turn
var<workgroup> s_tile: array<vec4<f32>, TILE_ROWS * S_STRIDE>;  // scores, then slices of the outputs
var<workgroup> p_tile: array<vec4<f16>, TILE_ROWS * P_STRIDE>;

fn row_vec(i: u32) -> vec4<f32> {
  return s_tile[i];
}

fn put_row_vec(i: u32, value: vec4<f32>) {
  s_tile[i] = value;
}

fn put_key(place: u32, vec: u32, value: vec4<f32>) {
  kv_tile[place * KV_STRIDE + vec] = vec4<f16>(value);
}

fn put_value(place: u32, vec: u32, value: vec4<f32>) {
  kv_tile[place * KV_STRIDE + vec] = vec4<f16>(value);
}

// Four scores of a row from token `token` of the run on.
fn masked(at: u32, tile: Tile, token: u32, seen: u32) -> vec4<f32> {
  let tokens = vec4<u32>(token) + vec4<u32>(0u, 1u, 2u, 3u);
  let visible = (vec4<u32>(tile.first_token) + tokens <= vec4<u32>(seen)) & (tokens < vec4<u32>(tile.n_tokens));
  return select(vec4<f32>(MASKED), s_tile[at], visible);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(local_invocation_index) li: u32,
  @builtin(subgroup_id) subgroup: u32,
) {
  let tile = read_tile(workgroup.y * GRID_WIDTH + workgroup.x);
  // No lane may leave before the last cooperative operation: a tile without rows has no tokens and writes nothing.
  if (KEY_ROTATES) { turn_queries(li, tile); }
  for (var i = li; i < TILE_ROWS * ROW_VECS; i += WORKGROUP_SIZE) {
    kv_tile[i / ROW_VECS * KV_STRIDE + i % ROW_VECS] = vec4<f16>(query(tile, i / ROW_VECS, i % ROW_VECS));
  }
  workgroupBarrier();
  let kv_rows = subgroup * 16u * KV_STRIDE;
  let s_rows = subgroup * 16u * S_STRIDE;
  let p_rows = subgroup * 16u * P_STRIDE;
  let kv_stride = KV_STRIDE;
  let s_stride = S_STRIDE;
  let p_stride = P_STRIDE;
  var q_part: array<coop_mat16x16<f16, A>, HEAD_BLOCKS>;
  for (var k = 0u; k < HEAD_BLOCKS; k++) {  // unroll
    q_part[k] = coopLoadT<coop_mat16x16<f16, A>>(&kv_tile[kv_rows + k * 4u], kv_stride);
  }
  workgroupBarrier();

  let r = li % TILE_ROWS;
  let side = li / TILE_ROWS;  // which half of the row's tokens and channels
  let seen = last_seen(tile, r);
  var m = MASKED;
  var l = 0.0;
  var o: array<vec4<f32>, SLICES * LANE_VECS>;

  for (var start = 0u; start < tile.n_tokens; start += TILE_TOKENS) {
    stage_keys(li, tile, start, 0u);
    workgroupBarrier();
    for (var n = 0u; n < TOKEN_BLOCKS; n++) {  // unroll
      var sum = coop_mat16x16<f32, C>();
      for (var k = 0u; k < HEAD_BLOCKS; k++) {  // unroll
        let keys = coopLoad<coop_mat16x16<f16, B>>(&kv_tile[n * 16u * KV_STRIDE + k * 4u], kv_stride);
        sum = coopMultiplyAdd(q_part[k], keys, sum);
      }
      let scores = sum;
      let at = s_rows + n * 4u;
      coopStoreT(scores, &s_tile[at], s_stride);
    }
    workgroupBarrier();

    stage_values(li, tile, start);
    var s: array<vec4<f32>, LANE_QUADS>;
    var tops = vec4<f32>(m);
    for (var i = 0u; i < LANE_QUADS; i++) {  // unroll
      let mine = side * LANE_QUADS + i;
      let other = (1u - side) * LANE_QUADS + i;
      s[i] = masked(r * S_STRIDE + mine, tile, start + mine * 4u, seen);
      tops = max(tops, max(s[i], masked(r * S_STRIDE + other, tile, start + other * 4u, seen)));
    }
    let top = max(max(tops.x, tops.y), max(tops.z, tops.w));
    let fade = exp2(m - top);
    m = top;
    l *= fade;
    for (var i = 0u; i < LANE_QUADS; i++) {  // unroll
      let p = select(vec4<f32>(0.0), exp2(s[i] - top), s[i] > vec4<f32>(MASKED));
      l += (p.x + p.y) + (p.z + p.w);
      p_tile[r * P_STRIDE + side * LANE_QUADS + i] = vec4<f16>(p);
    }
    workgroupBarrier();

    var p_part: array<coop_mat16x16<f16, A>, TOKEN_BLOCKS>;
    for (var k = 0u; k < TOKEN_BLOCKS; k++) {  // unroll
      p_part[k] = coopLoadT<coop_mat16x16<f16, A>>(&p_tile[p_rows + k * 4u], p_stride);
    }
    for (var slice = 0u; slice < SLICES; slice++) {  // unroll
      for (var n = 0u; n < SLICE_BLOCKS; n++) {  // unroll
        var sum = coop_mat16x16<f32, C>();
        for (var k = 0u; k < TOKEN_BLOCKS; k++) {  // unroll
          let values = coopLoadT<coop_mat16x16<f16, B>>(
            &kv_tile[k * 16u * KV_STRIDE + (slice * SLICE_BLOCKS + n) * 4u], kv_stride);
          sum = coopMultiplyAdd(p_part[k], values, sum);
        }
        let outputs = sum;
        let at = s_rows + n * 4u;
        coopStoreT(outputs, &s_tile[at], s_stride);
      }
      workgroupBarrier();
      for (var i = 0u; i < LANE_VECS; i++) {  // unroll
        let at = slice * LANE_VECS + i;
        o[at] = fma(o[at], vec4<f32>(fade), s_tile[r * S_STRIDE + side * LANE_VECS + i]);
      }
      workgroupBarrier();
    }
  }

  s_tile[r * S_STRIDE + side] = vec4<f32>(l);
  workgroupBarrier();
  if (r < tile.n_rows) {
    if (side == 0u) { state_ml[tile.slot + r] = vec2<f32>(m, s_tile[r * S_STRIDE].x + s_tile[r * S_STRIDE + 1u].x); }
    for (var slice = 0u; slice < SLICES; slice++) {  // unroll
      for (var i = 0u; i < LANE_VECS; i++) {  // unroll
        let vec = slice * SLICE_BLOCKS * 4u + side * LANE_VECS + i;
        state_o[(tile.slot + r) * ROW_VECS + vec] = o[slice * LANE_VECS + i];
      }
    }
  }
  if (VALUE_ROTATES) { turn_outputs(li, tile); }
}
