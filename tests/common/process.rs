//! An engine with its schedule, as one process has it; sessions go from one to the next in files.

use std::path::Path;

use concertina::disk::SessionFile;
use concertina::disk::session_file::{Origin, Turn};
use concertina::engine::{Engine, EngineConfig};
use concertina::geometry::Bytes;
use concertina::schedule::{HostConfig, Place, Request, ScheduleConfig, Scheduler, SessionId, Store};
use concertina::weights::Weights;

pub(crate) fn origin(weights: &Weights) -> Origin {
    let geometry = &weights.geometry;
    Origin::new("a small random model".to_owned(), "1 byte".to_owned(), geometry.num_layers, geometry.heads, 32)
}

pub(crate) struct Process<'d> {
    pub engine: Engine<'d>,
    pub scheduler: Scheduler,
    pub origin: Origin,
    /// Caches that left for the host and came back, and that were dropped.
    pub moves: [usize; 3],
    /// Most sessions that held pages at once.
    pub most_resident: usize,
    /// Of caches that go to files.
    _folder: tempfile::TempDir,
}

impl Process<'_> {
    pub(crate) fn start(weights: &Weights, config: &EngineConfig, host: HostConfig) -> Self {
        let (mut engine, caches) = Engine::new(super::device(), weights, config).expect("the budget suffices");
        let folder = tempfile::tempdir().expect("a folder");
        engine.keep_in(folder.path().to_owned());
        let &EngineConfig { max_rows, max_sessions, context_length, .. } = config;
        let config = ScheduleConfig { max_rows, max_sessions, context_length, host };
        let scheduler = Scheduler::new(config, caches);
        Self { engine, scheduler, origin: origin(weights), moves: [0; 3], most_resident: 0, _folder: folder }
    }

    fn step(&mut self) {
        let step = self.scheduler.step(&mut self.engine).expect("the step runs");
        let counts = [step.swapped_out.len(), step.swapped_in.len(), step.dropped.len()];
        self.moves.iter_mut().zip(counts).for_each(|(all, more)| *all += more);
        self.most_resident = self.most_resident.max(self.scheduler.n_admitted());
    }

    /// Takes steps until nothing is left to do.
    pub(crate) fn run(&mut self) {
        while !self.scheduler.is_idle() {
            self.step();
        }
    }

    /// Takes steps until the session has produced so many tokens.
    pub(crate) fn run_until(&mut self, id: SessionId, tokens: usize) {
        while self.produced(id).len() < tokens {
            self.step();
        }
    }

    pub(crate) fn produced(&self, id: SessionId) -> Vec<u32> {
        self.scheduler.session(id).expect("it exists").produced.clone()
    }

    /// Sessions whose caches are in host memory or in files.
    pub(crate) fn away(&self) -> usize {
        self.scheduler.sessions().filter(|(_, session)| session.place == Place::Host).count()
    }

    /// Writes the session as it is.
    pub(crate) fn save(&mut self, id: SessionId, path: &Path) {
        let turn = Turn { question: "What?".to_owned(), answer: "That.".to_owned() };
        let name = "a session".to_owned();
        let saved = self.engine.save(&self.scheduler, id, name, self.origin.clone(), vec![turn]).expect("it is read");
        let bytes = saved.write(path).expect("room on the disk");
        assert_eq!(bytes.0, std::fs::metadata(path).expect("written").len(), "what it says");
    }

    /// Ends all sessions; nothing is held afterwards.
    pub(crate) fn end(mut self) {
        let all: Vec<_> = self.scheduler.sessions().map(|(id, _)| id).collect();
        all.into_iter().for_each(|id| self.scheduler.cancel(id).expect("the pool agrees"));
        let report = self.scheduler.report();
        assert_eq!(report.pages_in_use_bytes + report.committed_bytes, Bytes::ZERO, "all bytes are back");
    }

    /// Queues the session of a file, with its next question.
    pub(crate) fn restore(&mut self, path: &Path, more: &[u32], request: Request) -> SessionId {
        let file = SessionFile::open(path).unwrap_or_else(|e| panic!("{e}"));
        file.origin().serves(&self.origin).expect("the same model");
        let before = self.scheduler.away_bytes(Store::Disk).0;
        let id = self.engine.restore(&mut self.scheduler, file, more, request).unwrap_or_else(|e| panic!("{e}"));
        assert!(self.scheduler.away_bytes(Store::Disk).0 > before, "its pages are still in the file");
        id
    }
}
