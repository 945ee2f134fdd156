//! Page tables on their way to the device.

use crate::geometry::WORD_BYTES;
use crate::schedule::{Caches, StepPlan};

/// Page tables that changed since they were uploaded. It keeps its memory.
#[derive(Debug, Default)]
pub(super) struct DirtyTables {
    pub(super) words: Vec<u32>,
    /// First entry in the table buffer, first word here, words.
    regions: Vec<(u32, usize, usize)>,
}

impl DirtyTables {
    pub(super) fn collect(&mut self, plan: &StepPlan, caches: &mut Caches) {
        self.words.clear();
        self.regions.clear();
        for rows in &plan.segments {
            let table = caches.tables.get_mut(&rows.session).expect("a planned session has a table");
            if table.is_dirty() {
                let from = self.words.len();
                let region = table.write_region(&mut self.words);
                self.regions.push((region, from, self.words.len() - from));
            }
        }
    }

    /// Copies every region from the staging half, in which the words begin at `offset` bytes.
    pub(super) fn record(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        source: &wgpu::Buffer,
        offset: u64,
        tables: &wgpu::Buffer,
    ) {
        for (region, from, n) in &self.regions {
            let (from, to) = (offset + *from as u64 * WORD_BYTES, u64::from(*region) * WORD_BYTES);
            encoder.copy_buffer_to_buffer(source, from, tables, to, *n as u64 * WORD_BYTES);
        }
    }
}
