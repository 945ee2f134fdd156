//! Append: rows of a prompt to open pages, their queries and keys turned on the way.

use std::sync::Arc;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::inputs::{Counts, copies, n_copies, numbers, page_cells, places, targets};
use super::outputs::{filled, poison};
use super::{BenchSettings, Checked, KernelRun, Work};
use crate::compression::hidden::HiddenCodec;
use crate::compression::hidden::{HeadParameters, PageContext};
use crate::device::Device;
use crate::device::staging::{Uploader, download};
use crate::engine::EngineError;
use crate::geometry::{Bytes, CELL_BYTES, HeadGeometry, WORD_BYTES};
use crate::kernels::abi::{AppendItem, AppendParams};
use crate::kernels::append::{self, Positions};
use crate::kernels::attention::CacheShape;
use crate::kernels::pipeline::{Pipeline, PipelineCache};
use crate::kernels::{Recorder, Slot, flat_grid};
use crate::reference::compare::{Tolerance, nmse};

/// Rows that are compared.
const SAMPLES: u32 = 8;
/// What an error of f32 becomes when a key is rounded to f16: half a unit there is so many units here.
const HALF_UNIT: f64 = (1 << 12) as f64;

/// What is appended: whole pages of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AppendSpec {
    /// Heads and pages.
    pub shape: CacheShape,
    /// Pages of each KV head.
    pub pages: u32,
}

/// Appending, ready to run.
#[derive(Debug)]
pub struct AppendRun {
    spec: AppendSpec,
    pipeline: Arc<Pipeline>,
    /// Of each copy.
    groups: Vec<wgpu::BindGroup>,
    rows: Vec<wgpu::Buffer>,
    arenas: Vec<wgpu::Buffer>,
    params: AppendParams,
    /// `[rows][query, key and value heads][head_dim]` before any run.
    values: Vec<f32>,
    /// What the device gets of them: the same unless it is spoiled.
    uploaded: Vec<f32>,
    /// `[row][head_dim / 2]` (cos, sin).
    angles: Vec<[f32; 2]>,
    /// `[page][KV head]`: first cell.
    places: Vec<u32>,
    /// Each run turns the queries once more.
    turns: Counts,
}

impl AppendSpec {
    const fn n_rows(&self) -> u32 {
        self.pages * self.shape.page_size
    }

    const fn stride(&self) -> u32 {
        self.shape.heads.q_width() + 2 * self.shape.heads.kv_width()
    }

    fn items(&self) -> Vec<AppendItem> {
        let (size, heads) = (self.shape.page_size, self.shape.heads.num_kv_heads);
        let item = |page: u32, kv_head: u32| AppendItem {
            row_lo: page * size,
            n_rows: size,
            kv_head,
            page_entry: page * heads + kv_head,
            ..AppendItem::default()
        };
        (0..self.pages).flat_map(|page| (0..heads).map(move |head| item(page, head))).collect()
    }
}

impl AppendRun {
    /// Makes rows and compiles.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn new(
        device: &Device,
        pipelines: &mut PipelineCache,
        spec: &AppendSpec,
        settings: &BenchSettings,
    ) -> Result<Self, EngineError> {
        let HeadGeometry { head_dim, num_kv_heads, .. } = spec.shape.heads;
        let (q_width, kv_width) = (spec.shape.heads.q_width(), spec.shape.heads.kv_width());
        let mut rng = ChaCha8Rng::seed_from_u64(31);
        let values = numbers(&mut rng, (spec.n_rows() * spec.stride()) as usize);
        #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is what is wanted")]
        let angle = |i: u32| {
            let (sin, cos) = (f64::from(i) * 0.37).sin_cos();
            [cos as f32, sin as f32]
        };
        let angles: Vec<[f32; 2]> = (0..spec.n_rows() * head_dim / 2).map(angle).collect();
        let items = spec.items();
        let mut words: Vec<u32> = bytemuck::cast_slice(&angles).to_vec();
        words.resize(words.len().next_multiple_of(4), 0);
        let first_item = u32::try_from(words.len() / 4).expect("a step is far below 2^32 words");
        words.extend_from_slice(bytemuck::cast_slice(&items));
        let n_pages = spec.pages * num_kv_heads;
        let cells = page_cells(HiddenCodec::F16, spec.shape.page());
        let places = places(&mut rng, n_pages, cells, settings);
        let (step, tables) = (filled(device, "step", &words)?, filled(device, "tables", &places)?);
        let arena_bytes = Bytes(u64::from(n_pages * cells) * CELL_BYTES);
        let n = n_copies(values.len() as u64 * WORD_BYTES + arena_bytes.0, settings);
        let rows = copies(device, "rows", &values, n)?;
        let arenas = targets(device, "open pages", arena_bytes, n)?;
        let pipeline = pipelines.get(device, &append::kernel(&spec.shape, Positions::Rotary))?;
        let bind = |(rows, arena)| pipeline.bind(device, &[&step, &tables, rows, arena].map(Slot::Whole));
        let groups = rows.iter().zip(&arenas).map(bind).collect();
        let params = AppendParams {
            items: first_item,
            n_items: n_pages,
            layer: 0,
            stride: spec.stride(),
            k_offset: q_width,
            v_offset: q_width + kv_width,
            angles: 0,
            n_rows: spec.n_rows(),
        };
        let (spec, turns, uploaded) = (*spec, Counts::new(n), values.clone());
        Ok(Self { spec, pipeline, groups, rows, arenas, params, values, uploaded, angles, places, turns })
    }

    /// A number of a row after so many turns, and the magnitude that its error multiplies.
    fn turned(&self, row: usize, at: usize, turns: u32) -> (f64, f64) {
        let dim = self.spec.shape.heads.head_dim as usize;
        let first = row * self.spec.stride() as usize + at / 2 * 2;
        let [a, b] = [self.values[first], self.values[first + 1]].map(f64::from);
        // The device's angles are f32, whose square is not exactly 1.
        let [cos, sin] = self.angles[row * dim / 2 + at % dim / 2].map(f64::from);
        let (phase, length) = (sin.atan2(cos) * f64::from(turns), sin.hypot(cos).powf(f64::from(turns)));
        let (sin, cos) = phase.sin_cos();
        let value = if at.is_multiple_of(2) { a * cos - b * sin } else { a * sin + b * cos };
        (value * length, a.abs() + b.abs())
    }

    /// The row of a copy against f64: queries in place, then keys and values in their pages.
    fn compare(&self, device: &Device, copy: usize, row: u32, found: &mut Found) -> Result<(), EngineError> {
        let heads = self.spec.shape.heads;
        let (size, dim) = (self.spec.shape.page_size, heads.head_dim as usize);
        let (q_width, kv_width) = (heads.q_width() as usize, heads.kv_width() as usize);
        let r = row as usize;
        let at = u64::from(row) * u64::from(self.spec.stride()) * WORD_BYTES;
        let queries = download(device, &self.rows[copy], at, q_width * size_of::<f32>())?;
        let turns = self.turns.of(copy);
        for (i, got) in bytemuck::pod_collect_to_vec::<u8, f32>(&queries).into_iter().enumerate() {
            let (want, scale) = self.turned(r, i, turns);
            found.push(got, want, scale * f64::from(turns.max(1)));
        }
        let page = self.spec.shape.page();
        let bytes = usize::try_from(HiddenCodec::F16.page_bytes(page).0).expect("a page fits in memory");
        let (none, token) = (HeadParameters::default(), (row % size) as usize);
        for head in 0..heads.num_kv_heads as usize {
            let cell = self.places[(row / size) as usize * heads.num_kv_heads as usize + head];
            let words = download(device, &self.arenas[copy], u64::from(cell) * CELL_BYTES, bytes)?;
            let words: Vec<u32> = bytemuck::pod_collect_to_vec(&words);
            let (keys, values) = HiddenCodec::F16.decode(page, PageContext::at(&none, 0), &words);
            for channel in 0..dim {
                let (want, scale) = self.turned(r, q_width + head * dim + channel, 1);
                found.push(keys[token * dim + channel], want, scale * HALF_UNIT);
                let value = q_width + kv_width + head * dim + channel;
                let exact = f64::from(self.values[r * self.spec.stride() as usize + value]);
                found.push(values[token * dim + channel], exact, 0.0);
            }
        }
        Ok(())
    }
}

/// What is compared.
#[derive(Default)]
struct Found {
    got: Vec<f32>,
    want: Vec<f64>,
    scale: Vec<f64>,
}

impl Found {
    fn push(&mut self, got: f32, want: f64, scale: f64) {
        self.got.push(got);
        self.want.push(want);
        self.scale.push(scale);
    }
}

impl KernelRun for AppendRun {
    fn copies(&self) -> bool {
        true
    }

    fn work(&self) -> Work {
        let (rows, heads) = (f64::from(self.spec.n_rows()), self.spec.shape.heads);
        let (q, kv) = (f64::from(heads.q_width()), f64::from(2 * heads.kv_width()));
        let angles = 4.0 * f64::from(heads.head_dim);
        Work { bytes: rows * (8.0 * q + 6.0 * kv + angles), flop: 0.0, pairs: None }
    }

    fn record(&self, recorder: &mut Recorder<'_>, copy: usize) {
        let copy = copy % self.groups.len();
        self.turns.add(copy);
        let grid = flat_grid(self.params.n_rows + self.params.n_items);
        recorder.dispatch(&self.pipeline, &self.groups[copy], &self.params, grid);
    }

    /// Queries are turned in place, so that theirs are put back.
    fn poison(&mut self, device: &Device) -> Result<(), EngineError> {
        let mut uploader = Uploader::new(device, "rows", Bytes::mib(4))?;
        for rows in &self.rows {
            uploader.upload(device, bytemuck::cast_slice(&self.uploaded), rows, 0)?;
        }
        self.turns.clear();
        Ok(poison(device, &self.arenas.iter().collect::<Vec<_>>())?)
    }

    fn check(&mut self, device: &Device, copy: usize) -> Result<Checked, EngineError> {
        let n = self.spec.n_rows();
        let mut found = Found::default();
        for i in 0..SAMPLES.min(n) {
            self.compare(device, copy % self.groups.len(), i * (n - 1) / (SAMPLES - 1), &mut found)?;
        }
        let Found { got, want, scale } = found;
        let missing = got.iter().filter(|value| !value.is_finite()).count();
        let error_over_bound = Tolerance::dot(2).worst(&got, &want, &scale);
        // f16 has 11 bits: the mean square of its rounding alone is near 1e-8.
        Ok(Checked { compared: got.len(), missing, error_over_bound, nmse: nmse(&got, &want) })
    }

    fn spoil(&mut self, device: &Device, copy: usize) -> Result<(), EngineError> {
        // The first keys of the first row.
        let first = self.params.k_offset as usize;
        self.uploaded[first..first + 8].fill(12.0);
        let rows = &self.rows[copy % self.rows.len()];
        let mut uploader = Uploader::new(device, "spoiled row", Bytes(32))?;
        let spoiled = bytemuck::cast_slice(&self.uploaded[first..first + 8]);
        Ok(uploader.upload(device, spoiled, rows, first as u64 * WORD_BYTES)?)
    }
}
