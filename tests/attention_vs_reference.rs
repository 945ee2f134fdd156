//! Attention kernels on the device against dense f64 attention.

use concertina::device::{AdapterRequest, Device};
use concertina::eval::verify::{Extent, run};

#[test]
fn attention_matches_the_oracle_gpu() {
    let device = Device::open(&AdapterRequest::default()).expect("a GPU adapter");
    let t = std::time::Instant::now();
    let extent = if std::env::var("FULL").is_ok() {Extent::Full} else {Extent::Quick};
    let checks = run(&device, extent, &mut |c| println!("{:.1?} {} {} {} err/bound {:.3} nmse {:?}", t.elapsed(), c.kernel, c.case, c.compared, c.error_over_bound, c.nmse)).expect("runs");
    assert!(checks.iter().all(|c| c.passed()));
}
