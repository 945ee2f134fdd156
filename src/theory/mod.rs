//! The theory: what a cache costs and how many fit, before anything runs (arXiv:2405.08944).
//!
//! [`predict`] holds the equations, with units; every measured number is shown beside its prediction.

pub mod predict;
