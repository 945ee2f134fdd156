//! What compressions cost in quality where it was measured: the table in `presets/quality.toml`, and records of `eval`.
//!
//! A theory of bytes says nothing about quality, so nothing here is computed: a compression was measured, or it is unknown.

use serde::{Deserialize, Serialize};

use crate::compression::Compression;

/// What was measured of one compression.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quality {
    /// As it is parsed.
    pub compression: String,
    /// Mean KL from the full cache's next-token distribution, in nats.
    pub mean_kl: Option<f64>,
    /// Its median.
    pub median_kl: Option<f64>,
    /// Nats per token of the text, less the full cache's.
    pub nll_difference: Option<f64>,
    /// Part of the tokens whose most probable continuation is the full cache's.
    pub same_top1: Option<f64>,
    /// Pass keys found, of so many.
    pub needles: Option<[u32; 2]>,
    /// Which measurement it is from.
    pub source: String,
}

impl Quality {
    /// A compression of which nothing is known yet.
    pub fn unknown(compression: &str, source: &str) -> Self {
        Self {
            compression: compression.to_owned(),
            mean_kl: None,
            median_kl: None,
            nll_difference: None,
            same_top1: None,
            needles: None,
            source: source.to_owned(),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    measured: Vec<Quality>,
}

/// Everything that was measured.
#[derive(Clone, Debug, PartialEq)]
pub struct QualityTable {
    rows: Vec<(Compression, Quality)>,
}

impl QualityTable {
    /// The table that comes with the program.
    ///
    /// # Panics
    /// Never: the file is part of the program, and a test reads it.
    pub fn built_in() -> Self {
        Self::parse(include_str!("../../presets/quality.toml")).expect("the program's own table should parse")
    }

    /// Reads a table.
    ///
    /// # Errors
    /// A sentence with the line, or the compression that does not exist.
    pub fn parse(text: &str) -> Result<Self, String> {
        let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
        let mut table = Self { rows: Vec::new() };
        for row in file.measured {
            table.add(row)?;
        }
        Ok(table)
    }

    /// Adds a measurement. What it says of a compression that is there already takes the place of what was known; the rest stays.
    ///
    /// # Errors
    /// A sentence when there is no such compression.
    pub fn add(&mut self, row: Quality) -> Result<(), String> {
        let compression: Compression = row.compression.parse().map_err(|error| format!("{error}"))?;
        let known = self.rows.iter_mut().find(|(known, _)| *known == compression);
        let Some((_, known)) = known else {
            let row = Quality { compression: compression.short(), ..row };
            self.rows.push((compression, row));
            return Ok(());
        };
        known.mean_kl = row.mean_kl.or(known.mean_kl);
        // A median belongs to its mean.
        known.median_kl = if row.mean_kl.is_some() { row.median_kl } else { known.median_kl };
        known.nll_difference = row.nll_difference.or(known.nll_difference);
        known.same_top1 = row.same_top1.or(known.same_top1);
        known.needles = row.needles.or(known.needles);
        known.source = row.source;
        Ok(())
    }

    /// What is known of a compression as a whole.
    pub fn of(&self, compression: &Compression) -> Option<&Quality> {
        self.rows.iter().find(|(known, _)| known == compression).map(|(_, row)| row)
    }

    /// Every measurement.
    pub fn rows(&self) -> impl Iterator<Item = (&Compression, &Quality)> {
        self.rows.iter().map(|(compression, row)| (compression, row))
    }
}

/// A compression's dimensions that are not full, each alone.
pub fn factors(compression: &Compression) -> Vec<Compression> {
    let Compression { layer, head, token, hidden } = compression;
    let full = Compression::default();
    let alone = [
        Compression { layer: layer.clone(), ..full.clone() },
        Compression { head: *head, ..full.clone() },
        Compression { token: *token, ..full.clone() },
        Compression { hidden: *hidden, ..full.clone() },
    ];
    alone.into_iter().filter(|factor| *factor != full).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Compression {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn what_was_measured_is_known_and_nothing_else() {
        let table = QualityTable::built_in();
        assert!(table.rows().count() > 80, "rows");
        for (compression, row) in table.rows() {
            assert_eq!(compression.short(), row.compression, "as it is written shortest");
            assert!(row.mean_kl.is_some() || row.needles.is_some(), "{}: something was measured", row.compression);
            assert!(row.mean_kl.is_none_or(|kl| kl > 0.0 && kl < 10.0), "{}: {:?}", row.compression, row.mean_kl);
            assert!(row.needles.is_none_or(|[found, of]| found <= of), "{}: {:?}", row.compression, row.needles);
        }
        assert_eq!(table.of(&read("kivi4")).and_then(|row| row.mean_kl), Some(0.0086), "as in the README");
        assert_eq!(table.of(&read("token=snapkv:0.33")), None, "nobody measured that");
    }

    #[test]
    fn a_new_measurement_takes_the_place_of_the_old() {
        let mut table = QualityTable::built_in();
        let n = table.rows().count();
        let row = Quality { mean_kl: Some(0.5), ..table.of(&read("kivi4")).expect("measured").clone() };
        table.add(row).expect("it exists");
        assert_eq!((table.rows().count(), table.of(&read("kivi4")).and_then(|r| r.mean_kl)), (n, Some(0.5)), "one row");
        let needles = Quality { needles: Some([1, 5]), ..Quality::unknown("layer=full,hidden=kivi4", "another run") };
        table.add(needles).expect("it exists");
        let both = table.of(&read("kivi4")).map(|row| (row.mean_kl, row.needles));
        assert_eq!(both, Some((Some(0.5), Some([1, 5]))), "what a record does not say stays");
        let foreign = Quality { compression: "kivi5".to_owned(), ..table.rows().next().expect("rows").1.clone() };
        assert!(table.add(foreign).is_err_and(|e| e.contains("kivi4")), "what there is");
        assert!(QualityTable::parse("[[measured]]\ncompression = 3").is_err_and(|e| e.contains("line 2")), "the line");
    }

    #[test]
    fn factors_are_the_dimensions_alone() {
        let stack = read("layer=share:2,head=duo:0.5,token=h2o:0.25,hidden=kivi2");
        let alone = ["layer=share:2", "head=duo:0.5", "token=h2o:0.25", "hidden=kivi2"].map(read);
        assert_eq!(factors(&stack), alone, "four");
        assert_eq!(factors(&Compression::default()), [], "none");
    }
}
