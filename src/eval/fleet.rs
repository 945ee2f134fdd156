//! A fleet: one workload over several replicas of a machine, each of one or more GPUs that share each layer.
//!
//! ```text
//! GPUs = replicas * GPUs that share each layer
//! ```
//!
//! Sessions are dealt out to replicas in turn ([`Workload::dealt_to`]) and stay with theirs, where their caches are. So every
//! design sees the same sessions at the same times, and none depends on how busy another replica is. All replicas are
//! simulated, one after another: one of them would stand for the others in the mean, but not in the slowest of a hundred
//! answers. A dispatcher that knows queues would do somewhat better.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::simulate::{Listener, Refused, SimulateError, SimulatedMachine, Simulation};
use crate::compression::Compression;
use crate::geometry::Bytes;
use crate::schedule::workload::{Arrivals, Workload};
use crate::schedule::{Answer, Finish, Phase, Scheduler, Session, SessionId, StepReport};

/// A design keeps up with its load where, when the last session comes, at most this part of all still waits for a first token.
pub const BEHIND_MAX: f64 = 0.05;

/// GPUs of one kind, and how they share the work.
#[derive(Clone, Debug, PartialEq)]
pub struct Design {
    /// Replicas of the model, each with sessions of its own.
    pub replicas: u32,
    /// GPUs of a replica, which share each layer.
    pub share: u32,
    /// Memory of one GPU.
    pub memory: Bytes,
    /// Place of this memory among the choices.
    pub memory_choice: usize,
    /// What is done to caches.
    pub compression: Compression,
}

impl Design {
    /// GPUs in all.
    pub const fn gpus(&self) -> u32 {
        self.replicas * self.share
    }
}

/// What designs are made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Choices {
    /// GPUs in all.
    pub gpus: Vec<u32>,
    /// GPUs that share each layer.
    pub share: Vec<u32>,
    /// Memory of one GPU.
    pub memory: Vec<Bytes>,
    /// What is done to caches.
    pub compressions: Vec<Compression>,
}

/// GPUs that can not be shared out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    /// GPUs in all.
    pub gpus: u32,
    /// GPUs that were to share each layer, which do not divide these.
    pub share: u32,
}

impl Choices {
    /// All designs, by GPUs, then by how many share a layer, memory and compression; and what no design can be made of.
    pub fn designs(&self) -> (Vec<Design>, Vec<LeftOut>) {
        let (mut designs, mut left_out) = (Vec::new(), Vec::new());
        for (gpus, share) in self.gpus.iter().flat_map(|gpus| self.share.iter().map(move |share| (*gpus, *share))) {
            if share == 0 || gpus == 0 || !gpus.is_multiple_of(share) {
                left_out.push(LeftOut { gpus, share });
                continue;
            }
            for (memory_choice, memory) in self.memory.iter().enumerate() {
                designs.extend(self.compressions.iter().map(|compression| Design {
                    replicas: gpus / share,
                    share,
                    memory: *memory,
                    memory_choice,
                    compression: compression.clone(),
                }));
            }
        }
        (designs, left_out)
    }
}

/// Why a machine holds no session at all, where that is so: its weights, or the least of what caches need, do not fit.
///
/// # Errors
/// [`SimulateError`] for everything else that can not be simulated.
pub fn too_small(machine: &SimulatedMachine, compression: &Compression) -> Result<Option<String>, SimulateError> {
    match machine.begin(0, compression, &[]) {
        Ok(_) => Ok(None),
        Err(error @ SimulateError::NoRoom { .. }) => Ok(Some(error.to_string())),
        Err(SimulateError::Pool(error)) => Ok(Some(format!("beside the weights, {error}"))),
        Err(error) => Err(error),
    }
}

/// What became of a workload, over all replicas.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Served {
    /// Sessions that came.
    pub sessions: u32,
    /// Sessions that ended with an answer to every question.
    pub finished: u32,
    /// Sessions that were refused, by the reason.
    pub refused: BTreeMap<&'static str, Refused>,
    /// From each question until the first token of its answer, in seconds.
    pub first_token_s: Vec<f64>,
    /// Time per token after the first, of each answer, in milliseconds.
    pub per_token_ms: Vec<f64>,
    /// Most sessions that held pages at once on one replica.
    pub resident_max: usize,
    /// Time in which replicas computed or moved something, added up.
    pub busy: Duration,
    /// When the last session came.
    pub last_arrival: Duration,
    /// When the last answer was there.
    pub last_answer: Duration,
    /// Sessions that still waited for their first token when the last one came.
    pub behind: u32,
    /// Whether sessions come over time, so that a design can keep up with them.
    pub over_time: bool,
    /// A hash of the replicas' traces in their order: equal traces have equal hashes.
    pub trace_hash: u64,
}

impl Served {
    /// Sessions per hour, from the first arrival to the last answer.
    pub fn sessions_per_hour(&self) -> Option<f64> {
        let hours = self.last_answer.as_secs_f64() / 3600.0;
        (hours > 0.0).then(|| f64::from(self.finished) / hours)
    }

    /// GPU hours per session, of so many GPUs that are all held from the beginning to the last answer.
    pub fn gpu_hours_per_session(&self, gpus: u32) -> Option<f64> {
        self.sessions_per_hour().filter(|rate| *rate > 0.0).map(|rate| f64::from(gpus) / rate)
    }

    /// The part of the replicas' time in which they computed or moved something.
    pub fn busy_part(&self, replicas: u32) -> f64 {
        let all = self.last_answer.as_secs_f64() * f64::from(replicas);
        if all > 0.0 { self.busy.as_secs_f64() / all } else { 0.0 }
    }

    /// Whether the line stays short ([`BEHIND_MAX`]): sessions may wait, but not for ever longer. Of sessions that all come at
    /// once nobody can say.
    ///
    /// One session per replica is no line: somebody's document is always being read.
    pub fn keeps_up(&self, replicas: u32) -> Option<bool> {
        let allowed = (BEHIND_MAX * f64::from(self.sessions)).max(f64::from(replicas));
        self.over_time.then(|| f64::from(self.behind) <= allowed)
    }

    /// Sessions that were refused because a replica can never hold them; those too long for the model are so anywhere.
    pub fn never_fit(&self) -> u32 {
        self.refused.values().filter(|refused| refused.kind != "too long").map(|refused| refused.sessions).sum()
    }

    fn add(&mut self, simulation: &Simulation, resident_max: usize) {
        let scheduler = &simulation.scheduler;
        for (_, session) in scheduler.sessions() {
            self.finished += u32::from(matches!(session.phase, Phase::Finished(Finish::Stop | Finish::Length)));
            let first_tokens = session.answers.iter().filter_map(|answer| answer.first_token);
            self.first_token_s.extend(first_tokens.map(|time| time.as_secs_f64()));
            self.per_token_ms.extend(session.answers.iter().filter_map(Answer::per_token_ms));
            self.behind += u32::from(first_token_at(session).is_none_or(|at| at > self.last_arrival));
        }
        for (kind, refused) in &simulation.refused {
            let all = self.refused.entry(kind).or_insert_with(|| Refused { sessions: 0, ..refused.clone() });
            all.sessions += refused.sessions;
        }
        self.resident_max = self.resident_max.max(resident_max);
        self.busy += scheduler.now().saturating_sub(simulation.usage.idle);
        self.last_answer = self.last_answer.max(scheduler.now());
        // FNV-1a over words.
        self.trace_hash = (self.trace_hash ^ simulation.device.trace_hash()).wrapping_mul(0x0100_0000_01b3);
    }
}

/// When a session saw the first token of its first answer.
fn first_token_at(session: &Session) -> Option<Duration> {
    let answer = session.answers.first()?;
    Some(answer.asked + answer.first_token?)
}

/// Runs a workload over replicas of a machine. `progress` hears how many sessions are over since it heard last.
///
/// # Errors
/// [`SimulateError`].
pub fn serve(
    machine: &SimulatedMachine,
    replicas: u32,
    workload: &Workload,
    compression: &Compression,
    progress: &mut dyn FnMut(u64),
) -> Result<Served, SimulateError> {
    let mut served = Served {
        sessions: workload.sessions,
        last_arrival: workload.visits().last().map_or(Duration::ZERO, |visit| visit.at),
        over_time: workload.arrival != Arrivals::All,
        trace_hash: 0xcbf2_9ce4_8422_2325,
        ..Served::default()
    };
    for replica in 0..replicas {
        let mut simulation = machine.begin(workload.seed, compression, &[])?;
        let mut watch = Watch { resident_max: 0, progress: &mut *progress };
        simulation.run(workload.dealt_to(replica, replicas), &mut watch)?;
        served.add(&simulation, watch.resident_max);
        let refused = simulation.refused.values().map(|refused| u64::from(refused.sessions)).sum();
        progress(refused);
    }
    Ok(served)
}

/// Sees what is gone after a step.
struct Watch<'a> {
    resident_max: usize,
    progress: &'a mut dyn FnMut(u64),
}

impl Listener for Watch<'_> {
    fn submitted(&mut self, _: &Scheduler, _: SessionId) {}

    fn stepped(&mut self, scheduler: &Scheduler, step: &StepReport) {
        // Sessions that ended in this step held their pages during it.
        self.resident_max = self.resident_max.max(scheduler.n_admitted() + step.finished.len());
        (self.progress)(step.finished.len() as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::workload::Distribution;
    use crate::theory::presets::Presets;
    use crate::theory::step::{Achieved, Machine};

    /// A model of 6 billion parameters, whose weights take 12 GB.
    fn machine(memory: u64) -> SimulatedMachine {
        let presets = Presets::built_in();
        let gpu = presets.gpu("a100").expect("a preset");
        SimulatedMachine {
            machine: Machine::new(gpu, &Achieved::default()),
            memory: Bytes(memory),
            host_budget: Bytes::ZERO,
            swap_chunk: Bytes::mib(64),
            max_rows: 1024,
            max_sessions: 16,
            observed: 1,
            context_length: 60_000,
            page_size: 64,
            model: presets.model("yi-6b").expect("a preset").decoder.clone(),
        }
    }

    fn workload(sessions: u32, per_second: f64) -> Workload {
        Workload {
            sessions,
            arrival: Arrivals::Poisson { per_second },
            context: Distribution::Uniform { from: 5e3, to: 2e4 },
            rounds: 2,
            question: Distribution::Fixed(50.0),
            answer: Distribution::Fixed(60.0),
            think: Distribution::Exponential { mean: 5.0 },
            seed: 4,
        }
    }

    fn of(replicas: u32, workload: &Workload) -> Served {
        let mut heard = 0;
        let served = serve(&machine(40_000_000_000), replicas, workload, &Compression::default(), &mut |n| heard += n);
        let served = served.expect("it can be simulated");
        let refused: u32 = served.refused.values().map(|refused| refused.sessions).sum();
        assert_eq!(heard, u64::from(served.finished + refused), "progress hears of each once");
        served
    }

    fn percentile(values: &[f64], part: f64) -> f64 {
        let mut values = values.to_vec();
        values.sort_by(f64::total_cmp);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index below the length")]
        let at = (part * (values.len() - 1) as f64) as usize;
        values[at]
    }

    #[test]
    fn the_same_seed_gives_the_same_figures_and_every_session_is_served_once() {
        let first = of(3, &workload(40, 1.0));
        assert_eq!(first, of(3, &workload(40, 1.0)), "equal seeds");
        assert_ne!(first.trace_hash, of(3, &Workload { seed: 5, ..workload(40, 1.0) }).trace_hash, "another seed");
        assert_ne!(first.trace_hash, of(2, &workload(40, 1.0)).trace_hash, "other replicas");
        assert_eq!((first.finished, first.first_token_s.len()), (40, 80), "two answers for each session");
        assert!((0.0..1.0).contains(&first.busy_part(3)) && first.busy_part(3) > 0.0, "{first:?}");
        assert_eq!(of(50, &workload(40, 1.0)).finished, 40, "replicas to which nobody comes");
    }

    #[test]
    fn twice_the_replicas_serve_twice_the_sessions_as_one_serves_half() {
        let think = Distribution::Fixed(2.0);
        let alike = |sessions| {
            let context = Distribution::Fixed(9_000.0);
            Workload { arrival: Arrivals::All, context, think, ..workload(sessions, 1.0) }
        };
        let sorted = |mut values: Vec<f64>| {
            values.sort_by(f64::total_cmp);
            values
        };
        let (one, two) = (of(1, &alike(8)), of(2, &alike(16)));
        let twice = one.first_token_s.iter().chain(&one.first_token_s).copied().collect();
        assert_eq!(sorted(two.first_token_s), sorted(twice), "every replica is as the only one");
        assert_eq!((two.last_answer, two.resident_max), (one.last_answer, one.resident_max), "as long, as many");
        assert!(of(1, &alike(16)).last_answer > one.last_answer, "one alone needs longer for all");
    }

    #[test]
    fn twice_the_replicas_at_twice_the_load_serve_as_well() {
        let (one, two, far) = (of(1, &workload(300, 0.6)), of(2, &workload(600, 1.2)), of(1, &workload(600, 1.2)));
        let [a, b, c] = [&one, &two, &far].map(|served| percentile(&served.first_token_s, 0.95));
        // Dealing out evens out arrivals, so that fewer wait.
        assert!((0.5..1.1).contains(&(b / a)), "95 of a hundred answers begin within {a} s and {b} s");
        let [a95, b95] = [&one, &two].map(|served| percentile(&served.per_token_ms, 0.95));
        assert!((b95 / a95 - 1.0).abs() < 0.1, "a token takes {a95} ms and {b95} ms");
        assert_eq!((one.keeps_up(1), two.keeps_up(2)), (Some(true), Some(true)), "neither falls behind");
        assert!(c > 10.0 * a && far.keeps_up(1) == Some(false), "one replica at twice the load falls behind: {c} s");
    }

    #[test]
    fn a_session_of_one_step_is_priced_by_hand() {
        let workload = Workload {
            arrival: Arrivals::All,
            context: Distribution::Fixed(500.0),
            rounds: 1,
            answer: Distribution::Fixed(1.0),
            ..workload(6, 1.0)
        };
        let machine = machine(40_000_000_000);
        // One after another, since there is one seat: a step of 550 rows each, bound by FLOP/s.
        let machine = SimulatedMachine { max_sessions: 1, ..machine };
        let step = machine.machine.prefill(&machine.model, 550, Bytes::ZERO);
        for (replicas, steps) in [(1, 6.0), (2, 3.0), (3, 2.0)] {
            let served = serve(&machine, replicas, &workload, &Compression::default(), &mut |_| {})
                .expect("it can be simulated");
            let seconds = served.last_answer.as_secs_f64();
            // A clock of whole nanoseconds, and a document that ends on an edge of its own.
            assert!((seconds / (steps * step) - 1.0).abs() < 0.05, "{replicas}: {seconds} s, not {steps} of {step} s");
            let hours = served.gpu_hours_per_session(2 * replicas).expect("a price");
            let expected = f64::from(2 * replicas) * seconds / 3600.0 / 6.0;
            assert!((hours / expected - 1.0).abs() < 1e-9, "{hours} GPU hours, not {expected}");
            assert!((served.busy_part(replicas) - 1.0).abs() < 1e-9, "always busy");
            assert_eq!(served.keeps_up(replicas), None, "all came at once");
        }
    }

    #[test]
    fn what_does_not_fit_is_told_and_sessions_that_never_fit_are_counted() {
        let full = Compression::default();
        let small = |memory, compression| too_small(&machine(memory), compression).expect("it can be simulated");
        assert!(small(10_000_000_000, &full).is_some_and(|why| why.contains("weights take")), "no room for weights");
        assert!(small(12_130_000_000, &full).is_some_and(|why| why.contains("too small")), "none for a slab");
        assert_eq!(small(40_000_000_000, &full), None, "room");
        let duo = "head=duo:0.5".parse().expect("a compression");
        assert!(too_small(&machine(10_000_000_000), &duo).is_err(), "what can not be simulated is no matter of memory");
        let workload = Workload { context: Distribution::Uniform { from: 1e4, to: 7e4 }, ..workload(40, 1.0) };
        let served = serve(&machine(15_000_000_000), 2, &workload, &full, &mut |_| {}).expect("it can be simulated");
        let never = served.never_fit();
        let too_long = served.refused.get("too long").map_or(0, |refused| refused.sessions);
        assert!(never > 0 && too_long > 0, "{never} never fit, {too_long} are too long: {:?}", served.refused);
        assert_eq!(served.finished + never + too_long, 40, "each is accounted for");
    }

    #[test]
    fn designs_are_what_divides() {
        let choices = Choices {
            gpus: vec![1, 4],
            share: vec![1, 2],
            memory: vec![Bytes(1), Bytes(2)],
            compressions: vec![Compression::default()],
        };
        let (designs, left_out) = choices.designs();
        let seen: Vec<_> = designs.iter().map(|d| (d.gpus(), d.replicas, d.share, d.memory.0)).collect();
        assert_eq!(
            seen,
            [(1, 1, 1, 1), (1, 1, 1, 2), (4, 4, 1, 1), (4, 4, 1, 2), (4, 2, 2, 1), (4, 2, 2, 2)],
            "in order"
        );
        assert_eq!(left_out, [LeftOut { gpus: 1, share: 2 }], "two can not share what one has");
    }
}
