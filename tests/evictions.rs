//! Evictions on a device against their definitions and the f64 oracle.

mod common;

use concertina::compression::Compression;
use concertina::eval::verify::eviction::{check, singles};
use concertina::kernels::PipelineCache;

fn run(compressions: &[&str]) {
    let device = common::device();
    let parsed: Vec<Compression> = compressions.iter().map(|c| c.parse().expect("a compression")).collect();
    for check in check(&device, &mut PipelineCache::default(), &parsed).expect("the device should not fail") {
        println!("{check:?}");
        assert!(check.passed(), "{check:?}");
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn every_policy_keeps_what_its_definition_keeps_gpu() {
    let device = common::device();
    let mut cache = PipelineCache::default();
    let mut failed = Vec::new();
    for compression in singles() {
        for check in check(&device, &mut cache, &[compression]).expect("the device should not fail") {
            println!("{} {} {} {:e} {:?}", check.kernel, check.case, check.compared, check.error_over_bound, check.nmse);
            if !check.passed() {
                failed.push(format!("{check:?}"));
            }
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}
