//! Who gives up its place when another session needs pages, and how.
//!
//! ```text
//! who   1. a session that nobody waits for: it thinks, or its question came after the waiting one's; the longest idle first
//!       2. a session of a lower priority in the middle of a round, the lowest and latest first, at most
//!          `max_preemptions` times in one round
//! how   swap        its pages are copied to the host, chunk by chunk beside the steps of others, and back later
//!       recompute   its pages are dropped at once, and its whole sequence is read again as a prompt
//!       compress    what it holds moves into the next rung of its ladder, and it stays
//!       the faster of swap and recompute by measured rates, since both lose nothing; where the host has no room, compress if
//!       there is a rung left, and recompute if not
//!
//! seconds(swap)      = bytes / out + bytes / in            bytes of its pages, link rates in bytes per second
//! seconds(recompute) = tokens / prefill                    tokens that it would read again, prompt rows per second
//! ```
//!
//! Pages that others name too stay when a session leaves. So one that would return nothing is left alone, and one whose pages
//! the waiting session would share goes last. A copy on the host is whole by itself, and comes back to pages of its own; one
//! that is computed again shares again what it can, so that only the rest counts as read.
//!
//! **Nobody starves.** Sessions wait in order of priority, then of their questions. The first in line takes the place of every
//! session that does not run, and those that run give theirs up at the end of their round. A session loses its place in a
//! round at most `max_preemptions` times, so a round is read again or copied back at most so often.

use std::time::Duration;

use super::batch::{Direction, Store, Transfer};
use super::{Backend, Place, Request, Scheduler, Session, SessionId, Shared, StepPlan, StepReport};
use crate::compression::Compression;
use crate::compression::hidden::HiddenCodec;
use crate::geometry::Bytes;
use crate::pool::PoolError;

/// How fast a cache moves, and how fast it is made. Zero where nobody knows; the schedule then learns how fast prompts are
/// read from steps that read nothing else.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    /// Bytes per second from the device to the host.
    pub out: f64,
    /// Bytes per second from the host to the device.
    pub back: f64,
    /// Prompt tokens per second.
    pub prefill: f64,
}

/// Where caches go that do not fit on the device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HostConfig {
    /// Bytes of host memory for caches.
    pub budget: Bytes,
    /// What swap and recompute are predicted from.
    pub rates: Rates,
    /// Bytes of files for caches that host memory has no room for.
    pub disk_budget: Bytes,
    /// Bytes per second into files, and out of them; zero where nobody knows.
    pub disk_rates: [f64; 2],
    /// What caches are encoded in before they leave, where there is room for both forms and the codec makes them smaller: a
    /// loss that the user chose. As they are where `None`.
    pub codec: Option<HiddenCodec>,
    /// How often a session may lose its place in the middle of one round.
    pub max_preemptions: u32,
}

impl Default for HostConfig {
    /// Neither host memory nor files: what does not fit is computed again.
    fn default() -> Self {
        let (budget, disk_budget) = (Bytes::ZERO, Bytes::ZERO);
        Self { budget, rates: Rates::default(), disk_budget, disk_rates: [0.0; 2], codec: None, max_preemptions: 2 }
    }
}

/// What becomes of a cache that gives up its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Copied to the host, and back later.
    Swap,
    /// Dropped, and computed again later.
    Recompute,
    /// Compressed harder, in its place.
    Compress,
}

impl Rates {
    /// Predicted time of moving so many bytes out and back, where the link's rates are known.
    pub fn swap(&self, bytes: Bytes) -> Option<Duration> {
        let bytes = bytes.0 as f64;
        (self.out > 0.0 && self.back > 0.0).then(|| Duration::from_secs_f64(bytes / self.out + bytes / self.back))
    }

    /// Predicted time of reading so many tokens again, where the rate is known.
    pub fn recompute(&self, tokens: u32) -> Option<Duration> {
        (self.prefill > 0.0).then(|| Duration::from_secs_f64(f64::from(tokens) / self.prefill))
    }

    /// The best way to give up `bytes` of a cache that has seen `tokens` tokens, where the host has `host_free` bytes left and
    /// its ladder has a rung left or not. Where one of the two times is unknown, a cache is swapped, since copying takes no
    /// arithmetic.
    pub fn choose(&self, bytes: Bytes, tokens: u32, host_free: Bytes, rung: bool) -> Method {
        if tokens == 0 {
            return Method::Recompute;
        }
        if bytes > host_free {
            return if rung { Method::Compress } else { Method::Recompute };
        }
        match (self.swap(bytes), self.recompute(tokens)) {
            (Some(swap), Some(recompute)) if recompute < swap => Method::Recompute,
            _ => Method::Swap,
        }
    }
}

impl Scheduler {
    /// Learns from a step.
    pub(super) fn learn(&mut self, report: &StepReport, elapsed: Duration) {
        let alone = report.decode_rows == 0 && report.out_bytes + report.in_bytes == Bytes::ZERO;
        if self.config.host.rates.prefill == 0.0 && alone && report.prefill_rows > 0 && !elapsed.is_zero() {
            let rate = f64::from(report.prefill_rows) / elapsed.as_secs_f64();
            let before = self.rates.prefill;
            // A quarter of what is new: steps differ in how much they attend to.
            self.rates.prefill = if before == 0.0 { rate } else { 0.75 * before + 0.25 * rate };
        }
    }

    /// What swap and recompute are predicted from.
    pub const fn rates(&self) -> Rates {
        self.rates
    }

    /// Takes the place of another session for the one that waits; whether pages are free now that were not before.
    pub(super) fn reclaim<B: Backend>(
        &mut self,
        waiting: SessionId,
        shared: Option<Shared>,
        backend: &mut B,
        report: &mut StepReport,
    ) -> Result<bool, B::Error> {
        // One leaves at a time: what it frees may be enough.
        if self.admitted.iter().any(|id| matches!(self.sessions[id].place, Place::Leaving(_))) {
            return Ok(false);
        }
        let Some(victim) = self.victim(waiting, shared.map(|shared| shared.donor)) else { return Ok(false) };
        let rung = self.way_out(victim, true) == Method::Compress && self.harden(victim)?;
        let method = self.way_out(victim, rung);
        if method != Method::Compress {
            if method == Method::Swap && self.encode(victim)? {
                self.carry_out(victim, backend, report)?;
            }
            self.give_up(victim, method, report)?;
            return Ok(method == Method::Recompute);
        }
        self.carry_out(victim, backend, report)?;
        Ok(true)
    }

    /// Carries out what was readied for a session's cache.
    fn carry_out<B: Backend>(
        &mut self,
        id: SessionId,
        backend: &mut B,
        report: &mut StepReport,
    ) -> Result<(), B::Error> {
        // Where it fails, it is due.
        report.compressed.push(id);
        let session = &self.sessions[&id];
        let tokens = &session.tokens[..session.cached() as usize];
        let elapsed = backend.evict(id, tokens, &mut self.caches)?;
        self.spend(elapsed, report);
        Ok(())
    }

    /// Readies a session's cache to leave in another codec, all its tokens and layers as they are; whether there is anything to do,
    /// and room to do it.
    fn encode(&mut self, id: SessionId) -> Result<bool, PoolError> {
        let session = &self.sessions[&id];
        let before = session.request.compression.clone();
        let Some(hidden) = self.config.host.codec.filter(|codec| *codec != before.hidden) else { return Ok(false) };
        // What tokens were evicted by is not done again.
        let after = Compression { layer: before.layer.clone(), hidden, ..Compression::default() };
        let whole = session.cached() >= session.request.document_tokens();
        if !whole || self.caches.serves_later(&before, &after).is_err() {
            return Ok(false);
        }
        let tail = session.request.max_tokens() - session.cached();
        let readied = self.caches.harden(id, &after, tail)?;
        if readied {
            let session = self.session_mut(id);
            session.moves.compressed += 1;
            session.request.compression.hidden = hidden;
            // Pages that were encoded twice are nobody else's beginning.
            session.read_as_prompt = 0;
        }
        Ok(readied)
    }

    /// A session gives up its place: its cache sets out for the host, or is dropped at once.
    pub(super) fn give_up(&mut self, id: SessionId, method: Method, report: &mut StepReport) -> Result<(), PoolError> {
        self.unseat(id, report);
        if method == Method::Swap {
            let bytes = self.caches.suspended_bytes(id);
            let (store, ..) = self.store_for(bytes);
            self.away[store as usize].take(bytes);
            let now = self.now;
            let session = self.session_mut(id);
            (session.place, session.store, session.moving_since) = (Place::Leaving(0), store, now);
            return Ok(());
        }
        let tokens = self.sessions[&id].cached();
        self.hand_over(id, |caches| caches.release(id))?;
        self.admitted.retain(|admitted| *admitted != id);
        let session = self.session_mut(id);
        session.forget();
        if tokens > 0 {
            session.moves.dropped += 1;
            report.dropped.push(id);
        }
        Ok(())
    }

    /// What keeps so many bytes, how many more it has room for, and how fast they move: host memory as long as it has room,
    /// then files.
    pub(super) fn store_for(&self, bytes: Bytes) -> (Store, Bytes, Rates) {
        if self.caches.abilities.swap_bytes == Bytes::ZERO {
            return (Store::Host, Bytes::ZERO, self.rates);
        }
        let HostConfig { budget, disk_budget, disk_rates: [out, back], .. } = self.config.host;
        let free = |store: Store, budget: Bytes| budget.saturating_sub(self.away[store as usize].held);
        let (host, disk) = (free(Store::Host, budget), free(Store::Disk, disk_budget));
        if bytes <= host || bytes > disk || self.disk_full {
            return (Store::Host, host, self.rates);
        }
        (Store::Disk, disk, Rates { out, back, ..self.rates })
    }

    /// Caches whose copies could not be kept, because a file could not be written or read: one that was on its way stays where it
    /// is, others are computed again. Nothing is sent to files any more.
    pub(super) fn lose(&mut self, lost: &[SessionId], report: &mut StepReport) -> Result<(), PoolError> {
        for id in lost {
            self.disk_full = true;
            let (place, store) = (self.sessions[id].place, self.sessions[id].store);
            let bytes = match place {
                Place::Leaving(_) => self.caches.suspended_bytes(*id),
                _ => self.hosted.remove(id).map_or(Bytes::ZERO, |suspended| suspended.bytes()),
            };
            self.away[store as usize].give_back(bytes);
            match place {
                Place::Leaving(_) => self.session_mut(*id).place = Place::Device,
                Place::Host | Place::Coming(_) => {
                    self.admitted.retain(|admitted| admitted != id);
                    self.caches.release(*id)?;
                    let session = self.session_mut(*id);
                    session.moves.dropped += 1;
                    session.forget();
                    report.dropped.push(*id);
                }
                Place::Nowhere | Place::Device => {}
            }
        }
        Ok(())
    }

    /// Puts a session that runs back in line.
    fn unseat(&mut self, id: SessionId, report: &mut StepReport) {
        let session = self.session_mut(id);
        if session.seated {
            session.seated = false;
            session.moves.preempted += 1;
            session.preempted_in_round += 1;
            self.enqueue(id);
            report.preempted.push(id);
        }
    }

    /// Readies the next rung of a session's ladder that makes its cache smaller; whether there is one, and room to go there.
    fn harden(&mut self, id: SessionId) -> Result<bool, PoolError> {
        let session = &self.sessions[&id];
        // A document is compressed whole.
        if session.cached() < session.request.document_tokens() {
            return Ok(false);
        }
        let tail = session.request.max_tokens() - session.cached();
        for at in session.rungs..session.request.ladder.len() {
            let rung = self.sessions[&id].request.ladder[at].clone();
            // A cache that is dropped later begins with its document in f16 where the rung evicts: an empty pool has to hold that.
            let again = Request { compression: rung.clone(), ..self.sessions[&id].request.clone() };
            let fits = |pages: Vec<_>| self.caches.pool.slabs_for(&pages) <= self.caches.pool.capacity();
            if !self.caches.pages_needed(&again).is_ok_and(fits) {
                continue;
            }
            if self.caches.harden(id, &rung, tail)? {
                let session = self.session_mut(id);
                session.rungs = at + 1;
                session.moves.compressed += 1;
                session.request.compression = rung;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Who gives up its pages for a session that waits, its donor last.
    fn victim(&self, waiting: SessionId, donor: Option<SessionId>) -> Option<SessionId> {
        let line = |id: &SessionId| self.sessions[id].line();
        let first = line(&waiting);
        let returns = |id: &SessionId| self.caches.returning_bytes(*id) > Bytes::ZERO;
        let here = self.admitted.iter().filter(|id| self.sessions[id].place == Place::Device && returns(id));
        let idle = here.clone().filter(|id| {
            let session = &self.sessions[id];
            !session.seated && (!session.wants_rows() || session.line() > first)
        });
        if let Some(id) = idle.min_by_key(|id| (Some(**id) == donor, self.sessions[id].idle_since, **id)) {
            return Some(*id);
        }
        let priority = self.sessions[&waiting].request.priority;
        self.last_seated(donor, |id, session| session.request.priority < priority && returns(&id))
    }

    /// The last in line of the sessions that run and may lose their place in this round, `donor` where there is no other.
    pub(super) fn last_seated(
        &self,
        donor: Option<SessionId>,
        of: impl Fn(SessionId, &Session) -> bool,
    ) -> Option<SessionId> {
        let may = |id: &&SessionId| {
            let session = &self.sessions[id];
            let again = session.preempted_in_round < self.config.host.max_preemptions;
            session.runs() && again && of(**id, session)
        };
        let last = |id: &&SessionId| (Some(**id) != donor, self.sessions[id].line());
        self.admitted.iter().filter(may).max_by_key(last).copied()
    }

    /// Pages that move in the next step: of the sessions on their way, in order, one chunk in each direction.
    pub(super) fn plan_transfers(&self) -> Vec<Transfer> {
        let mut left = [self.caches.abilities.swap_bytes; 2];
        let mut transfers = Vec::new();
        for id in &self.admitted {
            let (direction, from) = match self.sessions[id].place {
                Place::Leaving(done) => (Direction::Out, done),
                Place::Coming(done) => (Direction::In, done),
                _ => continue,
            };
            let left = &mut left[direction as usize];
            let store = self.sessions[id].store;
            let transfer = Transfer { store, ..self.caches.transfer(*id, direction, from, *left) };
            *left = left.saturating_sub(transfer.bytes);
            if !transfer.pages.is_empty() || transfer.last {
                transfers.push(transfer);
            }
        }
        transfers
    }

    /// Pages have moved.
    pub(super) fn moved(
        &mut self,
        plan: &StepPlan,
        lost: &[SessionId],
        report: &mut StepReport,
    ) -> Result<(), PoolError> {
        let kept = plan.transfers.iter().filter(|transfer| !lost.contains(&transfer.session));
        for Transfer { session: id, direction, pages, bytes, last, .. } in kept {
            match direction {
                Direction::Out => report.out_bytes += *bytes,
                Direction::In => report.in_bytes += *bytes,
            }
            report.moves.extend(last.then(|| self.now - self.sessions[id].moving_since));
            let place = match (direction, last) {
                (Direction::Out, false) => Place::Leaving(pages.end),
                (Direction::In, false) => Place::Coming(pages.end),
                (Direction::Out, true) => {
                    let suspended = self.hand_over(*id, |caches| caches.suspend(*id))?;
                    self.session_mut(*id).moves.swapped_out += 1;
                    self.admitted.retain(|admitted| admitted != id);
                    self.hosted.insert(*id, suspended);
                    report.swapped_out.push(*id);
                    Place::Host
                }
                (Direction::In, true) => {
                    self.session_mut(*id).moves.swapped_in += 1;
                    let suspended = self.hosted.remove(id).expect("what comes back was kept");
                    let store = self.sessions[id].store;
                    self.away[store as usize].give_back(suspended.bytes());
                    report.swapped_in.push(*id);
                    Place::Device
                }
            };
            self.session_mut(*id).place = place;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_faster_way_is_chosen_and_the_host_s_room_counts() {
        // 1 GB out and back at 50 GB/s takes 40 ms, as 400 tokens at 10,000 a second do.
        let rates = Rates { out: 50e9, back: 50e9, prefill: 10e3 };
        let gigabyte = Bytes(1_000_000_000);
        assert_eq!(rates.swap(gigabyte), Some(Duration::from_millis(40)), "both ways");
        assert_eq!(rates.choose(gigabyte, 399, gigabyte, false), Method::Recompute, "39.9 ms are less");
        assert_eq!(rates.choose(gigabyte, 400, gigabyte, false), Method::Swap, "as fast: nothing is computed twice");
        assert_eq!(rates.choose(gigabyte, 401, gigabyte, false), Method::Swap, "40.1 ms are more");
        assert_eq!(rates.choose(gigabyte, 401, Bytes(999_999_999), false), Method::Recompute, "no room on the host");
        let unknown = Rates { prefill: 0.0, ..rates };
        assert_eq!(unknown.choose(gigabyte, 1, gigabyte, false), Method::Swap, "nobody knows how long reading takes");
        assert_eq!(Rates::default().choose(gigabyte, 1, gigabyte, false), Method::Swap, "nobody knows anything");
        assert_eq!(
            rates.choose(gigabyte, 401, Bytes(999_999_999), true),
            Method::Compress,
            "a rung in place of reading"
        );
        assert_eq!(
            rates.choose(gigabyte, 401, gigabyte, true),
            Method::Swap,
            "nothing is lost while the host has room"
        );
        assert_eq!(rates.choose(gigabyte, 399, gigabyte, true), Method::Recompute, "nor where reading is faster");
        assert_eq!(
            Rates::default().choose(gigabyte, 0, gigabyte, false),
            Method::Recompute,
            "there is nothing to copy"
        );
    }
}
