//! Without a GPU: every kernel that can be asked for links, validates, and keeps to the portable limits.

use concertina::compression::hidden::HiddenCodec;
use concertina::geometry::HeadGeometry;
use concertina::kernels::append::Positions;
use concertina::kernels::attention::CacheShape;
use concertina::kernels::prefill::PrefillSpec;
use concertina::kernels::registry::{all_specs, format_specs};
use concertina::kernels::{Access, KernelSpec, append, link, merge_states, moments};
use rayon::prelude::*;

/// What Metal, DX12 and software Vulkan all grant; the WebGPU default would be half of it.
const WORKGROUP_MEMORY: u32 = 32 * 1024;
/// What adapters with cooperative matrices of 16 grant.
const COOPERATIVE_WORKGROUP_MEMORY: u32 = 48 * 1024;

#[test]
fn every_spec_links_validates_and_declares_its_bindings() {
    let specs = all_specs();
    assert!(specs.len() > 5000, "the registry should be complete, it has {}", specs.len());
    let sealing = specs.iter().filter(|spec| spec.name == "seal").count();
    assert!(sealing > 1000, "every codec should have kernels that seal pages, not {sealing}");
    let formats = specs.iter().filter(|spec| spec.name == "key_scores").count();
    for name in ["score", "gather"] {
        let found = specs.iter().filter(|spec| spec.name == name).count();
        assert!(
            found > formats,
            "{name} reads every format that attention reads, one of them in several ways: {found} of {formats}"
        );
    }
    let (prefill, cooperative): (Vec<_>, Vec<_>) =
        specs.iter().filter(|spec| spec.name.starts_with("prefill")).partition(|spec| !spec.is_cooperative());
    assert!(prefill.len() > formats, "prefill of {formats} formats has {} kernels", prefill.len());
    assert!(cooperative.len() > formats / 3, "many formats are read into matrices: {} of {formats}", cooperative.len());
    for name in ["decide", "select", "carry"] {
        assert_eq!(specs.iter().filter(|spec| spec.name == name).count(), 1, "{name} knows no format");
    }
    check(&specs);
}

/// One codec of each kind: plain, groups, rotation, pruning, latents.
fn kinds() -> [HiddenCodec; 5] {
    ["f16", "kivi4", "rot3", "think:0.6+int8", "lowrank:8"].map(|text| text.parse().expect("a codec"))
}

/// Every head shape that the geometry admits must have kernels, also those that the registry does not list: of f16 all,
/// of the other kinds a part, because what a codec adds grows with the width of a head and not with the group.
#[test]
fn every_admitted_head_shape_has_kernels_within_the_limits() {
    let mut specs = Vec::new();
    for head_dim in (8..=256).step_by(8) {
        for group_size in 1..=40 {
            let heads = HeadGeometry { num_qo_heads: group_size, num_kv_heads: 1, head_dim };
            if heads.check().is_ok() {
                let shape = CacheShape { heads, page_size: 64 };
                specs.extend([merge_states::kernel(&shape), moments::kernel(&shape)]);
                specs
                    .extend([Positions::Applied, Positions::Rotary].map(|positions| append::kernel(&shape, positions)));
                assert!(PrefillSpec::item_positions(&shape) > 0, "an item of {heads:?} holds a position");
                // Narrowest and widest groups of every head, and some between.
                let widest = HeadGeometry { num_qo_heads: group_size + 1, ..heads }.check().is_err();
                let some = widest || group_size == 1 || (head_dim % 40 == 0 && [3, 8, 12].contains(&group_size));
                for codec in kinds().into_iter().filter(|codec| !codec.seals() || some) {
                    codec.check(shape.page()).unwrap_or_else(|e| panic!("{e}"));
                    specs.extend(format_specs(&shape.format(codec)));
                }
            }
        }
    }
    assert!(specs.len() > 3000, "most shapes are admitted; {} kernels are too few", specs.len());
    check(&specs);
}

fn check(specs: &[KernelSpec]) {
    specs.par_iter().for_each(|spec| {
        let linked = link(spec);
        let (module, _) = linked.validate().unwrap_or_else(|e| panic!("{} {:?}: {e}", spec.name, spec.constants));
        let mut layouter = naga::proc::Layouter::default();
        layouter.update(module.to_ctx()).expect("a valid module has a layout");
        let mut declared = vec![None; spec.bindings.len()];
        let mut workgroup = 0;
        let mut immediate = 0;
        for (_, variable) in module.global_variables.iter() {
            match variable.space {
                naga::AddressSpace::WorkGroup => workgroup += layouter[variable.ty].size,
                naga::AddressSpace::Immediate => immediate += layouter[variable.ty].size,
                naga::AddressSpace::Storage { access } => {
                    let binding = variable.binding.as_ref().expect("storage is bound");
                    let writes = access.contains(naga::StorageAccess::STORE);
                    let access = if writes { Access::ReadWrite } else { Access::Read };
                    let name = variable.name.clone().expect("bindings are named");
                    assert_eq!(binding.group, 0, "{name}");
                    declared[binding.binding as usize] = Some((name, access));
                }
                _ => {}
            }
        }
        let expected: Vec<_> = spec.bindings.iter().map(|(n, a)| Some(((*n).to_owned(), *a))).collect();
        assert_eq!(declared, expected, "{}", spec.name);
        assert_eq!(immediate, spec.immediate_bytes, "{}: immediate data", spec.name);
        let memory = if spec.is_cooperative() { COOPERATIVE_WORKGROUP_MEMORY } else { WORKGROUP_MEMORY };
        assert!(workgroup <= memory, "{} {:?}: {workgroup} B", spec.name, spec.constants);
        assert!(spec.bindings.len() <= 8, "{}: eight storage bindings are the portable limit", spec.name);
    });
    println!("{} kernels validated", specs.len());
}
