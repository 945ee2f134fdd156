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
        let has = device.raw.features().contains(wgpu::Features::TIMESTAMP_QUERY);
        let queries = if has { Some(Queries::new(device)?) } else { None };
        Ok(Self { queries, started: Instant::now() })
    }

    /// The clock in use.
    pub const fn clock(&self) -> Clock {
        if self.queries.is_some() { Clock::Device } else { Clock::Wall }
    }

    /// Device bytes that the timer holds.
    pub fn bytes(&self) -> Bytes {
        self.queries.as_ref().map_or(Bytes::ZERO, |q| Bytes(q.resolve.size()) + q.back.capacity())
    }

    /// Begins a pass whose duration is measured.
    pub fn begin<'e>(&mut self, encoder: &'e mut wgpu::CommandEncoder) -> wgpu::ComputePass<'e> {
        self.started = Instant::now();
        let timestamp_writes = self.queries.as_ref().map(|q| wgpu::ComputePassTimestampWrites {
            query_set: &q.set,
            beginning_of_pass_write_index: Some(0),
            end_of_pass_write_index: Some(1),
        });
        encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: Some("step"), timestamp_writes })
    }

    /// After the pass has ended and before submission.
    pub fn resolve(&self, encoder: &mut wgpu::CommandEncoder) {
        if let Some(q) = &self.queries {
            encoder.resolve_query_set(&q.set, 0..2, &q.resolve, 0);
            encoder.copy_buffer_to_buffer(&q.resolve, 0, q.back.target(), 0, 16);
        }
    }

    /// After the submission has completed.
    ///
    /// # Errors
    /// [`DeviceError::Lost`].
    pub fn elapsed(&self, device: &Device) -> Result<Duration, DeviceError> {
        let Some(q) = &self.queries else { return Ok(self.started.elapsed()) };
        let mut bytes = Vec::with_capacity(16);
        q.back.read(device, 16, &mut bytes)?;
        let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&bytes);
        let nanoseconds = ticks[1].saturating_sub(ticks[0]) as f64 * q.period_ns;
        Ok(Duration::from_secs_f64(nanoseconds * 1e-9))
    }
}

impl Queries {
    fn new(device: &Device) -> Result<Self, DeviceError> {
        use wgpu::BufferUsages as Usage;
        let set = device.raw.create_query_set(&wgpu::QuerySetDescriptor {
            label: Some("step timer"),
            ty: wgpu::QueryType::Timestamp,
            count: 2,
        });
        let resolve = device.allocate("step timer", Bytes(16), Usage::QUERY_RESOLVE | Usage::COPY_SRC)?;
        let back = ReadBack::new(device, "step timer read-back", Bytes(16))?;
        Ok(Self { set, resolve, back, period_ns: f64::from(device.queue.get_timestamp_period()) })
    }
}
