//! Measuring: kernels against the oracle, and models against texts.

pub mod calibration;
pub mod ceilings;
pub mod fleet;
pub mod heads;
pub mod kernels;
pub mod kl;
pub mod metrics;
pub mod needle;
pub mod perplexity;
pub mod prompt;
pub mod simulate;
pub mod spread;
pub mod step;
pub mod switch;
pub mod tune;
pub mod verify;
