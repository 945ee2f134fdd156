//! Every kernel against its oracle, over tiers, page sizes and arenas.

mod common;

use concertina::compression::hidden::HiddenCodec;
use concertina::eval::verify::attention::check_shape;
use concertina::eval::verify::{Check, Extent, count, run};
use concertina::geometry::{Bytes, HeadGeometry};
use concertina::kernels::PipelineCache;
use concertina::kernels::attention::CacheShape;
use concertina::kernels::registry::PAGE_SIZES;

fn assert_passed(checks: &[Check]) {
    for check in checks {
        let nmse = check.nmse.map_or(String::new(), |e| format!(", NMSE {e:.1e}"));
        println!("{} {}: error / bound {:.3}{nmse}", check.kernel, check.case, check.error_over_bound);
        assert!(check.passed(), "{} {} is outside its bound", check.kernel, check.case);
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn kernels_match_their_oracles_in_the_best_tier_gpu() {
    let checks = run(common::device(), Extent::Quick, &mut |_| ()).expect("the device should run every kernel");
    assert_eq!(checks.len(), count(Extent::Quick), "every announced check should run");
    assert_passed(&checks);
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn kernels_match_their_oracles_in_the_portable_tier_gpu() {
    assert_passed(&run(common::portable(), Extent::Quick, &mut |_| ()).expect("the device should run every kernel"));
}

fn shape(head_dim: u32, group_size: u32, page_size: u32) -> CacheShape {
    let heads = HeadGeometry { num_qo_heads: 2 * group_size, num_kv_heads: 2, head_dim };
    CacheShape { heads, page_size, codec: HiddenCodec::F16 }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn every_page_size_gives_the_same_attention_gpu() {
    let mut cache = PipelineCache::default();
    for page_size in PAGE_SIZES {
        let lengths = [1, page_size - 1, page_size, page_size + 1, 300];
        let checks = check_shape(common::device(), &mut cache, shape(80, 7, page_size), &lengths, None);
        assert_passed(&checks.expect("the device should run the shape"));
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn sequences_that_spill_over_arenas_are_merged_gpu() {
    let mut cache = PipelineCache::default();
    // Arenas of one slab: 16 pages, so that longer sequences lie in many arenas.
    let shape = shape(64, 3, 16);
    let slab = Bytes(shape.codec.page_bytes(shape.page()).0 * 16);
    let checks = check_shape(common::device(), &mut cache, shape, &[1, 15, 16, 17, 700, 300], Some(slab));
    assert_passed(&checks.expect("the device should run over many arenas"));
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn a_wide_group_and_a_long_context_stay_within_their_bounds_gpu() {
    let mut cache = PipelineCache::default();
    let long = check_shape(common::device(), &mut cache, shape(64, 4, 64), &[4097, 63], None);
    assert_passed(&long.expect("the device should run the shape"));
    // Shapes beside the common ones: the widest groups, the narrowest head, and widths that leave lanes idle.
    for (head_dim, group_size) in [(64, 32), (128, 16), (64, 20), (8, 32), (72, 5), (200, 2), (256, 8)] {
        let odd = check_shape(common::device(), &mut cache, shape(head_dim, group_size, 64), &[97, 64], None);
        assert_passed(&odd.expect("the device should run the shape"));
    }
}
