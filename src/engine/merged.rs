//! Layers that have tokens in common: which tokens those are.

use super::EngineError;
use super::eviction::{Evictor, Kept, Words, count, within};
use crate::compression::hidden::HiddenCodec;
use crate::compression::layer::minicache;
use crate::geometry::WORD_BYTES;
use crate::kernels::Recorder;
use crate::kernels::abi::{GatherItem, MergeLayersItem};
use crate::kernels::plan::{ByPlace, Place};
use crate::pool::PageId;
use crate::pool::page_table::{PageTable, Window};
use crate::schedule::Merging;

impl Evictor<'_> {
    /// Takes from the lists of merged layers the tokens that both kept and that point alike; what the lower ones then have in
    /// common with the upper ones. Lists that changed are uploaded, merged tokens behind those of the lower layer.
    pub(super) fn merge(
        &mut self,
        window: &Window,
        source: &PageTable,
        kept: &mut Kept,
        merging: &Merging,
    ) -> Result<Kept, EngineError> {
        let (capacity, kv_heads) = (self.kernels.sizes().capacity, source.shape().num_kv_heads);
        let size = source.shape().page.page_size;
        let lists =
            |(lower, upper): (u32, u32), head: u32| [lower, upper].map(|layer| (layer * kv_heads + head) as usize);
        let mut merged = vec![Vec::new(); kept.len()];
        for pair in merging.pairs.iter().copied() {
            for head in 0..kv_heads {
                let [lower, upper] = lists(pair, head);
                let common = kept[lower].iter().filter(|index| kept[upper].binary_search(index).is_ok());
                merged[lower] = common.copied().collect();
                self.upload_kept(lower, &merged[lower])?;
            }
        }
        // Distances of all tokens that both layers kept, a window of pages at a time.
        let mut units = Vec::new();
        for pair in merging.pairs.iter().copied() {
            for head in 0..kv_heads {
                let n_tokens = count(merged[lists(pair, head)[0]].len());
                units.extend((0..n_tokens.div_ceil(size)).map(|page| (pair, head, page, n_tokens)));
            }
        }
        for batch in units.chunks((window.entries() / 2).max(1) as usize) {
            let mut gathers: ByPlace<GatherItem, Place> = ByPlace::default();
            let mut distances = Vec::new();
            for (slot, (pair, head, page, n_tokens)) in (0_u32..).zip(batch) {
                let (lower, n_kept) = (count(lists(*pair, *head)[0]), (n_tokens - page * size).min(size));
                let at = lower * capacity + page * size;
                for (layer, target) in [(pair.0, 2 * slot), (pair.1, 2 * slot + 1)] {
                    for from in source.held_runs(layer, *head) {
                        let item = GatherItem {
                            source: from.entry,
                            index: from.index,
                            n_tokens: from.n_tokens,
                            list: layer * kv_heads + head,
                            target,
                            kept: at,
                            n_kept,
                            ..GatherItem::default()
                        };
                        let place = Place { codec: from.codec, arena: from.arena, sealed_arena: PageId::WINDOW };
                        gathers.push(place, item);
                    }
                }
                let (lower, upper) = (2 * slot, 2 * slot + 1);
                distances.push(MergeLayersItem { lower, upper, target: 0, out: at, n_tokens: n_kept, pad: [0; 3] });
            }
            let (mut words, mut items) = (Words(vec![0; 4]), Vec::new());
            let dispatches = gathers.laid_out(&mut items);
            let (gathers_at, distances_at) = (words.put(&items), words.put(&distances));
            let (kernels, codec) = (self.kernels, HiddenCodec::F16);
            let record = |recorder: &mut Recorder<'_>| {
                for (place, range) in &dispatches {
                    let (items, n) = within(range, gathers_at, 3);
                    kernels.record_gather(recorder, *place, items, n);
                }
                kernels.record_merge(recorder, (codec, 0), (distances_at, count(distances.len())), false);
            };
            self.submit(&words, record, |_| ())?;
        }
        for pair in merging.pairs.iter().copied() {
            for head in 0..kv_heads {
                let [lower, upper] = lists(pair, head);
                let common = std::mem::take(&mut merged[lower]);
                let distances = self.read_decided(lower, common.len())?;
                let retained = minicache::retained(&distances, merging.retain_permille);
                let of = |stays: bool| (0..).zip(&common).filter(move |(i, _)| retained.contains(i) == stays);
                merged[lower] = of(false).map(|(_, index)| *index).collect();
                for list in [lower, upper] {
                    kept[list].retain(|index| merged[lower].binary_search(index).is_err());
                    let listed =
                        if list == lower { [&kept[list][..], &merged[lower]].concat() } else { kept[list].clone() };
                    self.upload_kept(list, &listed)?;
                }
            }
        }
        Ok(merged)
    }

    /// Uploads indices as those that a list keeps.
    fn upload_kept(&mut self, list: usize, indices: &[u32]) -> Result<(), EngineError> {
        let at = (list as u64 * u64::from(self.kernels.sizes().capacity)) * WORD_BYTES;
        let buffer = &self.kernels.buffers().kept;
        Ok(self.uploader.upload(self.device, bytemuck::cast_slice(indices), buffer, at)?)
    }

    /// The first decided scores of a list.
    fn read_decided(&self, list: usize, n: usize) -> Result<Vec<f32>, EngineError> {
        let at = (list as u64 * u64::from(self.kernels.sizes().capacity)) * WORD_BYTES;
        let bytes = n as u64 * WORD_BYTES;
        if n == 0 {
            return Ok(Vec::new());
        }
        let mut encoder = self.device.raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.copy_buffer_to_buffer(&self.kernels.buffers().decided, at, self.back.target(), 0, bytes);
        self.device.submit(encoder)?;
        let mut read = Vec::new();
        self.back.read(self.device, n * 4, &mut read)?;
        Ok(bytemuck::pod_collect_to_vec(&read))
    }
}
