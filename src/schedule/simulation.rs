//! A backend without a device: steps take a time that is computed, tokens follow from what a session has read.
//!
//! The same schedule code as on a device, driven in tests through thousands of steps. In place of keys and values a cache
//! holds a hash of the tokens in it, so that a session whose cache was lost, mixed up or copied too early produces other
//! tokens than alone.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Backend, Caches, Direction, Rates, SessionId, StepPlan, StepResult, Store, Transfer};
use crate::geometry::Bytes;
use crate::pool::PoolError;
use crate::pool::page_table::KeptTokens;

/// What a cache holds, or its copy: how many tokens, and their hash.
type Content = (u32, u64);

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
    device: BTreeMap<SessionId, Content>,
    /// Copies away from the device, with the pages that are whole.
    host: BTreeMap<SessionId, (u32, Content)>,
    /// Bytes that files hold, and for whom.
    files: BTreeMap<SessionId, u64>,
    /// Bytes that files can hold: a write beyond them fails.
    pub disk: Bytes,
    trace: u64,
    steps: u64,
}

/// As FNV-1a, but a word at a time: long simulations read billions of tokens.
const fn hash(before: u64, value: u64) -> u64 {
    (before ^ value).wrapping_mul(0x0100_0000_01b3)
}

/// Where hashes begin.
const EMPTY: u64 = 0xcbf2_9ce4_8422_2325;

impl Simulation {
    /// A simulation whose tokens are below `vocab`.
    pub fn new(seed: u64, vocab: u32) -> Self {
        Self {
            seed,
            vocab,
            per_step: Duration::from_millis(1),
            per_row: Duration::from_micros(100),
            rates: Rates::default(),
            device: BTreeMap::new(),
            host: BTreeMap::new(),
            files: BTreeMap::new(),
            disk: Bytes(u64::MAX),
            trace: EMPTY,
            steps: 0,
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

    /// What a session's cache holds, wherever it is: tokens, and their hash.
    pub fn content(&self, session: SessionId) -> Option<(u32, u64)> {
        self.device.get(&session).or_else(|| self.host.get(&session).map(|(_, content)| content)).copied()
    }

    /// Gives a session that is away its cache of `pages` pages, as it was in another simulation.
    pub fn insert(&mut self, session: SessionId, pages: u32, content: (u32, u64)) {
        self.host.insert(session, (pages, content));
    }

    /// Copies away from the device.
    pub fn hosted(&self) -> impl ExactSizeIterator<Item = SessionId> + '_ {
        self.host.keys().copied()
    }

    /// Adds to the trace.
    pub(super) fn record(&mut self, value: u32) {
        self.trace = hash(self.trace, u64::from(value));
    }

    /// Reads tokens into a cache that holds those before them.
    fn read(&mut self, session: SessionId, first_index: u32, tokens: &[u32]) -> u64 {
        let content = self.device.entry(session).or_insert((0, EMPTY));
        if first_index == 0 {
            *content = (0, EMPTY);
        }
        assert_eq!(content.0, first_index, "{session:?} should hold what comes before its rows");
        for token in tokens {
            *content = (content.0 + 1, hash(content.1, u64::from(*token)));
        }
        content.1
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

    /// The time that pages take to move.
    fn transfer(&mut self, transfer: &Transfer, caches: &Caches) -> Duration {
        let Transfer { session, direction, pages, bytes, last, .. } = transfer;
        let all = caches.tables[session].page_ids().count();
        assert_eq!(*last, pages.end as usize == all, "{session:?}: the last of {all} pages end a move");
        self.record(session.0);
        self.record(pages.end);
        let rate = match direction {
            Direction::Out => {
                let content = self.device[session];
                let copy = self.host.entry(*session).or_insert((0, content));
                assert_eq!(*copy, (pages.start, content), "{session:?} should stay as it is while it leaves");
                copy.0 = pages.end;
                if *last {
                    self.device.remove(session);
                }
                self.rates.out
            }
            Direction::In => {
                let (whole, content) = self.host[session];
                assert_eq!(whole as usize, all, "{session:?} should come back whole");
                if *last {
                    self.files.remove(session);
                    self.host.remove(session);
                    self.device.insert(*session, content);
                }
                self.rates.back
            }
        };
        if rate > 0.0 { Duration::from_secs_f64(bytes.0 as f64 / rate) } else { Duration::ZERO }
    }
}

impl Backend for Simulation {
    type Error = PoolError;

    fn execute(&mut self, plan: &StepPlan, caches: &mut Caches) -> Result<StepResult, PoolError> {
        self.steps += 1;
        let mut sampling = BTreeMap::new();
        // Rows that stop below a layer come behind the last one of their prompt.
        let mut in_order: Vec<_> = plan.segments.iter().enumerate().collect();
        in_order.sort_by_key(|(_, rows)| (rows.session, rows.first_index));
        for (at, rows) in in_order {
            let table = &caches.tables[&rows.session];
            assert!(table.n_tokens() >= rows.first_index + rows.n_rows(), "the table should hold the planned rows");
            self.record(rows.session.0);
            self.record(rows.first_index);
            let read = self.read(rows.session, rows.first_index, &rows.tokens);
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
        }
        Ok(StepResult { tokens: sampling.into_values().collect(), elapsed, lost })
    }

    /// Keeps as many tokens as the policy says; which ones is of no account here. Lists that share a total keep equally many.
    fn evict(&mut self, session: SessionId, _: &[u32], caches: &mut Caches) -> Result<Duration, PoolError> {
        self.record(session.0);
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
        if let Some(content) = self.device.get_mut(&session) {
            content.0 = n_tokens;
        }
        target.keep(&mut caches.pool, kept, &[], n_tokens)?;
        caches.swap(session, target)?;
        Ok(self.per_step)
    }
}
