//! Workloads over a virtual GPU: the same seed gives the same trace; one list of pages stands for all; a session that waits as a
//! number is served as one whose prompt is in memory; times are those of the theory.

use std::time::{Duration, Instant};

use concertina::compression::Compression;
use concertina::compression::hidden::HiddenCodec;
use concertina::eval::simulate::{Listener, SimulateError, SimulatedMachine, Simulation};
use concertina::geometry::{Bytes, HeadGeometry, ModelGeometry, PageGeometry};
use concertina::pool::page_table::{TableShape, Window};
use concertina::pool::{PagePool, PoolLayout};
use concertina::schedule::virtual_device::VirtualDevice;
use concertina::schedule::workload::{Arrivals, Distribution, Workload};
use concertina::schedule::{
    Abilities, Caches, Finish, HostConfig, OneList, Phase, Rates, Request, Round, ScheduleConfig, Scheduler, SessionId,
    StepReport,
};
use concertina::theory::model::Decoder;
use concertina::theory::parallel::TensorParallel;
use concertina::theory::presets::Presets;
use concertina::theory::step::{Achieved, Machine};

const PAGE: PageGeometry = PageGeometry { page_size: 32, head_dim: 32 };
const MAX_ROWS: u32 = 96;
/// Slabs of the small pools: too few for all sessions at once.
const SLABS: u64 = 7;

fn compressed(text: &str) -> Compression {
    text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
}

fn small_model() -> ModelGeometry {
    ModelGeometry {
        num_layers: 4,
        hidden_size: 128,
        intermediate_size: 256,
        heads: HeadGeometry { num_qo_heads: 4, num_kv_heads: 2, head_dim: PAGE.head_dim },
        vocab_size: 300,
        context_length: 2_000,
        rope_theta: 1e4,
        rms_norm_eps: 1e-5,
    }
}

/// Documents of about 150 tokens that come faster than they are served.
fn small_workload(seed: u64) -> Workload {
    Workload {
        sessions: 40,
        arrival: Arrivals::Poisson { per_second: 400.0 },
        context: Distribution::LogNormal { median: 150.0, sigma: 0.6 },
        rounds: 3,
        question: Distribution::Uniform { from: 1.0, to: 20.0 },
        answer: Distribution::Uniform { from: 2.0, to: 50.0 },
        think: Distribution::Exponential { mean: 0.05 },
        seed,
    }
}

fn slow_machine() -> Machine {
    Machine { flops: 2e9, bandwidth: 4e8, link: 2e7, parallel: None }
}

/// Everything of a step that does not depend on how many lists there are; bytes are of all lists.
#[derive(Debug, PartialEq)]
struct Seen {
    admitted: Vec<SessionId>,
    asked: Vec<SessionId>,
    moved: [Vec<SessionId>; 5],
    bytes: [Bytes; 4],
    produced: Vec<(SessionId, u32)>,
    finished: Vec<(SessionId, Finish)>,
    rows: (u32, u32),
    time: (Duration, Duration),
}

impl Seen {
    fn new(step: StepReport, scheduler: &Scheduler, lists: u32) -> Self {
        let (whole, pool) = (|bytes: Bytes| Bytes(bytes.0 * u64::from(lists)), scheduler.report());
        // Not the slack: which slabs are partly used depends on the order in which single pages return.
        let bytes = [step.out_bytes, step.in_bytes, pool.pages_in_use_bytes, pool.committed_bytes];
        Self {
            admitted: step.admitted,
            asked: step.asked,
            moved: [step.swapped_out, step.swapped_in, step.dropped, step.compressed, step.evicted],
            bytes: bytes.map(whole),
            produced: step.produced,
            finished: step.finished,
            rows: (step.decode_rows, step.prefill_rows),
            time: (step.elapsed, step.idle),
        }
    }
}

/// What sessions ask for in a comparison.
struct Case {
    compression: &'static str,
    ladder: &'static [&'static str],
    /// Bytes of host memory, and of a chunk in pages of each list.
    host: u64,
    chunk_pages: u64,
}

impl Case {
    fn all(&self) -> Vec<Compression> {
        std::iter::once(&self.compression).chain(self.ladder).map(|text| compressed(text)).collect()
    }

    fn abilities(&self, lists: u64) -> Abilities {
        let mut codecs: Vec<HiddenCodec> = self.all().iter().flat_map(Caches::codecs_of).collect();
        codecs.dedup();
        let chunk = HiddenCodec::F16.page_bytes(PAGE).0 * lists * self.chunk_pages;
        let swap_bytes = if self.host > 0 { Bytes(chunk) } else { Bytes::ZERO };
        Abilities { codecs, slots: Some(12), slot_bytes: Bytes(64 * lists), swap_bytes, ..Abilities::default() }
    }

    /// Steps of the workload, session by session as they come.
    fn steps(&self, caches: Caches, lists: OneList, compressions: &[Compression]) -> Vec<Seen> {
        let (scale, link) = (lists.lists, slow_machine().link / f64::from(lists.lists));
        let host = HostConfig {
            budget: Bytes(self.host / u64::from(scale)),
            rates: Rates { out: link, back: link, prefill: 0.0 },
            ..HostConfig::default()
        };
        let config = ScheduleConfig { max_rows: MAX_ROWS, max_sessions: 5, context_length: 2_000, host };
        let model = Decoder::dense(small_model(), true).expect("a model");
        let mut device = VirtualDevice::new(1, model, slow_machine(), lists);
        let mut scheduler = Scheduler::new(config, caches);
        let mut visits = small_workload(5).visits().peekable();
        let mut seen = Vec::new();
        while visits.peek().is_some() || !scheduler.is_idle() {
            while let Some(visit) = visits.next_if(|visit| visit.at <= scheduler.now()) {
                let place = scheduler.take_place(visit.at);
                let _ = scheduler.submit_in(place, visit.request(300, &compressions[0], &compressions[1..]));
            }
            scheduler.expect(visits.peek().map(|visit| visit.at));
            let step = scheduler.step(&mut device).expect("a simulation does not fail");
            seen.push(Seen::new(step, &scheduler, scale));
        }
        assert_eq!(scheduler.report().pages_in_use_bytes, Bytes::ZERO, "all pages are back");
        seen
    }

    /// Over a pool of so many slabs, each of 16 pages of every list that holds pages.
    fn over_all_lists(&self, lists: u32) -> Vec<Seen> {
        let model = small_model();
        let full = TableShape {
            num_layers: model.num_layers,
            num_kv_heads: model.heads.num_kv_heads,
            page: PAGE,
            codec: HiddenCodec::F16,
            quest: None,
        };
        let abilities = self.abilities(u64::from(lists));
        let window = Window::new(PAGE, full.num_kv_heads, MAX_ROWS, !abilities.codecs.is_empty());
        let sizes = abilities.codecs.iter().map(|codec| codec.page_bytes(PAGE)).chain([full.open_page()]);
        let (smallest, largest) = (sizes.clone().min().expect("f16"), sizes.max().expect("f16"));
        let slab = Bytes(16 * largest.0 * u64::from(lists));
        let tables = slab.0.div_ceil(smallest.0) * 8;
        let layout = PoolLayout {
            budget: Bytes(SLABS * (slab.0 + tables) + slab.0 / 2 + u64::from(window.entries()) * 4),
            staging: Bytes::ZERO,
            scratch: Bytes::ZERO,
            max_binding: Bytes(1 << 34),
            slab,
            smallest_page: smallest,
            fixed_entries: window.entries(),
        };
        let pool = PagePool::new(&layout).expect("seven slabs");
        assert_eq!(pool.capacity(), Bytes(SLABS * slab.0), "of the size that was meant");
        // Here a list stands for itself.
        let itself = OneList { lists: 1, read: model.num_lists() };
        self.steps(Caches::new(pool, full, window, abilities), itself, &self.all())
    }

    /// Over a pool of one list that stands for so many, which hold the bytes of `lists` of them.
    fn over_one_list(&self, one: OneList, lists: u32) -> Vec<Seen> {
        let abilities = self.abilities(u64::from(one.lists));
        let sizes =
            abilities.codecs.iter().map(|codec| codec.page_bytes(PAGE)).chain([HiddenCodec::F16.page_bytes(PAGE)]);
        let (smallest, largest) = (sizes.clone().min().expect("f16"), sizes.max().expect("f16"));
        let slab = 16 * largest.0;
        let budget = SLABS * (slab + slab.div_ceil(smallest.0) * 8) + slab / 2;
        let budget = Bytes(budget * u64::from(lists));
        let caches = one.caches(PAGE, MAX_ROWS, (budget, Bytes::ZERO), abilities).expect("seven slabs");
        let compressions: Vec<Compression> = self.all().iter().map(OneList::compression).collect();
        self.steps(caches, one, &compressions)
    }
}

const fn case(compression: &'static str, ladder: &'static [&'static str], host: u64, chunk_pages: u64) -> Case {
    Case { compression, ladder, host, chunk_pages }
}

/// Pages of one size: everything is exact.
const ONE_SIZE: [Case; 6] = [
    case("full", &[], 0, 0),
    case("full", &[], 4_000_000, 3),
    case("token=h2o:96:every32", &[], 0, 0),
    case("token=snapkv:0.5:window8", &[], 2_000_000, 3),
    case("layer=share:2", &[], 1_000_000, 2),
    case("full", &["token=keydiff:0.5", "token=streaming:64"], 300_000, 3),
];

/// Pages of two sizes, which compete for slabs.
const TWO_SIZES: [Case; 4] = [
    case("kivi4", &[], 0, 0),
    case("kivi4", &[], 2_000_000, 80),
    case("token=h2o:96:every32,hidden=rot3", &[], 0, 0),
    case("layer=share:2,hidden=int8", &[], 0, 0),
];

/// The speed of the simulation rests on this.
#[test]
fn one_list_stands_for_all_step_by_step_and_byte_by_byte() {
    let (mut steps, mut moves) = (0, [0; 5]);
    for case in &ONE_SIZE {
        let name = format!("{} with {} B on the host", case.compression, case.host);
        let one = OneList::new(&small_model(), &compressed(case.compression)).expect("it does the same to every list");
        let (all, coarse) = (case.over_all_lists(one.lists), case.over_one_list(one, one.lists));
        for (step, (all, coarse)) in all.iter().zip(&coarse).enumerate() {
            assert_eq!(all, coarse, "{name}: step {step}");
        }
        assert_eq!(all.len(), coarse.len(), "{name}: as many steps");
        steps += all.len();
        for seen in &all {
            moves.iter_mut().zip(&seen.moved).for_each(|(count, ids)| *count += ids.len());
        }
        // A pool with the bytes of fewer lists decides otherwise: the comparison sees it.
        let smaller = case.over_one_list(one, one.lists / 2);
        assert!(all != smaller, "{name}: a pool of another size should be noticed");
    }
    println!("{steps} steps; swapped out, in, dropped, compressed, evicted: {moves:?}");
    assert!(moves.iter().all(|n| *n > 0), "every way to give up pages should have happened: {moves:?}");
}

/// Where pages of two sizes compete for the last slabs, other slabs are partly used: the end is nearly the same.
#[test]
fn one_list_stands_for_all_up_to_the_last_slabs() {
    let time = |seen: &[Seen]| seen.iter().map(|seen| (seen.time.0 + seen.time.1).as_secs_f64()).sum::<f64>();
    let finished = |seen: &[Seen]| seen.iter().map(|seen| seen.finished.len()).sum::<usize>();
    for case in &TWO_SIZES {
        let name = format!("{} with {} B on the host", case.compression, case.host);
        let one = OneList::new(&small_model(), &compressed(case.compression)).expect("it does the same to every list");
        let (all, coarse) = (case.over_all_lists(one.lists), case.over_one_list(one, one.lists));
        let off = |other: &[Seen]| time(other) / time(&all) - 1.0;
        let smaller = case.over_one_list(one, one.lists / 2);
        println!("{name}: {} s, one list {:+.4}, in half of the pool {:+.4}", time(&all), off(&coarse), off(&smaller));
        assert_eq!(finished(&all), finished(&coarse), "{name}: sessions");
        assert!(off(&coarse).abs() < 0.02, "{name}: {:+.4} of the time", off(&coarse));
        assert!(off(&smaller).abs() > 0.04, "{name}: {:+.4} in half of the pool", off(&smaller));
    }
}

#[test]
fn a_device_that_reads_other_bytes_takes_another_time() {
    let case = &ONE_SIZE[0];
    let one = OneList::new(&small_model(), &Compression::default()).expect("full");
    let half = OneList { read: one.read / 2, ..one };
    let time = |one| case.over_one_list(one, 8).iter().map(|seen| seen.time.0).sum::<Duration>();
    assert!(time(half) < time(one), "half of the bytes are read in less time");
}

#[derive(Default)]
struct Steps {
    accepted: u32,
    steps: u64,
    answers: usize,
    /// Most sessions that had not begun, where they are counted: that looks at the whole line in every step.
    most_waiting: Option<usize>,
}

impl Listener for Steps {
    fn submitted(&mut self, _: &Scheduler, _: SessionId) {
        self.accepted += 1;
    }

    fn stepped(&mut self, scheduler: &Scheduler, step: &StepReport) {
        self.steps += 1;
        self.answers += step.answered.len() + step.finished.len();
        self.most_waiting = self.most_waiting.map(|most| most.max(not_begun(scheduler)));
    }
}

/// Sessions in the schedule that have not begun: their prompts are in memory.
fn not_begun(scheduler: &Scheduler) -> usize {
    let waits = |id: &SessionId| scheduler.session(*id).is_some_and(|session| session.phase == Phase::Waiting);
    scheduler.waiting().filter(waits).count()
}

fn machine(model: &str, gpu: &str) -> SimulatedMachine {
    let presets = Presets::built_in();
    let (preset, gpu) = (presets.model(model).expect(model), presets.gpu(gpu).expect(gpu));
    SimulatedMachine {
        machine: Machine::new(gpu, &Achieved::default()),
        memory: gpu.memory_bytes,
        host_budget: Bytes::ZERO,
        swap_chunk: Bytes::mib(64),
        max_rows: 1024,
        max_sessions: 16,
        observed: 1,
        context_length: 200_000,
        page_size: 64,
        model: preset.decoder.clone(),
    }
}

fn workload(sessions: u32, seed: u64) -> Workload {
    Workload {
        sessions,
        arrival: "poisson:2/s".parse().expect("arrivals"),
        context: "lognormal:50k".parse().expect("a distribution"),
        rounds: 3,
        question: Distribution::Fixed(50.0),
        answer: Distribution::Fixed(250.0),
        think: Distribution::Exponential { mean: 30.0 },
        seed,
    }
}

fn simulated(machine: &SimulatedMachine, workload: &Workload, compression: &str) -> (Simulation, Steps) {
    let mut steps = Steps::default();
    (watched(machine, workload, compression, &mut steps), steps)
}

fn watched(machine: &SimulatedMachine, workload: &Workload, compression: &str, steps: &mut Steps) -> Simulation {
    let mut simulation = machine.begin(workload.seed, &compressed(compression), &[]).expect("it can be simulated");
    simulation.run(workload.visits(), steps).expect("a simulation does not fail");
    simulation
}

fn refused(simulation: &Simulation) -> u32 {
    simulation.refused.values().map(|refused| refused.sessions).sum()
}

#[test]
fn the_same_seed_gives_the_same_trace_and_every_session_ends() {
    let machine = machine("yi-34b", "h100");
    let hash = |seed, compression| {
        let workload = workload(60, seed);
        let (simulation, steps) = simulated(&machine, &workload, compression);
        assert_eq!(steps.accepted + refused(&simulation), 60, "accepted or refused");
        assert_eq!(steps.answers, 3 * steps.accepted as usize, "every question has its answer");
        for (id, session) in simulation.scheduler.sessions() {
            assert_eq!(session.phase, Phase::Finished(Finish::Length), "{id:?} ended");
            assert!(session.answers.iter().all(|answer| answer.produced.len() == 250), "{id:?} answered in full");
            assert!(session.tokens.is_empty() && session.request.prompt.is_empty(), "{id:?}: no token is kept");
        }
        let seconds = simulation.scheduler.now().as_secs_f64();
        assert!(simulation.usage.idle.as_secs_f64() < seconds, "some time was busy");
        simulation.device.trace_hash()
    };
    assert_eq!(hash(1, "kivi4"), hash(1, "kivi4"), "equal seeds");
    assert_ne!(hash(1, "kivi4"), hash(2, "kivi4"), "another seed");
    assert_ne!(hash(1, "kivi4"), hash(1, "kivi2"), "another compression");
}

/// A line of numbers is served as a line of prompts, with fewer of them in memory.
#[test]
fn sessions_that_wait_as_numbers_are_served_as_those_whose_prompts_are_there() {
    let machine = machine("yi-34b", "h100");
    let workload = Workload { arrival: Arrivals::Poisson { per_second: 5.0 }, ..workload(80, 3) };
    let mut steps = Steps { most_waiting: Some(0), ..Steps::default() };
    let simulation = watched(&machine, &workload, "kivi4", &mut steps);
    let most = steps.most_waiting.expect("they are counted");
    assert!((1..=17).contains(&most), "{most} for 16 seats");
    let eager = |reversed: bool| {
        let begun = machine.begin(workload.seed, &compressed("kivi4"), &[]).expect("it can be simulated");
        let (mut scheduler, mut device) = (begun.scheduler, begun.device);
        let mut visits = workload.visits().peekable();
        let (vocab, kivi4) = (machine.model.geometry.vocab_size, compressed("kivi4"));
        let mut most = 0;
        while visits.peek().is_some() || !scheduler.is_idle() {
            let mut came = Vec::new();
            while let Some(visit) = visits.next_if(|visit| visit.at <= scheduler.now()) {
                came.push((scheduler.take_place(visit.at), visit.request(vocab, &kivi4, &[])));
            }
            if reversed {
                let (places, mut requests): (Vec<_>, Vec<_>) = came.into_iter().unzip();
                requests.reverse();
                came = places.into_iter().zip(requests).collect();
            }
            for (place, request) in came {
                let _ = scheduler.submit_in(place, request);
            }
            scheduler.expect(visits.peek().map(|visit| visit.at));
            most = most.max(not_begun(&scheduler));
            scheduler.step(&mut device).expect("a simulation does not fail");
        }
        (device.trace_hash(), most)
    };
    let (hash, most) = eager(false);
    assert!(most > 60, "{most} waited with their prompts");
    assert_eq!(hash, simulation.device.trace_hash(), "the same schedule");
    assert_ne!(eager(true).0, hash, "another order is another schedule");
}

/// A session of two questions, the second a while after the first answer, just after that answer.
fn between_questions(think: Duration) -> (Scheduler, VirtualDevice, SessionId) {
    let one = OneList::new(&small_model(), &Compression::default()).expect("full");
    let budget = (Bytes::mib(8), Bytes::ZERO);
    let caches = one.caches(PAGE, MAX_ROWS, budget, Abilities::default()).expect("room");
    let host = HostConfig::default();
    let config = ScheduleConfig { max_rows: MAX_ROWS, max_sessions: 1, context_length: 2_000, host };
    let model = Decoder::dense(small_model(), true).expect("a model");
    let mut device = VirtualDevice::new(1, model, slow_machine(), one);
    let mut scheduler = Scheduler::new(config, caches);
    let rounds = vec![Round { tokens: vec![2; 5], max_new: 1, think }];
    let first = scheduler.submit(Request { rounds, ..Request::new(vec![1; 10], 1) }).expect("it fits");
    scheduler.step(&mut device).expect("a simulation does not fail");
    (scheduler, device, first)
}

#[test]
fn who_asked_before_a_session_came_stands_before_it() {
    let think = Duration::from_millis(1);
    let line = |came: Duration| {
        let (mut scheduler, mut device, first) = between_questions(think);
        let answered = scheduler.now();
        scheduler.submit(Request::new(vec![3; 90], 1)).expect("it fits");
        scheduler.step(&mut device).expect("a simulation does not fail");
        assert!(scheduler.now() > answered + 2 * think, "a long step: {:?}", scheduler.now() - answered);
        let place = scheduler.take_place(answered + came);
        let last = scheduler.submit_in(place, Request::new(vec![4; 10], 1)).expect("it fits");
        assert_eq!(scheduler.session(last).map(|session| session.submitted), Some(answered + came), "when it came");
        (scheduler.waiting().collect::<Vec<_>>(), first, last)
    };
    let (waiting, first, last) = line(think * 2);
    assert_eq!(waiting, [first, last], "the question came before");
    let (waiting, _, last) = line(think / 2);
    assert_eq!(waiting, [last], "the question has not been heard when the session takes its place");
}

#[test]
fn time_passes_no_further_than_the_session_that_is_expected() {
    let (mut scheduler, mut device, _) = between_questions(Duration::from_secs(10));
    let answered = scheduler.now();
    scheduler.expect(Some(answered + Duration::from_secs(3)));
    let idle = |scheduler: &mut Scheduler, device: &mut VirtualDevice| {
        scheduler.step(device).expect("a simulation does not fail").idle.as_secs()
    };
    assert_eq!(idle(&mut scheduler, &mut device), 3, "until it comes");
    scheduler.expect(Some(answered + Duration::from_secs(30)));
    assert_eq!(idle(&mut scheduler, &mut device), 7, "until the question, which is before the next");
    assert!(scheduler.step(&mut device).expect("a simulation does not fail").prefill_rows > 0, "it is read");
}

#[test]
fn a_session_alone_takes_the_time_that_the_theory_says() {
    let machine = machine("yi-6b", "a100");
    for (compression, n_tokens) in [("full", 20_000), ("kivi4", 50_000)] {
        let alone = Workload {
            context: Distribution::Fixed(f64::from(n_tokens - 50)),
            rounds: 1,
            arrival: "poisson:1/min".parse().expect("arrivals"),
            ..workload(1, 0)
        };
        let (simulation, _) = simulated(&machine, &alone, compression);
        let predicted = machine.predict(&compressed(compression), n_tokens).expect("it can be simulated");
        let (_, session) = simulation.scheduler.sessions().next().expect("one session");
        assert_eq!(Some(session.submitted), alone.visits().next().map(|visit| visit.at), "it came when it came");
        assert_eq!(simulation.usage.idle, session.submitted, "until then nobody had anything to compute");
        let answer = &session.answers[0];
        let (first, last) = (answer.first_token.expect("a token"), answer.finished.expect("the last"));
        // Chunks end on pages, and each reads weights and cache again, which prefill hides behind its FLOP.
        let part = first.as_secs_f64() / predicted.prefill_s;
        assert!((part - 1.0).abs() < 0.01, "{compression}: prefill takes {part} of what is predicted");
        let token_ms = (last - first).as_secs_f64() * 1e3 / 249.0;
        // The cache grows by 250 tokens.
        let part = token_ms / predicted.token_ms;
        assert!((1.0..1.01).contains(&part), "{compression}: a token takes {part} of what is predicted");
    }
}

/// Where 16 GPUs share 8 KV heads, each head is held twice, so that half of the memory holds copies and every token is read twice.
#[test]
fn kv_heads_that_do_not_divide_take_memory_and_time_twice() {
    let shared = |degree: u32| {
        let one = machine("yi-34b", "h100");
        let parallel = TensorParallel { degree, bytes_per_s: 450e9 };
        SimulatedMachine {
            machine: one.machine.shared_by(parallel),
            memory: Bytes(one.memory.0 * u64::from(degree)),
            ..one
        }
    };
    let budget = |degree| {
        let machine = shared(degree);
        machine.budget().expect("room").0 as f64 / (machine.memory - machine.model.weights).0 as f64
    };
    assert_eq!([2, 8, 16].map(budget), [1.0, 1.0, 0.5], "of what weights leave");
    assert!((budget(3) - 8.0 / 9.0).abs() < 1e-6, "9 heads are held where 3 GPUs share 8");
    let (eight, sixteen) = (shared(8), shared(16));
    let decode_attention = |machine: &SimulatedMachine| {
        let alone = Workload { context: Distribution::Fixed(40_000.0), ..workload(1, 0) };
        simulated(machine, &alone, "full").0.device.spent().decode_attention_s
    };
    // Twice the bandwidth for twice the bytes.
    let part = decode_attention(&sixteen) / decode_attention(&eight);
    assert!((part - 1.0).abs() < 1e-6, "16 GPUs read caches in {part} of the time of 8");
    let four = decode_attention(&shared(4)) / decode_attention(&eight);
    assert!((four - 2.0).abs() < 1e-6, "4 need {four} times as long as 8");
    let predicted =
        |machine: &SimulatedMachine| machine.predict(&compressed("full"), 40_000).expect("it fits").switch_s;
    assert!((predicted(&sixteen) / predicted(&eight) - 1.0).abs() < 1e-6, "copies cross the links, too");
}

#[test]
fn swaps_take_the_time_that_the_link_needs() {
    let narrow = |swap_chunk| {
        let machine = SimulatedMachine { host_budget: Bytes(400_000_000_000), swap_chunk, ..machine("yi-34b", "h100") };
        let context = Distribution::Fixed(60_000.0);
        let (simulation, _) = simulated(&machine, &Workload { context, ..workload(20, 4) }, "kivi4");
        let moves = simulation.device.moves();
        assert!(moves.len() > 10, "{} moves", moves.len());
        let bytes = machine.predict(&compressed("kivi4"), 60_000).expect("it fits").kv_bytes;
        let least = bytes.0 as f64 / machine.machine.link;
        assert!(moves.iter().all(|time| time.as_secs_f64() > 0.99 * least), "none is faster than the link");
        moves.iter().map(Duration::as_secs_f64).sum::<f64>() / moves.len() as f64
    };
    assert!(narrow(Bytes::mib(512)) < narrow(Bytes::mib(64)), "small chunks ride on more steps");
}

#[test]
fn compression_serves_more_where_memory_is_what_runs_out() {
    let machine = machine("yi-34b", "h100");
    let workload = Workload { context: Distribution::Fixed(30_000.0), ..workload(40, 9) };
    let at_once = |compression: &str| {
        let (simulation, _) = simulated(&machine, &workload, compression);
        assert_eq!(refused(&simulation), 0, "{compression}: each fits alone");
        (simulation.scheduler.now(), machine.predict(&compressed(compression), 30_000).expect("it fits").fit)
    };
    let ((full, one), (kivi4, several)) = (at_once("full"), at_once("kivi4"));
    assert_eq!((one, several), (1, 4), "that fit at once");
    assert!(kivi4 < full, "{kivi4:?} for all sessions, with full caches {full:?}");
}

#[test]
fn what_can_not_be_simulated_is_refused_with_the_reason() {
    let usual = machine("yi-34b", "h100");
    let refusal = |machine: &SimulatedMachine, compression: &str, ladder: &[Compression]| {
        machine.begin(0, &compressed(compression), ladder).expect_err(compression).to_string()
    };
    for (compression, why) in
        [("head=duo:0.5", "one list for all"), ("kivi4:128", "128"), ("token=streaming:512:every48", "no multiple")]
    {
        let message = refusal(&usual, compression, &[]);
        assert!(message.contains(why), "{compression}: {message}");
    }
    let message = refusal(&usual, "full", &[compressed("token=h2o:0.5")]);
    assert!(message.contains("not known any more"), "{message}");
    let message = refusal(&usual, "full", &[compressed("layer=share:2")]);
    assert!(message.contains("other layers"), "{message}");
    let small = SimulatedMachine { memory: Bytes(60_000_000_000), ..usual.clone() };
    assert!(matches!(small.begin(0, &compressed("full"), &[]), Err(SimulateError::NoRoom { .. })), "weights alone");
    let tight = SimulatedMachine { memory: Bytes(68_900_000_000), ..usual.clone() };
    assert!(matches!(tight.begin(0, &compressed("full"), &[]), Err(SimulateError::Pool(_))), "no slab of pages");
    let chunk = SimulatedMachine { host_budget: Bytes::mib(1), swap_chunk: Bytes::mib(1), ..usual };
    let message = refusal(&chunk, "full", &[]);
    assert!(message.contains("480 lists") && message.contains("--swap-chunk"), "{message}");
}

#[test]
#[ignore = "takes half a minute: cargo test --release --test simulate -- --ignored --nocapture"]
fn ten_thousand_sessions_take_less_than_a_minute() {
    for compression in ["full", "kivi4"] {
        let started = Instant::now();
        let (simulation, steps) = simulated(&machine("yi-34b", "h100"), &workload(10_000, 0), compression);
        let elapsed = started.elapsed();
        let (n, hash) = (steps.accepted, simulation.device.trace_hash());
        println!("{compression}: {n} sessions, {} steps, trace {hash:016x}, {elapsed:?}", steps.steps);
        assert_eq!(n + refused(&simulation), 10_000, "accepted or refused");
        assert!(elapsed < Duration::from_secs(60), "{compression}: {elapsed:?}");
    }
}
