//! Inputs that are there several times, so that runs which take turns read none from a cache.

use std::sync::atomic::{AtomicU32, Ordering};

use half::f16;
use rand::RngExt;
use rand::seq::SliceRandom as _;
use rand_chacha::ChaCha8Rng;

use super::BenchSettings;
use super::outputs::filled;
use crate::compression::hidden::HiddenCodec;
use crate::device::{Device, DeviceError};
use crate::geometry::{Bytes, CELL_BYTES, PageGeometry};

/// Numbers that are made; longer inputs repeat them. A prime, so that no row repeats another.
const DISTINCT: usize = 1_000_003;

/// Numbers of `[-2, 2]` that f16 holds exactly.
pub(super) fn numbers(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    let some: Vec<f32> =
        (0..n.min(DISTINCT)).map(|_| f16::from_f32(rng.random_range(-2.0_f32..2.0)).to_f32()).collect();
    some.iter().cycle().take(n).copied().collect()
}

/// How often inputs of so many bytes have to be there.
pub(super) fn n_copies(bytes: u64, settings: &BenchSettings) -> usize {
    usize::try_from(settings.cold.0.div_ceil(bytes.max(1)).max(1)).expect("copies fit in memory")
}

/// `n` buffers with these numbers in them.
pub(super) fn copies<T: bytemuck::Pod>(
    device: &Device,
    label: &str,
    numbers: &[T],
    n: usize,
) -> Result<Vec<wgpu::Buffer>, DeviceError> {
    let mut all = vec![filled(device, label, numbers)?];
    let mut encoder = device.raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    for _ in 1..n {
        let copy = device.storage(label, Bytes(all[0].size()))?;
        encoder.copy_buffer_to_buffer(&all[0], 0, &copy, 0, copy.size());
        all.push(copy);
    }
    device.submit(encoder)?;
    device.wait()?;
    Ok(all)
}

/// Buffers that runs write, one for each copy of the inputs.
pub(super) fn targets(device: &Device, label: &str, bytes: Bytes, n: usize) -> Result<Vec<wgpu::Buffer>, DeviceError> {
    (0..n).map(|_| device.storage(label, bytes)).collect()
}

/// Cells of a page.
pub(super) fn page_cells(codec: HiddenCodec, page: PageGeometry) -> u32 {
    u32::try_from(codec.page_bytes(page).0 / CELL_BYTES).expect("a page has fewer than 2^32 cells")
}

/// First cells of `n` pages that lie one after another, in an order that says nothing unless `in_order`.
pub(super) fn places(rng: &mut ChaCha8Rng, n: u32, cells: u32, settings: &BenchSettings) -> Vec<u32> {
    let mut places: Vec<u32> = (0..n).map(|page| page * cells).collect();
    if !settings.in_order {
        places.shuffle(rng);
    }
    places
}

/// How often each copy was run since its outputs were poisoned, for kernels that add to what is there.
#[derive(Debug)]
pub(super) struct Counts(Vec<AtomicU32>);

impl Counts {
    pub(super) fn new(n: usize) -> Self {
        Self((0..n).map(|_| AtomicU32::new(0)).collect())
    }

    pub(super) fn add(&self, copy: usize) {
        self.0[copy].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn of(&self, copy: usize) -> u32 {
        self.0[copy].load(Ordering::Relaxed)
    }

    pub(super) fn clear(&self) {
        self.0.iter().for_each(|count| count.store(0, Ordering::Relaxed));
    }
}
