//! The simulation, with evictions that leave lists unequally long, and watched: what is observed of a session, into which
//! slot, and what each eviction is given.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use concertina::compression::keep::Domain;
use concertina::compression::token::{Rows, Score};
use concertina::pool::page_table::PageTable;
use concertina::schedule::simulation::{Simulation, SimulationError};
use concertina::schedule::{Backend, Caches, Observation, Request, Selection, SessionId, StepPlan, StepResult};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::world::document;

/// Whether a session is evicted from again and again, rather than once.
pub(crate) fn takes_turns(request: &Request) -> bool {
    let every = request.compression.token.eviction().and_then(|eviction| eviction.every);
    every.is_some_and(|every| request.max_tokens() - document(request) > every)
}

/// Rows of one session that were observed since its last eviction, or since the start.
#[derive(Debug, Default)]
struct Seen {
    slot: Option<u32>,
    positions: Vec<u32>,
    /// Position after the last eviction.
    since: u32,
}

/// What a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scores {
    Zero,
    /// Of a session, as its cache is.
    Of(SessionId),
    /// Of nobody, or of a cache that is gone.
    Stale,
}

/// A simulation that watches.
#[derive(Debug)]
pub(crate) struct Watched {
    pub(crate) simulation: Simulation,
    rng: ChaCha8Rng,
    /// What each session asked for.
    pub(crate) requests: BTreeMap<SessionId, Request>,
    seen: BTreeMap<SessionId, Seen>,
    slots: Vec<Scores>,
    /// Evictions, and those of them that left lists unequally long.
    pub(crate) evictions: u32,
    pub(crate) ragged: u32,
    pub(crate) carried: u32,
}

impl Watched {
    pub(crate) fn new(seed: u64, vocab: u32, slots: u32) -> Self {
        Self {
            simulation: Simulation::new(seed, vocab),
            rng: ChaCha8Rng::seed_from_u64(seed),
            requests: BTreeMap::new(),
            seen: BTreeMap::new(),
            slots: vec![Scores::Stale; slots as usize],
            evictions: 0,
            ragged: 0,
            carried: 0,
        }
    }

    fn observe(&mut self, plan: &StepPlan, caches: &mut Caches) {
        for slot in caches.take_fresh() {
            self.slots[slot as usize] = Scores::Zero;
        }
        let mut slots = BTreeSet::new();
        for rows in &plan.segments {
            for observed in &rows.observed {
                let id = rows.session;
                assert!(observed.first < rows.n_rows(), "an observation is of some row");
                assert_ne!(observed.what, Observation::Largest, "no policy here repeats its prompt");
                assert!(slots.insert(observed.slot), "a slot is one session's");
                let scores = &mut self.slots[observed.slot as usize];
                assert!(
                    [Scores::Zero, Scores::Of(id)].contains(scores),
                    "{id:?} adds to scores that are {scores:?} in slot {}",
                    observed.slot
                );
                *scores = Scores::Of(id);
                let seen = self.seen.entry(id).or_default();
                assert_eq!(*seen.slot.get_or_insert(observed.slot), observed.slot, "a session keeps its slot");
                seen.positions.extend(rows.first_index + observed.first..rows.first_index + rows.n_rows());
            }
        }
    }

    /// Checks that exactly the rows were observed that the policy ranks by, and notes what becomes of their scores.
    fn judge(&mut self, id: SessionId, caches: &Caches, selection: &Selection) {
        let more = takes_turns(&self.requests[&id]);
        let n_tokens = caches.tables[&id].n_tokens();
        let seen = self.seen.entry(id).or_default();
        let score = selection.rule.map(|rule| rule.score);
        let expected = match score {
            Some(Score::Attention { rows: Rows::All, .. }) => seen.since..n_tokens,
            Some(Score::Attention { rows: Rows::Last(n), .. }) => n_tokens.saturating_sub(n).max(seen.since)..n_tokens,
            Some(Score::Expected { n_skip, .. }) => n_skip.max(seen.since).min(n_tokens)..n_tokens,
            _ => 0..0,
        };
        let expected: Vec<u32> = expected.collect();
        assert_eq!(seen.positions, expected, "{id:?}: the rows that {score:?} ranks by at {n_tokens}");
        if let Some(slot) = seen.slot {
            assert_eq!(selection.slot, slot, "{id:?}: the eviction reads what was observed");
        }
        // Sums over all rows go with the tokens that stay, as long as more are added.
        let sums = matches!(score, Some(Score::Attention { rows: Rows::All, .. }));
        assert!(selection.carries == sums || !more, "{id:?}: scores of {score:?} go on: {}", selection.carries);
        if let Some(slot) = seen.slot {
            self.slots[slot as usize] = if selection.carries { Scores::Of(id) } else { Scores::Stale };
        }
        self.carried += u32::from(selection.carries);
        (seen.positions, seen.since) = (Vec::new(), n_tokens);
    }

    /// How many tokens each list of a domain keeps of those that it holds: what always stays, the floor, and of the rest
    /// whatever chance gives.
    fn share_out(&mut self, domain: &Domain, held: &[u32]) -> Vec<u32> {
        let Domain { total, floor, sink, recent, .. } = *domain;
        let certain = |n: &u32| sink.saturating_add(recent).max(floor).min(*n);
        let mut kept: Vec<u32> = held.iter().map(certain).collect();
        let mut left = total.saturating_sub(kept.iter().sum());
        // In one go for the most part, so that lists come out as unequal as the domain allows.
        while left > 0 && kept.iter().zip(held).any(|(kept, held)| kept < held) {
            let list = self.rng.random_range(0..held.len());
            let n = left.min(held[list] - kept[list]).min(self.rng.random_range(1..200));
            kept[list] += n;
            left -= n;
        }
        kept
    }
}

/// Positions of the first and the last tokens of a list, of so many.
fn positions(table: &PageTable, (layer, head): (u32, u32), n: u32, recent: u32) -> Vec<u32> {
    let held = table.n_held(layer, head);
    let last = recent.min(n);
    let indices = (0..n - last).chain(held - last..held);
    indices.map(|index| table.position_of(layer, head, index)).collect()
}

impl Backend for Watched {
    type Error = SimulationError;

    fn execute(&mut self, plan: &StepPlan, caches: &mut Caches) -> Result<StepResult, SimulationError> {
        self.observe(plan, caches);
        self.simulation.execute(plan, caches)
    }

    fn evict(&mut self, id: SessionId, tokens: &[u32], caches: &mut Caches) -> Result<Duration, SimulationError> {
        assert_eq!(
            tokens.len(),
            caches.tables[&id].n_tokens() as usize,
            "{id:?}: the tokens in its cache, no question"
        );
        let content = self.simulation.held(id, caches);
        let selection = caches.selection(id);
        let mut target = caches.take_target(id);
        let table = &caches.tables[&id];
        let (n_tokens, kv_heads) = (table.n_tokens(), table.shape().num_kv_heads);
        let owners: Vec<u32> = (0..caches.full.num_layers).filter(|layer| target.layers().owns(*layer)).collect();
        let place = |list: u32| (owners[(list / kv_heads) as usize], list % kv_heads);
        let mut kept: Vec<Option<Vec<u32>>> = vec![None; target.shape().num_lists() as usize];
        let mut named = BTreeSet::new();
        for domain in &selection.domains {
            assert!(domain.lists.iter().all(|list| named.insert(*list)), "{id:?}: a list chooses once");
            if domain.total == 0 {
                continue;
            }
            let held: Vec<u32> =
                domain.lists.iter().map(|list| place(*list)).map(|(l, h)| table.n_held(l, h)).collect();
            for (list, n) in domain.lists.iter().zip(self.share_out(domain, &held)) {
                kept[*list as usize] = Some(positions(table, place(*list), n, domain.recent));
            }
        }
        assert_eq!(named.len(), kept.len(), "{id:?}: every list chooses");
        let mut lengths = kept.iter().flatten().map(Vec::len);
        let first = lengths.next();
        self.ragged += u32::from(lengths.any(|n| Some(n) != first));
        target.keep(&mut caches.pool, kept.into_iter().map(Into::into).collect(), &[], n_tokens)?;
        caches.swap(id, target)?;
        self.simulation.kept(id, content, caches);
        self.judge(id, caches, &selection);
        self.evictions += 1;
        Ok(Duration::from_millis(1))
    }
}
