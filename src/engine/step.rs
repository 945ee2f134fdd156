//! The words that one step uploads: tokens, angles, and the work lists of every kernel.

use crate::geometry::ModelGeometry;
use crate::kernels::abi::SampleItem;
use crate::kernels::executor::ListOffsets;
use crate::kernels::plan::AttentionPlan;

/// Where each part of the step begins, in the unit that its shader counts in.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct StepOffsets {
    /// Words.
    pub(super) tokens: u32,
    /// Quadruples of words.
    pub(super) angles: u32,
    /// Words.
    pub(super) logit_rows: u32,
    /// Quadruples of words.
    pub(super) samples: u32,
    pub(super) lists: ListOffsets,
}

/// Inverse frequencies of rotary positions, `theta^(-2i / head_dim)`.
pub(super) fn inverse_frequencies(geometry: &ModelGeometry) -> Vec<f64> {
    let dim = geometry.heads.head_dim;
    (0..dim / 2).map(|i| f64::from(geometry.rope_theta).powf(-2.0 * f64::from(i) / f64::from(dim))).collect()
}

/// What a step computes, row by row.
#[derive(Debug, Default)]
pub(super) struct StepRows {
    pub(super) tokens: Vec<u32>,
    pub(super) positions: Vec<u32>,
    pub(super) logit_rows: Vec<u32>,
    pub(super) samples: Vec<SampleItem>,
}

impl StepRows {
    /// Writes all parts into `words`, which keeps its allocation from step to step; `lists` writes the plan's.
    pub(super) fn write(
        &self,
        frequencies: &[f64],
        plan: &AttentionPlan,
        lists: impl FnOnce(&AttentionPlan, &mut Vec<u32>) -> ListOffsets,
        words: &mut Vec<u32>,
    ) -> StepOffsets {
        words.clear();
        let tokens = at(words, 1);
        words.extend_from_slice(&self.tokens);
        let angles = at(words, 4);
        for position in &self.positions {
            for frequency in frequencies {
                let (sin, cos) = (f64::from(*position) * frequency).sin_cos();
                words.extend([to_bits(cos), to_bits(sin)]);
            }
        }
        let logit_rows = at(words, 1);
        words.extend_from_slice(&self.logit_rows);
        let samples = at(words, 4);
        words.extend_from_slice(bytemuck::cast_slice(&self.samples));
        let lists = lists(plan, words);
        StepOffsets { tokens, angles, logit_rows, samples, lists }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is what is wanted")]
fn to_bits(value: f64) -> u32 {
    (value as f32).to_bits()
}

/// Pads to a multiple of `unit` words; the index of what comes next, in that unit.
fn at(words: &mut Vec<u32>, unit: usize) -> u32 {
    words.resize(words.len().next_multiple_of(unit), 0);
    u32::try_from(words.len() / unit).expect("a step is far below 2^32 words")
}
