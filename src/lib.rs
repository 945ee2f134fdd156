//! Concertina: compressed attention for many long-context sessions on one GPU, on wgpu.
//!
//! # Should I use this?
//!
//! If several long contexts must share one GPU and memory is what runs out, and the GPU may be anyone's: attention runs
//! in WGSL compute shaders over a paged KV cache, a Rust host keeps a byte budget of device memory and schedules
//! sessions in it, and a CPU reference answers for every kernel. Pages can be compressed; [`compression`] says how and
//! what is still to come. If you serve one model on one vendor's data-centre card, a server for that card is faster.
//!
//! # Example
//!
//! ```
//! use concertina::compression::Compression;
//! use concertina::geometry::{Bytes, HeadGeometry, ModelGeometry, PageGeometry};
//! use concertina::pool::page_table::TableShape;
//! use concertina::theory::predict::kv_bytes;
//!
//! // What does a context cost? SmolLM2-135M keeps 22.5 KiB per token.
//! let model = ModelGeometry {
//!     num_layers: 30,
//!     hidden_size: 576,
//!     intermediate_size: 1536,
//!     heads: HeadGeometry { num_qo_heads: 9, num_kv_heads: 3, head_dim: 64 },
//!     vocab_size: 49152,
//!     context_length: 8192,
//!     rope_theta: 100_000.0,
//!     rms_norm_eps: 1e-5,
//! };
//! assert_eq!(kv_bytes(&model, &Compression::default(), 1), Bytes(23_040));
//! // In pages of 64 tokens per (layer, KV head), 1000 tokens round up to 16 pages in each of 90 lists.
//! let page = PageGeometry { page_size: 64, head_dim: 64 };
//! let codec = Compression::default().hidden;
//! let full = TableShape { num_layers: 30, num_kv_heads: 3, page, codec, quest: None };
//! assert_eq!(full.bytes_for(1000), Bytes(90 * 16 * (16 << 10)));
//! // With 4 bits and their scales, 15 sealed pages of 5 KiB and one that is still open.
//! let kivi4 = TableShape { codec: "kivi4".parse().unwrap(), ..full };
//! assert_eq!(kivi4.bytes_for(1000), Bytes(90 * (15 * (5 << 10) + (16 << 10))));
//! ```
//!
//! `examples/minimal_decode.rs` runs attention on a GPU in a hundred lines.
//!
//! # Map of rooms
//!
//! Imports go from left to right only; `tests/room_order.rs` holds them to it.
//!
//! ```text
//! geometry -> compression -> theory
//!    |            |            |
//!    v            v            v
//! reference     device -> pool -> kernels -> schedule -> engine -> eval, report -> command line
//!                                               ^           ^
//!                                            (no wgpu)    model
//! ```
//!
//! | paper's challenge (arXiv:2405.08944) | bounded by | room |
//! |---|---|---|
//! | concurrency: how many sessions fit | device memory size | [`pool`] |
//! | prefill latency | FLOP/s | [`kernels::prefill`] |
//! | decode latency | device memory bandwidth | [`kernels::decode`] |
//! | context switch | host link bandwidth | [`pool`], [`schedule`] |

pub mod compression;
pub mod device;
pub mod disk;
pub mod engine;
pub mod eval;
pub mod geometry;
pub mod kernels;
#[cfg(feature = "model")]
pub mod model;
pub mod pool;
pub mod reference;
#[cfg(feature = "model")]
pub mod report;
pub mod schedule;
pub mod theory;
pub mod weights;
