//! A backend without a device: steps take a time that is computed, tokens follow from what a session has read.
//!
//! The same schedule code as on a device, driven in tests through thousands of steps. In place of keys and values a cache
//! holds a hash of the tokens in it, so that a session whose cache was lost, mixed up or copied too early produces other
//! tokens than alone. Where tokens end with a page the hash is the page's, whichever tables name it; so a session that was given
//! another's pages produces what follows from these.
//!
//! Faults happen where a list of them says so: before anything is done, or when half of it is done and the other half is
//! rubbish. A lost device loses what it had, and of the copies in host memory those whose last pages left in the step before,
//! which a device may still have had to write.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

use super::{Backend, BackendError, Caches, Direction, Fault, Rates, SessionId, StepPlan, StepResult, Store, Transfer};
use crate::geometry::Bytes;
use crate::pool::page_table::KeptTokens;
use crate::pool::{PageId, PoolError};

/// What a cache holds, a page of it, or a copy: how many positions from the start, and a hash of all tokens up to there.
pub type Content = (u32, u64);

/// A copy away from the device.
#[derive(Clone, Debug)]
struct Copy {
    /// Pages of it that are whole.
    whole: u32,
    content: Content,
    /// What each page holds, where that is known.
    pages: Vec<Option<Content>>,
}

/// What goes wrong in a simulation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SimulatedFault {
    /// Calls of the backend that it is for, counted from 0: steps and evictions alike.
    pub calls: Range<u64>,
    /// Of these, steps of more rows than this; an eviction counts as one row.
    pub above_rows: u32,
    /// What happens.
    pub fault: Fault,
    /// Whether half of the work is done then.
    pub half: bool,
}

/// What can go wrong in a simulation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SimulationError {
    /// The pool disagrees.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// What was asked for.
    #[error("call {call} was to fail: {fault:?}")]
    Fault {
        /// Which call.
        call: u64,
        /// How it failed.
        fault: Fault,
    },
}

impl BackendError for SimulationError {
    fn fault(&self) -> Fault {
        match self {
            Self::Pool(error) => error.fault(),
            Self::Fault { fault, .. } => *fault,
        }
    }
}

/// Tokens from what a session has read, and a step time that grows with its rows and the bytes that move.
#[derive(Clone, Debug)]
pub struct Simulation {
    seed: u64,
    vocab: u32,
    /// Time of a step without rows.
    pub per_step: Duration,
    /// Time of each row.
    pub per_row: Duration,
    /// How fast pages move; at once where zero.
    pub rates: Rates,
    /// What goes wrong, and when.
    pub faults: Vec<SimulatedFault>,
    /// What each session has read.
    device: BTreeMap<SessionId, Content>,
    /// What the caches held behind which a step that failed has left rubbish.
    torn: BTreeMap<SessionId, Content>,
    /// What full pages hold, and pages that an eviction filled.
    pages: BTreeMap<PageId, Content>,
    /// Pages at which those that no table names any more are dropped.
    most_pages: usize,
    /// Copies away from the device.
    host: BTreeMap<SessionId, Copy>,
    /// Of these, whole ones, and the step that they were whole after.
    whole: BTreeMap<SessionId, u64>,
    /// Bytes that files hold, and for whom.
    files: BTreeMap<SessionId, u64>,
    /// Bytes that files can hold: a write beyond them fails.
    pub disk: Bytes,
    trace: u64,
    steps: u64,
    calls: u64,
}

/// As FNV-1a, but a word at a time: long simulations read billions of tokens.
const fn hash(before: u64, value: u64) -> u64 {
    (before ^ value).wrapping_mul(0x0100_0000_01b3)
}

/// Where hashes begin.
const EMPTY: u64 = 0xcbf2_9ce4_8422_2325;

/// What is where a step that failed was to write.
const RUBBISH: u64 = 0x5bad_5bad;

/// Pages whose contents are remembered without a look at which of them are still there.
const FEW_PAGES: usize = 1 << 12;

impl Simulation {
    /// A simulation whose tokens are below `vocab`.
    pub fn new(seed: u64, vocab: u32) -> Self {
        Self {
            seed,
            vocab,
            per_step: Duration::from_millis(1),
            per_row: Duration::from_micros(100),
            rates: Rates::default(),
            faults: Vec::new(),
            device: BTreeMap::new(),
            torn: BTreeMap::new(),
            pages: BTreeMap::new(),
            most_pages: FEW_PAGES,
            host: BTreeMap::new(),
            whole: BTreeMap::new(),
            files: BTreeMap::new(),
            disk: Bytes(u64::MAX),
            trace: EMPTY,
            steps: 0,
            calls: 0,
        }
    }

    /// A hash of every plan so far: equal traces have equal hashes.
    pub const fn trace_hash(&self) -> u64 {
        self.trace
    }

    /// Steps executed.
    pub const fn steps(&self) -> u64 {
        self.steps
    }

    /// What a session's cache holds, wherever it is and whatever was read by itself: positions, and a hash of the tokens.
    pub fn content(&self, session: SessionId) -> Option<Content> {
        let away = || self.host.get(&session).map(|copy| &copy.content);
        self.torn.get(&session).or_else(|| self.device.get(&session)).or_else(away).copied()
    }

    /// Gives a session that is away its cache of `pages` pages, as it was in another simulation.
    pub fn insert(&mut self, session: SessionId, pages: u32, content: Content) {
        self.host.insert(session, Copy { whole: pages, content, pages: vec![None; pages as usize] });
    }

    /// Copies away from the device.
    pub fn hosted(&self) -> impl ExactSizeIterator<Item = SessionId> + '_ {
        self.host.keys().copied()
    }

    /// Adds to the trace.
    pub(super) fn record(&mut self, value: u32) {
        self.trace = hash(self.trace, u64::from(value));
    }

    /// What the cache of a session holds before position `index`: where a page ends there, what its pages say.
    fn before(&self, session: SessionId, index: u32, caches: &Caches) -> Content {
        let table = &caches.tables[&session];
        let start = table.n_tokens() - table.tail();
        let size = table.shape().page.page_size;
        if index == 0 {
            return (0, EMPTY);
        }
        let at_edge = (index - start).is_multiple_of(size);
        let mut held =
            at_edge.then(|| table.pages_before(index)).into_iter().flatten().map(|page| self.pages.get(&page));
        let content = held.next().flatten();
        assert!(held.all(|other| other == content), "{session:?}: pages of one place hold the same tokens");
        // Nothing was kept, or nobody knows what the pages hold.
        let read = || self.torn.get(&session).or_else(|| self.device.get(&session));
        content.or_else(read).copied().unwrap_or((0, EMPTY))
    }

    /// Reads tokens into a cache that holds those before them.
    fn read(&mut self, session: SessionId, first_index: u32, tokens: &[u32], caches: &Caches) -> u64 {
        let mut content = self.before(session, first_index, caches);
        assert_eq!(content.0, first_index, "{session:?} should hold what comes before its rows");
        let table = &caches.tables[&session];
        let (start, size) = (table.n_tokens() - table.tail(), table.shape().page.page_size);
        for token in tokens {
            content = (content.0 + 1, hash(content.1, u64::from(*token)));
            if (content.0 - start).is_multiple_of(size) {
                self.pages.extend(table.pages_before(content.0).map(|page| (page, content)));
            }
        }
        self.torn.remove(&session);
        self.device.insert(session, content);
        content.1
    }

    /// What the cache of a session holds between two steps.
    pub fn held(&self, session: SessionId, caches: &Caches) -> Content {
        self.before(session, caches.tables[&session].n_tokens(), caches)
    }

    /// Notes what an eviction leaves of a cache that held so much: its pages speak for all of it.
    pub fn kept(&mut self, session: SessionId, (_, read): Content, caches: &Caches) {
        let table = &caches.tables[&session];
        // Positions begin anew where kept keys are turned to their places in the cache.
        let content = (table.n_tokens(), read);
        self.torn.remove(&session);
        self.device.insert(session, content);
        self.pages.extend(table.pages_before(content.0).map(|page| (page, content)));
    }

    /// Drops what sessions and pages held that are gone, once these are half of all.
    fn prune(&mut self, caches: &Caches) {
        if self.pages.len().max(self.device.len()) < self.most_pages {
            return;
        }
        self.device.retain(|session, _| caches.tables.contains_key(session));
        self.torn.retain(|session, _| caches.tables.contains_key(session));
        self.pages.retain(|page, _| caches.pool.holders(*page) > 0);
        self.most_pages = (2 * self.pages.len().max(self.device.len())).max(FEW_PAGES);
    }

    /// Whether this call of so many rows fails, and how.
    fn fault(&mut self, rows: u32) -> Option<SimulatedFault> {
        let call = self.calls;
        self.calls += 1;
        let here = |fault: &&SimulatedFault| fault.calls.contains(&call) && rows > fault.above_rows;
        let fault = self.faults.iter().find(here).cloned()?;
        self.record(u32::MAX);
        if fault.fault == Fault::DeviceLost {
            self.lose_device();
        }
        Some(fault)
    }

    fn lose_device(&mut self) {
        self.device.clear();
        self.torn.clear();
        self.pages.clear();
    }

    /// The error of the call that was made last.
    const fn failed(&self, fault: Fault) -> SimulationError {
        SimulationError::Fault { call: self.calls - 1, fault }
    }

    /// Does half of a step: rows and pages are rubbish where they were to be written, and what was there is as it was.
    fn tear(&mut self, plan: &StepPlan, caches: &Caches) {
        for (session, n) in plan.rows_of_sessions() {
            let table = &caches.tables[&session];
            let held = self.before(session, table.n_tokens() - n, caches);
            self.torn.insert(session, held);
            self.device.insert(session, (held.0 + n / 2 + 1, RUBBISH));
            let (start, size) = (table.n_tokens() - table.tail(), table.shape().page.page_size);
            let edges = (held.0 + 1..=table.n_tokens()).filter(|at| (at - start).is_multiple_of(size));
            self.pages.extend(edges.flat_map(|at| table.pages_before(at).map(move |page| (page, (at, RUBBISH)))));
        }
        for transfer in plan.transfers.iter().filter(|transfer| transfer.direction == Direction::In) {
            self.device.insert(transfer.session, (1, RUBBISH));
            let pages = caches.tables[&transfer.session].page_ids();
            self.pages.extend(pages.map(|(page, _)| (page, (1, RUBBISH))));
        }
    }

    /// A device in place of one that was lost: it has nothing. The sessions of whose caches whole copies are in host memory.
    pub fn rebuilt(&mut self) -> BTreeSet<SessionId> {
        self.lose_device();
        let steps = self.steps;
        self.whole.retain(|_, step| *step < steps);
        let whole: BTreeSet<_> = self.whole.keys().copied().collect();
        self.host.retain(|session, _| whole.contains(session));
        whole
    }

    /// Calls so far, steps and evictions alike.
    pub const fn calls(&self) -> u64 {
        self.calls
    }

    /// Whether a chunk that leaves finds room; a copy that does not is lost.
    fn has_room(&mut self, transfer: &Transfer) -> bool {
        if (transfer.store, transfer.direction) != (Store::Disk, Direction::Out) {
            return true;
        }
        let all: u64 = self.files.values().sum();
        let fits = all + transfer.bytes.0 <= self.disk.0;
        if fits {
            *self.files.entry(transfer.session).or_default() += transfer.bytes.0;
        } else {
            self.files.remove(&transfer.session);
            self.host.remove(&transfer.session);
        }
        fits
    }

    /// Notes what pages hold now that a copy is in them.
    fn come_back(&mut self, pages: impl Iterator<Item = (PageId, Option<Content>)>) {
        for (page, content) in pages {
            match content {
                Some(content) => self.pages.insert(page, content),
                None => self.pages.remove(&page),
            };
        }
    }

    /// The time that pages take to move.
    fn transfer(&mut self, transfer: &Transfer, caches: &Caches) -> Duration {
        let Transfer { session, direction, pages, bytes, last, .. } = transfer;
        let all = caches.tables[session].page_ids().count();
        assert_eq!(*last, pages.end as usize == all, "{session:?}: the last of {all} pages end a move");
        self.record(session.0);
        self.record(pages.end);
        let rate = match direction {
            Direction::Out => {
                let content = self.held(*session, caches);
                if pages.start == 0 {
                    let held = caches.tables[session].page_ids().map(|(page, _)| self.pages.get(&page).copied());
                    self.host.insert(*session, Copy { whole: 0, content, pages: held.collect() });
                }
                let copy = self.host.get_mut(session).expect("its first pages left");
                let before = (copy.whole, copy.content);
                assert_eq!(before, (pages.start, content), "{session:?} should stay as it is while it leaves");
                copy.whole = pages.end;
                if *last {
                    self.device.remove(session);
                    self.torn.remove(session);
                    self.whole.insert(*session, self.steps);
                }
                self.rates.out
            }
            Direction::In => {
                let copy = &self.host[session];
                assert_eq!(copy.whole as usize, all, "{session:?} should come back whole");
                if *last {
                    let copy = self.host.remove(session).expect("it was there");
                    self.device.insert(*session, copy.content);
                    self.come_back(caches.tables[session].page_ids().map(|(page, _)| page).zip(copy.pages));
                    self.files.remove(session);
                    self.torn.remove(session);
                    self.whole.remove(session);
                }
                self.rates.back
            }
        };
        if rate > 0.0 { Duration::from_secs_f64(bytes.0 as f64 / rate) } else { Duration::ZERO }
    }
}

impl Backend for Simulation {
    type Error = SimulationError;

    fn execute(&mut self, plan: &StepPlan, caches: &mut Caches) -> Result<StepResult, SimulationError> {
        if let Some(SimulatedFault { fault, half, .. }) = self.fault(plan.n_rows()) {
            if half && fault != Fault::DeviceLost {
                self.tear(plan, caches);
            }
            return Err(self.failed(fault));
        }
        self.steps += 1;
        self.prune(caches);
        let mut sampling = BTreeMap::new();
        // Rows that stop below a layer come behind the last one of their prompt.
        let mut in_order: Vec<_> = plan.segments.iter().enumerate().collect();
        in_order.sort_by_key(|(_, rows)| (rows.session, rows.first_index));
        for (at, rows) in in_order {
            let table = &caches.tables[&rows.session];
            assert!(table.n_tokens() >= rows.first_index + rows.n_rows(), "the table should hold the planned rows");
            self.record(rows.session.0);
            self.record(rows.first_index);
            let read = self.read(rows.session, rows.first_index, &rows.tokens, caches);
            self.trace = hash(self.trace, read);
            if rows.sample.is_some() {
                let mixed = (read ^ self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xd6e8_feb8_6659_fd93);
                sampling.insert(at, u32::try_from((mixed >> 32) % u64::from(self.vocab)).expect("below a vocabulary"));
            }
        }
        let mut elapsed = self.per_step + self.per_row * plan.n_rows();
        let mut lost = Vec::new();
        for transfer in &plan.transfers {
            if self.has_room(transfer) {
                elapsed += self.transfer(transfer, caches);
            } else {
                lost.push(transfer.session);
            }
        }
        for session in &plan.forgotten {
            self.files.remove(session);
            assert!(self.host.remove(session).is_some(), "{session:?} is forgotten and was not there");
            self.whole.remove(session);
        }
        Ok(StepResult { tokens: sampling.into_values().collect(), elapsed, lost })
    }

    /// Keeps as many tokens as the policy says; which ones is of no account here. Lists that share a total keep equally many.
    fn evict(&mut self, session: SessionId, _: &[u32], caches: &mut Caches) -> Result<Duration, SimulationError> {
        let fault = self.fault(1);
        if let Some(fault) = fault.as_ref().filter(|fault| !fault.half) {
            return Err(self.failed(fault.fault));
        }
        self.record(session.0);
        let content = self.held(session, caches);
        let selection = caches.selection(session);
        let mut target = caches.take_target(session);
        let table = &caches.tables[&session];
        let (n_tokens, kv_heads) = (table.n_tokens(), table.shape().num_kv_heads);
        let owners: Vec<u32> = (0..caches.full.num_layers).filter(|layer| target.layers().owns(*layer)).collect();
        let mut kept = vec![KeptTokens::default(); target.shape().num_lists() as usize];
        for domain in selection.domains.iter().filter(|domain| domain.total > 0) {
            let lists = u32::try_from(domain.lists.len()).expect("lists are counted in 32 bits");
            for list in &domain.lists {
                let held = table.n_held(owners[(list / kv_heads) as usize], list % kv_heads);
                let tokens = (domain.total / lists).min(held);
                self.record(tokens);
                kept[*list as usize].own = Some((0..tokens).collect());
            }
        }
        let longest = || kept.iter().filter_map(|tokens| tokens.own.as_ref()).map(Vec::len).max().unwrap_or(0);
        // Positions begin anew where kept keys are turned to their places in the cache.
        let n_tokens =
            if selection.rerotates { u32::try_from(longest()).expect("counted in 32 bits") } else { n_tokens };
        target.keep(&mut caches.pool, kept, &[], n_tokens)?;
        if let Some(fault) = fault {
            caches.return_target(session, target)?;
            return Err(self.failed(fault.fault));
        }
        caches.swap(session, target)?;
        self.kept(session, content, caches);
        Ok(self.per_step)
    }
}
