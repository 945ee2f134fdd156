//! A backend without a device: steps take a time that is computed, tokens come from a seed.
//!
//! The same schedule code as on a device, driven in tests through thousands of steps.

use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Backend, Caches, SessionId, StepPlan, StepResult};
use crate::pool::PoolError;
use crate::pool::page_table::KeptTokens;

/// Seeded tokens, and a step time that grows with its rows.
#[derive(Clone, Debug)]
pub struct Simulation {
    rng: ChaCha8Rng,
    vocab: u32,
    /// Time of a step without rows.
    pub per_step: Duration,
    /// Time of each row.
    pub per_row: Duration,
    trace: u64,
    steps: u64,
}

impl Simulation {
    /// A simulation whose tokens are uniform below `vocab`.
    pub fn new(seed: u64, vocab: u32) -> Self {
        Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
            vocab,
            per_step: Duration::from_millis(1),
            per_row: Duration::from_micros(100),
            trace: 0xcbf2_9ce4_8422_2325,
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

    fn record(&mut self, value: u32) {
        for byte in value.to_le_bytes() {
            self.trace = (self.trace ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

impl Backend for Simulation {
    type Error = PoolError;

    fn execute(&mut self, plan: &StepPlan, caches: &mut Caches) -> Result<StepResult, PoolError> {
        self.steps += 1;
        let mut tokens = Vec::new();
        for rows in &plan.segments {
            let table = &caches.tables[&rows.session];
            assert!(table.n_tokens() >= rows.first_index + rows.n_rows(), "the table should hold the planned rows");
            self.record(rows.session.0);
            self.record(rows.first_index);
            rows.tokens.iter().for_each(|t| self.record(*t));
            if rows.sample.is_some() {
                tokens.push(self.rng.random_range(0..self.vocab));
            }
        }
        Ok(StepResult { tokens, elapsed: self.per_step + self.per_row * plan.n_rows() })
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
        target.keep(&mut caches.pool, kept, &[], n_tokens)?;
        caches.swap(session, target)?;
        Ok(self.per_step)
    }
}
