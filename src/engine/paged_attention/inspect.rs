//! What tests look at: pages and scores as the device holds them.

use super::{PagedAttention, SequenceId};
use crate::device::DeviceError;
use crate::device::staging::download;
use crate::engine::EngineError;
use crate::geometry::{Bytes, CELL_BYTES, WORD_BYTES};
use crate::pool::PageId;

/// Words of a list's pages as the device holds them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevicePages {
    /// Pages of what the list has in common with another layer's.
    pub merged: Vec<Vec<u32>>,
    /// Pages in the codec: kept ones, then sealed ones.
    pub sealed: Vec<Vec<u32>>,
    /// Open pages, in order.
    pub open: Vec<Vec<u32>>,
}

impl PagedAttention<'_> {
    /// Scores that the last eviction ranked by, `[list][tokens]`, for so many tokens of each list; for tests.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn decided_scores(&self, tokens: &[usize]) -> Result<Vec<Vec<f32>>, EngineError> {
        let Some((kernels, _)) = &self.evictions else { return Ok(Vec::new()) };
        let of_list = |(list, n): (u64, &usize)| {
            let at = list * u64::from(kernels.sizes().capacity) * WORD_BYTES;
            Ok(bytemuck::pod_collect_to_vec(&download(self.device, &kernels.buffers().decided, at, n * 4)?))
        };
        (0..).zip(tokens).map(of_list).collect()
    }

    /// The pages of one KV head of a sequence's first layer as the device holds them, in order: those in its codec, then open
    /// ones; for tests.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn pages(&self, sequence: SequenceId, kv_head: u32) -> Result<DevicePages, EngineError> {
        self.pages_of_layer(sequence, 0, kv_head)
    }

    /// The same of any layer.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn pages_of_layer(&self, sequence: SequenceId, layer: u32, kv_head: u32) -> Result<DevicePages, EngineError> {
        let table = self.table(sequence)?;
        let read = |pages: &[PageId], page: Bytes| -> Result<Vec<Vec<u32>>, DeviceError> {
            let bytes = usize::try_from(page.0).expect("a page fits in the address space");
            let one = |id: &PageId| {
                let arena = &self.buffers.arenas[usize::from(id.arena)];
                download(self.device, arena, u64::from(id.cell) * CELL_BYTES, bytes)
            };
            pages.iter().map(|id| Ok(bytemuck::pod_collect_to_vec(&one(id)?))).collect()
        };
        let (sealed, open) = table.list(layer, kv_head);
        let (sealed_page, open_page) = (table.shape().sealed_page(), table.shape().open_page());
        let merged = read(table.merged_pages(layer, kv_head), table.shape().merged_page())?;
        Ok(DevicePages { merged, sealed: read(&sealed, sealed_page)?, open: read(open, open_page)? })
    }

    /// Turns over one bit of a sealed page of a sequence's first KV head, for tests of what finds it.
    ///
    /// # Errors
    /// [`EngineError`].
    ///
    /// # Panics
    /// When there is no such page or word.
    pub fn flip(&mut self, sequence: SequenceId, page: usize, word: u32, bit: u32) -> Result<(), EngineError> {
        let sealed = self.pages(sequence, 0)?.sealed;
        let turned = sealed[page][word as usize] ^ (1 << bit);
        let id = self.table(sequence)?.list(0, 0).0[page];
        let arena = &self.buffers.arenas[usize::from(id.arena)];
        let at = u64::from(id.cell) * CELL_BYTES + u64::from(word) * WORD_BYTES;
        Ok(self.uploader.upload(self.device, &turned.to_le_bytes(), arena, at)?)
    }
}
