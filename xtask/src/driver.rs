//! A graphics driver: found, or installed where that is one known command.

use std::fs;
use std::io::{IsTerminal as _, stdin};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::process::{command, line, run, succeeds};

/// Software Vulkan on Debian and Ubuntu.
const DRIVER_PACKAGE: &str = "mesa-vulkan-drivers";

/// Makes sure that `binary` finds an adapter, prints the adapters, and returns the name of the one used by default.
pub(crate) fn ensure(binary: &Path) -> Result<String> {
    let mut found = adapters(binary)?;
    if found.is_err() {
        if !is_debian_like() {
            bail!(
                "there is no graphics adapter; install a Vulkan driver: the GPU vendor's, or Mesa's software driver \
                 (Fedora and Arch: mesa-vulkan-drivers or vulkan-swrast; Alpine: mesa-vulkan-swrast)"
            );
        }
        println!("no graphics adapter: installing {DRIVER_PACKAGE} for software Vulkan");
        apt_install(DRIVER_PACKAGE)?;
        found = adapters(binary)?;
    }
    match found {
        Ok(text) => {
            print!("{text}");
            Ok(adapter_name(&text))
        }
        Err(text) => bail!("there is still no graphics adapter after installing {DRIVER_PACKAGE}: {}", text.trim()),
    }
}

/// What `concertina devices` prints: as `Ok` when there is an adapter, else as `Err`.
fn adapters(binary: &Path) -> Result<Result<String, String>> {
    let mut devices = command(binary);
    devices.arg("devices").stdin(Stdio::null());
    let output = devices.output().with_context(|| format!("`{}` could not be started", line(&devices)))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) })
}

/// The adapter used by default, from the output of `concertina devices`: what follows `default adapter: `.
fn adapter_name(devices: &str) -> String {
    let name = devices.lines().find_map(|line| line.strip_prefix("default adapter: "));
    name.map_or("(unnamed)", str::trim).to_owned()
}

/// Whether this system installs packages with apt.
pub(crate) fn is_debian_like() -> bool {
    fs::read_to_string("/etc/os-release").is_ok_and(|text| names_debian(&text))
}

fn names_debian(os_release: &str) -> bool {
    let values = os_release.lines().filter_map(|line| line.strip_prefix("ID=").or(line.strip_prefix("ID_LIKE=")));
    values.flat_map(|value| value.trim_matches(['"', '\'']).split(' ')).any(|id| id == "debian" || id == "ubuntu")
}

/// Installs one package with apt, as root or through sudo.
pub(crate) fn apt_install(package: &str) -> Result<()> {
    let is_root = command("id").arg("-u").output().is_ok_and(|output| output.stdout.trim_ascii() == b"0");
    // Without a terminal sudo could ask for a password that nobody types.
    let sudo: &[&str] = match is_root {
        true => &[],
        false if succeeds("sudo", &["-n", "true"]) => &["sudo", "-n"],
        false if stdin().is_terminal() && succeeds("sudo", &["--version"]) => &["sudo"],
        false => bail!("root is needed: run `apt-get install {package}` as root, then try again"),
    };
    let apt_get = |arguments: &[&str]| -> Command {
        // Through `env`, because sudo drops variables; without it packages may stop to ask.
        let mut words = sudo.iter().chain(&["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]).chain(arguments);
        let mut apt_get = command(words.next().expect("a command has a first word"));
        apt_get.args(words);
        apt_get
    };
    run(&mut apt_get(&["update"]))?;
    run(&mut apt_get(&["install", "-y", "--no-install-recommends", package]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debian_and_what_is_like_it_is_told_from_the_rest() {
        for text in ["NAME=\"Debian\"\nID=debian\n", "ID=ubuntu\nID_LIKE=debian", "ID=mint\nID_LIKE=\"ubuntu debian\""]
        {
            assert!(names_debian(text), "{text:?} installs with apt");
        }
        for text in ["ID=fedora\n", "ID=arch\nNAME=\"not debian\"", "ID=debianish", "VERSION_ID=debian", ""] {
            assert!(!names_debian(text), "{text:?} does not");
        }
    }

    #[test]
    fn the_default_adapter_is_read_from_the_list() {
        assert_eq!(adapter_name("0  a\n1  b\ndefault adapter: llvmpipe (256 bits)\n"), "llvmpipe (256 bits)");
        assert_eq!(adapter_name("0  a\n"), "(unnamed)", "a list without the line has no name to give");
    }
}
