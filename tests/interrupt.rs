//! An interrupt ends a run in order.

use std::process::{Command, Stdio};

use concertina::model::reference_model_path;

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
#[cfg(unix)]
fn an_interrupt_prints_what_there_is_gpu() {
    use std::io::Read as _;
    let model = reference_model_path().display().to_string();
    let args = ["generate", "--model", &model, "--prompt", "Count to a thousand.", "--max-new", "2000"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_concertina"));
    command.env("XDG_RUNTIME_DIR", std::env::temp_dir()).stdin(Stdio::null());
    command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program should start");
    let mut stdout = child.stdout.take().expect("a pipe");
    let mut first = [0];
    stdout.read_exact(&mut first).expect("it should say something");
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().expect("kill should start").success(), "sent");
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).expect("UTF-8");
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(
        rest.ends_with('\n') && String::from_utf8_lossy(&output.stderr).contains("cancelled"),
        "{rest}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
