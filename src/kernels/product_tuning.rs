//! How matrix products are laid out on lanes: what changes their speed and no result.

use std::fmt;
use std::str::FromStr;

/// Workgroup memory of `matvec` for inputs and sums, in vec4s: 16 KiB, so that two workgroups fit the smallest grant of 32 KiB.
const PAD_VECS: u32 = 1024;
/// The row counts that `matvec` is written for.
const FEW_ROWS: [u32; 4] = [1, 4, 8, 16];

/// `matvec`: a product of few rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FewRows {
    /// Rows of a lane at most; more are shared out over groups of lanes that read the same weights.
    pub lane_rows: u32,
    /// Columns of a lane, 4 or 8, in workgroups of more than 4 rows: every input that is read from workgroup memory feeds as many
    /// multiply-adds. Up to 4 rows it is 4, since more lanes then have more loads in flight.
    pub cols: u32,
    /// Lanes beside each other.
    pub column_lanes: u32,
    /// Slices of k: a power of two.
    pub slices: u32,
    /// Loads of 16 bytes of weights that a lane has in flight, as far as inputs leave room.
    pub loads: u32,
    /// Rows of a workgroup at most.
    pub max_rows: u32,
    /// Workgroups that a product should have: where a matrix has too few columns, k is cut into more slices and a workgroup has
    /// fewer columns.
    pub groups: u32,
}

/// A product of many rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ManyRows {
    /// `matmul_direct`: 64 rows by 64 columns straight from storage, for adapters whose workgroup memory is no faster.
    Direct,
    /// `matmul`: staged through workgroup memory.
    Tiled(Tile),
}

/// How `matmul` stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Rows of a workgroup.
    pub rows: u32,
    /// Columns of a workgroup.
    pub cols: u32,
    /// Numbers of k that are staged at once: 8 or 16.
    pub depth: u32,
    /// Staging buffers: with 2 one barrier a stage suffices.
    pub buffers: u32,
}

/// `matmul_coop`: a product of many rows on cooperative matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CooperativeRows {
    /// Rows of a workgroup.
    pub rows: u32,
    /// Columns of a workgroup.
    pub cols: u32,
}

impl CooperativeRows {
    /// Lanes of a workgroup: four subgroups.
    pub(super) const LANES: u32 = 128;
    /// Numbers of k of a step.
    pub(super) const DEPTH: u32 = 32;
    /// All there are, the one that is used first.
    pub const ALL: [Self; 4] = [
        Self { rows: 128, cols: 128 },
        Self { rows: 128, cols: 64 },
        Self { rows: 64, cols: 128 },
        Self { rows: 64, cols: 64 },
    ];
}

impl fmt::Display for CooperativeRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("cooperative{}x{}", self.rows, self.cols))
    }
}

impl FromStr for CooperativeRows {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|tile| tile.to_string() == text).ok_or_else(|| {
            let all = Self::ALL.map(|tile| tile.to_string()).join(", ");
            format!("'{text}' is no tile of cooperative matrices: {all}")
        })
    }
}

/// Of both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProductTuning {
    /// Decode rows.
    pub few: FewRows,
    /// Prompt rows.
    pub many: ManyRows,
}

impl FewRows {
    /// Columns beside each other whose weights are 64 bytes: with fewer, a load takes parts of what memory gives at once.
    const NARROWEST: u32 = 4;

    /// The layout for a matrix of `cols` columns. It does not depend on rows, nor may it: slices decide the order of additions.
    #[must_use]
    pub fn for_cols(&self, cols: u32) -> Self {
        let enough = |form: &Self| cols.div_ceil(form.width(self.max_rows)) >= self.groups;
        let narrowest = || self.forms().last().expect("there is one form at least");
        self.forms().find(enough).unwrap_or_else(narrowest)
    }

    /// The layouts of [`Self::for_cols`], the widest first.
    pub fn forms(&self) -> impl Iterator<Item = Self> + use<> {
        let (narrows, widest) = (self.groups > 1, Self { groups: 1, ..*self });
        std::iter::successors(Some(widest), move |form| {
            let next = Self { column_lanes: form.column_lanes / 2, slices: form.slices * 2, ..*form };
            (narrows && next.column_lanes >= Self::NARROWEST && next.is_sound()).then_some(next)
        })
    }

    /// Lanes of a workgroup.
    pub const fn lanes(&self, rows: u32) -> u32 {
        self.column_lanes * self.slices * self.row_groups(rows)
    }

    /// Columns of a workgroup.
    pub const fn width(&self, rows: u32) -> u32 {
        self.cols(rows) * self.column_lanes
    }

    /// Columns of a lane.
    pub(super) const fn cols(&self, rows: u32) -> u32 {
        if rows <= 4 { 4 } else { self.cols }
    }

    /// Groups of lanes with rows of their own.
    pub(super) const fn row_groups(&self, rows: u32) -> u32 {
        rows.div_ceil(self.lane_rows)
    }

    /// The row counts of a workgroup that a product of at most `most` rows can need.
    pub fn rows(&self, most: u32) -> impl Iterator<Item = u32> + use<> {
        let most = self.rows_for(most);
        FEW_ROWS.into_iter().filter(move |rows| *rows <= most)
    }

    /// Rows of a workgroup in a product of `n_rows`: all of them where that is possible, so that weights are read once.
    pub fn rows_for(&self, n_rows: u32) -> u32 {
        FEW_ROWS.into_iter().find(|rows| *rows >= n_rows).unwrap_or(self.max_rows).min(self.max_rows)
    }

    /// vec4s of the inputs of a cell of every slice.
    const fn staged(&self, rows: u32) -> u32 {
        rows * 2 * self.slices
    }

    /// Cells of a slice that are multiplied at once.
    pub(super) fn steps(&self, rows: u32) -> u32 {
        let in_flight = self.loads / self.cols(rows);
        let room = PAD_VECS / (2 * self.staged(rows));
        in_flight.min(room).max(1)
    }

    /// Staging buffers: with 2, one barrier a tile suffices.
    pub(super) fn buffers(&self, rows: u32) -> u32 {
        (PAD_VECS / (self.staged(rows) * self.steps(rows))).min(2)
    }

    /// Rows of a lane whose sums are in workgroup memory at once.
    pub(super) fn summed(&self, rows: u32) -> u32 {
        (PAD_VECS / (self.cols(rows) / 4 * self.lanes(rows))).clamp(1, rows / self.row_groups(rows))
    }

    /// vec4s of workgroup memory.
    pub(super) fn pad_vecs(&self, rows: u32) -> u32 {
        let inputs = self.staged(rows) * self.steps(rows) * self.buffers(rows);
        inputs.max(self.summed(rows) * self.cols(rows) / 4 * self.lanes(rows))
    }

    /// Lanes that stage the inputs of one slice, each half a cell of rows of its own.
    pub(super) const fn stagers(&self, rows: u32) -> u32 {
        self.lanes(rows) / (2 * self.slices)
    }

    fn is_sound(&self) -> bool {
        FEW_ROWS.contains(&self.max_rows)
            && [1, 4, 8, 16].contains(&self.lane_rows)
            && [4, 8].contains(&self.cols)
            && self.column_lanes.is_power_of_two()
            && (2..=16).contains(&self.column_lanes)
            && self.slices.is_power_of_two()
            && (4..=64).contains(&self.slices)
            && self.lanes(1) >= 32
            && self.lanes(self.max_rows) <= 256
            && (1..=16).contains(&self.loads)
            && self.staged(self.max_rows) <= PAD_VECS
            && self.groups > 0
    }
}

impl ManyRows {
    /// Rows and columns of a workgroup.
    pub const fn size(&self) -> [u32; 2] {
        match self {
            Self::Direct => [64, 64],
            Self::Tiled(tile) => [tile.rows, tile.cols],
        }
    }
}

impl Tile {
    /// Lanes of a workgroup, 8 rows by 8 columns each.
    pub const fn lanes(&self) -> u32 {
        self.rows / 8 * (self.cols / 8)
    }

    fn is_sound(&self) -> bool {
        [64, 128].contains(&self.rows)
            && [64, 128].contains(&self.cols)
            && [8, 16].contains(&self.depth)
            && (1..=2).contains(&self.buffers)
            && self.buffers * self.depth <= 16
            && (self.rows * self.depth / 4).is_multiple_of(self.lanes())
    }
}

const fn few([lane_rows, cols, column_lanes, slices]: [u32; 4], loads: u32, max_rows: u32, groups: u32) -> FewRows {
    FewRows { lane_rows, cols, column_lanes, slices, loads, max_rows, groups }
}

const fn many(rows: u32, cols: u32, depth: u32, buffers: u32) -> ManyRows {
    ManyRows::Tiled(Tile { rows, cols, depth, buffers })
}

impl ProductTuning {
    /// For GPUs.
    pub const GPU: Self = Self { few: few([8, 8, 8, 16], 8, 16, 128), many: many(128, 128, 8, 2) };
    /// For software Vulkan, where compiling a large kernel costs more than reading weights again from a cache.
    pub const CPU: Self = Self { few: few([4, 4, 16, 4], 4, 4, 1), many: ManyRows::Direct };

    /// What an adapter of a kind, as `concertina devices` names them, gets where nothing is chosen.
    pub fn of_kind(adapter_kind: &str) -> Self {
        if adapter_kind == "cpu" { Self::CPU } else { Self::GPU }
    }

    /// What is worth measuring; every one is checked like any other kernel.
    pub fn candidates() -> Vec<Self> {
        let fews = [
            Self::GPU.few,
            few([8, 8, 8, 16], 8, 16, 256),
            few([8, 8, 8, 16], 8, 16, 1),
            few([8, 8, 8, 16], 16, 16, 128),
            few([8, 8, 16, 8], 8, 16, 64),
            few([8, 4, 8, 16], 8, 16, 128),
            few([16, 8, 8, 16], 8, 16, 128),
            Self::CPU.few,
        ];
        let manys = [
            Self::GPU.many,
            many(128, 128, 16, 1),
            many(64, 128, 8, 2),
            many(64, 128, 16, 1),
            many(128, 64, 8, 2),
            many(64, 64, 16, 1),
            many(64, 64, 8, 1),
            Self::CPU.many,
        ];
        fews.into_iter().zip(manys).map(|(few, many)| Self { few, many }).collect()
    }
}

impl fmt::Display for ProductTuning {
    /// `few8x8x8x16:8:16:128,many128x128x8:2`: rows and columns of a lane, lanes, slices, loads, rows, workgroups; rows, columns,
    /// depth, buffers.
    /// `direct` in place of the latter where nothing is staged.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "few{},", self.few)?;
        match self.many {
            ManyRows::Direct => f.write_str("direct"),
            ManyRows::Tiled(_) => write!(f, "many{}", self.many),
        }
    }
}

impl fmt::Display for FewRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lane_rows, cols, column_lanes, slices, loads, max_rows, groups } = self;
        f.pad(&format!("{lane_rows}x{cols}x{column_lanes}x{slices}:{loads}:{max_rows}:{groups}"))
    }
}

impl fmt::Display for ManyRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Direct => f.pad("direct"),
            Self::Tiled(Tile { rows, cols, depth, buffers }) => f.pad(&format!("{rows}x{cols}x{depth}:{buffers}")),
        }
    }
}

impl FromStr for ProductTuning {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let example = Self::GPU;
        let wrong = || format!("'{text}' is no layout of products, such as {example}");
        let numbers = |part: &str, name: &str| -> Option<Vec<u32>> {
            part.strip_prefix(name)?.split(['x', ':']).map(|n| n.parse().ok()).collect()
        };
        let (a, b) = text.split_once(',').ok_or_else(wrong)?;
        let a = numbers(a, "few").ok_or_else(wrong)?;
        let [lane_rows, cols, column_lanes, slices, loads, max_rows, groups] = a[..] else { return Err(wrong()) };
        let few = few([lane_rows, cols, column_lanes, slices], loads, max_rows, groups);
        let (many, sound) = if b == "direct" {
            (ManyRows::Direct, true)
        } else {
            let b = numbers(b, "many").ok_or_else(wrong)?;
            let [rows, cols, depth, buffers] = b[..] else { return Err(wrong()) };
            let tile = Tile { rows, cols, depth, buffers };
            (ManyRows::Tiled(tile), tile.is_sound())
        };
        if few.is_sound() && sound {
            Ok(Self { few, many })
        } else {
            Err(format!("no product is written for '{text}'; some that are: {}", Self::list()))
        }
    }
}

impl ProductTuning {
    fn list() -> String {
        let all: Vec<String> = Self::candidates().iter().map(ToString::to_string).collect();
        all.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layout_is_read_as_it_is_written_and_nonsense_is_refused() {
        for tuning in ProductTuning::candidates() {
            assert_eq!(tuning.to_string().parse(), Ok(tuning), "{tuning}");
        }
        for wrong in [
            "",
            "few8x8x8x16:8:16:128",
            "few8x8x8x16:8:16:128,many128x128x8",
            "few8x8x8x16:8:16,many128x128x8:2",
            "few8x8x8x15:8:16:128,many128x128x8:2",
            "few8x8x8x16:8:3:128,many128x128x8:2",
            "few8x8x8x16:8:16:0,many128x128x8:2",
            "few0x8x8x16:8:16:128,many128x128x8:2",
            "few8x8x8x64:8:16:128,many128x128x8:2",
            "few4294967295x8x8x4294967295:8:16:128,many128x128x8:2",
            "few8x8x8x16:8:16:128,many128x128x16:2",
            "few8x8x8x16:8:16:128,many128x96x8:2",
        ] {
            assert!(wrong.parse::<ProductTuning>().is_err(), "'{wrong}' should be refused");
        }
    }

    #[test]
    fn a_workgroup_has_all_rows_where_it_can() {
        let few = ProductTuning::GPU.few;
        assert_eq!([1, 2, 4, 5, 9, 16, 17, 64].map(|n| few.rows_for(n)), [1, 4, 4, 8, 16, 16, 16, 16]);
        assert_eq!([1, 2, 4, 5, 64].map(|n| ProductTuning::CPU.few.rows_for(n)), [1, 4, 4, 4, 4]);
        assert_eq!(few.rows(6).collect::<Vec<_>>(), [1, 4, 8], "what 1 to 6 rows can need");
    }

    #[test]
    fn a_matrix_of_few_columns_is_cut_into_more_slices() {
        let few = ProductTuning::GPU.few;
        let layout = |cols: u32| few.for_cols(cols);
        let groups = |cols: u32| cols.div_ceil(layout(cols).width(16));
        assert_eq!([28_672, 14_336, 8_192, 4_096].map(groups), [448, 224, 128, 128], "workgroups of 16 rows");
        assert_eq!((layout(8_192).slices, layout(8_128).slices), (16, 32), "half as wide where there would be fewer");
        assert_eq!(layout(8_128).lanes(16), layout(8_192).lanes(16), "by as many lanes");
        assert_eq!(layout(64), few.forms().last().expect("a form"), "as narrow as it gets");
        assert_eq!(ProductTuning::CPU.few.for_cols(64), ProductTuning::CPU.few, "where the number is no matter");
    }
}
