//! Evictions on a device against their definitions and the f64 oracle.

mod common;

use concertina::compression::Compression;
use concertina::eval::verify::eviction::{check, singles};
use concertina::kernels::PipelineCache;

fn run(compressions: &[&str]) {
    let device = common::device();
    let parsed: Vec<Compression> = compressions.iter().map(|c| c.parse().expect("a compression")).collect();
    for check in check(&device, &mut PipelineCache::default(), &parsed, None).expect("the device should not fail") {
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
        for check in check(&device, &mut cache, &[compression], None).expect("the device should not fail") {
            println!(
                "{} {} {} {:e} {:?}",
                check.kernel, check.case, check.compared, check.error_over_bound, check.nmse
            );
            if !check.passed() {
                failed.push(format!("{check:?}"));
            }
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn tmp_arenas_gpu() {
    let device = common::device();
    let mut cache = PipelineCache::default();
    for text in ["expected:0.5", "keydiff:0.5", "h2o:0.5", "snapkv:0.5,hidden=kivi4"] {
        for check in check(
            device,
            &mut cache,
            &[text.parse().expect("a compression")],
            Some(concertina::geometry::Bytes(40 * (8 << 10))),
        )
        .expect("the device should not fail")
        {
            println!(
                "{} {} {} {:e} {:?} {}",
                check.kernel,
                check.case,
                check.compared,
                check.error_over_bound,
                check.nmse,
                check.passed()
            );
        }
    }
}
