//! Which tuning a command uses.

use std::path::Path;
use std::sync::{Arc, Once};

use anyhow::Result;
use concertina::device::Device;
use concertina::eval::tune::{EntryKey, Found, TuningFile, file_of_user};
use concertina::kernels::tuning::Tuning;
use concertina::report::DEFAULT_TUNING;

use super::args::Global;
use super::failure::usage;

/// How kernels are launched, and who says so.
#[derive(Debug)]
pub(super) struct Tuned {
    pub(super) tuning: Arc<Tuning>,
    /// A file, or [`DEFAULT_TUNING`].
    pub(super) source: String,
}

impl Tuned {
    fn by_default() -> Self {
        Self { tuning: Arc::default(), source: DEFAULT_TUNING.to_owned() }
    }

    fn by_file(tuning: Tuning, path: &Path) -> Self {
        Self { tuning: Arc::new(tuning), source: path.display().to_string() }
    }
}

impl Global {
    /// The tuning for a device: that of `--tuning`, or else of the user's file, where this has one for the device.
    pub(super) fn tuned(&self, device: &Device) -> Result<Tuned> {
        match self.tuning.as_deref() {
            Some(DEFAULT_TUNING) => Ok(Tuned::by_default()),
            Some(path) => of_file(Path::new(path), &EntryKey::of(device)),
            None => {
                file_of_user().map_or_else(|| Ok(Tuned::by_default()), |path| of_user(&path, &EntryKey::of(device)))
            }
        }
    }
}

/// Of a file that was asked for, which has to have one.
fn of_file(path: &Path, key: &EntryKey) -> Result<Tuned> {
    let shown = path.display();
    let Some(file) = TuningFile::read(path)? else {
        return Err(usage(format!("there is no tuning file '{shown}'; `concertina tune --file` writes one")));
    };
    let why = match file.find(key, path)? {
        Found::Entry(tuning) => return Ok(Tuned::by_file(*tuning, path)),
        Found::OtherVersion(other) => other_version(&other, key),
        Found::Nothing => format!("nothing for {} in the {} tier", key.adapter, key.tier),
    };
    Err(usage(format!("the tuning file '{shown}' has {why}; run `concertina tune --file {shown}`")))
}

/// Of the user's file, which need not have one.
fn of_user(path: &Path, key: &EntryKey) -> Result<Tuned> {
    static TOLD: Once = Once::new();
    let Some(file) = TuningFile::read(path)? else { return Ok(Tuned::by_default()) };
    Ok(match file.find(key, path)? {
        Found::Entry(tuning) => Tuned::by_file(*tuning, path),
        Found::OtherVersion(other) => {
            let why = other_version(&other, key);
            TOLD.call_once(|| {
                eprintln!(
                    "the tuning file '{}' has {why}, so that defaults are used; run `concertina tune`",
                    path.display()
                );
            });
            Tuned::by_default()
        }
        Found::Nothing => Tuned::by_default(),
    })
}

/// What a file has in place of what is looked for.
fn other_version(found: &EntryKey, wanted: &EntryKey) -> String {
    let part = |name: &str, found: &str, wanted: &str| {
        (found != wanted).then(|| format!("{name} '{found}' rather than '{wanted}'"))
    };
    let parts =
        [part("driver", &found.driver, &wanted.driver), part("program version", &found.program, &wanted.program)];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    format!("an entry of {}", parts.join(" and "))
}
