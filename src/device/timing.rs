//! How long a step took: by device timestamps where there are any, by the wall clock otherwise.

use std::time::{Duration, Instant};

use super::staging::ReadBack;
use super::{Device, DeviceError};
use crate::geometry::Bytes;

/// Which clock a measurement came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// Timestamps that the device wrote at the start and end of the pass.
    Device,
    /// Host time from submission to completion, which includes the submission's own cost.
    Wall,
}

impl std::fmt::Display for Clock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Device => "device timestamps",
            Self::Wall => "wall clock (this adapter has no timestamps)",
        })
    }
}

/// Measures compute passes.
#[derive(Debug)]
pub struct StepTimer {
    queries: Option<Queries>,
    started: Instant,
    /// Passes of a submission at most, and those begun in this one.
    most: u32,
    begun: u32,
}

#[derive(Debug)]
struct Queries {
    set: wgpu::QuerySet,
    resolve: wgpu::Buffer,
    back: ReadBack,
    period_ns: f64,
}

impl StepTimer {
    /// A timer for one pass at a time.
    ///
    /// # Errors
    /// As [`Device::allocate`].
    pub fn new(device: &Device) -> Result<Self, DeviceError> {
        Self::of_passes(device, 1)
    }

    /// A timer for at most so many passes of one submission.
    ///
    /// # Errors
    /// As [`Device::allocate`].
    pub fn of_passes(device: &Device, most: u32) -> Result<Self, DeviceError> {
        let has = device.raw.features().contains(wgpu::Features::TIMESTAMP_QUERY);
        let queries = if has { Some(Queries::new(device, most)?) } else { None };
        Ok(Self { queries, started: Instant::now(), most, begun: 0 })
    }

    /// Passes of a submission at most.
    pub const fn most(&self) -> u32 {
        self.most
    }

    /// The clock in use.
    pub const fn clock(&self) -> Clock {
        if self.queries.is_some() { Clock::Device } else { Clock::Wall }
    }

    /// Device bytes that the timer holds.
    pub fn bytes(&self) -> Bytes {
        self.queries.as_ref().map_or(Bytes::ZERO, |q| Bytes(q.resolve.size()) + q.back.capacity())
    }

    /// Begins a pass whose duration is measured, the first of its submission.
    pub fn begin<'e>(&mut self, encoder: &'e mut wgpu::CommandEncoder) -> wgpu::ComputePass<'e> {
        self.started = Instant::now();
        self.begun = 0;
        self.begin_next(encoder)
    }

    /// Begins another one of the same submission.
    ///
    /// # Panics
    /// When there are more than the timer was made for.
    pub fn begin_next<'e>(&mut self, encoder: &'e mut wgpu::CommandEncoder) -> wgpu::ComputePass<'e> {
        assert!(self.begun < self.most, "a timer of {} passes has no place for another", self.most);
        let first = self.begun * 2;
        self.begun += 1;
        let timestamp_writes = self.queries.as_ref().map(|q| wgpu::ComputePassTimestampWrites {
            query_set: &q.set,
            beginning_of_pass_write_index: Some(first),
            end_of_pass_write_index: Some(first + 1),
        });
        encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: Some("step"), timestamp_writes })
    }

    /// After the passes have ended and before submission.
    pub fn resolve(&self, encoder: &mut wgpu::CommandEncoder) {
        if let Some(q) = &self.queries {
            encoder.resolve_query_set(&q.set, 0..self.begun * 2, &q.resolve, 0);
            encoder.copy_buffer_to_buffer(&q.resolve, 0, q.back.target(), 0, u64::from(self.begun) * 16);
        }
    }

    /// After the submission has completed: from the start of the first pass to the end of the last.
    ///
    /// # Errors
    /// [`DeviceError::Lost`].
    pub fn elapsed(&self, device: &Device) -> Result<Duration, DeviceError> {
        let Some(q) = &self.queries else { return Ok(self.started.elapsed()) };
        let ticks = q.ticks(device, self.begun)?;
        Ok(q.between(ticks[0], ticks[ticks.len() - 1]))
    }

    /// After the submission has completed: the time of each pass, or without timestamps an equal share of all.
    ///
    /// # Errors
    /// [`DeviceError::Lost`].
    pub fn each(&self, device: &Device) -> Result<Vec<Duration>, DeviceError> {
        let Some(q) = &self.queries else {
            return Ok(vec![self.started.elapsed() / self.begun; self.begun as usize]);
        };
        let ticks = q.ticks(device, self.begun)?;
        Ok(ticks.chunks_exact(2).map(|pass| q.between(pass[0], pass[1])).collect())
    }
}

impl Queries {
    fn new(device: &Device, passes: u32) -> Result<Self, DeviceError> {
        use wgpu::BufferUsages as Usage;
        let set = device.raw.create_query_set(&wgpu::QuerySetDescriptor {
            label: Some("step timer"),
            ty: wgpu::QueryType::Timestamp,
            count: passes * 2,
        });
        let bytes = Bytes(u64::from(passes) * 16);
        let resolve = device.allocate("step timer", bytes, Usage::QUERY_RESOLVE | Usage::COPY_SRC)?;
        let back = ReadBack::new(device, "step timer read-back", bytes)?;
        Ok(Self { set, resolve, back, period_ns: f64::from(device.queue.get_timestamp_period()) })
    }

    /// Start and end of each pass.
    fn ticks(&self, device: &Device, passes: u32) -> Result<Vec<u64>, DeviceError> {
        let mut bytes = Vec::new();
        self.back.read(device, passes as usize * 16, &mut bytes)?;
        Ok(bytemuck::pod_collect_to_vec(&bytes))
    }

    fn between(&self, start: u64, end: u64) -> Duration {
        Duration::from_secs_f64(end.saturating_sub(start) as f64 * self.period_ns * 1e-9)
    }
}
