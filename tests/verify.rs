//! Every kernel against its oracle, over tiers, codecs, page sizes and arenas.

mod common;

use concertina::compression::hidden::HiddenCodec;
use concertina::engine::bench::cache::CacheSpec;
use concertina::engine::bench::gather::GatherRun;
use concertina::engine::bench::score::{ScoreRun, ScoreSpec};
use concertina::engine::bench::{BenchSettings, KernelRun, TimedRuns};
use concertina::eval::verify::attention::{Batch, Flip, check_batch};
use concertina::eval::verify::eviction_tunings::check_launch;
use concertina::eval::verify::{Check, Extent, count, run};
use concertina::geometry::{Bytes, HeadGeometry};
use concertina::kernels::PipelineCache;
use concertina::kernels::attention::CacheShape;
use concertina::kernels::registry::PAGE_SIZES;

fn assert_passed(checks: &[Check]) {
    for check in checks {
        let nmse = check.nmse.map_or(String::new(), |e| format!(", NMSE {e:.1e}"));
        println!("{} {}: error / bound {:.3}{nmse}", check.kernel, check.case, check.error_over_bound);
    }
    for check in checks {
        assert!(check.passed(), "{} {} is outside its bound", check.kernel, check.case);
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn kernels_match_their_oracles_in_the_best_tier_gpu() {
    let checks = run(common::device(), Extent::Quick, &mut |_| ()).expect("the device should run every kernel");
    assert_eq!(checks.len(), count(common::device().tier(), Extent::Quick), "every announced check should run");
    assert_passed(&checks);
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn kernels_match_their_oracles_in_the_portable_tier_gpu() {
    assert_passed(&run(common::portable(), Extent::Quick, &mut |_| ()).expect("the device should run every kernel"));
}

fn shape(head_dim: u32, group_size: u32, page_size: u32) -> CacheShape {
    let heads = HeadGeometry { num_qo_heads: 2 * group_size, num_kv_heads: 2, head_dim };
    CacheShape { heads, page_size }
}

fn check(batch: &Batch) {
    let checks = check_batch(common::device(), &mut PipelineCache::default(), batch);
    assert_passed(&checks.expect("the device should run the batch"));
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn every_page_size_gives_the_same_attention_gpu() {
    for page_size in PAGE_SIZES {
        let shape = shape(80, 7, page_size);
        for codec in ["f16", "rot3", "think:0.6+int8"].map(|text| text.parse().expect("a codec")) {
            check(&Batch::uniform(shape, codec, &[1, page_size - 1, page_size, page_size + 1, 300]));
        }
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn sequences_that_spill_over_arenas_are_merged_gpu() {
    // Arenas of one slab: 16 pages, so that longer sequences lie in many arenas.
    let shape = shape(64, 3, 16);
    let slab = Bytes(HiddenCodec::F16.page_bytes(shape.page()).0 * 16);
    let lengths = [1, 15, 16, 17, 700, 300];
    for codec in [HiddenCodec::F16, "rot4".parse().expect("a codec")] {
        check(&Batch { max_arena: Some(slab), ..Batch::uniform(shape, codec, &lengths) });
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn one_flipped_bit_in_one_scale_is_caught_gpu() {
    let shape = shape(64, 3, 64);
    let codec: HiddenCodec = "int8".parse().expect("a codec");
    // Scales of keys lie behind 64 tokens of 16 words of codes; token 20 of the page.
    let word = 64 * 16 + 20;
    for bit in [0, 9, 16] {
        let flip = Some(Flip { sequence: 0, page: 0, word, bit });
        let batch = Batch { flip, ..Batch::uniform(shape, codec, &[70, 65]) };
        let checks =
            check_batch(common::device(), &mut PipelineCache::default(), &batch).expect("the device should run");
        let failed: Vec<_> = checks.iter().filter(|check| !check.passed()).map(|check| check.kernel).collect();
        // The lowest bit of a minimum or a scale moves one token of 70 by less than attention's bound shows.
        let expected: &[&str] = if bit == 9 { &["seal", "decode", "prefill"] } else { &["seal"] };
        assert!(expected.iter().all(|kernel| failed.contains(kernel)), "bit {bit}: only {failed:?} failed");
        assert!(!failed.contains(&"append"), "open pages are untouched");
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn a_wide_group_and_a_long_context_stay_within_their_bounds_gpu() {
    check(&Batch::uniform(shape(64, 4, 64), HiddenCodec::F16, &[4097, 63]));
    // Shapes beside the common ones: the widest groups, the narrowest head, and widths that leave lanes idle.
    for (head_dim, group_size) in [(64, 32), (128, 16), (64, 20), (8, 32), (72, 5), (200, 2), (256, 8)] {
        let shape = shape(head_dim, group_size, 64);
        check(&Batch::uniform(shape, HiddenCodec::F16, &[97, 64]));
        // One codec for each way in which kernels differ.
        let codecs = ["int8", "kivi2", "mean+rot3", "think:0.6+kivi4", "lowrank:8+int8"];
        let sequences = codecs.map(|text| (text.parse().expect("a codec"), 150)).into();
        check(&Batch { shape, sequences, max_arena: None, flip: None });
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn every_launch_over_a_spoiled_page_is_caught_gpu() {
    let (device, mut pipelines) = (common::device(), PipelineCache::default());
    let mut runs = TimedRuns::new(device).expect("a timer");
    let settings = BenchSettings { cold: Bytes::ZERO, in_order: false, max_arena: None };
    for text in ["f16", "kivi4", "rot4"] {
        let codec = text.parse().expect("a codec");
        let cache = |contexts| CacheSpec { shape: shape(64, 3, 64), codec, contexts };
        let score = ScoreSpec { cache: cache(vec![150]), rows: 20 };
        let score = ScoreRun::new(device, &mut pipelines, &score, &settings).expect("it fits");
        let gather = GatherRun::new(device, &mut pipelines, &cache(vec![150, 70]), &settings).expect("it fits");
        let both: [Box<dyn KernelRun>; 2] = [Box::new(score), Box::new(gather)];
        for mut run in both {
            for spoiled in [false, true] {
                if spoiled {
                    run.spoil(device, 0).expect("a page is overwritten");
                }
                for candidate in 0..run.candidates().len() {
                    let check = check_launch(&mut runs, &mut pipelines, run.as_mut(), candidate).expect("it runs");
                    assert_eq!(check.passed(), !spoiled, "{text}: {check:?}");
                }
            }
        }
    }
}
