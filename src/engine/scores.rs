//! Scores that observed rows left in a slot, back on the host: for measuring, since it reads them all.

use super::{Engine, EngineError, Evictions};
use crate::device::staging::download;
use crate::geometry::WORD_BYTES;

impl Engine<'_> {
    /// Raw scores of a slot: of each list the first `n_tokens`.
    ///
    /// # Errors
    /// [`EngineError::Input`] when the engine was made without evictions, or for fewer slots or tokens.
    pub fn raw_scores(&self, slot: u32, n_tokens: u32) -> Result<Vec<Vec<f32>>, EngineError> {
        let Some(Evictions { kernels, .. }) = &self.evictions else {
            return Err(EngineError::Input("this engine was made without evictions, and scores nothing".to_owned()));
        };
        let sizes = kernels.sizes();
        if slot >= sizes.slots || n_tokens > sizes.capacity {
            let (slots, capacity) = (sizes.slots, sizes.capacity);
            return Err(EngineError::Input(format!(
                "scores of {n_tokens} tokens in slot {slot} are wanted; evictions were made for {capacity} tokens in \
                 {slots} slots"
            )));
        }
        let bytes = u64::from(sizes.slot_values()) * WORD_BYTES;
        let length = usize::try_from(bytes).expect("a slot fits in the address space");
        let read = download(self.device, &kernels.buffers().raw, u64::from(slot) * bytes, length)?;
        let all: Vec<f32> = bytemuck::pod_collect_to_vec(&read);
        Ok(all.chunks_exact(sizes.capacity as usize).map(|list| list[..n_tokens as usize].to_vec()).collect())
    }
}
