//! When a time counts: after a warm-up, once times have settled, and how many of them.

use std::time::{Duration, Instant};

use crate::eval::spread::Spread;

/// How a kernel is timed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Protocol {
    /// Seconds that the device is busy before anything counts.
    pub warm_up: f64,
    /// Seconds after which it counts although times have not settled.
    pub most_warm_up: f64,
    /// Times that count.
    pub samples: usize,
    /// Times that count of a run so long that `seconds` are over.
    pub least: usize,
    /// Host seconds of one kernel and case, warm-up included, beyond which only what `least` asks for is still run.
    pub seconds: f64,
}

/// How far the last times of a warm-up may lie apart, as a part of the shortest.
const SETTLED: f64 = 0.03;
/// How many times these are.
const LAST: usize = 5;
/// Seconds of a submission: far above what starting one costs.
const SUBMISSION: f64 = 0.02;

impl Protocol {
    /// For a GPU, where a run takes milliseconds.
    pub const FULL: Self = Self { warm_up: 0.4, most_warm_up: 2.0, samples: 30, least: 5, seconds: 8.0 };
    /// For processors that pretend to be a GPU, whose clocks do not depend on what was run before.
    pub const SOFTWARE: Self = Self { warm_up: 0.1, most_warm_up: 0.5, samples: 30, least: 5, seconds: 1.5 };

    /// Seconds of each run that counts, and whether times had settled by then. `run` runs so many times, from a turn on.
    ///
    /// # Errors
    /// Those of `run`.
    ///
    /// # Panics
    /// Never: at least one run is timed.
    pub fn times<E>(
        &self,
        most: usize,
        mut run: impl FnMut(usize, usize) -> Result<Vec<Duration>, E>,
    ) -> Result<(Spread, bool), E> {
        let started = Instant::now();
        let mut turn = 0;
        let mut next = |n: usize| -> Result<Vec<f64>, E> {
            let times = run(turn, n)?;
            turn += n;
            // A clock of the device may be coarser than its shortest kernel.
            Ok(times.into_iter().map(|time| time.as_secs_f64().max(1e-9)).collect())
        };
        let mut before = next(1)?;
        let mut at_once = 1;
        let mut busy = before[0];
        while !(busy >= self.warm_up && settled(&before)) {
            if busy >= self.most_warm_up || started.elapsed().as_secs_f64() >= self.seconds / 2.0 {
                break;
            }
            at_once = in_a_submission(before[before.len() - 1], most);
            let times = next(at_once)?;
            busy += times.iter().sum::<f64>();
            before.extend(times);
        }
        let mut counted = Vec::new();
        while counted.len() < self.samples {
            if counted.len() >= self.least && started.elapsed().as_secs_f64() >= self.seconds {
                break;
            }
            counted.extend(next(at_once.min(self.samples - counted.len()))?);
        }
        Ok((Spread::of(counted).expect("at least one run is timed"), settled(&before)))
    }
}

/// Runs of a submission.
fn in_a_submission(seconds: f64, most: usize) -> usize {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped, and above 0")]
    let wanted = (SUBMISSION / seconds).clamp(1.0, 1e6) as usize;
    wanted.min(most)
}

/// Whether the last times are alike.
fn settled(times: &[f64]) -> bool {
    let Some(first) = times.len().checked_sub(LAST) else { return false };
    let (low, high) = times[first..].iter().fold((f64::INFINITY, 0.0), |(l, h), t| (f64::min(l, *t), f64::max(h, *t)));
    high <= low * (1.0 + SETTLED)
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: Protocol = Protocol { warm_up: 0.4, most_warm_up: 2.0, samples: 30, least: 5, seconds: 1e9 };

    #[test]
    fn a_clock_that_rises_is_waited_for() {
        // A card that idled: the first 100 runs take 10 ms, later ones 2 ms.
        let mut ran = Vec::new();
        let (spread, settled) = QUICK
            .times(8, |turn, n| {
                ran.push((turn, n));
                let time = |i: usize| Duration::from_micros(if i < 100 { 10_000 } else { 2_000 });
                Ok::<_, ()>((turn..turn + n).map(time).collect())
            })
            .expect("no errors");
        assert!(settled && spread.n == 30, "{spread:?}");
        assert_eq!(spread.median, 0.01, "0.4 s of equal times are settled: the rise came later than anyone waits");
        let next = ran.iter().fold(0, |end, (turn, n)| if *turn == end { end + n } else { usize::MAX });
        assert!(next >= 70, "turns follow each other without a gap: {ran:?}");
        // Times that fall all the time do not settle before the end of the warm-up.
        let mut time = 0.1;
        let mut next = || {
            time *= 0.96;
            Duration::from_secs_f64(time)
        };
        let (_, settled) = QUICK.times(8, |_, n| Ok::<_, ()>((0..n).map(|_| next()).collect())).expect("no errors");
        assert!(!settled, "times that fall have not settled");
    }

    #[test]
    fn slow_runs_are_few_and_short_ones_share_a_submission() {
        let slow = Protocol { seconds: 0.0, ..QUICK };
        let (spread, settled) = slow.times(64, |_, n| Ok::<_, ()>(vec![Duration::from_secs(1); n])).expect("no errors");
        assert_eq!((spread.n, settled), (5, false), "no time left: the least that counts, not settled");
        assert_eq!([0.1, 0.019, 0.002, 1e-6].map(|t| in_a_submission(t, 64)), [1, 1, 10, 64], "20 ms at once");
        let failed = QUICK.times(64, |_, _| Err::<Vec<Duration>, _>("broken"));
        assert_eq!(failed, Err("broken"), "errors end it");
    }
}
