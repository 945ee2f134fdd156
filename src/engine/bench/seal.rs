//! Seal: full f16 pages become codes.

use std::sync::Arc;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::inputs::{copies, n_copies, numbers, page_cells, places, targets};
use super::outputs::{filled, poison};
use super::{BenchSettings, Checked, KernelRun, Work};
use crate::compression::hidden::{HeadParameters, HiddenCodec, PageContext};
use crate::device::Device;
use crate::device::staging::{Uploader, download};
use crate::engine::EngineError;
use crate::geometry::{Bytes, CELL_BYTES};
use crate::kernels::abi::{SealItem, SealParams};
use crate::kernels::attention::CacheShape;
use crate::kernels::pipeline::{Pipeline, PipelineCache};
use crate::kernels::seal::SealSpec as SealKernel;
use crate::kernels::{Recorder, Slot, flat_grid};

/// Pages of different contents.
const DISTINCT: usize = 16;

/// What is sealed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SealSpec {
    /// Heads and pages.
    pub shape: CacheShape,
    /// What pages become; one that needs nothing of a model.
    pub codec: HiddenCodec,
    /// Pages, each of one KV head.
    pub pages: u32,
}

/// Sealing, ready to run.
#[derive(Debug)]
pub struct SealRun {
    spec: SealSpec,
    pipeline: Arc<Pipeline>,
    /// Workgroups of a page.
    strips: u32,
    /// Of each copy.
    groups: Vec<wgpu::BindGroup>,
    open: Vec<wgpu::Buffer>,
    sealed: Vec<wgpu::Buffer>,
    /// First cell of each sealed page.
    places: Vec<u32>,
    /// First cell of the first page that is read.
    first_open: u32,
    /// Words of the distinct pages, by definition.
    expected: Vec<Vec<u32>>,
}

impl SealRun {
    /// Makes pages and compiles.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn new(
        device: &Device,
        pipelines: &mut PipelineCache,
        spec: &SealSpec,
        settings: &BenchSettings,
    ) -> Result<Self, EngineError> {
        let SealSpec { shape, codec, pages } = *spec;
        let page = shape.page();
        codec.check(page).map_err(EngineError::Input)?;
        let format = shape.format(codec);
        let seal = SealKernel::new(format);
        let (pipeline, strips) = (pipelines.get(device, &seal.kernel())?, seal.strips());
        let mut rng = ChaCha8Rng::seed_from_u64(29);
        let elements = usize::try_from(page.elements()).expect("a page fits in memory");
        let mut side = || numbers(&mut rng, elements);
        let contents: Vec<_> = (0..DISTINCT).map(|_| (side(), side())).collect();
        let parameters = HeadParameters::default();
        let context = PageContext::at(&parameters, page.page_size);
        let encoded = |codec: HiddenCodec| -> Vec<Vec<u32>> {
            contents.iter().map(|(k, v)| codec.encode(page, context, k, v)).collect()
        };
        let (open_cells, sealed_cells) = (page_cells(HiddenCodec::F16, page), page_cells(codec, page));
        let open_places = places(&mut rng, pages, open_cells, settings);
        let places = places(&mut rng, pages, sealed_cells, settings);
        // Item i reads a page of contents i % DISTINCT, wherever it lies.
        let f16 = encoded(HiddenCodec::F16);
        let mut image = vec![0_u32; (pages * open_cells * 4) as usize];
        for (words, at) in f16.iter().cycle().zip(&open_places) {
            image[*at as usize * 4..][..words.len()].copy_from_slice(words);
        }
        let item = |i: u32| SealItem {
            open_entry: i,
            sealed_entry: pages + i,
            first_position: page.page_size,
            ..SealItem::default()
        };
        let items: Vec<SealItem> = (0..pages).map(item).collect();
        let step = filled(device, "step", &items)?;
        let tables = filled(device, "tables", &[&open_places[..], &places].concat())?;
        let unused = device.storage("codec parameters", Bytes(16))?;
        let sealed_bytes = Bytes(u64::from(pages * sealed_cells) * CELL_BYTES);
        let n = n_copies(image.len() as u64 * 4 + sealed_bytes.0, settings);
        let open = copies(device, "open pages", &image, n)?;
        let sealed = targets(device, "sealed pages", sealed_bytes, n)?;
        let bind = |(open, sealed)| pipeline.bind(device, &[&step, &tables, &unused, open, sealed].map(Slot::Whole));
        let groups = open.iter().zip(&sealed).map(bind).collect();
        let (expected, first_open) = (encoded(codec), open_places[0]);
        Ok(Self { spec: *spec, pipeline, strips, groups, open, sealed, places, first_open, expected })
    }
}

impl KernelRun for SealRun {
    fn copies(&self) -> bool {
        true
    }

    fn work(&self) -> Work {
        let page = self.spec.shape.page();
        let bytes = HiddenCodec::F16.page_bytes(page).0 + self.spec.codec.page_bytes(page).0;
        Work { bytes: f64::from(self.spec.pages) * bytes as f64, flop: 0.0, pairs: None }
    }

    fn record(&self, recorder: &mut Recorder<'_>, copy: usize) {
        let params = SealParams { items: 0, n_items: self.spec.pages, layer: 0 };
        let grid = flat_grid(params.n_items * self.strips);
        recorder.dispatch(&self.pipeline, &self.groups[copy % self.groups.len()], &params, grid);
    }

    fn poison(&mut self, device: &Device) -> Result<(), EngineError> {
        Ok(poison(device, &self.sealed.iter().collect::<Vec<_>>())?)
    }

    fn check(&mut self, device: &Device, copy: usize) -> Result<Checked, EngineError> {
        let sealed = &self.sealed[copy % self.sealed.len()];
        let length = usize::try_from(sealed.size()).expect("a buffer fits in the address space");
        let words: Vec<u32> = bytemuck::pod_collect_to_vec(&download(device, sealed, 0, length)?);
        let expected = self.expected.iter().cycle().zip(&self.places);
        let right = |(page, at): (&Vec<u32>, &u32)| words[*at as usize * 4..][..page.len()] == page[..];
        let all_right = expected.clone().all(right);
        let compared = expected.map(|(page, _)| page.len()).sum();
        // Codes are exact: one bit is as wrong as all.
        let error_over_bound = if all_right { 0.0 } else { f64::INFINITY };
        Ok(Checked { compared, missing: 0, error_over_bound, nmse: 0.0 })
    }

    fn spoil(&mut self, device: &Device, copy: usize) -> Result<(), EngineError> {
        let garbage = vec![0x4A_u8; 1 << 10];
        let (open, at) = (&self.open[copy % self.open.len()], u64::from(self.first_open) * CELL_BYTES);
        Ok(Uploader::new(device, "spoiled page", Bytes(1 << 10))?.upload(device, &garbage, open, at)?)
    }
}
