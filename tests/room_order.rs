//! Imports go one way only: every room (a module at the crate's root) may use the rooms to its left and no others.
//!
//! The check reads the sources as tokens: comments, strings and `#[cfg(test)]` items are dropped, every path that
//! begins with `crate::` or `super::` is resolved, use lists included, and its first segment is the room it reaches.
//! It knows nothing of types, so a room has to be named where it is used; renaming or glob-importing the crate's root
//! would hide that and is a violation of its own.

use std::fs;
use std::path::{Path, PathBuf};

/// What one room may use.
struct Room {
    name: &'static str,
    uses: Uses,
    /// Whether the word `wgpu` may appear.
    wgpu: bool,
}

enum Uses {
    /// Anything but the command line.
    Library,
    /// Anything.
    Everything,
    Only(&'static [&'static str]),
}

const fn room(name: &'static str, uses: &'static [&'static str]) -> Room {
    Room { name, uses: Uses::Only(uses), wgpu: false }
}

const fn room_on_wgpu(name: &'static str, uses: &'static [&'static str]) -> Room {
    Room { name, uses: Uses::Only(uses), wgpu: true }
}

/// The rooms from left to right. A module that is missing here fails the check until it has its place.
const ROOMS: &[Room] = &[
    room("geometry", &[]),
    room("weights", &["geometry"]),
    room("compression", &["geometry"]),
    room("theory", &["geometry", "compression"]),
    room("reference", &["geometry", "compression", "weights"]),
    room_on_wgpu("device", &["geometry"]),
    room("pool", &["device", "geometry", "compression"]),
    room_on_wgpu("kernels", &["pool", "device", "geometry", "compression", "weights"]),
    room("schedule", &["geometry", "compression", "theory", "pool"]),
    room("disk", &["geometry", "compression", "pool", "schedule"]),
    room("model", &["geometry", "weights"]),
    room_on_wgpu(
        "engine",
        &[
            "geometry",
            "weights",
            "compression",
            "theory",
            "reference",
            "device",
            "pool",
            "kernels",
            "schedule",
            "disk",
            "model",
        ],
    ),
    Room { name: "eval", uses: Uses::Library, wgpu: false },
    Room { name: "report", uses: Uses::Library, wgpu: false },
    Room { name: "cli", uses: Uses::Everything, wgpu: false },
    Room { name: "main", uses: Uses::Everything, wgpu: false },
    Room { name: "lib", uses: Uses::Everything, wgpu: false },
];

/// A path that its room could not use otherwise, and why it may.
struct Exception {
    room: &'static str,
    path: &'static str,
    #[expect(dead_code, reason = "an exception is written down with its reason, for people")]
    reason: &'static str,
}

const EXCEPTIONS: &[Exception] = &[Exception {
    room: "schedule",
    path: "kernels::sample::Sampling",
    reason: "how a request samples is plain data that the scheduler carries along and never looks into",
}];

/// Part of a room that another one may not use although it may use the rest.
const CLOSED: &[(&str, &str, &str)] = &[("schedule", "pool", "device")];

/// The one file outside a room on wgpu that makes buffers.
const WGPU_FILES: &[&str] = &["pool/device.rs"];

/// Rooms whose results depend on their inputs alone: time and chance are passed in.
const PURE: &[&str] = &["schedule", "theory", "compression"];
const IMPURE_WORDS: &[&str] =
    &["Instant", "SystemTime", "thread_rng", "ThreadRng", "OsRng", "SysRng", "from_os_rng", "from_entropy"];
const IMPURE_PATHS: &[[&str; 2]] = &[["rand", "rng"], ["rand", "random"]];

const LINES_MAX: usize = 600;

/// Rust text as words, `::` and single characters; without comments, strings, character literals and lifetimes.
fn tokens(text: &str) -> Vec<String> {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut tokens = Vec::new();
    let mut i = 0;
    while i < chars.len() {
        let c = chars[i];
        if c == '/' && at(i + 1) == '/' {
            i += chars[i..].iter().take_while(|c| **c != '\n').count();
        } else if c == '/' && at(i + 1) == '*' {
            i = after_block_comment(&chars, i);
        } else if c == '"' {
            i = after_string(&chars, i);
        } else if c == '\'' {
            // A character when a quote follows it, else a lifetime, whose name is as good as a word.
            i += match (at(i + 1), at(i + 2)) {
                ('\\', _) => 3 + chars[i + 3..].iter().take_while(|c| **c != '\'').count() + 1,
                (_, '\'') => 3,
                _ => 1,
            };
        } else if is_word(c) {
            let word: String = chars[i..].iter().take_while(|c| is_word(**c)).collect();
            let end = i + word.chars().count();
            let hashes = chars[end..].iter().take_while(|c| **c == '#').count();
            if matches!(word.as_str(), "r" | "br" | "cr") && at(end + hashes) == '"' {
                i = after_raw_string(&chars, end + hashes, hashes);
            } else {
                i = end;
                tokens.push(word);
            }
        } else if c == ':' && at(i + 1) == ':' {
            tokens.push("::".to_owned());
            i += 2;
        } else {
            if !c.is_whitespace() {
                tokens.push(c.to_string());
            }
            i += 1;
        }
    }
    tokens
}

fn after_block_comment(chars: &[char], start: usize) -> usize {
    let (mut i, mut depth) = (start + 2, 1);
    while i < chars.len() && depth > 0 {
        match (chars[i], chars.get(i + 1)) {
            ('/', Some('*')) => (i, depth) = (i + 2, depth + 1),
            ('*', Some('/')) => (i, depth) = (i + 2, depth - 1),
            _ => i += 1,
        }
    }
    i
}

fn after_string(chars: &[char], start: usize) -> usize {
    let mut i = start + 1;
    while i < chars.len() && chars[i] != '"' {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

fn after_raw_string(chars: &[char], quote: usize, hashes: usize) -> usize {
    let closes = |i: usize| chars[i] == '"' && chars[i + 1..].iter().take_while(|c| **c == '#').count() >= hashes;
    (quote + 1..chars.len()).find(|i| closes(*i)).map_or(chars.len(), |i| i + 1 + hashes)
}

/// Drops every item under `#[cfg(test)]`.
fn without_tests(tokens: &[String]) -> Vec<String> {
    const ATTRIBUTE: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut kept = Vec::new();
    let mut i = 0;
    while i < tokens.len() {
        if tokens.len() - i >= ATTRIBUTE.len() && tokens[i..].iter().zip(ATTRIBUTE).all(|(t, a)| t == a) {
            i = after_item(tokens, i + ATTRIBUTE.len());
        } else {
            kept.push(tokens[i].clone());
            i += 1;
        }
    }
    kept
}

/// The first token after an item: behind its `;` or its closing brace, whichever comes first.
fn after_item(tokens: &[String], start: usize) -> usize {
    let mut depth = 0;
    for (i, token) in tokens.iter().enumerate().skip(start) {
        match token.as_str() {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => depth -= 1,
            _ => {}
        }
        let in_use_list = token == "}" && tokens.get(i + 1).is_some_and(|next| next == ";");
        if depth == 0 && (token == ";" || token == "}" && !in_use_list) {
            return i + 1;
        }
    }
    tokens.len()
}

/// Module path of a file below `src/`: `pool/arena.rs` is `pool::arena`, `lib.rs` the root.
fn module_of(file: &str) -> Vec<String> {
    let file = file.strip_suffix(".rs").unwrap_or(file);
    let parts = file.split('/').filter(|part| !matches!(*part, "mod" | "lib" | "main"));
    parts.map(str::to_owned).collect()
}

/// Every path of the crate that a file names, from the crate's root.
fn crate_paths(tokens: &[String], file: &str) -> Vec<Vec<String>> {
    let mut paths = Vec::new();
    let mut module = module_of(file);
    let mut depth = 0;
    // Inline modules and the brace depth at which each of them closes.
    let mut inline = Vec::new();
    for (i, token) in tokens.iter().enumerate() {
        let next = |n: usize| tokens.get(i + n).map_or("", String::as_str);
        let continues = i > 0 && tokens[i - 1] == "::";
        match token.as_str() {
            "{" => depth += 1,
            "}" => {
                depth -= 1;
                if inline.last() == Some(&depth) {
                    inline.pop();
                    module.pop();
                }
            }
            "mod" if next(2) == "{" => {
                module.push(next(1).to_owned());
                inline.push(depth);
            }
            "crate" if !continues && next(1) == "::" => {
                follow(tokens, i + 2, Vec::new(), &mut paths);
            }
            "crate" if next(1) == "as" => paths.push(vec!["crate as".to_owned()]),
            "super" if !continues => {
                let mut base = module.clone();
                base.pop();
                let mut at = i + 1;
                while tokens.get(at).is_some_and(|t| t == "::") && tokens.get(at + 1).is_some_and(|t| t == "super") {
                    base.pop();
                    at += 2;
                }
                if tokens.get(at).is_some_and(|t| t == "::") {
                    follow(tokens, at + 1, base, &mut paths);
                }
            }
            _ => {}
        }
    }
    paths
}

/// Follows a path, or each path of a use list, from token `at`; returns the token after it.
fn follow(tokens: &[String], mut at: usize, mut path: Vec<String>, paths: &mut Vec<Vec<String>>) -> usize {
    loop {
        match tokens.get(at).map(String::as_str) {
            Some("{") => {
                at += 1;
                while tokens.get(at).is_some_and(|t| t != "}") {
                    at = follow(tokens, at, path.clone(), paths);
                    // Up to the next path of the list: over `as name` and the comma.
                    at += tokens[at..].iter().take_while(|t| *t != "," && *t != "}").count();
                    at += usize::from(tokens.get(at).is_some_and(|t| t == ","));
                }
                return at + 1;
            }
            Some("self") => {
                paths.push(path);
                return at + 1;
            }
            Some(word) if word == "*" || word.starts_with(|c: char| c.is_alphabetic() || c == '_') => {
                path.push(word.to_owned());
                at += 1;
            }
            // `::<` of a call.
            _ => {
                paths.push(path);
                return at;
            }
        }
        if tokens.get(at).is_none_or(|t| t != "::") {
            paths.push(path);
            return at;
        }
        at += 1;
    }
}

/// What is against the arrows in one file, whose path is relative to `src/`.
fn violations(file: &str, text: &str) -> Vec<String> {
    let first = file.split('/').next().unwrap_or(file);
    let name = first.strip_suffix(".rs").unwrap_or(first);
    let Some(room) = ROOMS.iter().find(|room| room.name == name) else {
        return vec![format!("src/{file}: room {name} has no place in tests/room_order.rs")];
    };
    let tokens = without_tests(&tokens(text));
    let mut found: Vec<_> =
        crate_paths(&tokens, file).iter().filter_map(|path| against_the_arrows(room, path)).collect();
    if !room.wgpu && !WGPU_FILES.contains(&file) && tokens.iter().any(|token| token == "wgpu") {
        found.push("wgpu is used outside device, pool/device.rs, kernels and engine".to_owned());
    }
    if PURE.contains(&name) {
        let words = tokens.iter().filter(|token| IMPURE_WORDS.contains(&token.as_str())).cloned();
        let paths =
            tokens.windows(3).filter(|w| w[1] == "::" && IMPURE_PATHS.iter().any(|p| p[0] == w[0] && p[1] == w[2]));
        found.extend(words.chain(paths.map(|w| w.concat())).map(|w| format!("{w}: time and chance are passed in")));
    }
    found.iter().map(|what| format!("src/{file}: {what}")).collect()
}

fn against_the_arrows(room: &Room, path: &[String]) -> Option<String> {
    let text = path.join("::");
    if matches!(room.uses, Uses::Everything) || path.first().is_some_and(|first| first == room.name) {
        return None;
    }
    if EXCEPTIONS.iter().any(|e| e.room == room.name && e.path == text) {
        return None;
    }
    let Some(used) = path.first().and_then(|first| ROOMS.iter().find(|other| other.name == first)) else {
        return Some(format!("crate::{text} names no room; write the room's path"));
    };
    let allowed = match &room.uses {
        Uses::Everything => true,
        Uses::Library => !matches!(used.uses, Uses::Everything),
        Uses::Only(rooms) => rooms.contains(&used.name),
    };
    if !allowed {
        return Some(format!("{} may not use crate::{text}", room.name));
    }
    let (_, _, closed) = CLOSED.iter().find(|(user, other, _)| *user == room.name && *other == used.name)?;
    match path.get(1).map(String::as_str) {
        Some("*") | None => {
            Some(format!("{} may not import all of crate::{}, because {closed} is closed to it", room.name, used.name))
        }
        Some(part) if part == *closed => Some(format!("{} may not use crate::{text}", room.name)),
        Some(_) => None,
    }
}

fn too_long(file: &str, text: &str) -> Option<String> {
    let lines = text.lines().count();
    (lines > LINES_MAX).then(|| format!("{file}: {lines} lines, at most {LINES_MAX} are readable"))
}

/// Files below `folder` whose names end in `.rs` or `.wgsl`, sorted.
fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(folder) else { return found };
    for entry in entries {
        let path = entry.expect("a folder of the sources should be readable").path();
        if path.is_dir() {
            found.extend(files_below(&path));
        } else if path.extension().is_some_and(|e| e == "rs" || e == "wgsl") {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn relative(path: &Path, root: &Path) -> String {
    let path = path.strip_prefix(root).expect("files lie below the root");
    let parts: Vec<_> = path.components().map(|c| c.as_os_str().to_string_lossy()).collect();
    parts.join("/")
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn imports_follow_the_arrows() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files = files_below(&root);
    assert!(files.len() >= 30, "the sources should be found: {} files", files.len());
    let found: Vec<_> = files.iter().flat_map(|path| violations(&relative(path, &root), &read(path))).collect();
    assert!(found.is_empty(), "against the arrows:\n{}", found.join("\n"));
}

#[test]
fn no_file_is_longer_than_one_can_read() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = ["src", "shaders", "tests", "examples", "benches", "xtask"];
    let files: Vec<_> = folders.iter().flat_map(|folder| files_below(&root.join(folder))).collect();
    assert!(files.len() >= 50, "the sources should be found: {} files", files.len());
    let found: Vec<_> = files.iter().filter_map(|path| too_long(&relative(path, root), &read(path))).collect();
    assert!(found.is_empty(), "too long:\n{}", found.join("\n"));
}

#[test]
fn a_long_file_is_noticed() {
    assert_eq!(too_long("a.rs", &"x\n".repeat(LINES_MAX)), None, "as long as allowed");
    assert!(too_long("a.rs", &"x\n".repeat(LINES_MAX + 1)).is_some(), "one line more");
}

#[test]
fn what_goes_against_the_arrows_is_noticed() {
    for (file, text) in [
        ("geometry.rs", "use crate::pool::PagePool;"),
        ("geometry.rs", "fn f() -> crate::pool::PagePool { todo() }"),
        ("geometry.rs", "use super::pool;"),
        ("geometry.rs", "use super::*;"),
        ("geometry.rs", "use crate::PagePool;"),
        ("geometry.rs", "use crate as c;"),
        ("geometry.rs", "use {crate::{self as c}};"),
        ("pool/arena.rs", "use super::super::kernels::link;"),
        ("pool/arena.rs", "use crate::{geometry::{Bytes, PageId}, kernels::{self, link}};"),
        ("pool/mod.rs", "use crate::{geometry as g, engine};"),
        ("pool/mod.rs", "mod inner { use super::super::schedule::Session; }"),
        ("pool/mod.rs", "mod inner { fn f() {} } use super::schedule::Session;"),
        ("pool/mod.rs", "#[cfg(test)] mod tests { use super::*; } use crate::engine::Engine;"),
        ("pool/mod.rs", "#[cfg(test)] use super::{a, b}; use crate::engine::Engine;"),
        ("pool/mod.rs", "macro_rules! m { () => { $crate::engine::run() } }"),
        ("model/mod.rs", "use crate::kernels::Module;"),
        ("report/mod.rs", "use crate::cli::Options;"),
        ("schedule/mod.rs", "use crate::device::Device;"),
        ("schedule/mod.rs", "use crate::pool::device::PoolBuffers;"),
        ("schedule/mod.rs", "use crate::pool::{PagePool, device};"),
        ("schedule/mod.rs", "use crate::pool;"),
        ("schedule/mod.rs", "use crate::pool::*;"),
        ("schedule/mod.rs", "use crate::kernels::sample::kernel;"),
        ("schedule/mod.rs", "use crate::kernels::sample;"),
        ("schedule/mod.rs", "use std::time::{Duration, Instant};"),
        ("theory/mod.rs", "let now = std::time::SystemTime::now();"),
        ("compression/mod.rs", "let mut rng = rand::rng();"),
        ("schedule/mod.rs", "let x: u8 = rand::random();"),
        ("schedule/mod.rs", "fn f(buffer: &wgpu::Buffer) {}"),
        ("pool/mod.rs", "use wgpu::Buffer;"),
        ("report/mod.rs", "let c = '\"'; use wgpu::Buffer; // \""),
        ("report/mod.rs", "let c = ('\\'', r#\"\"#, '\\u{22}'); use wgpu::Buffer;"),
        ("attic/mod.rs", "fn f() {}"),
    ] {
        assert!(!violations(file, text).is_empty(), "src/{file} with `{text}` should be refused");
    }
}

#[test]
fn what_follows_the_arrows_passes() {
    for (file, text) in [
        ("pool/arena.rs", "use crate::geometry::{Bytes, CELL_BYTES}; use super::budget::Budget;"),
        ("pool/mod.rs", "use super::pool::arena; pub(crate) fn f() {} pub(in crate::pool) fn g() {}"),
        (
            "pool/mod.rs",
            "//! [`crate::engine`]\n/* crate::engine /* nested */ wgpu */ const S: &str = \"crate::engine\";",
        ),
        ("pool/mod.rs", "#[cfg(test)]\nmod tests { use crate::engine::Engine; fn f() { wgpu::x(); } }"),
        ("pool/mod.rs", "mod inner { mod deeper { use super::super::arena; } use super::budget; } use self::arena::A;"),
        ("pool/device.rs", "use wgpu::Buffer; use crate::device::Device;"),
        ("kernels/decode.rs", "use crate::geometry::Bytes; fn f<'a>(b: &'a wgpu::Buffer) -> Vec<u8> { x::<u8>() }"),
        (
            "schedule/mod.rs",
            "use crate::kernels::sample::Sampling; use crate::pool::{PagePool, page_table::PageTable};",
        ),
        ("schedule/mod.rs", "use crate::kernels::sample::{Sampling}; use std::time::Duration; /// Not an Instant.\n"),
        ("engine/mod.rs", "use crate::{model::GgufFile, schedule::Session, kernels::{self, link}};"),
        ("eval/mod.rs", "use crate::engine::Engine; use crate::report::Table;"),
        ("main.rs", "mod cli; use crate::cli::run;"),
        ("lib.rs", "pub mod pool; pub use pool::PagePool;"),
    ] {
        let found = violations(file, text);
        assert!(found.is_empty(), "src/{file} with `{text}` should pass: {found:?}");
    }
}
