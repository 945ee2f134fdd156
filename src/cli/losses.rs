//! Runs that outlive their device.

use anyhow::{Result, anyhow};
use concertina::device::{AdapterRequest, Device};
use concertina::engine::host_cache::HostCopies;
use concertina::engine::{Engine, EngineError};
use concertina::report::FaultsReport;
use concertina::schedule::recovery::MAX_FAILURES;
use concertina::schedule::{BackendError, Caches, Fault, Scheduler};

/// How often a run goes on after its device was lost. A device that is lost again and again is given what it can not do.
const MOST: usize = 3;

/// What was lost so far, and what is handed over to the next device.
#[derive(Debug, Default)]
pub(super) struct Losses {
    copies: HostCopies,
    pub(super) report: FaultsReport,
}

impl Losses {
    /// After an error of a step: takes what is left where the device was lost, and tells the user. Another error is returned, and
    /// so is one loss too many.
    pub(super) fn take(
        &mut self,
        error: EngineError,
        engine: &mut Engine<'_>,
        scheduler: &mut Scheduler,
    ) -> Result<()> {
        if error.fault() == Fault::OutOfMemory {
            return Err(anyhow!(
                "{error}; {} steps in a row found no memory, the last with {} rows at most; give a smaller --kv-budget or leave \
                 the device more memory",
                MAX_FAILURES + 1,
                scheduler.max_rows()
            ));
        }
        if error.fault() != Fault::DeviceLost {
            return Err(error.into());
        }
        if self.report.device_losses == MOST {
            return Err(anyhow!("{error}, as {MOST} before it were; give a smaller --chunk"));
        }
        self.copies = engine.take_copies();
        let loss = scheduler.device_lost(&self.copies.sessions())?;
        let tokens: u64 = loss.recomputed.iter().map(|(_, tokens)| u64::from(*tokens)).sum();
        eprintln!(
            "{error}; going on with another one, {} rows a step at most; caches that come back from host memory: {}; that are computed \
             again: {}, of {tokens} tokens",
            scheduler.max_rows(),
            loss.restored.len(),
            loss.recomputed.len()
        );
        self.report.device_losses += 1;
        self.report.caches_restored += loss.restored.len();
        self.report.caches_recomputed += loss.recomputed.len();
        Ok(())
    }

    /// Opens a device: the first one, or one in place of another.
    pub(super) fn open(&self, request: &AdapterRequest) -> Result<Device> {
        let opened = Device::open(request);
        if self.report.device_losses == 0 {
            return Ok(opened?);
        }
        opened.map_err(|error| anyhow!("no other device in place of the one that was lost: {error}"))
    }

    /// Gives an engine that was made anew what the one before it had in host memory. `caches` are its own, which nobody needs.
    pub(super) fn hand_over(&mut self, engine: &mut Engine<'_>, caches: &Caches, scheduler: &Scheduler) -> Result<()> {
        let sizes = |caches: &Caches| caches.pool.arena_bytes().collect::<Vec<_>>();
        if sizes(caches) != sizes(scheduler.caches()) || caches.pool.tables() != scheduler.caches().pool.tables() {
            return Err(anyhow!(
                "the device that was opened in place of the one that was lost holds pages in other buffers"
            ));
        }
        engine.keep_copies(std::mem::take(&mut self.copies));
        Ok(())
    }
}
