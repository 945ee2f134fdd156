//! Runs that are timed by the device, several in a submission.

use std::time::Duration;

use super::KernelRun;
use crate::device::Device;
use crate::device::timing::{Clock, StepTimer};
use crate::engine::EngineError;
use crate::kernels::Recorder;

/// Times runs of kernels. Each run is a pass of its own; passes of a submission follow each other without the host, so that a
/// card does not idle between them and lower its clock.
#[derive(Debug)]
pub struct TimedRuns<'d> {
    device: &'d Device,
    timer: StepTimer,
}

impl<'d> TimedRuns<'d> {
    /// Runs of a submission at most.
    pub const MOST: u32 = 64;

    /// Makes the timer.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    pub fn new(device: &'d Device) -> Result<Self, EngineError> {
        Ok(Self { device, timer: StepTimer::of_passes(device, Self::MOST)? })
    }

    /// The device.
    pub const fn device(&self) -> &'d Device {
        self.device
    }

    /// Where times come from.
    pub const fn clock(&self) -> Clock {
        self.timer.clock()
    }

    /// Runs `n` times from a copy on, each reading the next one; the time of each.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    ///
    /// # Panics
    /// When `n` is 0 or more than [`Self::MOST`].
    pub fn run(&mut self, case: &dyn KernelRun, first: usize, n: usize) -> Result<Vec<Duration>, EngineError> {
        let Self { device, timer } = self;
        let mut encoder = device.raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        for i in 0..n {
            let pass = if i == 0 { timer.begin(&mut encoder) } else { timer.begin_next(&mut encoder) };
            case.record(&mut Recorder::new(pass), first + i);
        }
        timer.resolve(&mut encoder);
        device.submit(encoder)?;
        device.wait()?;
        Ok(timer.each(device)?)
    }
}
