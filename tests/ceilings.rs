//! Ceilings of a device: their results are right, and a figure whose result is wrong is refused.

mod common;

use std::time::Duration;

use concertina::engine::ceilings::{Ceiling, CeilingSizes, Ceilings};
use concertina::eval::ceilings;

/// A size that ends in the middle of a tile, as no whole MiB does.
fn odd() -> CeilingSizes {
    let memory_bytes = concertina::geometry::Bytes((1 << 20) + 16 * 37);
    CeilingSizes { memory_bytes, ..CeilingSizes::QUICK }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn every_ceiling_is_measured_and_its_result_is_right_gpu() {
    for device in [common::device(), common::portable()] {
        let mut made = Ceilings::new(device, odd()).expect("a small buffer fits");
        for ceiling in Ceiling::ALL {
            let measured = ceilings::ceiling(&mut made, ceiling, Duration::ZERO, 3).expect("right results");
            let value = measured.value;
            assert!(value.median.is_finite() && value.median > 0.0 && value.n == 3, "{ceiling:?}: {value:?}");
            assert!(value.p10 <= value.median && value.median <= value.p90, "{ceiling:?}: {value:?}");
        }
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn a_figure_whose_result_is_wrong_is_refused_gpu() {
    let mut made = Ceilings::new(common::device(), odd()).expect("a small buffer fits");
    for ceiling in [Ceiling::Copy, Ceiling::Flop, Ceiling::Out, Ceiling::Back, Ceiling::Read] {
        made.run(ceiling).expect("it runs");
        made.check(ceiling).expect("the result is right");
        made.spoil(ceiling).expect("a few bytes are written");
        // What is read and what leaves was changed before; what is written, after.
        if ceiling == Ceiling::Read {
            made.run(ceiling).expect("it runs");
        }
        let error = made.check(ceiling).expect_err("the result is wrong").to_string();
        assert!(error.contains("does not count"), "{ceiling:?}: {error}");
        if ceiling != Ceiling::Read {
            made.run(Ceiling::Back).expect("the bytes are sent again");
            made.run(ceiling).expect("it runs again");
            made.check(ceiling).expect("and is right again");
        }
    }
    let error = ceilings::ceiling(&mut made, Ceiling::Read, Duration::ZERO, 3).expect_err("its source was changed");
    assert!(error.to_string().contains("add up to"), "{error}");
}
