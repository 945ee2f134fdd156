//! `verify`: every kernel against its oracle on this device.
//!
//! Each check yields the largest observed error as a fraction of its derived bound, and for attention the NMSE. A
//! check whose fraction exceeds 1 has failed.

pub mod attention;
mod codecs;
pub mod eviction;
pub mod eviction_tunings;
mod latent;
pub mod operators;
mod tunings;

use serde::Serialize;

use crate::device::{Device, Tier};
use crate::engine::EngineError;
use crate::kernels::PipelineCache;

/// The outcome of one check.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// The kernel.
    pub kernel: &'static str,
    /// What was run.
    pub case: String,
    /// Numbers compared.
    pub compared: usize,
    /// Largest observed error / bound.
    pub error_over_bound: f64,
    /// Normalised mean squared error, where it is meaningful.
    pub nmse: Option<f64>,
}

/// Largest NMSE that attention may have.
pub const NMSE_LIMIT: f64 = 1e-6;

impl Check {
    /// Whether every number was within its bound. A check that compared nothing has not passed.
    pub fn passed(&self) -> bool {
        self.compared > 0 && self.error_over_bound <= 1.0 && self.nmse.is_none_or(|e| e <= NMSE_LIMIT)
    }
}

/// How much to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Every head width, group size and codec, contexts to 4097 tokens.
    Full,
    /// Two shapes, every codec and short contexts.
    Quick,
}

/// Runs every check, reporting each as it finishes.
///
/// # Errors
/// [`EngineError`] when the device refuses; a wrong result is a [`Check`], not an error.
pub fn run(device: &Device, extent: Extent, each: &mut dyn FnMut(&Check)) -> Result<Vec<Check>, EngineError> {
    let mut checks = Vec::new();
    let mut report = |check: Check| {
        each(&check);
        checks.push(check);
    };
    operators::run(device, &mut report)?;
    latent::run(device, &mut report)?;
    codecs::run(device, extent, &mut report)?;
    attention::run(device, extent, &mut report)?;
    // Evictions share kernels.
    let mut pipelines = PipelineCache::default();
    eviction::run(device, &mut pipelines, extent, &mut report)?;
    eviction_tunings::run(device, &mut pipelines, extent, &mut report)?;
    tunings::run(device, extent, &mut report)?;
    Ok(checks)
}

/// How many checks [`run`] will make in a tier.
pub fn count(tier: Tier, extent: Extent) -> usize {
    operators::count(tier)
        + latent::COUNT
        + codecs::count(extent)
        + attention::count(extent)
        + eviction::count(extent)
        + eviction_tunings::count(extent)
        + tunings::count(tier, extent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_fails_on_error_poison_and_emptiness() {
        let check = |compared, error_over_bound, nmse| {
            Check { kernel: "decode", case: String::new(), compared, error_over_bound, nmse }.passed()
        };
        assert!(check(1, 0.5, Some(1e-9)), "good");
        assert!(!check(1, 1.5, None), "over the bound");
        assert!(!check(1, f64::INFINITY, None), "poison");
        assert!(!check(1, 0.5, Some(1e-5)), "NMSE");
        assert!(!check(0, 0.0, None), "nothing compared");
    }
}
