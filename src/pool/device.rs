//! The pool's device side: arenas and page tables as buffers, byte for byte what [`PagePool`] says.

use super::PagePool;
use crate::device::{Device, DeviceError};
use crate::geometry::Bytes;

/// The buffers behind a [`PagePool`].
#[derive(Debug)]
pub struct PoolBuffers {
    pub(crate) arenas: Vec<wgpu::Buffer>,
    pub(crate) tables: wgpu::Buffer,
}

impl PoolBuffers {
    /// Allocates every arena and the tables.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] when the device holds less than the budget.
    pub fn new(device: &Device, pool: &PagePool) -> Result<Self, DeviceError> {
        let arenas = pool.arena_bytes().map(|bytes| device.storage("arena", bytes)).collect::<Result<_, _>>()?;
        Ok(Self { arenas, tables: device.storage("page tables", pool.tables())? })
    }

    /// Bytes of all buffers.
    pub fn bytes(&self) -> Bytes {
        Bytes(self.arenas.iter().map(wgpu::Buffer::size).sum::<u64>() + self.tables.size())
    }
}
