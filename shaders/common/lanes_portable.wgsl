// Reductions over a workgroup of WORKGROUP_SIZE lanes (a multiple of 8) through workgroup memory.
// Same function set as lanes_subgroup.wgsl. Every lane must call, and every lane gets the result.

struct Lanes {
  @builtin(local_invocation_index) index: u32,
}

var<workgroup> lanes_scratch: array<vec4<f32>, WORKGROUP_SIZE>;
var<workgroup> lanes_folded: array<vec4<f32>, 8>;

fn lanes_max(lanes: Lanes, value: vec4<f32>) -> vec4<f32> {
  lanes_scratch[lanes.index] = value;
  workgroupBarrier();
  if (lanes.index < 8u) {
    var folded = lanes_scratch[lanes.index];
    for (var i = lanes.index + 8u; i < WORKGROUP_SIZE; i += 8u) { folded = max(folded, lanes_scratch[i]); }
    lanes_folded[lanes.index] = folded;
  }
  workgroupBarrier();
  return max(
    max(max(lanes_folded[0], lanes_folded[1]), max(lanes_folded[2], lanes_folded[3])),
    max(max(lanes_folded[4], lanes_folded[5]), max(lanes_folded[6], lanes_folded[7])));
}

fn lanes_sum(lanes: Lanes, value: vec4<f32>) -> vec4<f32> {
  lanes_scratch[lanes.index] = value;
  workgroupBarrier();
  if (lanes.index < 8u) {
    var folded = lanes_scratch[lanes.index];
    for (var i = lanes.index + 8u; i < WORKGROUP_SIZE; i += 8u) { folded += lanes_scratch[i]; }
    lanes_folded[lanes.index] = folded;
  }
  workgroupBarrier();
  return ((lanes_folded[0] + lanes_folded[1]) + (lanes_folded[2] + lanes_folded[3])) +
         ((lanes_folded[4] + lanes_folded[5]) + (lanes_folded[6] + lanes_folded[7]));
}
