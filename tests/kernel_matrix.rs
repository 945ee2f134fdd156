//! Without a GPU: every kernel that can be asked for links, validates, and keeps to the portable limits.

use concertina::compression::hidden::HiddenCodec;
use concertina::device::Tier;
use concertina::geometry::HeadGeometry;
use concertina::kernels::attention::CacheShape;
use concertina::kernels::decode::DecodeSpec;
use concertina::kernels::prefill::PrefillSpec;
use concertina::kernels::registry::all_specs;
use concertina::kernels::{Access, KernelSpec, link};

/// What Metal, DX12 and software Vulkan all grant; the WebGPU default would be half of it.
const WORKGROUP_MEMORY: u32 = 32 * 1024;

#[test]
fn every_spec_links_validates_and_declares_its_bindings() {
    let specs = all_specs();
    assert!(specs.len() > 500, "the registry should be complete, it has {}", specs.len());
    check(&specs);
}

/// Every head shape that the geometry admits must have kernels, also those that the registry does not list.
#[test]
fn every_admitted_head_shape_has_kernels_within_the_limits() {
    let mut specs = Vec::new();
    for head_dim in (8..=256).step_by(8) {
        for group_size in 1..=40 {
            let heads = HeadGeometry { num_qo_heads: group_size, num_kv_heads: 1, head_dim };
            if heads.check().is_ok() {
                let shape = CacheShape { heads, page_size: 64, codec: HiddenCodec::F16 };
                specs.extend([Tier::Portable, Tier::Subgroup].map(|tier| DecodeSpec { shape, tier }.kernel()));
                let prefill = PrefillSpec { shape };
                assert!(prefill.tile_positions() > 0, "a tile of {heads:?} holds a position");
                specs.push(prefill.kernel());
            }
        }
    }
    assert!(specs.len() > 1000, "most shapes are admitted, not {}", specs.len() / 3);
    check(&specs);
}

fn check(specs: &[KernelSpec]) {
    for spec in specs {
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
        assert!(workgroup <= WORKGROUP_MEMORY, "{} {:?}: {workgroup} B", spec.name, spec.constants);
        assert!(spec.bindings.len() <= 8, "{}: eight storage bindings are the portable limit", spec.name);
    }
    println!("{} kernels validated", specs.len());
}
