//! Session files that lie: opening one, and going on with what it says, never panics and never takes much memory.
//!
//! `CONCERTINA_FUZZ_SECONDS=600 cargo test --release --test session_file_hostile` looks for other lies for ten minutes.

#![expect(unsafe_code, reason = "a counting allocator has to implement GlobalAlloc")]
#![cfg(feature = "model")]

mod common;
#[path = "common/counting.rs"]
mod counting;

use std::path::Path;
use std::time::{Duration, Instant};

use common::sessions::{config, request};
use concertina::device::Device;
use concertina::disk::SessionFile;
use concertina::disk::session_file::{Origin, SavedSession, Turn};
use concertina::engine::{Engine, EngineConfig};
use concertina::geometry::Bytes;
use concertina::schedule::simulation::Simulation;
use concertina::schedule::{Caches, Request, ScheduleConfig, Scheduler, Store};
use counting::peak_of;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};

/// What one attempt may hold at a time beside a few times its file.
const PEAK_BYTES_MAX: usize = 8 << 20;
/// Attempts where no time is given.
const ATTEMPTS: u32 = 4_000;
const KINDS: [&str; 6] = [
    "full",
    "kivi4",
    "token=h2o:96:every32,hidden=kivi4",
    "token=adakv:0.5:expected,head=duo:0.5:sink4:recent32",
    "layer=minicache:0..",
    "token=quest:64",
];

fn engine_config(weights: &concertina::weights::Weights) -> EngineConfig {
    EngineConfig { swap_chunk: Bytes(24 << 10), budget: Bytes::mib(48), chooses: true, ..config(weights, &KINDS) }
}

fn schedule(caches: &Caches) -> Scheduler {
    let host = Default::default();
    let config = ScheduleConfig { max_rows: 64, max_sessions: 4, context_length: 512, host };
    Scheduler::new(config, caches.clone())
}

/// Files of sessions between questions, and in an answer.
fn files(caches: &Caches, origin: &Origin, folder: &Path) -> Vec<Vec<u8>> {
    let mut files = Vec::new();
    for (at, text) in KINDS.iter().enumerate() {
        let (mut s, mut backend) = (schedule(caches), Simulation::new(1, 200));
        let request = Request { rounds: Vec::new(), keep: true, ..request(at, 120, 9, 200, text) };
        let id = s.submit(request).expect("it fits");
        let until = if at.is_multiple_of(2) { usize::MAX } else { 4 };
        while !s.is_idle() && s.session(id).expect("it exists").produced.len() < until {
            s.step(&mut backend).expect("a simulation does not fail");
        }
        let record = s.record(id);
        let cache = record.cache.clone().expect("it has a cache");
        let suspended = s.caches().restore(&record.compression, cache, record.cached, 200).expect("it is its own");
        let length = |bytes: Bytes| usize::try_from(bytes.0).expect("small");
        let pages = vec![7; length(suspended.page_bytes())];
        let slot = vec![8; length(record.cache.as_ref().and_then(|c| c.slot).unwrap_or_default())];
        let turns = vec![Turn { question: "What?".to_owned(), answer: "That.".to_owned() }];
        let saved = SavedSession { name: (*text).to_owned(), origin: origin.clone(), turns, record, pages, slot };
        let path = folder.join("whole.session");
        saved.write(&path).expect("room on the disk");
        files.push(std::fs::read(&path).expect("written"));
    }
    files
}

type Tensors = Vec<(String, Dtype, Vec<u8>)>;

fn parts(file: &[u8]) -> Tensors {
    let tensors = SafeTensors::deserialize(file).expect("other readers can open it");
    let mut names = tensors.names().into_iter().map(str::to_owned).collect::<Vec<_>>();
    names.sort_by_key(|name| tensors.tensor(name).expect("it is there").data().as_ptr() as usize);
    let part = |name: String| {
        let tensor = tensors.tensor(&name).expect("it is there");
        (tensor.dtype(), tensor.data().to_vec(), name)
    };
    names.into_iter().map(part).map(|(dtype, bytes, name)| (name, dtype, bytes)).collect()
}

/// A file of these tensors, with a checksum that is right.
fn signed(tensors: &Tensors) -> Vec<u8> {
    let (mut at, mut header, mut said) = (0, Vec::new(), Vec::new());
    for (name, dtype, bytes) in tensors {
        let length = bytes.len() * 8 / dtype.bitsize();
        let (from, end) = (at, at + bytes.len());
        said.push(format!("{name} {dtype:?} [{length}] ({from}, {end})\n"));
        header.push(format!(r#""{name}":{{"dtype":"{dtype:?}","shape":[{length}],"data_offsets":[{from},{end}]}}"#));
        at = end;
    }
    said.sort();
    let mut hash = Sha256::new();
    said.iter().for_each(|line| hash.update(line));
    tensors.iter().for_each(|(.., bytes)| hash.update(bytes));
    let checksum: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    let about = format!(r#""format":"concertina session","version":"1","checksum":"{checksum}""#);
    let header = format!(r#"{{"__metadata__":{{{about}}},{}}}"#, header.join(","));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    tensors.iter().for_each(|(.., bytes)| file.extend(bytes));
    file
}

/// A number that readers may trip over.
fn number(rng: &mut ChaCha8Rng) -> u32 {
    let edges = [0, 1, 31, 32, 33, 96, 130, 511, 512, 513, 1 << 16, 1 << 20, i32::MAX as u32, u32::MAX - 1, u32::MAX];
    if rng.random_bool(0.7) { edges[rng.random_range(0..edges.len())] } else { rng.random() }
}

/// Puts another number in place of one of those in a text.
fn other_number(text: &mut Vec<u8>, rng: &mut ChaCha8Rng) {
    let starts: Vec<usize> = (1..text.len())
        .filter(|at| text[*at].is_ascii_digit() && !text[at - 1].is_ascii_alphanumeric() && text[at - 1] != b'.')
        .collect();
    let from = starts[rng.random_range(0..starts.len())];
    let end = (from..text.len()).find(|at| !text[*at].is_ascii_digit()).unwrap_or(text.len());
    let new = if rng.random_bool(0.1) { "99999999999999999999".to_owned() } else { number(rng).to_string() };
    text.splice(from..end, new.into_bytes());
}

/// A lie: bytes that are not those that were written, or others under a right checksum.
fn lie(file: &[u8], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut bytes = file.to_vec();
    let any = |bytes: &[u8], rng: &mut ChaCha8Rng| rng.random_range(0..bytes.len());
    match rng.random_range(0..10) {
        0 => bytes.truncate(any(&bytes, rng)),
        1 => bytes[rng.random_range(0..1200)] ^= 1 << rng.random_range(0..8),
        2 => {
            let at = rng.random_range(0..1200);
            bytes.splice(at..at, (0..rng.random_range(1..9)).map(|_| 32));
        }
        3 => bytes[..8].copy_from_slice(&(u64::from(number(rng)) << rng.random_range(0..33)).to_le_bytes()),
        kind => {
            let mut tensors = parts(file);
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(0..tensors.len());
                let session = tensors.iter().position(|(name, ..)| name == "session").expect("it is there");
                let (_, dtype, bytes) = &mut tensors[if kind < 7 { session } else { at }];
                if kind < 7 && !bytes.is_empty() {
                    other_number(bytes, rng);
                } else if bytes.is_empty() || rng.random_bool(0.2) {
                    bytes.extend(number(rng).to_le_bytes());
                } else if rng.random_bool(0.2) {
                    bytes.truncate(bytes.len() / 8 * 4);
                } else {
                    let width = dtype.bitsize() / 8;
                    let word = rng.random_range(0..bytes.len() / width) * width;
                    let new = number(rng).to_le_bytes();
                    bytes[word..word + width].copy_from_slice(&new[..width]);
                }
            }
            return signed(&tensors);
        }
    }
    bytes
}

/// How far a file came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reached {
    Refused,
    Opened,
    Restored,
    Ran,
}

fn attempt(path: &Path, caches: &Caches) -> Reached {
    let Ok(file) = SessionFile::open(path) else { return Reached::Refused };
    let record = file.record().clone();
    let Some(cache) = record.cache else { return Reached::Opened };
    let prompt = [&record.prompt[..], &[1]].concat();
    let request = Request {
        prompt,
        compression: record.compression.clone(),
        document: Some(record.document),
        ..Request::new(vec![1], record.max_new)
    };
    let (mut s, mut backend) = (schedule(caches), Simulation::new(1, 200));
    if request.all_tokens() > 512 {
        return Reached::Opened;
    }
    let Ok(suspended) = s.caches().restore(&record.compression, cache, record.cached, request.max_tokens()) else {
        return Reached::Opened;
    };
    if suspended.page_bytes() != file.page_bytes() {
        return Reached::Opened;
    }
    let (pages, tokens) = (suspended.n_pages(), suspended.n_tokens());
    let restored = s.restore(request, &record.produced, record.cached, Some((suspended, Store::Disk)));
    let Ok(id) = restored else { return Reached::Restored };
    backend.insert(id, pages, (tokens, 0));
    for _ in 0..30 {
        s.step(&mut backend).expect("a simulation does not fail");
    }
    s.cancel(id).expect("the pool agrees");
    let report = s.report();
    assert_eq!(report.pages_in_use_bytes + report.committed_bytes, Bytes::ZERO, "all bytes are back");
    Reached::Ran
}

#[test]
fn files_that_lie_are_refused_or_harmless() {
    let device = Device::open_noop().expect("the noop backend is compiled into the tests");
    let weights = common::tiny_model(4);
    let (_, caches) = Engine::new(&device, &weights, &engine_config(&weights)).expect("ample memory");
    let geometry = &weights.geometry;
    let origin =
        Origin::new("a small random model".to_owned(), "1 byte".to_owned(), geometry.num_layers, geometry.heads, 32);
    let folder = tempfile::tempdir().expect("a folder");
    let files = files(&caches, &origin, folder.path());
    let path = folder.path().join("lie.session");
    for (file, kind) in files.iter().zip(KINDS) {
        std::fs::write(&path, file).expect("written");
        assert_eq!(attempt(&path, &caches), Reached::Ran, "{kind}: the truth");
        std::fs::write(&path, signed(&parts(file))).expect("written");
        assert_eq!(attempt(&path, &caches), Reached::Ran, "{kind}: signed again");
    }
    let seconds = std::env::var("CONCERTINA_FUZZ_SECONDS").ok().map(|n| n.parse().expect("a number of seconds"));
    let until = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let mut reached = std::collections::BTreeMap::new();
    for seed in 0.. {
        if until.map_or(seed >= u64::from(ATTEMPTS), |until| Instant::now() >= until) {
            break;
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let lie = lie(&files[rng.random_range(0..files.len())], &mut rng);
        std::fs::write(&path, &lie).expect("written");
        let tried = std::panic::catch_unwind(|| peak_of(|| attempt(&path, &caches)));
        let (result, peak) = tried.unwrap_or_else(|_| panic!("seed {seed} panicked"));
        assert!(peak < PEAK_BYTES_MAX + 4 * lie.len(), "seed {seed}: {peak} bytes at a time, of {}", lie.len());
        *reached.entry(result).or_insert(0_u64) += 1;
    }
    println!("{} lies: {reached:?}", reached.values().sum::<u64>());
    assert!(reached[&Reached::Refused] > 100 && reached[&Reached::Opened] > 100, "{reached:?}");
    assert!(reached[&Reached::Ran] > 0, "some changes do no harm: {reached:?}");
}

/// Most of its tensors have no bytes, so that they begin at the same place.
#[test]
fn a_session_without_a_cache_comes_back_as_it_was() {
    let device = Device::open_noop().expect("the noop backend is compiled into the tests");
    let weights = common::tiny_model(4);
    let (_, caches) = Engine::new(&device, &weights, &engine_config(&weights)).expect("ample memory");
    let mut s = schedule(&caches);
    let id = s.submit(request(1, 50, 4, 200, "full")).expect("it fits");
    let geometry = &weights.geometry;
    let origin = Origin::new("a model".to_owned(), "1 byte".to_owned(), geometry.num_layers, geometry.heads, 32);
    let (name, turns, record) = ("one".to_owned(), Vec::new(), s.record(id));
    assert_eq!(record.cache, None, "nothing was read yet");
    let saved = SavedSession { name, origin, turns, record, pages: Vec::new(), slot: Vec::new() };
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("one.session");
    saved.write(&path).expect("room on the disk");
    for _ in 0..8 {
        let file = SessionFile::open(&path).expect("it is whole");
        assert_eq!(file.record(), &saved.record, "what was on record");
    }
}

#[test]
fn a_folder_or_nothing_is_no_session_file() {
    let folder = tempfile::tempdir().expect("a folder");
    assert!(SessionFile::open(folder.path()).is_err(), "a folder");
    assert!(SessionFile::open(&folder.path().join("none")).is_err(), "nothing");
}
