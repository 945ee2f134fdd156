// Attention that tokens receive from rows of the step, from queries and their log-sum-exp.
// Specification: src/kernels/score.rs. Workgroup = one work item = a run of tokens of one KV head.
//
// (row, query head) pairs pass in tiles. Lanes are PAIR_GROUPS groups of ACROSS: a group owns 8 pairs of a tile, a lane of it 8 tokens
// of TILE_TOKENS. Queries and keys pass through workgroup memory CHUNK_CELLS cells at a time, keys decoded once for a tile.

const HEAD_VECS = HEAD_DIM / 4u;
const CHUNK_VECS = CHUNK_CELLS * 2u;
const TILE_PAIRS = PAIR_GROUPS * 8u;
const ACROSS = TILE_TOKENS / 8u;

// Four channels of the queries of a tile, and 16 bytes by which neighbouring channels lie in different banks.
struct QueryVecs {
  groups: array<array<vec4<f32>, 8>, PAIR_GROUPS>,
  unused: vec4<f32>,
}

var<workgroup> q_tile: array<QueryVecs, CHUNK_VECS>;
var<workgroup> k_tile: array<array<array<vec4<f32>, ACROSS>, 8>, CHUNK_VECS>;  // four channels each
var<workgroup> lse_tile: array<vec4<f32>, TILE_PAIRS / 4u>;
var<workgroup> totals: array<array<f32, TILE_TOKENS>, PAIR_GROUPS>;

// What is read, and which pairs read it.
struct Tile {
  pages: u32,     // entry of the run's first page
  n_tokens: u32,  // tokens of the run
  member: u32,    // merged layers are not scored
  first_row: u32,
  n_pairs: u32,
  kv_head: u32,
}

fn put_key(place: u32, vec: u32, value: vec4<f32>) {
  k_tile[vec][place / ACROSS][place % ACROSS] = value;
}

// Row of the step and query head of a pair; pairs past the last repeat it.
fn row_and_head(tile: Tile, pair: u32) -> vec2<u32> {
  let place = min(pair, tile.n_pairs - 1u);
  return vec2<u32>(tile.first_row + place / GROUP_SIZE, tile.kv_head * GROUP_SIZE + place % GROUP_SIZE);
}

fn stage_queries(li: u32, tile: Tile, first_pair: u32, first_vec: u32) {
  for (var i = li; i < TILE_PAIRS * CHUNK_VECS; i += WORKGROUP_SIZE) {
    let pair = i / CHUNK_VECS;
    let at = row_and_head(tile, first_pair + pair);
    let vec = min(first_vec + i % CHUNK_VECS, HEAD_VECS - 1u);
    q_tile[i % CHUNK_VECS].groups[pair / 8u][pair % 8u] =
      q[at.x * (par.q_stride / 4u) + at.y * HEAD_VECS + vec] * par.scale_log2;
  }
}

fn stage_lse(li: u32, tile: Tile, first_pair: u32) {
  for (var i = li; i < TILE_PAIRS / 4u; i += WORKGROUP_SIZE) {
    var of_quad: vec4<f32>;
    for (var c = 0u; c < 4u; c++) {  // unroll
      let at = row_and_head(tile, first_pair + i * 4u + c);
      of_quad[c] = lse[at.x * (NUM_KV_HEADS * GROUP_SIZE) + at.y];
    }
    lse_tile[i] = of_quad;
  }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let item = group.y * GRID_WIDTH + group.x;
  if (item >= par.n_items) { return; }
  let a = step[par.items + item * 3u];
  let b = step[par.items + item * 3u + 1u];
  let c = step[par.items + item * 3u + 2u];
  let tile = Tile(a.w + par.layer * c.x, b.x, 0u, a.x, a.y * GROUP_SIZE, a.z);
  let pairs = li / ACROSS;  // the lane's group of pairs
  let x = li % ACROSS;      // its place in it
  for (var start = 0u; start < tile.n_tokens; start += TILE_TOKENS) {
    var total: array<f32, 8>;  // of the lane's tokens over its pairs
    for (var j = 0u; j < 8u; j++) { total[j] = 0.0; }  // unroll
    for (var first = 0u; first < tile.n_pairs; first += TILE_PAIRS) {
      let mine = first + pairs * 8u;
      var s: array<vec4<f32>, 16>;  // [token][half of the pairs]
      stage_lse(li, tile, first);
      for (var v0 = 0u; v0 < HEAD_VECS; v0 += CHUNK_VECS) {
        stage_queries(li, tile, first, v0);
        stage_keys(li, tile, start, v0 / 2u);
        workgroupBarrier();
        // One row has few pairs: groups without any do nothing.
        if (mine < tile.n_pairs) {
          for (var v = 0u; v < min(CHUNK_VECS, HEAD_VECS - v0); v++) {
            let q0 = q_tile[v].groups[pairs][0]; let q1 = q_tile[v].groups[pairs][1]; let q2 = q_tile[v].groups[pairs][2];
            let q3 = q_tile[v].groups[pairs][3]; let q4 = q_tile[v].groups[pairs][4]; let q5 = q_tile[v].groups[pairs][5];
            let q6 = q_tile[v].groups[pairs][6]; let q7 = q_tile[v].groups[pairs][7];
            for (var j = 0u; j < 8u; j++) {  // unroll
              let k = k_tile[v][j][x];
              let l = s[2u * j];
              let h = s[2u * j + 1u];
              s[2u * j] = vec4<f32>(chain(q0, k, l.x), chain(q1, k, l.y), chain(q2, k, l.z), chain(q3, k, l.w));
              s[2u * j + 1u] = vec4<f32>(chain(q4, k, h.x), chain(q5, k, h.y), chain(q6, k, h.z), chain(q7, k, h.w));
            }
          }
        }
        workgroupBarrier();
      }
      if (mine < tile.n_pairs) {
        // Positions that pairs see up to; pairs past the last see nothing.
        var low_seen: vec4<u32>;
        var high_seen: vec4<u32>;
        for (var r = 0u; r < 4u; r++) {  // unroll
          low_seen[r] = select(0u, b.z + (mine + r) / GROUP_SIZE + 1u, mine + r < tile.n_pairs);
          high_seen[r] = select(0u, b.z + (mine + 4u + r) / GROUP_SIZE + 1u, mine + 4u + r < tile.n_pairs);
        }
        let low_lse = lse_tile[pairs * 2u];
        let high_lse = lse_tile[pairs * 2u + 1u];
        for (var j = 0u; j < 8u; j++) {  // unroll
          let position = vec4<u32>(b.y + start + j * ACROSS + x);
          let l = select(vec4<f32>(0.0), exp2(s[2u * j] - low_lse), position < low_seen);
          let h = select(vec4<f32>(0.0), exp2(s[2u * j + 1u] - high_lse), position < high_seen);
          if (par.largest == 1u) {
            let top = max(l, h);
            total[j] = max(total[j], max(max(top.x, top.y), max(top.z, top.w)));
          } else {
            total[j] += ((l.x + l.y) + (l.z + l.w)) + ((h.x + h.y) + (h.z + h.w));
          }
        }
      }
      // The next tile's log-sum-exp may not come before this one's is read.
      workgroupBarrier();
    }
    for (var j = 0u; j < 8u; j++) { totals[pairs][j * ACROSS + x] = total[j]; }  // unroll
    workgroupBarrier();
    for (var place = li; place < min(TILE_TOKENS, tile.n_tokens - start); place += WORKGROUP_SIZE) {
      var received = totals[0][place];
      for (var g = 1u; g < PAIR_GROUPS; g++) {
        let more = totals[g][place];
        received = select(received + more, max(received, more), par.largest == 1u);
      }
      let at = b.w + par.layer * par.list_stride + start + place;
      if (par.largest == 1u) {
        scores[at] = max(scores[at], received);
      } else {
        scores[at] += received * (1.0 / f32(GROUP_SIZE));
      }
    }
    workgroupBarrier();
  }
}
