//! Measuring: kernels against the oracle, and models against texts.

pub mod calibration;
pub mod fleet;
pub mod heads;
pub mod kl;
pub mod needle;
pub mod perplexity;
pub mod prompt;
pub mod simulate;
pub mod switch;
pub mod verify;
