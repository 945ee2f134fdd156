//! The ceilings of a device, measured: what [`theory`](crate::theory) calls a machine.

use std::time::Duration;

use serde::Serialize;

use super::spread::{Spread, measure};
use crate::engine::EngineError;
use crate::engine::ceilings::{Ceiling, Ceilings};

/// One ceiling.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// Which.
    pub ceiling: Ceiling,
    /// Bytes per second, FLOP per second, or seconds of a dispatch or a submission.
    pub value: Spread,
}

/// Measures one ceiling: `repeats` times after a warm-up.
///
/// # Errors
/// [`EngineError::Input`] where the result of the work is wrong, so that its time says nothing; [`EngineError::Device`].
pub fn ceiling(
    ceilings: &mut Ceilings<'_>,
    ceiling: Ceiling,
    warm_up: Duration,
    repeats: usize,
) -> Result<Measured, EngineError> {
    // Before the figure, so that no time is spent on what does not count; and after, so that all of it does.
    ceilings.run(ceiling)?;
    ceilings.check(ceiling)?;
    let seconds = measure(warm_up, repeats, || ceilings.run(ceiling).map(|time| time.as_secs_f64().max(1e-9)))?;
    ceilings.check(ceiling)?;
    let work = ceilings.work(ceiling);
    let value = match ceiling {
        Ceiling::Dispatch | Ceiling::Submission => seconds.scaled(1.0 / work),
        _ => seconds.rate(work),
    };
    Ok(Measured { ceiling, value })
}
