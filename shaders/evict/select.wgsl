// Which tokens stay: the best of a domain of lists, by radix select, and their indices in order.
// Specification: src/kernels/select.rs; definition: src/compression/keep.rs. Workgroup = one domain.

struct SelectParams {
  items: u32,    // first vec4 of the work list in `step`
  n_items: u32,
}

// Above every key: a token that stays whatever it is worth, or no token at all.
const PROTECTED = 0xffffffffu;
const STRIDE = WORKGROUP_SIZE * LOADS;
// Keys are read in digits of 11, 11 and 10 bits.
const BINS = WORKGROUP_SIZE * LANE_BINS;
// The first digit is counted in several histograms, because scores are alike and lanes would wait for each other.
const REPLICAS = 3u;
// Keys of a lane that may share the first digit of the one that is searched, so that they are not read once more.
const SURVIVORS = (REPLICAS - 1u) * LANE_BINS;
const ROWS = 16u;
const ROW_LANES = WORKGROUP_SIZE / ROWS;

var<immediate> par: SelectParams;
@group(0) @binding(0) var<storage, read> step: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> decided: array<vec4<u32>>;  // scores by their bits
@group(0) @binding(2) var<storage, read_write> kept: array<u32>;    // [list][capacity]: flags where there is a floor, then indices
@group(0) @binding(3) var<storage, read_write> counts: array<u32>;  // [list]

var<workgroup> bins: array<atomic<u32>, REPLICAS * BINS>;
var<workgroup> sums: array<vec4<u32>, ROWS * (ROW_LANES + 1u)>;  // one more in a row, for other banks
var<workgroup> row_sums: array<vec4<u32>, ROWS>;
var<workgroup> found: array<u32, 2>;
var<workgroup> spilled: atomic<u32>;

// Lists of a domain: (list, tokens, first of `decided` and `kept`, unused) from vec4 `lists` on.
struct Domain {
  lists: u32,
  n_lists: u32,
  total: u32,
  floor: u32,
  sink: u32,
  recent: u32,
  flagged: bool,  // `kept` says which tokens stay already
}

// One list, in fours: the first may begin before it.
struct Span {
  list: u32,
  at: u32,
  n_tokens: u32,
  first_open: u32,
  end_open: u32,
  shift: u32,
  quads: u32,
}

// Tokens above `key` stay, and the first `ties` that have it.
struct Cut {
  key: u32,
  ties: u32,
}

struct Scanned {
  before: vec4<u32>,
  total: vec4<u32>,
}

fn read_span(domain: Domain, place: u32) -> Span {
  let a = step[domain.lists + place];
  let sink = min(domain.sink, a.y);
  let recent = min(domain.recent, a.y - sink);
  let shift = a.z % 4u;
  return Span(a.x, a.z, a.y, sink, a.y - recent, shift, (a.y + shift + 3u) / 4u);
}

// Indices of a four; before the list they are huge.
fn indices(span: Span, quad: u32) -> vec4<u32> {
  return vec4<u32>(quad * 4u) + vec4<u32>(0u, 1u, 2u, 3u) - span.shift;
}

// Order-preserving: NaN below everything, both zeros alike.
fn order_keys(bits: vec4<u32>) -> vec4<u32> {
  let magnitude = bits & vec4<u32>(0x7fffffffu);
  var keys = select(bits | vec4<u32>(0x80000000u), ~bits, bits >= vec4<u32>(0x80000000u));
  keys = select(keys, vec4<u32>(0x80000000u), magnitude == vec4<u32>(0u));
  return select(keys, vec4<u32>(0u), magnitude > vec4<u32>(0x7f800000u));
}

// Keys of LOADS fours, WORKGROUP_SIZE apart; of tokens that stay already, and of places that hold none, PROTECTED. Nothing is asked
// before all are there, because compilers move a load behind a question, and then wait for one after another.
fn open_keys(domain: Domain, span: Span, first: u32) -> array<vec4<u32>, LOADS> {
  var keys: array<vec4<u32>, LOADS>;
  for (var u = 0u; u < LOADS; u++) {  // unroll
    keys[u] = decided[span.at / 4u + min(first + u * WORKGROUP_SIZE, span.quads - 1u)];
  }
  for (var u = 0u; u < LOADS; u++) {  // unroll
    let i = indices(span, first + u * WORKGROUP_SIZE);
    let open = i - span.first_open < vec4<u32>(span.end_open - span.first_open);
    keys[u] = select(vec4<u32>(PROTECTED), order_keys(keys[u]), open);
  }
  if (domain.flagged) {
    for (var u = 0u; u < LOADS; u++) {  // unroll
      let at = vec4<u32>(span.at) + min(indices(span, first + u * WORKGROUP_SIZE), vec4<u32>(span.n_tokens - 1u));
      let flags = vec4<u32>(kept[at.x], kept[at.y], kept[at.z], kept[at.w]);
      keys[u] = select(keys[u], vec4<u32>(PROTECTED), flags != vec4<u32>(0u));
    }
  }
  return keys;
}

// Sums over the lanes before, and over all.
fn scan(li: u32, value: vec4<u32>) -> Scanned {
  let row = li / ROW_LANES;
  let at = row * (ROW_LANES + 1u) + li % ROW_LANES;
  sums[at] = value;
  workgroupBarrier();
  if (li < ROWS) {
    var sum = vec4<u32>(0u);
    for (var i = 0u; i < ROW_LANES; i++) {
      let here = sums[li * (ROW_LANES + 1u) + i];
      sums[li * (ROW_LANES + 1u) + i] = sum;
      sum += here;
    }
    row_sums[li] = sum;
  }
  workgroupBarrier();
  var before = sums[at];
  var total = vec4<u32>(0u);
  for (var i = 0u; i < ROWS; i++) {
    let here = row_sums[i];
    before += select(vec4<u32>(0u), here, i < row);
    total += here;
  }
  return Scanned(before, total);
}

fn clear(li: u32, n: u32) {
  for (var i = li; i < n; i += WORKGROUP_SIZE) { atomicStore(&bins[i], 0u); }
  workgroupBarrier();
}

// The bin that holds the `rank`-th largest of what was counted in `replicas` histograms, and its rank there.
fn find(li: u32, rank: u32, replicas: u32) -> vec2<u32> {
  workgroupBarrier();
  // A lane has neighbouring bins, the first lane the last ones.
  let last = BINS - 1u - li * LANE_BINS;
  var here: array<u32, LANE_BINS>;
  var sum = 0u;
  for (var b = 0u; b < LANE_BINS; b++) {  // unroll
    here[b] = 0u;
    for (var r = 0u; r < replicas; r++) { here[b] += atomicLoad(&bins[r * BINS + last - b]); }
    sum += here[b];
  }
  var above = scan(li, vec4<u32>(sum, 0u, 0u, 0u)).before.x;
  if (above < rank && rank <= above + sum) {
    for (var b = 0u; b < LANE_BINS; b++) {  // unroll
      if (above < rank && rank <= above + here[b]) {
        found[0] = last - b;
        found[1] = rank - above;
      }
      above += here[b];
    }
  }
  workgroupBarrier();
  return vec2<u32>(found[0], found[1]);
}

// Counts a digit of the open keys of lists `begin .. until`: the bits from `low` on, of keys that have `prefix` above them. Keeps the
// lane's first keys that pass the second digit, and returns how many there were.
fn count(li: u32, domain: Domain, begin: u32, until: u32, low: u32, prefix: u32) -> u32 {
  let bits = select(11u, 10u, low == 0u);
  let histogram = select(0u, li % REPLICAS * BINS, low == 21u);
  var n_mine = 0u;
  for (var s = begin; s < until; s++) {
    let span = read_span(domain, s);
    for (var first = li; first < span.quads; first += STRIDE) {
      let all = open_keys(domain, span, first);
      for (var u = 0u; u < LOADS; u++) {  // unroll
        let keys = all[u];
        for (var c = 0u; c < 4u; c++) {  // unroll
          // Shifting by 32 is not defined, so the first digit compares nothing.
          let same = low == 21u || (keys[c] >> ((low + bits) & 31u)) == prefix;
          if (keys[c] != PROTECTED && same) {
            atomicAdd(&bins[histogram + ((keys[c] >> low) & ((1u << bits) - 1u))], 1u);
            if (low == 10u) {
              // The other histograms are free by now.
              if (n_mine < SURVIVORS) { atomicStore(&bins[BINS + n_mine * WORKGROUP_SIZE + li], keys[c]); }
              n_mine++;
            }
          }
        }
      }
    }
  }
  return n_mine;
}

// Where the best `n` open tokens of lists `begin .. until` of a domain end; there are so many.
fn threshold(li: u32, domain: Domain, begin: u32, until: u32, n: u32) -> Cut {
  if (li == 0u) { atomicStore(&spilled, 0u); }
  var prefix = 0u;
  var rank = n;
  var n_mine = 0u;
  for (var digit = 0u; digit < 3u; digit++) {
    let low = select(select(0u, 10u, digit == 1u), 21u, digit == 0u);
    let replicas = select(1u, REPLICAS, digit == 0u);
    clear(li, replicas * BINS);
    if (digit < 2u || atomicLoad(&spilled) == 1u) {
      n_mine = count(li, domain, begin, until, low, prefix);
      if (n_mine > SURVIVORS) { atomicStore(&spilled, 1u); }
    } else {
      for (var i = 0u; i < n_mine; i++) {
        let key = atomicLoad(&bins[BINS + i * WORKGROUP_SIZE + li]);
        if ((key >> 10u) == prefix) { atomicAdd(&bins[key & 1023u], 1u); }
      }
    }
    let at = find(li, rank, replicas);
    prefix = (prefix << select(11u, 10u, digit == 2u)) | at.x;
    rank = at.y;
  }
  return Cut(prefix, rank);
}

// Writes flags or, where `marks` says no, indices of the tokens of a list that stay. `seen` tokens of the lists before have the
// cut's key. Returns how many stay, and how many have been seen now.
fn write_kept(li: u32, domain: Domain, span: Span, cut: Cut, seen: u32, marks: bool) -> vec2<u32> {
  let taken = min(seen, cut.ties);
  var above = 0u;
  var ties = seen;
  for (var base = 0u; base < span.quads; base += STRIDE) {
    let first = base + li;
    let keys = open_keys(domain, span, first);
    // What is above in the lower half, what ties in the upper.
    var own: vec4<u32>;
    for (var u = 0u; u < LOADS; u++) {  // unroll
      let here = indices(span, first + u * WORKGROUP_SIZE) < vec4<u32>(span.n_tokens);
      let ones = vec4<u32>(1u);
      let wins = select(vec4<u32>(0u), ones, here & (keys[u] > vec4<u32>(cut.key)));
      let equal = select(vec4<u32>(0u), ones, here & (keys[u] == vec4<u32>(cut.key)));
      own[u] = dot(wins, ones) | (dot(equal, ones) << 16u);
    }
    let scanned = scan(li, own);
    // Indices may overwrite flags that a slower lane has just read.
    storageBarrier();
    for (var u = 0u; u < LOADS; u++) {  // unroll
      let i = indices(span, first + u * WORKGROUP_SIZE);
      var place = above + (scanned.before[u] & 0xffffu);
      var tie = ties + (scanned.before[u] >> 16u);
      for (var c = 0u; c < 4u; c++) {  // unroll
        if (i[c] < span.n_tokens) {
          let equal = keys[u][c] == cut.key;
          let stays = keys[u][c] > cut.key || (equal && tie < cut.ties);
          if (marks) {
            kept[span.at + i[c]] = select(0u, 1u, stays);
          } else if (stays) {
            kept[span.at + place + min(tie, cut.ties) - taken] = i[c];
          }
          tie += select(0u, 1u, equal);
          place += select(0u, 1u, keys[u][c] > cut.key);
        }
      }
      above += scanned.total[u] & 0xffffu;
      ties += scanned.total[u] >> 16u;
    }
  }
  return vec2<u32>(above + min(ties, cut.ties) - taken, ties);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) li: u32) {
  let item = group.y * GRID_WIDTH + group.x;
  if (item >= par.n_items) { return; }
  let a = step[par.items + item * 2u];
  let b = step[par.items + item * 2u + 1u];
  var domain = Domain(a.x, a.y, a.z, a.w, b.x, b.y, false);
  var spent = 0u;
  var all = 0u;
  var flagged = false;
  for (var s = 0u; s < domain.n_lists; s++) {
    let span = read_span(domain, s);
    let protected_here = span.first_open + span.n_tokens - span.end_open;
    // A floor never asks for more than the list or the domain has.
    let floor = min(domain.floor, span.n_tokens);
    flagged = flagged || floor > protected_here;
    spent += max(floor, protected_here);
    all += span.n_tokens;
  }
  // A list for its floor, one after another, then all together.
  let rounds = select(0u, domain.n_lists, flagged);
  for (var round = 0u; round <= rounds; round++) {
    let marks = round < rounds;
    let begin = select(0u, round, marks);
    let until = select(domain.n_lists, round + 1u, marks);
    var wanted = min(domain.total, all);
    var held = spent;
    if (marks) {
      let span = read_span(domain, round);
      held = span.first_open + span.n_tokens - span.end_open;
      wanted = min(domain.floor, span.n_tokens);
    }
    domain.flagged = flagged && !marks;
    // Nothing but what stays already.
    var cut = Cut(PROTECTED - 1u, 0u);
    if (!marks && wanted == all) {
      cut = Cut(0u, all);
    } else if (wanted > held) {
      cut = threshold(li, domain, begin, until, wanted - held);
    }
    var seen = 0u;
    for (var s = begin; s < until; s++) {
      let span = read_span(domain, s);
      let written = write_kept(li, domain, span, cut, seen, marks);
      if (!marks && li == 0u) { counts[span.list] = written.x; }
      seen = written.y;
    }
    storageBarrier();
    workgroupBarrier();
  }
}
