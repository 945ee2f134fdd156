//! The theory: what a cache costs, how many fit, and how long a step takes, before anything runs (arXiv:2405.08944).
//!
//! [`predict`], [`cache`], [`model`], [`step`], [`challenges`] and [`throughput`] hold the equations, with units; [`presets`] the
//! models and GPUs that have names; [`search`] looks for compressions, [`quality`] says what is known of them. Every measured
//! number is shown beside its prediction.

pub mod cache;
pub mod challenges;
pub mod model;
pub mod parallel;
pub mod predict;
pub mod presets;
mod presets_file;
pub mod quality;
pub mod search;
pub mod step;
pub mod throughput;
