//! The pool's device side: arenas, window and page tables as buffers, byte for byte what [`PagePool`] says.

use super::PagePool;
use super::page_table::Window;
use crate::device::staging::Uploader;
use crate::device::{Device, DeviceError};
use crate::geometry::Bytes;

/// The buffers behind a [`PagePool`].
#[derive(Debug)]
pub struct PoolBuffers {
    pub(crate) arenas: Vec<wgpu::Buffer>,
    pub(crate) window: wgpu::Buffer,
    pub(crate) tables: wgpu::Buffer,
}

impl PoolBuffers {
    /// Allocates every arena, the window and the tables.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] when the device holds less than the budget.
    pub fn new(device: &Device, pool: &PagePool, window: &Window) -> Result<Self, DeviceError> {
        let arenas = pool.arena_bytes().map(|bytes| device.storage("arena", bytes)).collect::<Result<_, _>>()?;
        Ok(Self {
            arenas,
            window: device.storage("window", Self::window_bytes(window))?,
            tables: device.storage("page tables", pool.tables())?,
        })
    }

    /// Bytes of the window's buffer, which exists even where the window has no pages.
    pub fn window_bytes(window: &Window) -> Bytes {
        window.bytes().max(Bytes(16))
    }

    /// Writes the window's entries at the start of the tables.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn write_window(&self, device: &Device, uploader: &mut Uploader, window: &Window) -> Result<(), DeviceError> {
        uploader.upload(device, bytemuck::cast_slice(&window.write_entries()), &self.tables, 0)
    }

    /// Every arena, then the window.
    pub(crate) fn with_window(&self) -> impl Iterator<Item = &wgpu::Buffer> {
        self.arenas.iter().chain([&self.window])
    }

    /// Bytes of all buffers.
    pub fn bytes(&self) -> Bytes {
        Bytes(self.with_window().map(wgpu::Buffer::size).sum::<u64>() + self.tables.size())
    }
}
