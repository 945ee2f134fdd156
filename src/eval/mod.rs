//! Measuring: kernels against the oracle, and models against texts.

pub mod verify;
