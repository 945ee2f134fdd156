//! What the link to the host does at best: the measure of a context switch, and what the schedule predicts swaps from.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::swap::Swap;
use super::{Engine, EngineError};
use crate::device::staging::ReadBack;
use crate::device::{Device, DeviceError};
use crate::geometry::Bytes;
use crate::schedule::Rates;

/// How often the link is measured for a schedule.
const MEASUREMENTS: usize = 8;

impl Engine<'_> {
    /// Time of moving `bytes`, or as many as the arenas have, out and back in plain copies, and how many moved: what a switch could
    /// reach at best. Its buffers, chunks and turns, so that both read and write as much memory that is as cold; but each chunk lies
    /// in one piece, and host memory is there. What arenas hold stays as it is.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    pub fn plain_copies(&mut self, bytes: Bytes) -> Result<Option<(Bytes, [Duration; 2])>, EngineError> {
        let Some(swap) = &mut self.swap else { return Ok(None) };
        swap.drain(self.device)?;
        self.device.wait()?;
        let pieces = swap.plain_pieces(bytes);
        let length = pieces.iter().map(|(_, piece)| piece.end - piece.start).sum();
        // Touched once, as memory is that held a cache before.
        let mut host = vec![1; usize::try_from(length).expect("a cache fits in memory")];
        let started = Instant::now();
        swap.plain_out(self.device, &pieces, &mut host)?;
        let out = started.elapsed();
        let started = Instant::now();
        swap.plain_back(self.device, &pieces, &host)?;
        Ok(Some((Bytes(length), [out, started.elapsed()])))
    }

    /// How fast caches move, measured, the fastest of a few; zero where they do not.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    pub fn link_rates(&mut self) -> Result<Rates, EngineError> {
        let Some(chunk) = self.swap.as_ref().map(|swap| swap.back[0].capacity()) else { return Ok(Rates::default()) };
        let mut rates = [0.0_f64; 2];
        for _ in 0..MEASUREMENTS {
            let Some((bytes, times)) = self.plain_copies(chunk)? else { break };
            let of = times.map(|time| bytes.0 as f64 / time.as_secs_f64().max(1e-9));
            rates = [rates[0].max(of[0]), rates[1].max(of[1])];
        }
        let [out, back] = rates;
        Ok(Rates { out, back, prefill: 0.0 })
    }
}

impl Swap {
    /// Parts of arenas of so many bytes in all, each at most a chunk.
    fn plain_pieces(&self, bytes: Bytes) -> Vec<(usize, Range<u64>)> {
        let (mut pieces, mut left) = (Vec::new(), bytes.0);
        for (index, (arena, _)) in self.arenas.iter().enumerate() {
            let mut at = 0;
            while left > 0 && at < arena.size() {
                let end = arena.size().min(at + left.min(self.back[0].capacity().0));
                pieces.push((index, at..end));
                left -= end - at;
                at = end;
            }
        }
        pieces
    }

    /// The host reads a chunk while the device copies the next.
    fn plain_out(&self, device: &Device, pieces: &[(usize, Range<u64>)], host: &mut [u8]) -> Result<(), DeviceError> {
        let mut rest = host;
        let mut read = |back: &ReadBack, length: u64| {
            let length = usize::try_from(length).expect("a chunk fits in memory");
            let (here, after) = std::mem::take(&mut rest).split_at_mut(length);
            rest = after;
            back.finish(device, |staged| here.copy_from_slice(&staged[..length]))
        };
        let mut before = None;
        for (back, (arena, piece)) in self.back.iter().cycle().zip(pieces) {
            let length = piece.end - piece.start;
            let mut encoder = device.raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            encoder.copy_buffer_to_buffer(&self.arenas[*arena].0, piece.start, back.target(), 0, length);
            device.submit(encoder)?;
            back.request(device);
            if let Some((back, length)) = before.replace((back, length)) {
                read(back, length)?;
            }
        }
        before.map_or(Ok(()), |(back, length)| read(back, length))
    }

    /// The host writes a chunk while the device copies the one before.
    fn plain_back(&mut self, device: &Device, pieces: &[(usize, Range<u64>)], host: &[u8]) -> Result<(), DeviceError> {
        let mut rest = host;
        for (arena, piece) in pieces {
            let length = usize::try_from(piece.end - piece.start).expect("a chunk fits in memory");
            let (here, after) = rest.split_at(length);
            rest = after;
            self.upload.write(device, &[here])?;
            let mut encoder = device.raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            let target = &self.arenas[*arena].0;
            encoder.copy_buffer_to_buffer(self.upload.source(), 0, target, piece.start, length as u64);
            device.submit(encoder)?;
            self.upload.recycle(device);
        }
        device.wait()
    }
}
