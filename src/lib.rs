//! Concertina.
pub mod compression;
pub mod device;
pub mod geometry;
pub mod kernels;
pub mod pool;
pub mod weights;
