//! The theory: what a cache costs, how many fit, and how long a step takes, before anything runs (arXiv:2405.08944).
//!
//! [`predict`], [`model`] and [`step`] hold the equations, with units; [`presets`] the models and GPUs that have names. Every
//! measured number is shown beside its prediction.

pub mod model;
pub mod predict;
pub mod presets;
mod presets_file;
pub mod step;
