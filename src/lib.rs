//! Concertina: compressed attention for many long-context sessions on one GPU, on wgpu.
#[cfg(feature = "model")]
pub mod model;
pub mod compression;
pub mod device;
pub mod engine;
pub mod eval;
pub mod geometry;
pub mod kernels;
pub mod pool;
pub mod reference;
pub mod schedule;
pub mod weights;
