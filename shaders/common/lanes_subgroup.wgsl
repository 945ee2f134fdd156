// Reductions over a workgroup of WORKGROUP_SIZE lanes with subgroup operations, for subgroups of any size.
// Same function set as lanes_portable.wgsl. Every lane must call, and every lane gets the result.

struct Lanes {
  @builtin(local_invocation_index) index: u32,
  @builtin(subgroup_id) subgroup: u32,
  @builtin(subgroup_invocation_id) lane: u32,
  @builtin(num_subgroups) subgroups: u32,
}

// No adapter has subgroups of fewer than four lanes.
var<workgroup> lanes_folded: array<vec4<f32>, (WORKGROUP_SIZE + 3u) / 4u>;

fn lanes_max(lanes: Lanes, value: vec4<f32>) -> vec4<f32> {
  let part = subgroupMax(value);
  if (lanes.subgroups == 1u) { return part; }
  // A slower lane may still be reading the result of the call before this one.
  workgroupBarrier();
  if (lanes.lane == 0u) { lanes_folded[lanes.subgroup] = part; }
  workgroupBarrier();
  var folded = lanes_folded[0];
  for (var i = 1u; i < lanes.subgroups; i++) { folded = max(folded, lanes_folded[i]); }
  return folded;
}

fn lanes_sum(lanes: Lanes, value: vec4<f32>) -> vec4<f32> {
  let part = subgroupAdd(value);
  if (lanes.subgroups == 1u) { return part; }
  workgroupBarrier();
  if (lanes.lane == 0u) { lanes_folded[lanes.subgroup] = part; }
  workgroupBarrier();
  var folded = lanes_folded[0];
  for (var i = 1u; i < lanes.subgroups; i++) { folded += lanes_folded[i]; }
  return folded;
}
