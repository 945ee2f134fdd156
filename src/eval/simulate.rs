//! A workload over a virtual GPU: the schedule as it runs on a device, with times from the theory.
//!
//! ```text
//! memory = weights + budget        budget = activations + window + staging of swaps + scores of evictions + tables + pages
//! ```
//!
//! Where several GPUs share each layer, memory and rates are those of all, and KV heads that they can not divide evenly are held as
//! copies ([`over_all`](crate::theory::parallel::TensorParallel::over_all)). Bytes of caches are counted once here, so the budget is smaller by as much, and what is
//! read and moved takes the time of as many bytes as are held.
//!
//! Sessions that wait for their first step are kept as numbers: a prompt is made when the line is about to come to it, and
//! dropped when its session is over. In between a session keeps its tokens, 8 bytes for each, since its cache may have to be
//! computed again: ten thousand that are all between two questions of 50,000 tokens take 4 GiB.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::Serialize;

use crate::compression::Compression;
use crate::compression::hidden::HiddenCodec;
use crate::engine::EvictionConfig;
use crate::geometry::{Bytes, PageGeometry};
use crate::kernels::attention::CacheShape;
use crate::kernels::eviction::EvictionSizes;
use crate::pool::PoolError;
use crate::pool::page_table::{TableShape, Window};
use crate::schedule::simulation::SimulationError;
use crate::schedule::virtual_device::VirtualDevice;
use crate::schedule::workload::Visit;
use crate::schedule::{
    Abilities, Caches, HostConfig, OneList, PlaceInLine, REPEAT_ROOM, Rates, Request, ScheduleConfig, Scheduler,
    SessionId, StepReport, Store, SubmitError,
};
use crate::theory::model::Decoder;
use crate::theory::predict::concurrency;
use crate::theory::step::Machine;

/// Chunks that a swap holds on the device: staging both ways, twice, and what is being packed.
const SWAP_CHUNKS: u64 = 5;

/// What sessions run on.
#[derive(Clone, Debug)]
pub struct SimulatedMachine {
    /// The model.
    pub model: Decoder,
    /// The GPU, or several that share each layer.
    pub machine: Machine,
    /// Bytes of device memory, of all of them.
    pub memory: Bytes,
    /// Bytes of host memory for caches.
    pub host_budget: Bytes,
    /// Bytes that a step moves each way.
    pub swap_chunk: Bytes,
    /// Rows of one step at most.
    pub max_rows: u32,
    /// Sessions that compute at once at most.
    pub max_sessions: u32,
    /// Sessions that are scored at once for what evictions keep.
    pub observed: u32,
    /// Longest context, in tokens.
    pub context_length: u32,
    /// Tokens of a page.
    pub page_size: u32,
}

/// Why a simulation can not begin, or go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SimulateError {
    /// A compression that can not be simulated on this machine.
    #[error("{0}")]
    Compression(String),
    /// A model whose cache one list of pages does not stand for.
    #[error("{0}")]
    Model(String),
    /// The model does not fit.
    #[error(
        "the weights take {weights} of {memory}, which leaves nothing for caches; give more memory, or the bytes of \
         quantised weights"
    )]
    NoRoom {
        /// Bytes of weights.
        weights: Bytes,
        /// Bytes of device memory.
        memory: Bytes,
    },
    /// A step moves no page of every list.
    #[error("a step moves {chunk}, which is less than a page of each of {lists} lists: {page}; give --swap-chunk more")]
    SmallChunk {
        /// Bytes that a step moves.
        chunk: Bytes,
        /// Lists.
        lists: u32,
        /// Bytes of their largest pages together.
        page: Bytes,
    },
    /// The pool.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// A step.
    #[error(transparent)]
    Step(#[from] SimulationError),
    /// The schedule makes no progress, which would be a defect.
    #[error("no session can take a step, though {waiting} wait: a defect")]
    Stuck {
        /// Sessions in line.
        waiting: usize,
    },
}

/// Sessions that were refused, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refused {
    /// `too long`, `never fits` or `not served`.
    pub kind: &'static str,
    /// How many.
    pub sessions: u32,
    /// What the first of them was told.
    pub first: String,
}

/// Bytes held over time, in byte seconds, and where time went.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Pages in use, of one list.
    pub pages_byte_s: f64,
    /// Caches in host memory, of one list.
    pub host_byte_s: f64,
    /// Time in which nobody had anything to compute.
    pub idle: Duration,
}

/// A workload under way.
#[derive(Debug)]
pub struct Simulation {
    /// Sessions and their caches: bytes are those of one list.
    pub scheduler: Scheduler,
    /// The GPU.
    pub device: VirtualDevice,
    /// What a list stands for.
    pub lists: OneList,
    /// Sessions that were refused, by kind.
    pub refused: BTreeMap<&'static str, Refused>,
    /// What was held over time.
    pub usage: Usage,
    compression: Compression,
    ladder: Vec<Compression>,
    vocab: u32,
    context_length: u32,
    /// Sessions that wait without a request.
    line: VecDeque<(PlaceInLine, Visit)>,
    /// Sessions in the schedule that have not begun.
    fresh: usize,
    /// Of these, as many as a step can begin, and one that waits.
    fresh_max: usize,
}

impl SimulatedMachine {
    fn page(&self) -> PageGeometry {
        PageGeometry { page_size: self.page_size, head_dim: self.model.geometry.heads.head_dim }
    }

    /// KV heads of a layer, and how many its GPUs hold, copies included.
    fn kv_heads(&self) -> (u64, u64) {
        let heads = u64::from(self.model.geometry.heads.num_kv_heads.max(1));
        let held = self.machine.parallel.map_or(heads, |parallel| parallel.over_all(&self.model, Bytes(heads)).0);
        (heads, held)
    }

    /// Bytes for caches and everything around them: what the weights leave, copies of KV heads left out.
    ///
    /// # Errors
    /// [`SimulateError::NoRoom`].
    pub fn budget(&self) -> Result<Bytes, SimulateError> {
        let (weights, memory) = (self.model.weights, self.memory);
        if weights >= memory {
            return Err(SimulateError::NoRoom { weights, memory });
        }
        let left = memory - weights;
        let (heads, held) = self.kv_heads();
        let once = u128::from(left.0) * u128::from(heads) / u128::from(held);
        Ok(Bytes(u64::try_from(once).unwrap_or(left.0)))
    }

    /// What evictions need for some compressions.
    fn evictions(&self, all: &[Compression], ladder: bool) -> Option<EvictionSizes> {
        let config = EvictionConfig::of(all, self.observed).or(ladder.then(EvictionConfig::default))?;
        let geometry = &self.model.geometry;
        Some(EvictionSizes {
            num_lists: geometry.num_lists(),
            capacity: self.context_length + REPEAT_ROOM,
            slots: config.slots,
            moments: config.moments,
        })
    }

    /// What the caches can do, in bytes of all lists, and the bytes of the budget that are not for pages.
    fn abilities(&self, all: &[Compression], ladder: bool) -> (Abilities, Bytes) {
        let mut codecs: Vec<_> = all.iter().flat_map(Caches::codecs_of).collect();
        codecs.sort_unstable();
        codecs.dedup();
        let heads = self.model.geometry.heads;
        let shape = CacheShape { heads, page_size: self.page_size };
        let evictions = self.evictions(all, ladder);
        let of_slots =
            |slots: u32| evictions.map_or(Bytes::ZERO, |e| EvictionSizes { slots, ..e }.scratch_bytes(&shape));
        let swap_bytes = if self.host_budget > Bytes::ZERO { self.swap_chunk } else { Bytes::ZERO };
        let window = Window::new(self.page(), heads.num_kv_heads, self.max_rows, !codecs.is_empty());
        let scratch = self.model.activation_bytes(self.max_rows, self.max_sessions)
            + window.bytes()
            + Bytes(swap_bytes.0 * SWAP_CHUNKS)
            + evictions.map_or(Bytes::ZERO, |e| of_slots(e.slots));
        let abilities = Abilities {
            codecs,
            slots: evictions.map(|e| e.slots),
            slot_bytes: of_slots(1) - of_slots(0),
            swap_bytes,
            chooses: false,
            head_scores: None,
        };
        (abilities, scratch)
    }

    /// Checks that one list of pages stands for the caches of the model.
    ///
    /// # Errors
    /// [`SimulateError::Model`] with the reason.
    fn check_model(&self) -> Result<(), SimulateError> {
        if let Some(latent) = &self.model.latent {
            let (cached, heads) = (latent.cached(), self.model.geometry.heads.num_qo_heads);
            return Err(SimulateError::Model(format!(
                "a token of this model leaves a latent of {cached} numbers for {heads} heads together, which pages of the keys \
                 and values of a head can not stand for"
            )));
        }
        if let Some(local) = &self.model.local {
            let (all, windowed) = self.model.layers_by_sight();
            let window = local.window;
            return Err(SimulateError::Model(format!(
                "{windowed} layers of this model keep {window} tokens and {all} keep all, so that one list can not stand for both"
            )));
        }
        Ok(())
    }

    /// Checks that sessions of a compression, and of a ladder, can be simulated.
    ///
    /// # Errors
    /// [`SimulateError::Model`] or [`SimulateError::Compression`] with the reason.
    fn check(&self, compression: &Compression, ladder: &[Compression]) -> Result<OneList, SimulateError> {
        self.check_model()?;
        let geometry = &self.model.geometry;
        let lists = OneList::new(geometry, compression).map_err(SimulateError::Compression)?;
        for one in std::iter::once(compression).chain(ladder) {
            OneList::new(geometry, one).map_err(SimulateError::Compression)?;
            one.hidden.check(self.page()).map_err(SimulateError::Compression)?;
            let every = one.token.eviction().and_then(|eviction| eviction.every);
            if let Some(every) = every.filter(|every| every % self.page_size != 0) {
                let (size, one) = (self.page_size, one.short());
                return Err(SimulateError::Compression(format!(
                    "{one}: every{every} is no multiple of the pages of {size} tokens"
                )));
            }
            if one.layer != compression.layer {
                let (rung, one) = (one.short(), compression.short());
                return Err(SimulateError::Compression(format!(
                    "{rung} has other layers than {one}: a ladder keeps them"
                )));
            }
        }
        Ok(lists)
    }

    /// Readies a workload under one compression.
    ///
    /// # Errors
    /// [`SimulateError`].
    pub fn begin(
        &self,
        seed: u64,
        compression: &Compression,
        ladder: &[Compression],
    ) -> Result<Simulation, SimulateError> {
        let lists = self.check(compression, ladder)?;
        let all: Vec<Compression> = std::iter::once(compression).chain(ladder).map(OneList::compression).collect();
        let (abilities, scratch) = self.abilities(&all, !ladder.is_empty());
        let sizes = abilities.codecs.iter().chain([&HiddenCodec::F16]).map(|codec| codec.page_bytes(self.page()));
        let page = lists.whole(sizes.max().unwrap_or_default());
        if abilities.swap_bytes > Bytes::ZERO && abilities.swap_bytes < page {
            return Err(SimulateError::SmallChunk { chunk: abilities.swap_bytes, lists: lists.lists, page });
        }
        let caches = lists.caches(self.page(), self.max_rows, (self.budget()?, scratch), abilities)?;
        let compression = OneList::compression(compression);
        // What can never be served is known before anybody comes.
        caches.serves(&compression).map_err(SimulateError::Compression)?;
        for rung in &all[1..] {
            caches.serves_later(&compression, rung).map_err(SimulateError::Compression)?;
        }
        let (heads, held) = self.kv_heads();
        let link = self.machine.link * heads as f64 / held as f64 / f64::from(lists.lists);
        let host = HostConfig {
            budget: lists.share(self.host_budget),
            rates: Rates { out: link, back: link, prefill: 0.0 },
            ..HostConfig::default()
        };
        let &Self { max_rows, max_sessions, context_length, .. } = self;
        let config = ScheduleConfig { max_rows, max_sessions, context_length, host };
        Ok(Simulation {
            scheduler: Scheduler::new(config, caches),
            device: VirtualDevice::new(seed, self.model.clone(), self.machine, lists),
            lists,
            refused: BTreeMap::new(),
            usage: Usage::default(),
            compression,
            ladder: all[1..].to_vec(),
            vocab: self.model.geometry.vocab_size,
            context_length,
            line: VecDeque::new(),
            fresh: 0,
            fresh_max: max_sessions as usize + 1,
        })
    }

    /// What the theory says of a session of so many tokens, alone and with everything that fits.
    ///
    /// # Errors
    /// [`SimulateError`].
    pub fn predict(&self, compression: &Compression, n_tokens: u32) -> Result<Predicted, SimulateError> {
        let simulation = self.begin(0, compression, &[])?;
        let (caches, lists) = (simulation.scheduler.caches(), simulation.lists);
        let one = OneList::compression(compression);
        let kept = one.token.eviction().map_or(n_tokens, |eviction| eviction.kept(n_tokens).min(n_tokens));
        let served = |why| SimulateError::Compression(why);
        let shape: TableShape = caches.shape(&one).map_err(served)?;
        let held = shape.bytes_for(kept);
        let request = Request { compression: one, ..Request::new(vec![0; n_tokens.max(1) as usize], 1) };
        let needed = caches.needed(&request).map_err(served)?;
        let (model, machine) = (&self.model, &self.machine);
        let copied = |bytes| machine.parallel.map_or(bytes, |parallel| parallel.over_all(model, bytes));
        let (read, moved) = (copied(Bytes(held.0 * u64::from(lists.read))), copied(lists.whole(held)));
        Ok(Predicted {
            context_tokens: n_tokens,
            kv_bytes: lists.whole(held),
            needed_bytes: lists.whole(needed),
            fit: concurrency(caches.pool.capacity(), needed),
            prefill_s: machine.prefill(model, n_tokens, read),
            token_ms: machine.decode(model, kept, read) * 1e3,
            switch_s: machine.switch(moved, moved),
        })
    }
}

/// What the theory says of one session.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Predicted {
    /// Tokens that it has read.
    pub context_tokens: u32,
    /// Bytes of its cache then, pages and metadata included.
    pub kv_bytes: Bytes,
    /// Bytes of pages that it commits until then.
    pub needed_bytes: Bytes,
    /// Such sessions that fit: concurrency.
    pub fit: u64,
    /// Prefill of all of its tokens in one step.
    pub prefill_s: f64,
    /// One token after them, alone.
    pub token_ms: f64,
    /// It leaves, and another like it comes.
    pub switch_s: f64,
}

/// Hears what happens.
pub trait Listener {
    /// A session was accepted.
    fn submitted(&mut self, scheduler: &Scheduler, session: SessionId);

    /// A step ended.
    fn stepped(&mut self, scheduler: &Scheduler, step: &StepReport);
}

impl Simulation {
    /// Runs a workload, or what of it comes here, until every session is over; sessions are in the order in which they come.
    ///
    /// # Errors
    /// [`SimulateError`].
    pub fn run(
        &mut self,
        visits: impl Iterator<Item = Visit>,
        listener: &mut dyn Listener,
    ) -> Result<(), SimulateError> {
        let mut visits = visits.peekable();
        loop {
            let now = self.scheduler.now();
            while let Some(visit) = visits.next_if(|visit| visit.at <= now) {
                let place = self.scheduler.take_place(visit.at);
                self.line.push_back((place, visit));
            }
            self.scheduler.expect(visits.peek().map(|visit| visit.at));
            self.submit(listener);
            if visits.peek().is_none() && self.line.is_empty() && self.scheduler.is_idle() {
                return Ok(());
            }
            self.step(listener)?;
        }
    }

    /// Makes requests for those who come next in line.
    fn submit(&mut self, listener: &mut dyn Listener) {
        while self.fresh < self.fresh_max {
            let Some((place, visit)) = self.line.pop_front() else { return };
            let ((prompt, max_new), context_length) = (visit.lengths(), self.context_length);
            if prompt + max_new > u64::from(context_length) {
                // Before its prompt takes memory.
                self.refuse(SubmitError::TooLong { prompt, max_new, context_length });
                continue;
            }
            let request = visit.request(self.vocab, &self.compression, &self.ladder);
            match self.scheduler.submit_in(place, request) {
                Ok(id) => {
                    self.fresh += 1;
                    listener.submitted(&self.scheduler, id);
                }
                Err(error) => self.refuse(error),
            }
        }
    }

    fn refuse(&mut self, error: SubmitError) {
        let kind = match error {
            SubmitError::TooLong { .. } => "too long",
            SubmitError::NeverFits { .. } => "never fits",
            SubmitError::Empty { .. }
            | SubmitError::NothingToCompute { .. }
            | SubmitError::NotServed(_)
            | SubmitError::Unknown(_) => "not served",
        };
        let first = || Refused { kind, sessions: 0, first: self.lists.whole_refusal(error).to_string() };
        self.refused.entry(kind).or_insert_with(first).sessions += 1;
    }

    fn step(&mut self, listener: &mut dyn Listener) -> Result<(), SimulateError> {
        let pages = self.scheduler.report().pages_in_use_bytes;
        let step = self.scheduler.step(&mut self.device)?;
        self.fresh -= step.admitted.len();
        let moved = step.out_bytes + step.in_bytes > Bytes::ZERO || !step.compressed.is_empty();
        let passed = !step.idle.is_zero() || !step.asked.is_empty() || !step.evicted.is_empty();
        if step.prefill_rows + step.decode_rows == 0 && !moved && !passed && !self.scheduler.is_idle() {
            return Err(SimulateError::Stuck { waiting: self.scheduler.waiting().len() });
        }
        // What was held before a step is what most of it had.
        let seconds = (step.elapsed + step.idle).as_secs_f64();
        self.usage.pages_byte_s += pages.0 as f64 * seconds;
        self.usage.host_byte_s += self.scheduler.away_bytes(Store::Host).0.0 as f64 * seconds;
        self.usage.idle += step.idle;
        listener.stepped(&self.scheduler, &step);
        step.finished.iter().for_each(|(id, _)| self.scheduler.shed(*id));
        Ok(())
    }
}
