//! What goes wrong on a device after it was opened: where it is heard of, and how it becomes an error.
//!
//! wgpu reports some errors to a callback, says of a lost device that its later calls are invalid, and panics where a driver
//! loses the device during a wait. Here all of it becomes a [`DeviceError`] of the next call that can fail. Accepted
//! downsides: wgpu 30 gives a device up when it finds no memory for commands, so that only new buffers can fail without a loss;
//! and the panic that is caught during a wait still prints its line.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Device, DeviceError};

/// What was heard of a device and not yet returned.
#[derive(Debug, Default)]
struct Heard {
    /// Why it was lost; stays.
    lost: Option<String>,
    /// The first error that no scope has caught.
    error: Option<wgpu::Error>,
    /// How many submissions go well before one is to fail in a test, and how.
    fails_after: Option<(u32, Failure)>,
}

/// What a test can wish for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// A submission finds no memory, and is not made.
    NoMemory,
    /// The device is lost before a submission.
    Loss,
}

impl Heard {
    /// Counts a submission; how it is to fail.
    fn count_down(&mut self) -> Option<Failure> {
        let (left, failure) = self.fails_after?;
        self.fails_after = left.checked_sub(1).map(|left| (left, failure));
        (left == 0).then_some(failure)
    }
}

/// What a device's callbacks have heard.
#[derive(Clone, Debug, Default)]
pub(super) struct Trouble(Arc<Mutex<Heard>>);

impl Trouble {
    /// Listens to a device.
    pub(super) fn of(raw: &wgpu::Device) -> Self {
        let trouble = Self::default();
        let heard = trouble.clone();
        raw.set_device_lost_callback(move |reason, message| {
            let why = if message.is_empty() { format!("{reason:?}").to_lowercase() } else { message };
            heard.lock().lost.get_or_insert(why);
        });
        let heard = trouble.clone();
        raw.on_uncaptured_error(Arc::new(move |error| {
            heard.lock().error.get_or_insert(error);
        }));
        trouble
    }

    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lost(&self) -> Result<(), DeviceError> {
        self.lock().lost.clone().map_or(Ok(()), |why| Err(DeviceError::Lost(why)))
    }
}

impl Device {
    /// Submits what was recorded, unless something went wrong before.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub(crate) fn submit(&self, encoder: wgpu::CommandEncoder) -> Result<(), DeviceError> {
        let commands = encoder.finish();
        let failure = self.trouble.lock().count_down();
        match failure {
            Some(Failure::Loss) => self.destroy(),
            Some(Failure::NoMemory) => {
                let error = wgpu::Error::OutOfMemory { source: "a test wants it so".into() };
                self.trouble.lock().error.get_or_insert(error);
            }
            None => {}
        }
        self.check()?;
        let submission = self.queue.submit([commands]);
        *self.submitted.lock().unwrap_or_else(PoisonError::into_inner) = Some(submission);
        self.check()
    }

    /// Whether nothing has gone wrong since the last time.
    ///
    /// # Errors
    /// [`DeviceError::Lost`] from the loss on, [`DeviceError::NoMemory`].
    ///
    /// # Panics
    /// When wgpu has refused a call on a device that is there: a defect.
    pub(crate) fn check(&self) -> Result<(), DeviceError> {
        self.trouble.lost()?;
        let Some(error) = self.trouble.lock().error.take() else { return Ok(()) };
        // Calls on a device that is gone are invalid; that it is gone is heard in a wait.
        self.poll(None)?;
        match error {
            wgpu::Error::OutOfMemory { source } => Err(DeviceError::NoMemory(source.to_string())),
            error => panic!("wgpu refused a call: {error}"),
        }
    }

    /// Waits until all submitted work is done and mapped buffers are ready.
    ///
    /// # Errors
    /// [`DeviceError::Lost`], [`DeviceError::NoMemory`].
    ///
    /// # Panics
    /// When wgpu has refused a call on a device that is there: a defect.
    pub fn wait(&self) -> Result<(), DeviceError> {
        self.wait_for(None)
    }

    /// What was submitted last.
    pub(super) fn submitted(&self) -> Option<wgpu::SubmissionIndex> {
        self.submitted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for a submission and all before it, or for all that was submitted; what comes behind it goes on.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub(super) fn wait_for(&self, submission: Option<wgpu::SubmissionIndex>) -> Result<(), DeviceError> {
        self.poll(submission)?;
        self.check()
    }

    fn poll(&self, submission: Option<wgpu::SubmissionIndex>) -> Result<(), DeviceError> {
        let wait = wgpu::PollType::Wait { submission_index: submission, timeout: None };
        let waited = catch_unwind(AssertUnwindSafe(|| self.raw.poll(wait)));
        self.trouble.lost()?;
        match waited {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(DeviceError::Lost(error.to_string())),
            Err(panic) => resume_unwind(panic),
        }
    }

    /// Lets a submission fail after so many that go well, for tests.
    #[doc(hidden)]
    pub fn fail_after(&self, submissions: u32, failure: Failure) {
        self.trouble.lock().fails_after = Some((submissions, failure));
    }

    /// Gives the device up at once, as a driver does that resets it, for tests: everything on it is gone.
    #[doc(hidden)]
    pub fn destroy(&self) {
        self.raw.destroy();
    }
}
