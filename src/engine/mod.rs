//! The engine: executes on a device what the schedule planned.
//!
//! * [`paged_attention::PagedAttention`] is attention over a paged cache without a model: the library's smallest useful
//!   part, and what `verify` and the kernel tests drive.
//! * `Engine` adds weights, activations and sampling, and implements the schedule's
//!   [`Backend`](crate::schedule::Backend): one step of a whole batch is one submission.

pub mod paged_attention;

use crate::device::DeviceError;
use crate::kernels::KernelError;
use crate::pool::PoolError;

/// What can go wrong while executing.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A kernel does not run here.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The pool can not give what is asked.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The caller's numbers do not fit together.
    #[error("{0}")]
    Input(String),
}
