//! Gather: tokens that stay move into fresh pages, dense and in order, as f16.
//!
//! ```text
//! target[K, V][slot] = f16(decode(source[kept[slot]]))       slots behind the last kept token repeat it
//! ```
//!
//! The target is a page of the window, which seal then encodes, or a page of the cache itself where that is f16. A kept
//! key keeps its rotary position, unless the item names angles by which it is turned to its place in the cache.
//!
//! **Work.** One workgroup per [`GatherItem`](super::abi::GatherItem): one page of the target against one run of the source; tokens
//! of other runs are left to their own items. Lanes look up where the page's tokens lie, then move cells of 8 channels:
//!
//! ```text
//! f16                     whole cells as they are; lanes on neighbouring tokens (keys) or cells (values)
//! other plain channels    keys: all cells of a load of one token; values: one cell of one token
//! rotated                 16 rows at a time through workgroup memory, where rotations are undone
//! picked, latents         a lane decodes a whole token
//! ```
//!
//! **Bytes.** Tokens that stay are read once and written once. Where every other token stays, about as many bytes of those
//! between come with them, because memory is read in 32 or 64 bytes at a time: for keys (16 bytes of a token beside 16 of the
//! next), and for codes of values that share a load.
//!
//! **Exactness.** f16, f32 that holds f16, and codes between a minimum and a scale decode to the bits that the CPU gives. Where
//! a transform is undone (rotations, latents, turned keys) devices may round differently, by one unit of f16.

use std::fmt;
use std::str::FromStr;

use super::abi::{GatherParams, Immediates as _};
use super::attention::Format;
use super::{Access, Binding, KernelSpec, Part, modules};

const BINDINGS: &[Binding] = &[
    ("step", Access::Read),
    ("tables", Access::Read),
    ("parameters", Access::Read),
    ("kept", Access::Read),
    ("arena", Access::ReadWrite),
    ("target_arena", Access::ReadWrite),
];

/// How gather is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GatherTuning {
    /// Lanes of a workgroup.
    pub lanes: u32,
    /// Cells that a lane has on their way at once, at most.
    pub loads: u32,
}

impl Default for GatherTuning {
    /// A page of 64 tokens of 128 channels is one round of each side.
    fn default() -> Self {
        Self { lanes: 128, loads: 8 }
    }
}

impl GatherTuning {
    /// Everything that is worth measuring, the default first.
    pub fn candidates() -> Vec<Self> {
        [(128, 8), (256, 4), (64, 8), (128, 4)].map(|(lanes, loads)| Self { lanes, loads }).into()
    }
}

impl fmt::Display for GatherTuning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("lanes:{}:{}", self.lanes, self.loads))
    }
}

impl FromStr for GatherTuning {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::candidates();
        known.iter().copied().find(|tuning| tuning.to_string() == text).ok_or_else(|| {
            let names: Vec<String> = known.iter().map(ToString::to_string).collect();
            format!("'{text}' is no tuning of gather: there are {}", names.join(", "))
        })
    }
}

/// The kernel whose source pages have `format`.
pub fn kernel(format: &Format, tuning: GatherTuning) -> KernelSpec {
    let GatherTuning { lanes, loads } = tuning;
    let cells = format.shape.page_size * format.shape.heads.head_dim / 8;
    let loads = (cells / lanes).clamp(1, loads);
    let (constants, mut parts) = format.reader(&[("WORKGROUP_SIZE", lanes), ("LOADS", loads)]);
    let files = [&modules::ATTENTION_SHARED, &modules::EVICT_ROWS, &modules::ROTATE_ROWS, &modules::GATHER];
    parts.extend(files.map(Part::from));
    KernelSpec { name: "gather", constants, parts, bindings: BINDINGS, immediate_bytes: GatherParams::BYTES }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launch_is_read_as_it_is_written_and_nonsense_is_refused() {
        assert_eq!(GatherTuning::candidates()[0], GatherTuning::default(), "the default comes first");
        for tuning in GatherTuning::candidates() {
            assert_eq!(tuning.to_string().parse(), Ok(tuning), "{tuning}");
        }
        for wrong in ["", "lanes", "lanes:128", "lanes:128:8:1", "lanes:128:0", "lanes:96:8", "tiled:64:128:4"] {
            let error = wrong.parse::<GatherTuning>().expect_err(wrong);
            assert!(error.contains("no tuning of gather") && error.contains("lanes:128:8"), "{error}");
        }
    }
}
