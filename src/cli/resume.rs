//! Results of long measurements, kept as they come: a run that was interrupted goes on where it was.
//!
//! ```text
//! {"settings":{"measure":"eval kl","model":"...","text":"...",...}}     what every result in the file is of
//! {"unit":0,"result":...}                                               one finished unit a line
//! ```
//!
//! A line is written at once and synced, so that an interrupt leaves whole lines and at most a part of one, which is dropped.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};
use clap::Args;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::failure::usage;

/// How a file begins.
const FIRST: &str = "{\"settings\":";

/// Where finished units are kept.
#[derive(Args, Clone, Debug)]
pub(super) struct ResumeArg {
    /// Keep what is finished in this file, and skip what is in it
    ///
    /// The file belongs to one command: with another model, text or setting it is refused.
    #[arg(long, value_name = "FILE")]
    resume: Option<PathBuf>,
}

/// Units that are finished.
#[derive(Debug, Default)]
pub(super) struct Resumed {
    file: Option<(PathBuf, File)>,
    units: BTreeMap<usize, Value>,
}

/// What tells bytes from others: their number and a hash (FNV-1a, 64 bits).
pub(super) fn fingerprint(bytes: &[u8]) -> String {
    let hash = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3));
    format!("{} bytes, {hash:016x}", bytes.len())
}

impl Resumed {
    /// Reads the file, or begins it; without one nothing is kept.
    pub(super) fn open(arg: &ResumeArg, settings: &Value) -> Result<Self> {
        match &arg.resume {
            Some(path) => Self::open_file(path, settings),
            None => Ok(Self::default()),
        }
    }

    fn open_file(path: &Path, settings: &Value) -> Result<Self> {
        let failed = |e: std::io::Error| anyhow!("can not keep results in '{}': {e}", path.display());
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(failed)?;
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(failed)?;
        // A line without its end was being written when the run was interrupted.
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        let mut lines = text[..whole].lines().enumerate();
        let mut units = BTreeMap::new();
        let broken = |number: usize| {
            usage(format!(
                "'{}' is no file of --resume: line {} is not what it writes; give another file",
                path.display(),
                number + 1
            ))
        };
        let begun = match lines.next() {
            Some((number, line)) => {
                let line: Value = serde_json::from_str(line).map_err(|_| broken(number))?;
                let found = line.get("settings").ok_or_else(|| broken(number))?;
                if let Some(difference) = difference(found, settings) {
                    let path = path.display();
                    return Err(usage(format!(
                        "'{path}' has results of other settings: {difference}; give another file"
                    )));
                }
                true
            }
            // A text without a line is what an interrupt leaves of the first line, or another file.
            None if text.starts_with(FIRST) || FIRST.starts_with(&text) => false,
            None => return Err(broken(0)),
        };
        for (number, line) in lines {
            let mut line: Value = serde_json::from_str(line).map_err(|_| broken(number))?;
            let unit = line.get("unit").and_then(Value::as_u64).and_then(|unit| usize::try_from(unit).ok());
            let result = line.get_mut("result").map(Value::take);
            let (Some(unit), Some(result)) = (unit, result) else { return Err(broken(number)) };
            units.insert(unit, result);
        }
        file.set_len(whole as u64).and_then(|()| file.seek(SeekFrom::End(0))).map_err(failed)?;
        let mut resumed = Self { file: Some((path.to_owned(), file)), units };
        if !begun {
            resumed.write(&json!({ "settings": settings }))?;
        }
        Ok(resumed)
    }

    /// The result of a unit that is finished.
    pub(super) fn unit<T: DeserializeOwned>(&mut self, unit: usize) -> Result<Option<T>> {
        let Some(result) = self.units.remove(&unit) else { return Ok(None) };
        let path = self.file.as_ref().map(|(path, _)| path.display().to_string()).unwrap_or_default();
        let result = serde_json::from_value(result);
        result.map(Some).map_err(|e| usage(format!("'{path}': the result of unit {unit} can not be read: {e}")))
    }

    /// Keeps the result of a unit.
    pub(super) fn add(&mut self, unit: usize, result: &impl Serialize) -> Result<()> {
        if self.file.is_none() {
            return Ok(());
        }
        let result = serde_json::to_value(result).context("a result can not be written as JSON")?;
        self.write(&json!({ "unit": unit, "result": result }))
    }

    fn write(&mut self, line: &Value) -> Result<()> {
        let Some((path, file)) = &mut self.file else { return Ok(()) };
        let line = format!("{line}\n");
        let written = file.write_all(line.as_bytes()).and_then(|()| file.sync_data());
        written.map_err(|e| anyhow!("can not keep results in '{}': {e}", path.display()))
    }
}

/// The first setting that differs, as a sentence.
fn difference(found: &Value, wanted: &Value) -> Option<String> {
    let nothing = Map::new();
    let [found, wanted] = [found, wanted].map(|settings| settings.as_object().unwrap_or(&nothing));
    let names = wanted.keys().chain(found.keys());
    let differs = |name: &&String| found.get(*name) != wanted.get(*name);
    let shown = |settings: &Map<String, Value>, name: &str| match settings.get(name) {
        Some(Value::String(text)) => text.clone(),
        Some(value) => value.to_string(),
        None => "nothing".to_owned(),
    };
    let name = names.into_iter().find(differs)?;
    Some(format!("its {name} is {}, that of this command {}", shown(found, name), shown(wanted, name)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn arg(path: &Path) -> ResumeArg {
        ResumeArg { resume: Some(path.to_owned()) }
    }

    #[test]
    fn what_is_finished_is_found_again_and_a_torn_line_is_dropped() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("results.jsonl");
        let settings = json!({ "model": "m", "window": { "tail": 3 } });
        let open = || Resumed::open(&arg(&path), &settings).expect("its own settings");
        let mut first = open();
        assert_eq!(first.unit::<Vec<f64>>(0).expect("nothing to read"), None, "a new file");
        first.add(0, &[0.1, 0.25]).expect("written");
        first.add(2, &[2.0]).expect("written");
        let whole = fs::read(&path).expect("a file");
        for cut in [1, 5] {
            fs::write(&path, &whole[..whole.len() - cut]).expect("torn");
            let mut second = open();
            assert_eq!(second.unit(0).expect("readable"), Some(vec![0.1, 0.25]), "a whole line");
            assert_eq!(second.unit::<Vec<f64>>(2).expect("nothing to read"), None, "the torn line");
            second.add(2, &[2.0]).expect("written again");
            assert_eq!(fs::read(&path).expect("a file"), whole, "as if it had never been torn");
        }
        fs::write(&path, &whole[..10]).expect("torn in the first line");
        open().add(0, &[0.1, 0.25]).expect("written");
        assert!(whole.starts_with(&fs::read(&path).expect("a file")), "begun anew");
    }

    #[test]
    fn other_settings_and_other_files_are_refused_with_the_reason() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("results.jsonl");
        Resumed::open(&arg(&path), &json!({ "tail": 3, "seed": 1 })).expect("a new file");
        let refused = |settings: &Value| Resumed::open(&arg(&path), settings).expect_err("refused").to_string();
        let message = refused(&json!({ "tail": 4, "seed": 1 }));
        assert!(message.contains("its tail is 3, that of this command 4; give another file"), "{message}");
        assert!(refused(&json!({ "tail": 3 })).contains("its seed is 1, that of this command nothing"), "fewer");
        let before = "a text\nof two lines\n";
        for text in [before, "no line", "{\"unit\":0,\"result\":1}\n"] {
            fs::write(&path, text).expect("another file");
            assert!(refused(&json!({})).contains("is no file of --resume: line 1"), "{text}");
            assert_eq!(fs::read_to_string(&path).expect("readable"), text, "left as it was");
        }
        let nothing = Resumed::open(&ResumeArg { resume: None }, &json!({})).expect("no file");
        assert!(nothing.file.is_none(), "nothing is kept");
        assert_ne!(fingerprint(b"ab"), fingerprint(b"ba"), "the order counts");
    }
}
