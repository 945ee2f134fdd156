//! What becomes of a schedule when its backend fails.
//!
//! A step that failed is taken back: page tables shrink by the rows that were planned, nothing has moved, and what happened
//! before it, admissions and evictions, stays. Then
//!
//! ```text
//! out of memory  the limit of rows is halved, though not below the sessions that run; at that floor half of these give up their
//!                places, by swap or recompute, the last in line first, each within its `max_preemptions`. The step is planned
//!                again. After [`MAX_FAILURES`] failures in a row the error is returned.
//! device lost    the error is returned. Once its owner has made the backend anew, [`Scheduler::device_lost`] says what it had:
//!                caches whose copies in host memory are whole come back from there, the others are computed again.
//! another        the error is returned; the same step could be tried again.
//! ```
//!
//! **The limit grows again** to twice its rows after [`GOOD_STEPS`] steps in a row without a failure, since who else holds memory
//! on a device changes over time. A try that fails loses nothing but itself, so that this costs one step of [`GOOD_STEPS`] at most.
//! A lost device halves the limit too: a driver gives up on submissions that take too long or too much.

use std::collections::BTreeSet;

use super::{Caches, Method, Place, Scheduler, SessionId, StepPlan, StepReport};
use crate::geometry::Bytes;
use crate::pool::PoolError;
use crate::pool::page_table::PageTable;

/// Failures in a row for want of memory, after which the error is returned: so many halve 4,096 rows to one.
pub const MAX_FAILURES: u32 = 12;
/// Steps in a row after which the limit of rows grows.
pub const GOOD_STEPS: u32 = 64;

/// What a backend's error means for the schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing that the schedule can do anything about.
    Other,
    /// The device had no memory for a step. What was there before is as it was: caches, slots, copies in host memory. What the
    /// step was to write may be there in part.
    OutOfMemory,
    /// The device is gone, and everything in its memory.
    DeviceLost,
}

/// An error of a backend.
pub trait BackendError: From<PoolError> {
    /// What it means for the schedule.
    fn fault(&self) -> Fault;
}

impl BackendError for PoolError {
    /// The pool is accounting: it has no device.
    fn fault(&self) -> Fault {
        Fault::Other
    }
}

/// A step that found no memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// How many failed in a row, with this one.
    pub failures: u32,
    /// Rows that a step may hold from now on.
    pub max_rows: u32,
}

/// What a lost device took along.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Loss {
    /// Sessions whose caches come back from host memory.
    pub restored: Vec<SessionId>,
    /// Sessions whose caches are computed again, and the tokens that these had seen.
    pub recomputed: Vec<(SessionId, u32)>,
}

/// How many rows a step may hold.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limit {
    pub(super) rows: u32,
    /// Failures since the last step that went well.
    failures: u32,
    /// Steps that went well since the last failure, or the last change.
    good: u32,
}

impl Limit {
    pub(super) const fn new(rows: u32) -> Self {
        Self { rows, failures: 0, good: 0 }
    }

    /// A step went well.
    pub(super) fn went_well(&mut self, most: u32) {
        (self.failures, self.good) = (0, self.good + 1);
        if self.good == GOOD_STEPS {
            *self = Self::new(self.rows.saturating_mul(2).min(most));
        }
    }
}

impl Scheduler {
    /// Rows that a step may hold now; fewer than configured after a [`Fault`].
    pub const fn max_rows(&self) -> u32 {
        self.limit.rows
    }

    /// Makes the next try smaller where memory was short; whether there is one.
    pub(super) fn shrink(&mut self, report: &mut StepReport) -> Result<bool, PoolError> {
        self.limit.failures += 1;
        self.limit.good = 0;
        let failures = self.limit.failures;
        if failures <= MAX_FAILURES {
            let seated = u32::try_from(self.seated()).expect("sessions that run are few");
            if self.limit.rows > seated.max(1) {
                self.limit.rows = (self.limit.rows / 2).max(seated).max(1);
            } else {
                for _ in 0..seated / 2 {
                    let Some(last) = self.last_seated(None, |_, _| true) else { break };
                    let method = self.way_out(last, false);
                    self.give_up(last, method, report)?;
                }
                self.limit.rows = u32::try_from(self.seated()).expect("sessions that run are few").max(1);
            }
        }
        report.shortage = Some(Shortage { failures, max_rows: self.limit.rows });
        Ok(failures <= MAX_FAILURES)
    }

    /// Swap or recompute, whichever is better for a cache; or compress, where a rung is left to go to.
    pub(super) fn way_out(&self, id: SessionId, rung: bool) -> Method {
        let bytes = self.caches.suspended_bytes(id);
        let (_, free, rates) = self.store_for(bytes);
        // What others hold too is not read again.
        let elsewhere = self.prefix(id).0.map_or(0, |shared| shared.tokens);
        rates.choose(bytes, self.sessions[&id].cached().saturating_sub(elsewhere), free, rung)
    }

    /// Everything in device memory is gone. `copies` are sessions of whose caches the new backend has whole copies in host
    /// memory; it may have no others. Nothing is left on the device, in the accounting as in fact, and every session that has
    /// something to compute stands in line, where its question puts it.
    ///
    /// The next [`StepReport`] names the caches that are to be computed again.
    ///
    /// # Errors
    /// [`PoolError`] when the pool disagrees, which would be a defect.
    pub fn device_lost(&mut self, copies: &BTreeSet<SessionId>) -> Result<Loss, PoolError> {
        let mut loss = Loss::default();
        let ids: Vec<SessionId> = self.sessions.keys().copied().collect();
        for id in ids {
            let session = &self.sessions[&id];
            let (tokens, place, store) = (session.cached(), session.place, session.store as usize);
            let whole = matches!(place, Place::Host | Place::Coming(_)) && copies.contains(&id);
            if place == Place::Nowhere {
                continue;
            }
            if let Place::Leaving(_) = place {
                self.away[store].give_back(self.caches.suspended_bytes(id));
            }
            self.caches.release(id)?;
            if whole {
                self.session_mut(id).place = Place::Host;
                loss.restored.push(id);
            } else {
                let copy = self.hosted.remove(&id);
                self.away[store].give_back(copy.map_or(Bytes::ZERO, |copy| copy.bytes()));
                let session = self.session_mut(id);
                session.forget();
                if tokens > 0 {
                    session.moves.dropped += 1;
                    self.unreported.dropped.push(id);
                    loss.recomputed.push((id, tokens));
                }
            }
            let session = self.session_mut(id);
            if std::mem::take(&mut session.seated) {
                self.enqueue(id);
            }
        }
        self.admitted.clear();
        self.caches.forget_fresh();
        self.forgotten = copies.iter().filter(|id| !loss.restored.contains(id)).copied().collect();
        self.limit.rows = (self.limit.rows / 2).max(1);
        self.limit.good = 0;
        Ok(loss)
    }
}

impl Caches {
    /// Takes back the rows of a step that failed.
    ///
    /// # Errors
    /// [`PoolError`] when the pool disagrees, which would be a defect.
    pub fn ungrow(&mut self, plan: &StepPlan) -> Result<(), PoolError> {
        // In the opposite order, so that the pool is as it was.
        for (session, _) in plan.rows_of_sessions().into_iter().rev() {
            self.tables.get_mut(&session).expect("an admitted session has a table").ungrow(&mut self.pool)?;
        }
        Ok(())
    }

    /// Takes back what [`Self::take_target`] gave, where its eviction failed: emptied, and still due.
    ///
    /// # Errors
    /// [`PoolError`] when the pool disagrees, which would be a defect.
    ///
    /// # Panics
    /// When the session has no eviction to come.
    pub fn return_target(&mut self, id: SessionId, target: PageTable) -> Result<(), PoolError> {
        let (shape, layers, capacity) = (*target.shape(), target.layers().clone(), target.admitted());
        target.release(&mut self.pool, &mut self.ranges)?;
        let target = PageTable::admit(&mut self.pool, &mut self.ranges, shape, &layers, capacity)?;
        self.plans.get_mut(&id).expect("an eviction that is due has a plan").targets.insert(0, target);
        Ok(())
    }
}
