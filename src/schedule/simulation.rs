//! A backend without a device: steps take a time that is computed, tokens follow from what a session has read.
//!
//! The same schedule code as on a device, driven in tests through thousands of steps. In place of keys and values a cache
//! holds a hash of the tokens in it, so that a session whose cache was lost, mixed up or copied too early produces other
//! tokens than alone. Where tokens end with a page the hash is the page's, whichever tables name it; so a session that was given
//! another's pages produces what follows from these.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Backend, Caches, Direction, Rates, SessionId, StepPlan, StepResult, Transfer};
use crate::pool::page_table::KeptTokens;
use crate::pool::{PageId, PoolError};

/// What a cache holds, a page of it, or a copy: how many tokens from the start, and their hash.
pub type Content = (u32, u64);

/// A copy in host memory.
#[derive(Clone, Debug)]
struct HostCopy {
    /// Pages of it that are whole.
    whole: u32,
    content: Content,
    /// What each page holds.
    pages: Vec<Option<Content>>,
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
    /// What each session has read.
    device: BTreeMap<SessionId, Content>,
    /// What full pages hold, and pages that an eviction filled.
    pages: BTreeMap<PageId, Content>,
    host: BTreeMap<SessionId, HostCopy>,
    trace: u64,
    steps: u64,
}

/// FNV-1a over 32 bits more.
fn hash(before: u64, value: u32) -> u64 {
    value.to_le_bytes().iter().fold(before, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Where hashes begin.
const EMPTY: u64 = 0xcbf2_9ce4_8422_2325;

/// The last pages of a session's lists that hold tokens before position `index`, where a page of the tail ends there; all that
/// was kept where the tail begins there.
fn ends(caches: &Caches, session: SessionId, index: u32) -> Vec<PageId> {
    let table = &caches.tables[&session];
    let shape = table.shape();
    let page = (index + table.tail() - table.n_tokens()) / shape.page.page_size;
    let lists = (0..caches.full.num_layers).flat_map(|layer| (0..shape.num_kv_heads).map(move |head| (layer, head)));
    let ends = lists.filter(|(layer, head)| table.layers().owns(*layer) && !table.is_closed(*layer, *head));
    let of_list = |(layer, head)| {
        let (mut in_codec, open) = table.list(layer, head);
        let kept = table.n_kept(layer, head).div_ceil(shape.page.page_size) as usize;
        match page.checked_sub(1) {
            None => {
                in_codec.truncate(kept);
                in_codec
            }
            Some(page) if shape.codec.seals() => vec![in_codec[kept + page as usize]],
            Some(page) => vec![open[page as usize]],
        }
    };
    ends.flat_map(of_list).collect()
}

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
            pages: BTreeMap::new(),
            host: BTreeMap::new(),
            trace: EMPTY,
            steps: 0,
        }
    }

    /// A hash of every plan so far (FNV-1a): equal traces have equal hashes.
    pub const fn trace_hash(&self) -> u64 {
        self.trace
    }

    /// Steps executed.
    pub const fn steps(&self) -> u64 {
        self.steps
    }

    /// Copies in host memory.
    pub fn hosted(&self) -> impl ExactSizeIterator<Item = SessionId> + '_ {
        self.host.keys().copied()
    }

    fn record(&mut self, value: u32) {
        self.trace = hash(self.trace, value);
    }

    /// What the cache of a session holds before position `index`: where a page ends there, what its pages say.
    fn before(&self, session: SessionId, index: u32, caches: &Caches) -> Content {
        let table = &caches.tables[&session];
        let start = table.n_tokens() - table.tail();
        let size = table.shape().page.page_size;
        if index == 0 {
            return (0, EMPTY);
        }
        let mut held = if (index - start).is_multiple_of(size) { ends(caches, session, index) } else { Vec::new() }
            .into_iter()
            .map(|page| self.pages.get(&page).copied());
        // A cache of which nothing was kept has no page that says anything.
        let content = held.next().flatten().unwrap_or_else(|| self.device.get(&session).copied().unwrap_or_default());
        assert!(held.all(|other| other == Some(content)), "{session:?}: pages of one place hold the same tokens");
        content
    }

    /// Reads tokens into a cache that holds those before them.
    fn read(&mut self, session: SessionId, first_index: u32, tokens: &[u32], caches: &Caches) -> u64 {
        let mut content = self.before(session, first_index, caches);
        assert_eq!(content.0, first_index, "{session:?} should hold what comes before its rows");
        let table = &caches.tables[&session];
        let (start, size) = (table.n_tokens() - table.tail(), table.shape().page.page_size);
        for token in tokens {
            content = (content.0 + 1, hash(content.1, *token));
            if (content.0 - start).is_multiple_of(size) {
                self.pages.extend(ends(caches, session, content.0).into_iter().map(|page| (page, content)));
            }
        }
        self.device.insert(session, content);
        content.1
    }

    /// What the cache of a session holds between two steps.
    pub fn held(&self, session: SessionId, caches: &Caches) -> Content {
        self.before(session, caches.tables[&session].n_tokens(), caches)
    }

    /// Notes what an eviction leaves of a cache that held so much: its pages speak for all of it.
    pub fn kept(&mut self, session: SessionId, content: Content, caches: &Caches) {
        self.device.insert(session, content);
        self.pages.extend(ends(caches, session, content.0).into_iter().map(|page| (page, content)));
    }

    /// The time that pages take to move.
    fn transfer(&mut self, transfer: &Transfer, caches: &Caches) -> Duration {
        let Transfer { session, direction, pages, bytes, last } = transfer;
        let all = caches.tables[session].page_ids().count();
        assert_eq!(*last, pages.end as usize == all, "{session:?}: the last of {all} pages end a move");
        self.record(session.0);
        self.record(pages.end);
        let rate = match direction {
            Direction::Out => {
                let content = self.held(*session, caches);
                let held = || caches.tables[session].page_ids().map(|(page, _)| self.pages.get(&page).copied());
                let new = || HostCopy { whole: 0, content, pages: held().collect() };
                let copy = self.host.entry(*session).or_insert_with(new);
                let before = (copy.whole, copy.content);
                assert_eq!(before, (pages.start, content), "{session:?} should stay as it is while it leaves");
                copy.whole = pages.end;
                if *last {
                    self.device.remove(session);
                }
                self.rates.out
            }
            Direction::In => {
                let copy = &self.host[session];
                assert_eq!(copy.whole as usize, all, "{session:?} should come back whole");
                if *last {
                    let copy = self.host.remove(session).expect("it was there");
                    self.device.insert(*session, copy.content);
                    let pages = caches.tables[session].page_ids().map(|(page, _)| page).zip(copy.pages);
                    self.pages.extend(pages.filter_map(|(page, content)| Some((page, content?))));
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
            rows.tokens.iter().for_each(|t| self.record(*t));
            let read = self.read(rows.session, rows.first_index, &rows.tokens, caches);
            if rows.sample.is_some() {
                let mixed = (read ^ self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xd6e8_feb8_6659_fd93);
                sampling.insert(at, u32::try_from((mixed >> 32) % u64::from(self.vocab)).expect("below a vocabulary"));
            }
        }
        let mut elapsed = self.per_step + self.per_row * plan.n_rows();
        for transfer in &plan.transfers {
            elapsed += self.transfer(transfer, caches);
        }
        for session in &plan.forgotten {
            assert!(self.host.remove(session).is_some(), "{session:?} is forgotten and was not there");
        }
        Ok(StepResult { tokens: sampling.into_values().collect(), elapsed })
    }

    /// Keeps as many tokens as the policy says; which ones is of no account here. Lists that share a total keep equally many.
    fn evict(&mut self, session: SessionId, _: &[u32], caches: &mut Caches) -> Result<Duration, PoolError> {
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
        target.keep(&mut caches.pool, kept, &[], n_tokens)?;
        caches.swap(session, target)?;
        self.kept(session, content, caches);
        Ok(self.per_step)
    }
}
