//! A simulation whose steps take the time that the theory says: [`Simulation`] on a virtual GPU.

use std::collections::BTreeMap;
use std::time::Duration;

use super::simulation::Simulation;
use super::simulation::SimulationError;
use super::{Backend, Caches, Direction, OneList, SessionId, StepPlan, StepResult};
use crate::geometry::Bytes;
use crate::theory::model::Decoder;
use crate::theory::step::{Machine, StepTime, StepWork};

/// A GPU, or several that share each layer, that computes nothing and takes the time for it.
#[derive(Clone, Debug)]
pub struct VirtualDevice {
    simulation: Simulation,
    model: Decoder,
    machine: Machine,
    lists: OneList,
    /// Of sessions whose pages are on their way, for how long.
    moving: BTreeMap<SessionId, Duration>,
    /// How long each cache was on its way, one way.
    moves: Vec<Duration>,
    spent: StepTime,
    evicting: Duration,
}

impl VirtualDevice {
    /// A GPU with a model. `lists` says what a list of the caches stands for.
    pub fn new(seed: u64, model: Decoder, machine: Machine, lists: OneList) -> Self {
        Self {
            simulation: Simulation::new(seed, model.geometry.vocab_size),
            model,
            machine,
            lists,
            moving: BTreeMap::new(),
            moves: Vec::new(),
            spent: StepTime::default(),
            evicting: Duration::ZERO,
        }
    }

    /// A hash of every plan and every time so far: equal traces have equal hashes.
    pub const fn trace_hash(&self) -> u64 {
        self.simulation.trace_hash()
    }

    /// Steps executed.
    pub const fn steps(&self) -> u64 {
        self.simulation.steps()
    }

    /// How long each cache that moved was on its way, one way, in the order in which they arrived.
    pub fn moves(&self) -> &[Duration] {
        &self.moves
    }

    /// What steps took, part by part: kernels add up, and the link is beside them.
    pub const fn spent(&self) -> StepTime {
        self.spent
    }

    /// What evictions took.
    pub const fn evicting(&self) -> Duration {
        self.evicting
    }

    /// Bytes of a cache over all GPUs that share each layer.
    fn with_copies(&self, bytes: Bytes) -> Bytes {
        self.machine.parallel.map_or(bytes, |parallel| parallel.over_all(&self.model, bytes))
    }

    fn work(&self, plan: &StepPlan, caches: &Caches) -> StepWork {
        let mut work = StepWork::default();
        for rows in &plan.segments {
            let (table, n) = (&caches.tables[&rows.session], rows.n_rows());
            work.rows += u64::from(n);
            work.sampling += u64::from(rows.sample.is_some());
            // All lists are equally long; what an eviction removed is not seen.
            let before = table.n_held(0, 0) - n;
            let cache = table.held_bytes().0 * u64::from(self.lists.read) / u64::from(table.shape().num_lists());
            let cache = self.with_copies(Bytes(cache));
            if rows.decode { &mut work.decode } else { &mut work.prefill }.add(&self.model, n, before, cache);
        }
        for transfer in &plan.transfers {
            let bytes = self.with_copies(self.lists.whole(transfer.bytes));
            match transfer.direction {
                Direction::Out => work.out += bytes,
                Direction::In => work.back += bytes,
            }
        }
        work
    }

    /// Notes how long pages have been on their way.
    fn follow(&mut self, plan: &StepPlan, elapsed: Duration) {
        for transfer in &plan.transfers {
            self.moving.entry(transfer.session).or_default();
        }
        self.moving.values_mut().for_each(|time| *time += elapsed);
        for transfer in plan.transfers.iter().filter(|transfer| transfer.last) {
            self.moves.extend(self.moving.remove(&transfer.session));
        }
        for session in &plan.forgotten {
            self.moving.remove(session);
        }
    }
}

impl Backend for VirtualDevice {
    type Error = SimulationError;

    fn execute(&mut self, plan: &StepPlan, caches: &mut Caches) -> Result<StepResult, SimulationError> {
        let time = self.machine.step(&self.model, &self.work(plan, caches));
        let elapsed = Duration::from_secs_f64(time.total_s());
        let result = self.simulation.execute(plan, caches)?;
        self.spent.add(&time);
        self.simulation.record(elapsed.subsec_nanos());
        self.follow(plan, elapsed);
        Ok(StepResult { elapsed, ..result })
    }

    /// Reads the cache twice, to score and to gather, and writes what stays.
    fn evict(&mut self, session: SessionId, tokens: &[u32], caches: &mut Caches) -> Result<Duration, SimulationError> {
        let before = caches.tables[&session].held_bytes();
        self.simulation.evict(session, tokens, caches)?;
        let after = caches.tables[&session].held_bytes();
        let bytes = self.with_copies(self.lists.whole(Bytes(2 * before.0 + after.0)));
        let elapsed = Duration::from_secs_f64(self.machine.memory(bytes));
        self.simulation.record(elapsed.subsec_nanos());
        self.evicting += elapsed;
        Ok(elapsed)
    }
}
