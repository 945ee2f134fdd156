//! Random schedules over pools that are too small for all, and what has to hold between any two steps.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use concertina::compression::Compression;
use concertina::compression::head::{HeadPattern, HeadScores};
use concertina::compression::hidden::HiddenCodec;
use concertina::compression::layer::Sharing;
use concertina::compression::token::{Allocation, Score};
use concertina::geometry::{Bytes, PageGeometry};
use concertina::pool::page_table::{TableShape, Window};
use concertina::pool::{PagePool, PoolLayout};
use concertina::schedule::{
    Abilities, Caches, HostConfig, Phase, Request, ScheduleConfig, Scheduler, Session, SessionId, StepReport,
};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::backend::takes_turns;

/// What sessions ask for: codecs that take nothing, a little, half, more than f16, and sides of their own; policies alone and
/// beside codecs; heads that keep windows; layers that share.
pub(crate) const ASKED: [&str; 26] = [
    "f16",
    "rot3",
    "kivi4",
    "f32",
    "k:int8,v:rot2",
    "token=snapkv:0.25:window8",
    "token=snapkv:0.25:window8,hidden=rot3",
    "token=snapkv:96:window16:every32,hidden=kivi4",
    "token=h2o:96:every32",
    "token=h2o:96:every32,hidden=kivi4",
    "token=h2o:0.2,hidden=rot3",
    "token=streaming:64:every32",
    "token=streaming:64:every32,hidden=k:int8,v:rot2",
    "head=duo:0.5:sink4:recent16",
    "head=duo:0.5:sink4:recent16,token=snapkv:0.25:window8,hidden=rot3",
    "head=duo:0.5:sink4:recent16,token=h2o:96:every32",
    "token=adakv:0.25:snapkv:window8",
    "token=adakv:64:h2o:every16,hidden=rot3",
    "token=pyramidkv:80:window8:every16,hidden=rot3",
    "token=keydiff:0.5,hidden=f32",
    "token=expected:0.25",
    "layer=share:2",
    "layer=share:0,1,0,hidden=rot3",
    "layer=share:0,1,0,token=h2o:96:every32,hidden=kivi4",
    "layer=share:2,token=streaming:64:every32,hidden=rot3",
    "layer=share:2,token=snapkv:0.25:window8",
];

pub(crate) fn compressed(text: &str) -> Compression {
    text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
}

pub(crate) fn full(num_layers: u32, num_kv_heads: u32, page_size: u32) -> TableShape {
    let page = PageGeometry { page_size, head_dim: 32 };
    TableShape { num_layers, num_kv_heads, page, codec: HiddenCodec::F16, quest: None }
}

/// What serves these codecs and every eviction.
pub(crate) fn abilities(full: &TableShape, codecs: &[&str], slots: u32) -> Abilities {
    let codecs = codecs.iter().map(|codec| compressed(codec).hidden).collect();
    Abilities { codecs, slots: Some(slots), head_scores: Some(Arc::new(head_scores(full))), ..Abilities::default() }
}

pub(crate) fn head_scores(full: &TableShape) -> HeadScores {
    let lines = (0..full.num_layers).map(|layer| {
        let scores: Vec<_> = (0..full.num_kv_heads).map(|head| format!("0.{}{layer}", (7 * head + 3) % 10)).collect();
        scores.join("\t") + "\n"
    });
    HeadScores::parse(&lines.collect::<String>()).expect("a score per list")
}

/// Caches over `slabs` slabs of 16 open pages each, in arenas of `arena_slabs`.
pub(crate) fn caches(full: TableShape, abilities: Abilities, max_rows: u32, slabs: u64, arena_slabs: u64) -> Caches {
    let window = Window::new(full.page, full.num_kv_heads, max_rows, !abilities.codecs.is_empty());
    let pages = abilities.codecs.iter().map(|c| c.page_bytes(full.page)).chain([full.open_page()]);
    let smallest_page = pages.clone().min().expect("open pages at least");
    let slab = slab(&full, &abilities);
    let tables = slab.0.div_ceil(smallest_page.0) * 4 * PoolLayout::ENTRIES_PER_PAGE;
    let layout = PoolLayout {
        budget: Bytes(slabs * (slab.0 + tables) + 10_000 + u64::from(window.entries()) * 4),
        staging: Bytes(4096),
        scratch: Bytes(2048),
        max_binding: Bytes(slab.0 * arena_slabs),
        slab,
        smallest_page,
        fixed_entries: window.entries(),
    };
    let pool = PagePool::new(&layout).expect("the layout should fit");
    Caches::new(pool, full, window, abilities)
}

fn slab(full: &TableShape, abilities: &Abilities) -> Bytes {
    let pages = abilities.codecs.iter().map(|c| c.page_bytes(full.page)).chain([full.open_page()]);
    Bytes(16 * pages.max().expect("open pages at least").0)
}

pub(crate) fn scheduler(rng: &mut ChaCha8Rng) -> Scheduler {
    let page_size = *[16_u32, 32].get(rng.random_range(0..2_usize)).expect("two sizes");
    let shape = full(rng.random_range(1..4), rng.random_range(1..4), page_size);
    let max_sessions = rng.random_range(1..9);
    let config = ScheduleConfig {
        max_rows: max_sessions + rng.random_range(0..80),
        max_sessions,
        context_length: 320,
        host: HostConfig::default(),
    };
    // Some are not served: pages too small for a codec's groups, or chance.
    let asked: BTreeSet<HiddenCodec> = ASKED.iter().map(|text| compressed(text).hidden).collect();
    let fits = |c: &HiddenCodec| c.seals() && c.check(shape.page).is_ok();
    let codecs = asked.into_iter().filter(fits).filter(|_| rng.random_bool(0.8)).collect();
    let slots = rng.random_bool(0.9).then(|| rng.random_range(0..4));
    let head_scores = rng.random_bool(0.8).then(|| Arc::new(head_scores(&shape)));
    let abilities = Abilities { codecs, slots, head_scores, ..Abilities::default() };
    let (slabs, arena_slabs) = (rng.random_range(2..40), rng.random_range(1..8));
    Scheduler::new(config, caches(shape, abilities, config.max_rows, slabs, arena_slabs))
}

/// Whether a cache of this compression is evicted from.
fn evicts(compression: &Compression) -> bool {
    compression.token.eviction().is_some() || compression.head != HeadPattern::Full
}

/// Tokens that are read before the first eviction: all of the prompt where nothing else is said, and one at least.
pub(crate) fn document(request: &Request) -> u32 {
    let prompt = u32::try_from(request.prompt.len()).expect("short");
    request.document.map_or(prompt, |document| document.clamp(1, prompt))
}

/// Whether nobody here can carry out a request, by what the caches are able to.
pub(crate) fn is_beyond(caches: &Caches, request: &Request) -> bool {
    let Abilities { codecs, slots, head_scores, .. } = &caches.abilities;
    let compression = &request.compression;
    let eviction = compression.token.eviction();
    let ranks = eviction.is_some_and(|eviction| eviction.rule(u32::MAX).score != Score::None);
    // A part of a short document has no room for a window.
    let no_room = eviction.is_some_and(|eviction| {
        let (n, every) = (document(request), eviction.every.is_some());
        let kept = eviction.kept(n);
        kept < n && !every && eviction.check_kept(kept).is_err()
    });
    // A map is for one number of layers.
    let other_model = compression.layer.owners(caches.full.num_layers).is_err();
    other_model
        || (compression.hidden.seals() && !codecs.contains(&compression.hidden))
        || ((evicts(compression) || compression.layer.share != Sharing::None) && slots.is_none())
        || (ranks && *slots == Some(0))
        || (compression.head != HeadPattern::Full && head_scores.is_none())
        || no_room
}

/// Whether a session could be admitted if it were alone: a slab serves one page size at a time.
pub(crate) fn fits_alone(caches: &Caches, request: &Request) -> bool {
    let slab = slab(&caches.full, &caches.abilities);
    let mut pages: BTreeMap<Bytes, u64> = BTreeMap::new();
    for (page, n) in caches.pages_needed(request).expect("it is served") {
        *pages.entry(page).or_default() += u64::from(n);
    }
    let slabs: u64 = pages.iter().map(|(page, n)| n.div_ceil(slab.0 / page.0)).sum();
    slabs <= caches.pool.capacity().0 / slab.0
}

/// Tokens of a session that are cached.
fn cached(session: &Session) -> u32 {
    match session.phase {
        Phase::Prefill(done) => done,
        _ => u32::try_from(session.request.prompt.len() + session.produced.len()).expect("short") - 1,
    }
}

/// What the tests know of a session's cache.
#[derive(Debug, Default)]
struct Cache {
    evictions: u32,
    /// Tokens seen at the last eviction.
    at: u32,
}

/// Follows a schedule from step to step.
#[derive(Debug, Default)]
pub(crate) struct Follower {
    caches: BTreeMap<SessionId, Cache>,
    /// Sessions that should be evicted from in the next step, if they are still there.
    due: BTreeSet<SessionId>,
    /// Most slots taken at once.
    pub(crate) most_slots: usize,
}

impl Follower {
    /// When a session is next evicted from, in tokens seen.
    fn due(&self, id: SessionId, request: &Request) -> Option<u32> {
        let cache = self.caches.get(&id).filter(|cache| cache.evictions > 0);
        match cache {
            None => evicts(&request.compression).then(|| document(request)),
            Some(cache) => {
                let every = request.compression.token.eviction()?.every?;
                takes_turns(request).then_some(cache.at + every)
            }
        }
    }

    /// Notes who is evicted from next.
    pub(crate) fn before(&mut self, s: &Scheduler) {
        let due = |(id, session): &(SessionId, &Session)| {
            session.is_admitted() && self.due(*id, &session.request) == Some(cached(session))
        };
        self.due = s.sessions().filter(due).map(|(id, _)| id).collect();
    }

    /// Checks a step, then everything between steps.
    pub(crate) fn after(&mut self, s: &Scheduler, report: &StepReport, before: &BTreeMap<SessionId, u32>) {
        let evicted: BTreeSet<_> = report.evicted.iter().copied().collect();
        assert_eq!(evicted, self.due, "evicted from, and due");
        for id in evicted {
            let cache = self.caches.entry(id).or_default();
            (cache.evictions, cache.at) = (cache.evictions + 1, before[&id]);
        }
        self.check(s);
    }

    pub(crate) fn check(&mut self, s: &Scheduler) {
        let report = s.report();
        assert!(report.in_use_bytes <= report.budget_bytes && report.peak_bytes <= report.budget_bytes, "budget");
        let caches = s.caches();
        let (mut pages, mut slots) = (BTreeSet::new(), BTreeSet::new());
        let (mut held, mut least, mut most) = (0, 0, 0);
        for (id, session) in s.sessions() {
            assert_eq!(session.is_admitted(), caches.tables.contains_key(&id), "exactly admitted sessions hold pages");
            if !session.is_admitted() {
                continue;
            }
            held += self.check_session(caches, id, session, &mut pages);
            let (low, high) = self.promised(caches, id, session);
            (least, most) = (least + low, most + high);
            // What is observed of a prompt of any length goes to the session's slot.
            if let Some(observed) = caches.observed(id, u32::MAX / 2) {
                let all = caches.abilities.slots.expect("evictions are served");
                assert!(slots.insert(observed.slot) && observed.slot < all, "{id:?} has slot {}", observed.slot);
            }
        }
        self.most_slots = self.most_slots.max(slots.len());
        assert_eq!(report.pages_in_use_bytes, Bytes(held), "the pool holds what the tables name");
        let promised = (report.pages_in_use_bytes + report.committed_bytes).0;
        assert!((least..=most).contains(&promised), "{promised} B are promised, which is not {least} to {most}");
    }

    /// Bytes that a session holds.
    fn check_session(
        &self,
        caches: &Caches,
        id: SessionId,
        session: &Session,
        pages: &mut BTreeSet<concertina::pool::PageId>,
    ) -> u64 {
        let (table, compression) = (&caches.tables[&id], &session.request.compression);
        let seen = cached(session);
        assert_eq!(table.n_tokens(), seen, "session {id:?}: tokens seen");
        let known = self.caches.get(&id).filter(|cache| cache.evictions > 0);
        let of_codec = caches.shape(compression).expect("it is served");
        // A document is in f16 until it is evicted from.
        let codec = if known.is_none() && evicts(compression) { HiddenCodec::F16 } else { of_codec.codec };
        let shape = TableShape { codec, ..of_codec };
        assert_eq!(table.shape(), &shape, "session {id:?}: the table is of what was asked for");
        assert_eq!(table.tail(), seen - known.map_or(0, |cache| cache.at), "session {id:?}: what came since");
        assert!(table.sealing_pages().is_empty(), "session {id:?}: nothing is left to seal between steps");
        let due = self.due(id, &session.request);
        assert!(due.is_none_or(|due| seen <= due), "session {id:?}: {seen} tokens were to be evicted from at {due:?}");
        let size = shape.page.page_size;
        let owners: Vec<u32> = (0..caches.full.num_layers).filter(|layer| table.layers().owns(*layer)).collect();
        let (mut held, mut tokens) = (0, 0);
        for (layer, head) in owners.iter().flat_map(|l| (0..shape.num_kv_heads).map(move |h| (*l, h))) {
            let (kept, closed) = (table.n_kept(layer, head), table.is_closed(layer, head));
            assert!(known.is_some() || (kept, closed) == (0, false), "session {id:?}: nothing is evicted yet");
            let tail = if closed { 0 } else { table.tail() };
            // Between steps a page is either sealed or open; f16 pages of a tail are always open.
            let (open, sealed) =
                if shape.codec.seals() { (tail.div_ceil(size).min(1), tail / size) } else { (tail.div_ceil(size), 0) };
            let (in_codec, own) = table.list(layer, head);
            let expected = (open as usize, (kept.div_ceil(size) + sealed) as usize);
            assert_eq!((own.len(), in_codec.len()), expected, "session {id:?}: open pages, and those in the codec");
            assert!(in_codec.iter().chain(own).all(|p| pages.insert(*p)), "no page belongs to two lists");
            held += own.len() as u64 * shape.open_page().0 + in_codec.len() as u64 * shape.sealed_page().0;
            tokens += u64::from(table.n_held(layer, head));
        }
        assert_eq!(table.held_bytes(), Bytes(held), "session {id:?}: bytes held");
        assert_eq!(table.held_tokens(), tokens, "session {id:?}: tokens held");
        if known.is_some() {
            check_cap(&session.request, table, &owners);
        }
        held
    }

    /// What may be promised to a session: exactly so much, unless it is evicted from again and again.
    fn promised(&self, caches: &Caches, id: SessionId, session: &Session) -> (u64, u64) {
        let needed = caches.needed(&session.request).expect("it is served").0;
        let known = self.caches.get(&id).filter(|cache| cache.evictions > 0);
        let Some(cache) = known else { return (needed, needed) };
        let table = &caches.tables[&id];
        if takes_turns(&session.request) {
            return (table.held_bytes().0, needed);
        }
        let shape = table.shape();
        let (open, sealed) = shape.pages_of_list(session.request.max_tokens() - cache.at);
        let of_list = |(layer, head)| {
            let tail = u64::from(!table.is_closed(layer, head));
            let kept = u64::from(table.n_kept(layer, head).div_ceil(shape.page.page_size));
            tail * u64::from(open) * shape.open_page().0 + (kept + tail * u64::from(sealed)) * shape.sealed_page().0
        };
        let owners = (0..caches.full.num_layers).filter(|layer| table.layers().owns(*layer));
        let bytes: u64 = owners.flat_map(|l| (0..shape.num_kv_heads).map(move |h| (l, h))).map(of_list).sum();
        (bytes, bytes)
    }
}

/// No list holds more than the budget, on average where lists compete, once every so many tokens leave.
fn check_cap(request: &Request, table: &concertina::pool::page_table::PageTable, owners: &[u32]) {
    let Some(eviction) = request.compression.token.eviction().filter(|eviction| eviction.every.is_some()) else {
        return;
    };
    let heads = table.shape().num_kv_heads;
    let budget = u64::from(eviction.budget.tokens(0));
    let alone = matches!(eviction.rule(eviction.kept(0)).allocation, Allocation::Uniform);
    let (mut all, mut lists) = (0, 0);
    for layer in owners {
        let held: Vec<u64> = (0..heads).map(|head| u64::from(table.n_held(*layer, head))).collect();
        assert!(!alone || held.iter().all(|n| *n <= budget), "{held:?} tokens of {budget} in layer {layer}");
        (all, lists) = (all + held.iter().sum::<u64>(), lists + u64::from(heads));
    }
    assert!(all <= budget * lists, "{all} tokens in {lists} lists of {budget}");
}
