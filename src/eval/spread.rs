//! Times that are measured again and again: a warm-up that does not count, then the median and how far others lie from it.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Time that a device is kept busy before anything counts: a card that idled runs at a part of its clock.
pub const WARM_UP: Duration = Duration::from_millis(500);

/// Some measurements of one thing, in the unit of the thing.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The median.
    pub median: f64,
    /// What one in ten does not exceed.
    pub p10: f64,
    /// What nine in ten do not exceed.
    pub p90: f64,
    /// How many there were.
    pub n: usize,
}

impl Spread {
    /// Of some values, by the nearest rank; `None` of none.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let at = |percent: usize| values.get((values.len() * percent).div_ceil(100).saturating_sub(1)).copied();
        Some(Self { median: at(50)?, p10: at(10)?, p90: at(90)?, n: values.len() })
    }

    /// Every value times a factor above 0.
    #[must_use]
    pub fn scaled(self, factor: f64) -> Self {
        Self { median: self.median * factor, p10: self.p10 * factor, p90: self.p90 * factor, ..self }
    }

    /// What a fixed amount of work per second comes to, of seconds: the fast runs are its upper end.
    #[must_use]
    pub fn rate(self, work: f64) -> Self {
        Self { median: work / self.median, p10: work / self.p90, p90: work / self.p10, ..self }
    }
}

/// Measures `repeats` times, at least once, after as much warm-up.
///
/// # Errors
/// Those of what is measured.
///
/// # Panics
/// Never: at least one value is measured.
pub fn measure<E>(warm_up: Duration, repeats: usize, mut once: impl FnMut() -> Result<f64, E>) -> Result<Spread, E> {
    let started = Instant::now();
    while started.elapsed() < warm_up {
        once()?;
    }
    let values = (0..repeats.max(1)).map(|_| once()).collect::<Result<Vec<_>, E>>()?;
    Ok(Spread::of(values).expect("at least one value was measured"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_by_the_nearest_rank() {
        let spread = Spread::of((1..=10).rev().map(f64::from).collect()).expect("ten values");
        assert_eq!((spread.median, spread.p10, spread.p90, spread.n), (5.0, 1.0, 9.0, 10), "of ten");
        assert_eq!(Spread::of(vec![3.0]).map(|s| (s.p10, s.p90)), Some((3.0, 3.0)), "of one");
        assert_eq!(Spread::of(Vec::new()), None, "of none");
        let rate = spread.rate(90.0);
        assert_eq!((rate.median, rate.p10, rate.p90), (18.0, 10.0, 90.0), "fast is short");
        assert_eq!(spread.scaled(2.0).p90, 18.0, "doubled");
    }

    #[test]
    fn what_warms_up_does_not_count() {
        let mut calls = 0_u32;
        let slow_start = || {
            calls += 1;
            std::thread::sleep(Duration::from_millis(2));
            Ok::<_, ()>(if calls == 1 { 1e9 } else { 1.0 })
        };
        let spread = measure(Duration::from_millis(1), 3, slow_start).expect("no errors");
        assert_eq!((spread.p90, spread.n), (1.0, 3), "the first run is not among them");
        assert_eq!(measure(Duration::ZERO, 3, || Err::<f64, _>("broken")), Err("broken"), "errors end it");
    }
}
