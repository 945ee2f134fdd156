//! Kernels as they are measured: inputs of any size on the device, runs that are timed, outputs that are checked.
//!
//! A kernel takes part by one file with one implementation of [`KernelRun`], and by lines for its cases in
//! [`eval::kernels::cases`](mod@crate::eval::kernels::cases); how it is timed and what is said of it is that room's part.
//!
//! | file | kernel | checked against |
//! |---|---|---|
//! | [`decode`] | decode with `merge_states`, over page tables | dense attention in f64 over what its pages hold |
//! | [`prefill`] | prefill with `merge_states`, the last rows of every sequence | the same |
//! | [`product`] | products of many rows, and of few | sums of products in f64 |
//! | [`merge`] | `merge_states` by itself | its own sums in f64 |
//! | [`append`] | rows to open pages, turned | turned numbers in f64, rounded to f16 |
//! | [`seal`] | full pages to codes | the codec's definition, every bit |
//! | [`score`] | what cached tokens receive from rows | sums of probabilities in f64 |
//! | [`select`] | which tokens stay | the definition of the choice, every index |
//! | [`gather`] | kept tokens to fresh pages | what their pages hold, every bit |
//!
//! Caches of gigabytes are filled within a second: [`cache`] encodes a few dozen pages on the CPU and copies them about on the
//! device, so that any page's contents follow from its place. A run reads what no cache of the device still holds: where a
//! case's bytes are few, runs take turns over copies of it that lie elsewhere ([`BenchSettings::cold`]).

pub mod append;
mod attention;
pub mod cache;
pub mod decode;
pub mod gather;
mod inputs;
pub mod merge;
mod outputs;
pub mod prefill;
pub mod product;
pub mod score;
pub mod seal;
pub mod select;
mod timed;

use super::EngineError;
use crate::device::Device;
use crate::geometry::Bytes;
use crate::kernels::{PipelineCache, Recorder};
pub use attention::tolerance;
pub use timed::TimedRuns;

/// What one run does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    /// Useful bytes read and written: of a cache the tokens that are read, with their share of scales and minima.
    pub bytes: f64,
    /// Multiplications and additions.
    pub flop: f64,
    /// (token, KV head) pairs that are read, so that codecs can be compared; `None` where that says nothing.
    pub pairs: Option<f64>,
}

/// How inputs are made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BenchSettings {
    /// Runs take turns over so many bytes at least: beyond any cache of the device.
    pub cold: Bytes,
    /// Leave pages in the order in which the pool gave them rather than shuffling them.
    pub in_order: bool,
    /// Largest arena; the adapter's binding limit where `None`.
    pub max_arena: Option<Bytes>,
}

/// How what a run left compares with the reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Checked {
    /// Numbers compared.
    pub compared: usize,
    /// Numbers of the whole output that are not finite, or that the run did not write.
    pub missing: usize,
    /// Largest observed error / bound.
    pub error_over_bound: f64,
    /// Normalised mean squared error.
    pub nmse: f64,
}

/// A kernel with its inputs on a device, ready to run.
pub trait KernelRun {
    /// Variants of the kernel that give the same result; the first is the one that the program uses, and is chosen.
    fn candidates(&self) -> Vec<String> {
        vec!["only".to_owned()]
    }

    /// Compiles the variant that runs from now on.
    ///
    /// # Errors
    /// [`EngineError::Kernel`] where it does not run on this device; others still may.
    fn choose(
        &mut self,
        _device: &Device,
        _pipelines: &mut PipelineCache,
        _candidate: usize,
    ) -> Result<(), EngineError> {
        Ok(())
    }

    /// What each run does.
    fn work(&self) -> Work;

    /// Whether it writes a third of its bytes or more, so that copying is what it can at best be as fast as, not reading.
    fn copies(&self) -> bool {
        false
    }

    /// Records one run over a copy of the inputs; copies are counted without end. It overwrites what the run before it left.
    fn record(&self, recorder: &mut Recorder<'_>, copy: usize);

    /// Makes everything that a run should write a NaN.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    fn poison(&mut self, device: &Device) -> Result<(), EngineError>;

    /// Compares what the last run left, which read copy `copy`, with the reference; that is computed once.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    fn check(&mut self, device: &Device, copy: usize) -> Result<Checked, EngineError>;

    /// Changes what runs of copy `copy` read, for tests of [`Self::check`].
    ///
    /// # Errors
    /// [`EngineError::Device`].
    #[doc(hidden)]
    fn spoil(&mut self, device: &Device, copy: usize) -> Result<(), EngineError>;
}
