//! Sessions in files, from the command line.

use std::io::Read as _;
use std::process::{Command, Output};

use concertina::model::reference_model_path;
use serde_json::Value;

fn concertina(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_concertina"));
    command.env("XDG_RUNTIME_DIR", std::env::temp_dir()).args(args);
    command.output().expect("the program should start")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The JSON that a command writes to the standard output.
fn json(args: &[&str]) -> Value {
    let output = concertina(&[args, &["--json", "-"]].concat());
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{args:?}: {e}"))
}

fn refused(args: &[&str], code: i32) -> String {
    let output = concertina(args);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {}", text(&output.stderr));
    text(&output.stderr)
}

struct Folder {
    folder: tempfile::TempDir,
    model: String,
}

impl Folder {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        for (name, text) in [("a.txt", "The town lies by the sea."), ("b.txt", "The mill stands on the hill.")] {
            std::fs::write(folder.path().join(name), text.repeat(3)).expect("written");
        }
        Self { folder, model: reference_model_path().display().to_string() }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }
}

/// Answers of every session of a report.
fn answers(report: &Value, of: &str) -> Vec<Vec<String>> {
    let rounds = |session: &Value| {
        let rounds = session[of].as_array().expect("a list").iter();
        rounds.map(|round| round["answer"].as_str().expect("a text").to_owned()).collect()
    };
    report["sessions"].as_array().expect("a list").iter().map(rounds).collect()
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn sessions_go_on_where_another_process_left_them_gpu() {
    let folder = Folder::new();
    let (a, b, dir) = (folder.path("a.txt"), folder.path("b.txt"), folder.path("sessions"));
    let run = |more: &[&str]| {
        let args = ["run", "--model", &folder.model, "--document", &a, &b, "--ask", "Where is it?"];
        let size = ["--max-new", "4", "--context", "256", "--compress", "full", "kivi4"];
        json(&[&args[..], more, &size].concat())
    };
    let whole = answers(&run(&["--then", "Say that again.", "Why?"]), "rounds");
    let first = run(&["--session-dir", &dir]);
    let names: Vec<_> = first["sessions"].as_array().expect("a list").iter().map(|s| s["saved_as"].clone()).collect();
    assert_eq!(names, ["a", "b"], "named after their documents");
    let load = |question: &str| {
        let args = ["session", "load", "--model", &folder.model, "--session-dir", &dir, "a", "b", "--ask", question];
        json(&[&args[..], &["--max-new", "4", "--context", "256"]].concat())
    };
    let [second, third] = ["Say that again.", "Why?"].map(load);
    let all = [answers(&first, "rounds"), answers(&second, "turns"), answers(&third, "turns")];
    for (at, whole) in whole.iter().enumerate() {
        let in_turns: Vec<_> = all.iter().flat_map(|answers| answers[at].clone()).collect();
        assert_eq!(&in_turns, whole, "session {at}: three processes answer as one");
    }
    let list = json(&["session", "list", "--session-dir", &dir]);
    let sessions = list["sessions"].as_array().expect("a list");
    let turns: Vec<_> = sessions.iter().map(|session| session["turns"].as_array().map(Vec::len)).collect();
    assert_eq!(turns, [Some(3), Some(3)], "the whole talk is there");
    assert_eq!(
        sessions[1]["compression"], "layer=full,head=full,token=full,hidden=kivi4",
        "what was done to the cache"
    );

    // A second run over the same documents takes nobody's place.
    let again = run(&["--session-dir", &dir]);
    assert_eq!(again["sessions"][0]["saved_as"], "a-2", "a name of its own");
    assert_eq!(answers(&again, "rounds"), answers(&first, "rounds"), "the same questions");

    // A damaged file is named with the reason, and the rest is there.
    let path = folder.folder.path().join("sessions/b.session");
    let mut bytes = std::fs::read(&path).expect("written");
    *bytes.last_mut().expect("pages") ^= 4;
    std::fs::write(&path, &bytes).expect("written");
    let list = json(&["session", "list", "--session-dir", &dir]);
    assert_eq!(list["sessions"].as_array().map(Vec::len), Some(3), "a, a-2 and b-2");
    assert_eq!(list["refused"][0]["file"], "b.session", "{list}");
    assert!(list["refused"][0]["reason"].as_str().expect("a text").contains("damaged"), "{list}");
    let load = ["session", "load", "--model", &folder.model, "--session-dir", &dir, "b", "--ask", "Why?"];
    assert!(refused(&load, 1).contains("damaged"), "{}", refused(&load, 1));
    let inspected = json(&["session", "inspect", &folder.path("sessions/a.session")]);
    assert_eq!(inspected["waits_for"], "question", "{inspected}");
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn documents_are_saved_before_anything_is_asked_gpu() {
    let folder = Folder::new();
    let (a, dir) = (folder.path("a.txt"), folder.path("sessions"));
    let size = ["--context", "256"];
    let compress = "token=keydiff:0.5,hidden=kivi4";
    let asked = ["run", "--model", &folder.model, "--document", &a, "--ask", "Where is the town?", "--max-new", "6"];
    let whole = json(&[&asked[..], &size, &["--compress", compress]].concat());
    let save = ["session", "save", "--model", &folder.model, "--document", &a, "--session-dir", &dir];
    let saved = json(&[&save[..], &size, &["--compress", compress]].concat());
    let name = saved["sessions"][0]["name"].as_str().expect("a name").to_owned();
    let load = ["session", "load", "--model", &folder.model, "--session-dir", &dir, &name, "--max-new", "6"];
    let unasked = refused(&[&load[..], &size].concat(), 2);
    assert!(unasked.contains("give it a question with --ask"), "{unasked}");
    let loaded = json(&[&load[..], &size, &["--ask", "Where is the town?"]].concat());
    assert_eq!(answers(&loaded, "turns"), answers(&whole, "rounds"), "{compress}: as if it had been read now");
    assert!(loaded["sessions"][0]["restored_bytes"].as_u64() > Some(0), "its pages came from the file");
    let small = refused(&["session", "list", "--session-dir", &folder.path("none")], 1);
    assert!(small.contains("can not read the folder"), "{small}");
    let none =
        refused(&["session", "load", "--model", &folder.model, "--session-dir", &dir, "nobody", "--ask", "Who?"], 1);
    assert!(none.contains("nobody.session"), "{none}");
}

#[test]
fn a_codec_for_caches_that_can_not_leave_is_refused() {
    let folder = Folder::new();
    let a = folder.path("a.txt");
    let run = ["run", "--model", &folder.model, "--document", &a, "--ask", "Where?", "--swap-codec"];
    let nowhere = refused(&[&run[..], &["kivi4"]].concat(), 2);
    assert!(nowhere.contains("--host-budget or --session-dir"), "{nowhere}");
    let unknown = refused(&[&run[..], &["kivi5", "--host-budget", "1MiB"]].concat(), 2);
    assert!(unknown.contains("kivi5"), "{unknown}");
    let alone = refused(&[&run[..6], &["Where?", "--disk-budget", "1GiB"]].concat(), 2);
    assert!(alone.contains("--session-dir"), "{alone}");
}

/// A disk that takes no more: the file that does not fit is named, nothing of it is left, and those that were there stay.
#[test]
#[cfg(unix)]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn a_full_disk_is_said_and_loses_nothing_gpu() {
    let folder = Folder::new();
    let (a, dir) = (folder.path("a.txt"), folder.path("sessions"));
    std::fs::create_dir(&dir).expect("a folder");
    std::fs::write(folder.path("sessions/old.session"), "old").expect("written");
    // Files of at most 64 blocks of 512 bytes or 1 KiB, and an error rather than a signal beyond.
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' XFSZ; ulimit -f 64; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_concertina")]);
    command.args(["session", "save", "--model", &folder.model, "--document", &a, "--session-dir", &dir]);
    let output = command.env("XDG_RUNTIME_DIR", std::env::temp_dir()).args(["--context", "256"]).output();
    let output = output.expect("a shell");
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("can not save 'a'") && message.contains("of pages"), "{message}");
    let left: Vec<_> = std::fs::read_dir(&dir).expect("a folder").map(|e| e.expect("readable").file_name()).collect();
    assert_eq!(left, ["old.session"], "nothing is left of it");
}

/// An interrupt in the middle of an answer saves it; the answer is finished later as if nothing had happened.
#[test]
#[cfg(unix)]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn an_interrupt_saves_every_session_gpu() {
    let folder = Folder::new();
    let (a, dir) = (folder.path("a.txt"), folder.path("sessions"));
    let args = |dir: &[&str], more: &[&str]| -> Vec<String> {
        let args = ["run", "--model", &folder.model, "--document", &a, "--ask", "Count to ten.", "--context", "256"];
        [&args[..], &["--max-new", "40"], dir, more].concat().into_iter().map(str::to_owned).collect()
    };
    let mut command = Command::new(env!("CARGO_BIN_EXE_concertina"));
    command.env("XDG_RUNTIME_DIR", std::env::temp_dir());
    let trace = folder.path("trace.json");
    command.args(args(&["--session-dir", &dir], &["--trace", &trace]));
    let child = command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn();
    let mut child = child.expect("the program should start");
    // From its first line on it saves what there is.
    let mut first = [0];
    child.stdout.as_mut().expect("a pipe").read_exact(&mut first).expect("it says something");
    std::thread::sleep(std::time::Duration::from_secs(3));
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill should start");
    let output = child.wait_with_output().expect("it ends");
    let message = text(&output.stderr);
    assert!(sent.success(), "it was still running");
    assert_eq!(output.status.code(), Some(0), "{message}");
    assert!(message.contains("1 sessions were saved") || !message.contains("interrupted"), "{message}");
    let saved = json(&["session", "inspect", &folder.path("sessions/a.session")]);
    assert_ne!(saved["waits_for"], Value::Null, "{saved}");
    let whole: Vec<String> = args(&[], &[]);
    let whole = json(&whole.iter().map(String::as_str).collect::<Vec<_>>());
    let load = ["session", "load", "--model", &folder.model, "--session-dir", &dir, "a", "--context", "256"];
    if saved["waits_for"] != "question" {
        let loaded = json(&load);
        assert_eq!(answers(&loaded, "turns"), answers(&whole, "rounds"), "the answer was finished");
    }
    let list = json(&["session", "list", "--session-dir", &dir]);
    assert_eq!(list["sessions"][0]["turns"][0]["answer"], whole["sessions"][0]["rounds"][0]["answer"], "{list}");
}
