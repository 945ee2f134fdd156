//! The CPU reference: what every kernel answers to.
//!
//! It shares no algorithm with the kernels. [`attention`] is dense, two-pass and in f64; [`transformer`] runs a whole
//! sequence without any cache; [`scoring`] says what tokens are worth to an eviction; [`compare`] measures how far two
//! results are apart, and knows how far they may be.

pub mod attention;
pub mod compare;
pub mod sampling;
pub mod scoring;
pub mod transformer;
