//! Persistent mapped buffers between host and device.
//!
//! An [`Uploader`] keeps two host-visible buffers mapped in turn: the host writes one while the device may still read
//! the other. A [`ReadBack`] keeps one buffer that the device copies into and the host reads after the step. Neither
//! allocates after construction.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Device, DeviceError};
use crate::geometry::Bytes;

const PENDING: u8 = 0;
const MAPPED: u8 = 1;
const FAILED: u8 = 2;
/// With the device, and nobody has asked for it back.
const AWAY: u8 = 3;

#[derive(Debug)]
struct Mapped {
    buffer: wgpu::Buffer,
    state: Arc<AtomicU8>,
    /// What had been submitted when it was asked for: it is mapped when that is done, whatever was submitted since.
    after: Mutex<Option<wgpu::SubmissionIndex>>,
}

impl Mapped {
    fn new(device: &Device, label: &str, bytes: Bytes, usage: wgpu::BufferUsages) -> Result<Self, DeviceError> {
        let buffer = device.allocate(label, bytes, usage)?;
        Ok(Self { buffer, state: Arc::new(AtomicU8::new(PENDING)), after: Mutex::new(None) })
    }

    fn request(&self, device: &Device, mode: wgpu::MapMode) {
        *self.after.lock().unwrap_or_else(PoisonError::into_inner) = device.submitted();
        self.state.store(PENDING, Ordering::Release);
        let state = Arc::clone(&self.state);
        self.buffer.slice(..).map_async(mode, move |result| {
            state.store(if result.is_ok() { MAPPED } else { FAILED }, Ordering::Release);
        });
    }

    fn unmap(&self) {
        self.buffer.unmap();
        self.state.store(AWAY, Ordering::Release);
    }

    fn wait(&self, device: &Device) -> Result<(), DeviceError> {
        // When several threads wait on one device, another one may be running our callback after our own wait ended.
        while self.state.load(Ordering::Acquire) == PENDING {
            device.wait_for(self.after.lock().unwrap_or_else(PoisonError::into_inner).clone())?;
            std::thread::yield_now();
        }
        match self.state.load(Ordering::Acquire) {
            MAPPED => Ok(()),
            _ => device.wait().and(Err(DeviceError::Lost("a staging buffer could not be mapped".to_owned()))),
        }
    }
}

/// Host-to-device bytes through two mapped buffers, used in turn.
///
/// The life of one half: [`Uploader::write`] waits until the half is mapped, fills it and unmaps it; the caller
/// records copies out of [`Uploader::source`] and submits; [`Uploader::recycle`] asks for it to be mapped again once
/// the device is done, and turns to the other half.
#[derive(Debug)]
pub struct Uploader {
    halves: [Mapped; 2],
    current: usize,
    capacity: Bytes,
}

impl Uploader {
    /// Two halves of `capacity` bytes each.
    ///
    /// # Errors
    /// As [`Device::allocate`].
    pub fn new(device: &Device, label: &str, capacity: Bytes) -> Result<Self, DeviceError> {
        use wgpu::BufferUsages as Usage;
        let capacity = capacity.align_up(16);
        let half = || Mapped::new(device, label, capacity, Usage::MAP_WRITE | Usage::COPY_SRC);
        let halves = [half()?, half()?];
        for half in &halves {
            half.request(device, wgpu::MapMode::Write);
        }
        Ok(Self { halves, current: 0, capacity })
    }

    /// Bytes of one half.
    pub const fn capacity(&self) -> Bytes {
        self.capacity
    }

    /// Bytes of both halves.
    pub const fn total(&self) -> Bytes {
        Bytes(self.capacity.0 * 2)
    }

    /// Writes the pieces one after another from the start of the current half.
    ///
    /// # Errors
    /// [`DeviceError::TooLarge`] when the pieces exceed the capacity, [`DeviceError::Lost`].
    pub fn write(&mut self, device: &Device, pieces: &[&[u8]]) -> Result<(), DeviceError> {
        let in_a_row = pieces.iter().scan(0, |end, piece| {
            let at = *end;
            *end += piece.len();
            Some((at, *piece))
        });
        self.fill(device, in_a_row)
    }

    /// Writes each piece where it says, in bytes from the start of the current half.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn scatter(&mut self, device: &Device, pieces: &[(usize, &[u8])]) -> Result<(), DeviceError> {
        self.fill(device, pieces.iter().copied())
    }

    fn fill<'a>(
        &mut self,
        device: &Device,
        pieces: impl Iterator<Item = (usize, &'a [u8])> + Clone,
    ) -> Result<(), DeviceError> {
        let end = pieces.clone().map(|(at, piece)| at + piece.len()).max().unwrap_or(0);
        let bytes = Bytes(end as u64);
        if bytes > self.capacity {
            return Err(DeviceError::TooLarge { label: "an upload".to_owned(), bytes, limit: self.capacity });
        }
        let half = &self.halves[self.current];
        // A submission that failed has not asked for it.
        if half.state.load(Ordering::Acquire) == AWAY {
            half.request(device, wgpu::MapMode::Write);
        }
        half.wait(device)?;
        {
            let mut view = half
                .buffer
                .slice(..)
                .get_mapped_range_mut()
                .map_err(|e| DeviceError::Lost(format!("a staging buffer has no mapped range: {e}")))?;
            for (at, piece) in pieces {
                view.slice(at..at + piece.len()).copy_from_slice(piece);
            }
        }
        half.unmap();
        Ok(())
    }

    /// The half that [`Self::write`] filled.
    pub fn source(&self) -> &wgpu::Buffer {
        &self.halves[self.current].buffer
    }

    /// Call after submitting the copies: the half is mapped again when the device is done with it.
    pub fn recycle(&mut self, device: &Device) {
        self.halves[self.current].request(device, wgpu::MapMode::Write);
        self.current = 1 - self.current;
    }

    /// Copies `bytes` of any length to `target` at `offset`, a half at a time.
    ///
    /// # Errors
    /// [`DeviceError::Lost`].
    pub fn upload(
        &mut self,
        device: &Device,
        bytes: &[u8],
        target: &wgpu::Buffer,
        offset: u64,
    ) -> Result<(), DeviceError> {
        let step = usize::try_from(self.capacity.0).expect("a staging half should fit in the address space");
        let mut at = offset;
        for piece in bytes.chunks(step) {
            // Copies move whole words.
            let padding = [0_u8; 4];
            let tail = &padding[..(4 - piece.len() % 4) % 4];
            self.write(device, &[piece, tail])?;
            let mut encoder = device.raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            let length = (piece.len() + tail.len()) as u64;
            encoder.copy_buffer_to_buffer(self.source(), 0, target, at, length);
            device.submit(encoder)?;
            self.recycle(device);
            at += piece.len() as u64;
        }
        Ok(())
    }
}

/// Device-to-host bytes through one mapped buffer.
#[derive(Debug)]
pub struct ReadBack {
    mapped: Mapped,
    capacity: Bytes,
}

impl ReadBack {
    /// A buffer of `capacity` bytes.
    ///
    /// # Errors
    /// As [`Device::allocate`].
    pub fn new(device: &Device, label: &str, capacity: Bytes) -> Result<Self, DeviceError> {
        use wgpu::BufferUsages as Usage;
        let capacity = capacity.align_up(16);
        let mapped = Mapped::new(device, label, capacity, Usage::MAP_READ | Usage::COPY_DST)?;
        Ok(Self { mapped, capacity })
    }

    /// Bytes that fit.
    pub const fn capacity(&self) -> Bytes {
        self.capacity
    }

    /// The buffer to record copies into.
    pub fn target(&self) -> &wgpu::Buffer {
        &self.mapped.buffer
    }

    /// After the submission: waits for it and appends the first `length` bytes to `out` in one copy.
    ///
    /// # Errors
    /// [`DeviceError::Lost`].
    pub fn read(&self, device: &Device, length: usize, out: &mut Vec<u8>) -> Result<(), DeviceError> {
        self.request(device);
        self.finish(device, |bytes| out.extend_from_slice(&bytes[..length]))
    }

    /// After the submission: asks for the bytes, which [`Self::finish`] reads; other work can be submitted in between.
    pub fn request(&self, device: &Device) {
        self.mapped.request(device, wgpu::MapMode::Read);
    }

    /// Waits for what [`Self::request`] asked for and shows it.
    ///
    /// # Errors
    /// [`DeviceError::Lost`].
    pub fn finish(&self, device: &Device, see: impl FnOnce(&[u8])) -> Result<(), DeviceError> {
        self.mapped.wait(device)?;
        {
            let view = self
                .mapped
                .buffer
                .slice(..)
                .get_mapped_range()
                .map_err(|e| DeviceError::Lost(format!("a read-back buffer has no mapped range: {e}")))?;
            see(&view);
        }
        self.mapped.unmap();
        Ok(())
    }
}

/// Reads `length` bytes of `source` from `offset`; for tests and tools, since it allocates.
///
/// # Errors
/// As [`Device::allocate`], or [`DeviceError::Lost`].
pub fn download(device: &Device, source: &wgpu::Buffer, offset: u64, length: usize) -> Result<Vec<u8>, DeviceError> {
    let padded = Bytes(length as u64).align_up(4);
    let back = ReadBack::new(device, "download", padded)?;
    let mut encoder = device.raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    encoder.copy_buffer_to_buffer(source, offset, back.target(), 0, padded.0);
    device.submit(encoder)?;
    let mut out = Vec::with_capacity(length);
    back.read(device, length, &mut out)?;
    Ok(out)
}
