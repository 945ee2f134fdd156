//! What a device gives at best, one kind of work at a time: memory, the link to the host, arithmetic, and the start of a kernel.
//!
//! | ceiling | work | checked |
//! |---|---|---|
//! | read | `stream` adds up a buffer | the sum, which names each cell |
//! | copy | `stream` copies it to another | the copy's sum |
//! | out, back | one piece between device and mapped host memory | bytes that left against those that came back |
//! | FLOP | the model's own `matmul`, many rows | entries against f64 on the CPU |
//! | dispatch | a kernel that does nothing, many times in a pass | has no result |
//! | submission | a pass with one such dispatch, waited for | has no result |
//!
//! Buffers are made once and filled before anything is timed. Times are those of one run; whoever measures repeats them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::EngineError;
use crate::device::staging::{ReadBack, Uploader, download};
use crate::device::timing::{Clock, StepTimer};
use crate::device::{Device, DeviceError};
use crate::geometry::{Bytes, CELL_BYTES, F16_BYTES, WORD_BYTES};
use crate::kernels::abi::{MatmulParams, StreamParams};
use crate::kernels::matmul::{self, Input, NO_LIST, Output};
use crate::kernels::pipeline::{Pipeline, PipelineCache};
use crate::kernels::{KernelSpec, Recorder, Slot, stream};
use crate::reference::compare::Tolerance;
use crate::weights::Matrix;

/// Empty dispatches of a pass.
const DISPATCHES: u32 = 256;
/// Entries of a product that are computed again on the CPU.
const CHECKED: usize = 64;
/// Bytes that are filled at once.
const FILL: Bytes = Bytes::mib(4);

/// A kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ceiling {
    /// Reading device memory.
    Read,
    /// Reading and writing it; both count.
    Copy,
    /// Bytes to the host.
    Out,
    /// Bytes from the host.
    Back,
    /// Arithmetic of matrix products.
    Flop,
    /// Starting one kernel in a pass.
    Dispatch,
    /// Submitting a pass and waiting for it.
    Submission,
}

impl Ceiling {
    /// All kinds.
    pub const ALL: [Self; 7] =
        [Self::Read, Self::Copy, Self::Out, Self::Back, Self::Flop, Self::Dispatch, Self::Submission];
}

/// How much work is done at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct CeilingSizes {
    /// Bytes of the buffer that is read, and of the one that it is copied to: beyond any cache of the device.
    pub memory_bytes: Bytes,
    /// Bytes of a piece between device and host.
    pub link_bytes: Bytes,
    /// Rows, inputs and outputs of the product.
    pub product: [u32; 3],
}

impl CeilingSizes {
    /// What takes milliseconds on a large GPU: at most the 1 GiB that a cache of 50 MB does not help with.
    pub const FULL: Self =
        Self { memory_bytes: Bytes::mib(1024), link_bytes: Bytes::mib(64), product: [2048, 4096, 4096] };
    /// For processors that pretend to be a GPU: everything is done there, in seconds.
    pub const SOFTWARE: Self =
        Self { memory_bytes: Bytes::mib(128), link_bytes: Bytes::mib(32), product: [128, 1024, 1024] };
    /// What takes no time anywhere, and says little.
    pub const QUICK: Self = Self { memory_bytes: Bytes::mib(4), link_bytes: Bytes::mib(1), product: [64, 256, 256] };

    /// The same within a device's largest binding.
    fn within(self, device: &Device) -> Self {
        let memory_bytes = Bytes(self.memory_bytes.min(device.max_binding()).0 / CELL_BYTES * CELL_BYTES);
        Self { memory_bytes, ..self }
    }
}

/// Everything that the kinds of work need.
#[derive(Debug)]
pub struct Ceilings<'d> {
    device: &'d Device,
    timer: StepTimer,
    sizes: CeilingSizes,
    memory: Memory,
    link: Link,
    product: Product,
}

#[derive(Debug)]
struct Kernel {
    pipeline: Arc<Pipeline>,
    group: wgpu::BindGroup,
}

#[derive(Debug)]
struct Memory {
    source: wgpu::Buffer,
    copied: wgpu::Buffer,
    sums: wgpu::Buffer,
    n_cells: u32,
    expected: [u32; 4],
    read: Kernel,
    read_copy: Kernel,
    copy: Kernel,
}

#[derive(Debug)]
struct Link {
    there: wgpu::Buffer,
    uploader: Uploader,
    back: ReadBack,
    sent: Vec<u8>,
    received: Vec<u8>,
}

#[derive(Debug)]
struct Product {
    kernel: Kernel,
    tile: [u32; 2],
    params: MatmulParams,
    x: Vec<f32>,
    matrix: Matrix,
    y: wgpu::Buffer,
}

impl<'d> Ceilings<'d> {
    /// Makes and fills the buffers, as large as asked for or as a binding can be.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn new(device: &'d Device, sizes: CeilingSizes) -> Result<Self, EngineError> {
        let sizes = sizes.within(device);
        let mut cache = PipelineCache::default();
        Ok(Self {
            device,
            timer: StepTimer::new(device)?,
            sizes,
            memory: Memory::new(device, &mut cache, sizes.memory_bytes)?,
            link: Link::new(device, sizes.link_bytes)?,
            product: Product::new(device, &mut cache, sizes.product)?,
        })
    }

    /// The clock of kernels; the link and submissions are timed by the host.
    pub const fn clock(&self) -> Clock {
        self.timer.clock()
    }

    /// What was made.
    pub const fn sizes(&self) -> CeilingSizes {
        self.sizes
    }

    /// Bytes, FLOP or starts of one run.
    pub fn work(&self, ceiling: Ceiling) -> f64 {
        let [rows, k, cols] = self.sizes.product.map(f64::from);
        match ceiling {
            Ceiling::Read => self.sizes.memory_bytes.0 as f64,
            Ceiling::Copy => 2.0 * self.sizes.memory_bytes.0 as f64,
            Ceiling::Out | Ceiling::Back => self.sizes.link_bytes.0 as f64,
            Ceiling::Flop => 2.0 * rows * k * cols,
            Ceiling::Dispatch => f64::from(DISPATCHES),
            Ceiling::Submission => 1.0,
        }
    }

    /// Does one kind of work once; its time.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    pub fn run(&mut self, ceiling: Ceiling) -> Result<Duration, EngineError> {
        let Self { device, timer, memory, link, product, .. } = self;
        let (all, nothing) = (StreamParams { n_cells: memory.n_cells }, StreamParams { n_cells: 0 });
        let tiles = stream::grid(memory.n_cells);
        let time = match ceiling {
            Ceiling::Read => memory.read.timed(device, timer, &all, tiles, 1),
            Ceiling::Copy => memory.copy.timed(device, timer, &all, tiles, 1),
            Ceiling::Flop => {
                let grid = matmul::grid(&product.params, product.tile[0], product.tile[1]);
                product.kernel.timed(device, timer, &product.params, grid, 1)
            }
            Ceiling::Dispatch => memory.copy.timed(device, timer, &nothing, stream::grid(0), DISPATCHES),
            Ceiling::Submission => {
                let started = Instant::now();
                memory.copy.timed(device, timer, &nothing, stream::grid(0), 1).map(|_| started.elapsed())
            }
            Ceiling::Out => link.leave(device),
            Ceiling::Back => link.come(device),
        };
        Ok(time?)
    }

    /// Whether what the last run of one kind of work left is right.
    ///
    /// # Errors
    /// [`EngineError::Input`] with what is wrong.
    pub fn check(&mut self, ceiling: Ceiling) -> Result<(), EngineError> {
        let Self { device, timer, memory, link, product, .. } = self;
        let wrong = match ceiling {
            Ceiling::Read => memory.differs(device)?,
            Ceiling::Copy => {
                let all = StreamParams { n_cells: memory.n_cells };
                memory.read_copy.timed(device, timer, &all, stream::grid(memory.n_cells), 1)?;
                memory.differs(device)?
            }
            Ceiling::Out | Ceiling::Back => link.differs(device)?,
            Ceiling::Flop => product.differs(device)?,
            Ceiling::Dispatch | Ceiling::Submission => None,
        };
        wrong.map_or(Ok(()), |what| Err(EngineError::Input(format!("{ceiling:?} does not count: {what}"))))
    }

    /// Changes a few bytes of what one kind of work reads or has left, for tests of [`Self::check`].
    ///
    /// # Errors
    /// [`EngineError::Device`].
    #[doc(hidden)]
    pub fn spoil(&mut self, ceiling: Ceiling) -> Result<(), EngineError> {
        let target = match ceiling {
            Ceiling::Read => &self.memory.source,
            Ceiling::Copy => &self.memory.copied,
            Ceiling::Flop => &self.product.y,
            Ceiling::Out | Ceiling::Back => &self.link.there,
            Ceiling::Dispatch | Ceiling::Submission => return Ok(()),
        };
        self.link.uploader.upload(self.device, &[0xA5; 16], target, 0)?;
        Ok(())
    }
}

impl Kernel {
    fn new(
        device: &Device,
        cache: &mut PipelineCache,
        spec: &KernelSpec,
        buffers: &[&wgpu::Buffer],
    ) -> Result<Self, EngineError> {
        let pipeline = cache.get(device, spec)?;
        let slots: Vec<_> = buffers.iter().map(|buffer| Slot::Whole(buffer)).collect();
        let group = pipeline.bind(device, &slots);
        Ok(Self { pipeline, group })
    }

    /// Dispatches `times` times in one pass and waits for it.
    fn timed<I: bytemuck::Pod>(
        &self,
        device: &Device,
        timer: &mut StepTimer,
        params: &I,
        grid: [u32; 3],
        times: u32,
    ) -> Result<Duration, DeviceError> {
        let mut encoder = device.raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let mut recorder = Recorder::new(timer.begin(&mut encoder));
        (0..times).for_each(|_| recorder.dispatch(&self.pipeline, &self.group, params, grid));
        drop(recorder);
        timer.resolve(&mut encoder);
        device.submit(encoder)?;
        device.wait()?;
        timer.elapsed(device)
    }
}

impl Memory {
    fn new(device: &Device, cache: &mut PipelineCache, bytes: Bytes) -> Result<Self, EngineError> {
        let n_cells = u32::try_from(bytes.0 / CELL_BYTES).expect("a binding has fewer cells than 2^32");
        let [source, copied] = [device.storage("stream source", bytes)?, device.storage("stream copy", bytes)?];
        let tiles = u64::from(n_cells.div_ceil(stream::TILE_CELLS));
        let sums = device.storage("stream sums", Bytes(tiles * CELL_BYTES))?;
        let mut uploader = Uploader::new(device, "stream staging", FILL)?;
        let mut expected = [0_u32; 4];
        let step = u32::try_from(FILL.0 / CELL_BYTES).expect("a few MiB");
        let mut first = 0;
        while first < n_cells {
            // Any numbers that differ will do.
            let word = |i: u32| i.wrapping_mul(2_654_435_761);
            let cells: Vec<[u32; 4]> =
                (first..n_cells.min(first + step)).map(|c| [0, 1, 2, 3].map(|i| word(c * 4 + i))).collect();
            for (total, part) in expected.iter_mut().zip(stream::sum(first, &cells)) {
                *total = total.wrapping_add(part);
            }
            uploader.upload(device, bytemuck::cast_slice(&cells), &source, u64::from(first) * CELL_BYTES)?;
            first += u32::try_from(cells.len()).expect("no more than a step");
        }
        let read = Kernel::new(device, cache, &stream::read(), &[&source, &sums])?;
        let read_copy = Kernel::new(device, cache, &stream::read(), &[&copied, &sums])?;
        let copy = Kernel::new(device, cache, &stream::copy(), &[&source, &copied])?;
        Ok(Self { source, copied, sums, n_cells, expected, read, read_copy, copy })
    }

    fn differs(&self, device: &Device) -> Result<Option<String>, EngineError> {
        let length = usize::try_from(self.sums.size()).expect("sums fit in memory");
        let sums: Vec<[u32; 4]> = bytemuck::pod_collect_to_vec(&download(device, &self.sums, 0, length)?);
        let found = sums.iter().fold([0_u32; 4], |total, sum| [0, 1, 2, 3].map(|i| total[i].wrapping_add(sum[i])));
        let expected = self.expected;
        let bytes = Bytes(u64::from(self.n_cells) * CELL_BYTES);
        Ok((found != expected).then(|| format!("{bytes} add up to {found:x?}, not to {expected:x?}")))
    }
}

impl Link {
    fn new(device: &Device, bytes: Bytes) -> Result<Self, EngineError> {
        let length = usize::try_from(bytes.0).expect("a piece fits in memory");
        let mut sent = vec![0; length];
        ChaCha8Rng::seed_from_u64(3).fill(&mut sent[..]);
        let there = device.storage("link", bytes)?;
        let mut uploader = Uploader::new(device, "link upload", bytes)?;
        uploader.upload(device, &sent, &there, 0)?;
        let back = ReadBack::new(device, "link read-back", bytes)?;
        Ok(Self { there, uploader, back, received: Vec::with_capacity(length), sent })
    }

    fn leave(&mut self, device: &Device) -> Result<Duration, DeviceError> {
        let started = Instant::now();
        let mut encoder = device.raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.copy_buffer_to_buffer(&self.there, 0, self.back.target(), 0, self.sent.len() as u64);
        device.submit(encoder)?;
        self.received.clear();
        self.back.read(device, self.sent.len(), &mut self.received)?;
        Ok(started.elapsed())
    }

    fn come(&mut self, device: &Device) -> Result<Duration, DeviceError> {
        let started = Instant::now();
        self.uploader.upload(device, &self.sent, &self.there, 0)?;
        device.wait()?;
        Ok(started.elapsed())
    }

    /// Fetches what is there, and compares.
    fn differs(&mut self, device: &Device) -> Result<Option<String>, EngineError> {
        self.leave(device)?;
        let wrong = self.sent.iter().zip(&self.received).filter(|(a, b)| a != b).count();
        Ok((wrong > 0).then(|| format!("{wrong} of {} bytes changed on the way", self.sent.len())))
    }
}

impl Product {
    fn new(device: &Device, cache: &mut PipelineCache, [rows, k, cols]: [u32; 3]) -> Result<Self, EngineError> {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut values = |n: u32| -> Vec<f32> { (0..n).map(|_| rng.random_range(-1.0_f32..1.0)).collect() };
        let x = values(rows * k);
        let matrix = Matrix::new(cols, k, values(cols * k).into_iter().map(f16::from_f32).collect());
        let mut packed = Vec::new();
        matmul::pack(&matrix, &mut packed);
        let bytes = |n: u32, each: u64| Bytes(u64::from(n) * each);
        let mut uploader = Uploader::new(device, "product staging", FILL)?;
        let there = [
            device.storage("product x", bytes(rows * k, WORD_BYTES))?,
            device.storage("product w", bytes(cols * k, F16_BYTES))?,
        ];
        uploader.upload(device, bytemuck::cast_slice(&x), &there[0], 0)?;
        uploader.upload(device, bytemuck::cast_slice(&packed), &there[1], 0)?;
        let y = device.storage("product y", bytes(rows * cols, WORD_BYTES))?;
        let many = cache.tuning().product(&device.summary().kind).many;
        let product = matmul::Product { input: Input::Plain, output: Output::Replace };
        let kernel = Kernel::new(device, cache, &product.matmul(many), &[&there[0], &there[1], &y])?;
        let (cells, list) = (k / 8, NO_LIST);
        let params = MatmulParams { x_row: 0, y_row: 0, n_rows: rows, cols, cells, first_col: 0, list, eps: 0.0 };
        Ok(Self { kernel, tile: many.size(), params, x, matrix, y })
    }

    /// Some entries against the same sums in f64; the first entry is always among them.
    fn differs(&self, device: &Device) -> Result<Option<String>, EngineError> {
        let MatmulParams { n_rows, cols, .. } = self.params;
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let random = std::iter::repeat_with(|| (rng.random_range(0..n_rows), rng.random_range(0..cols)));
        let entries: Vec<(u32, u32)> = std::iter::once((0, 0)).chain(random).take(CHECKED).collect();
        let k = self.matrix.cols as usize;
        let (mut found, mut sums, mut scale) = (Vec::new(), Vec::new(), Vec::new());
        for (row, col) in entries {
            let at = (u64::from(row) * u64::from(cols) + u64::from(col)) * WORD_BYTES;
            let word: Vec<f32> = bytemuck::pod_collect_to_vec(&download(device, &self.y, at, 4)?);
            found.extend(word);
            let x = &self.x[row as usize * k..(row as usize + 1) * k];
            let products = x.iter().zip(self.matrix.row(col)).map(|(x, w)| f64::from(*x) * w.to_f64());
            let (sum, squares) = products.fold((0.0, 0.0), |(s, q), p| (s + p, q + p * p));
            sums.push(sum);
            scale.push(f64::sqrt(squares));
        }
        let worst = Tolerance::dot(k).worst(&found, &sums, &scale);
        let n = found.len();
        Ok((worst > 1.0).then(|| format!("of {n} products one is off by {worst:.1} times what rounding allows")))
    }
}
