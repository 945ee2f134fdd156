//! Starting other programs, always in the repository's root and with a clean environment.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail};

/// The repository's root.
pub(crate) fn root() -> PathBuf {
    // Cargo says at run time where the package lies; what it was at compile time holds until a checkout is moved.
    let package = env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    package.parent().map_or_else(|| package.clone(), Path::to_path_buf)
}

/// A command in the repository's root.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root());
    // What cargo tells this package about itself would make build scripts of dependencies run again.
    let of_this_package = |key: &str| {
        key.starts_with("CARGO_PKG_") || key.starts_with("CARGO_MANIFEST_") || key == "CARGO_PRIMARY_PACKAGE"
    };
    for (key, _) in env::vars_os() {
        if key.to_str().is_some_and(of_this_package) {
            command.env_remove(key);
        }
    }
    // Vulkan loaders and drivers complain on every start when it is missing.
    if cfg!(unix) && env::var_os("XDG_RUNTIME_DIR").is_none() {
        command.env("XDG_RUNTIME_DIR", env::temp_dir());
    }
    command
}

/// A command of the cargo that runs this program.
pub(crate) fn cargo<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Command {
    let mut cargo = command(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(arguments);
    cargo
}

/// The command as one would type it.
pub(crate) fn line(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_stem().unwrap_or_default();
    let words = std::iter::once(program).chain(command.get_args());
    let quoted = words.map(|word| {
        let word = word.to_string_lossy();
        if word.is_empty() || word.contains([' ', '*', '\n', '"']) { format!("'{word}'") } else { word.into_owned() }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

/// Runs to the end with inherited output.
pub(crate) fn status(command: &mut Command) -> Result<ExitStatus> {
    command.status().with_context(|| format!("`{}` could not be started", line(command)))
}

/// Runs to the end with inherited output; anything but success is an error.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = status(command)?;
    if !status.success() {
        bail!("`{}` ended with {status}", line(command));
    }
    Ok(())
}

/// Whether a command can be started and succeeds; its output is dropped.
pub(crate) fn succeeds(program: &str, arguments: &[&str]) -> bool {
    let mut command = command(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Cargo's target folder, which this program itself runs from.
pub(crate) fn target() -> Result<PathBuf> {
    let own = env::current_exe().context("this program should know where it lies")?;
    let profile = own.parent().and_then(Path::parent);
    profile.map(Path::to_path_buf).with_context(|| format!("{} should lie in a target folder", own.display()))
}

/// The built program of a profile folder, `debug` or `release`.
pub(crate) fn binary(profile: &str) -> Result<PathBuf> {
    Ok(target()?.join(profile).join(format!("concertina{}", env::consts::EXE_SUFFIX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_can_be_typed_again() {
        let mut command = Command::new("cargo");
        command.args(["test", "--bench", "*", "two words"]);
        assert_eq!(line(&command), "cargo test --bench '*' 'two words'", "spaces and stars need quotes");
    }

    #[test]
    fn the_root_holds_the_workspace() {
        assert!(root().join("xtask").is_dir(), "{} should hold this package", root().display());
    }

    #[test]
    fn a_missing_program_and_a_failing_one_are_told_from_success() {
        let cargo = env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
        assert!(succeeds(&cargo, &["--version"]), "cargo runs this test");
        assert!(!succeeds(&cargo, &["no-such-command"]), "cargo refuses an unknown command");
        assert!(!succeeds("no-such-program-anywhere", &[]), "a missing program is no success");
    }
}
