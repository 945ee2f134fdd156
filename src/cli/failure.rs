//! From an error to one sentence and an exit code.

use std::process::ExitCode;

use concertina::device::DeviceError;

/// The exit code of a command line that can not be carried out as it is written.
const USAGE: u8 = 2;
/// The exit code of everything else that went wrong.
const FAILED: u8 = 1;
/// The exit code after an interrupt from the keyboard, as shells report it.
pub(super) const INTERRUPTED: u8 = 130;
/// The exit code after a reader has closed the pipe, as shells report it.
const PIPE_CLOSED: u8 = 141;

/// The command line contradicts itself or what it names.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Usage(pub(super) String);

/// An error for a command line that can not be carried out as it is written.
pub(super) fn usage(message: impl Into<String>) -> anyhow::Error {
    Usage(message.into()).into()
}

/// Prints the sentence and chooses the code.
pub(super) fn report(error: &anyhow::Error) -> ExitCode {
    if error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe) {
        return PIPE_CLOSED.into();
    }
    let usage = error.is::<Usage>() || matches!(error.downcast_ref(), Some(DeviceError::UnknownAdapter { .. }));
    eprintln!("error: {}", one_line(&error.to_string()));
    if usage { USAGE } else { FAILED }.into()
}

/// Clap's message as one sentence: without the usage, which `--help` shows.
pub(super) fn report_clap(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind;
    let text = error.render().to_string();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // A reader that stops reading has seen what it wanted.
            let _ = std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes());
            ExitCode::SUCCESS
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            eprint!("{text}");
            USAGE.into()
        }
        _ => {
            eprintln!("{}", clap_sentence(&text));
            USAGE.into()
        }
    }
}

/// The paragraphs of a message, but for usage and the pointer to the help, on one line.
fn clap_sentence(text: &str) -> String {
    let kept = text.split("\n\n").filter(|p| !p.starts_with("Usage:") && !p.starts_with("For more information"));
    kept.map(one_line).collect::<Vec<_>>().join("; ")
}

/// The text without line breaks and other control characters.
fn one_line(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.join(" ").chars().map(|c| if c.is_control() { '\u{FFFD}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_become_one_sentence() {
        let text = "error: invalid value 'x' for '--chunk <ROWS>': not a number\n\n  tip: try 128\n\nUsage: a b\n\nFor \
                    more information, try '--help'.\n";
        let expected = "error: invalid value 'x' for '--chunk <ROWS>': not a number; tip: try 128";
        assert_eq!(clap_sentence(text), expected, "clap");
        assert_eq!(one_line("a\n  b\u{1b}[1m\n"), "a b\u{FFFD}[1m", "control characters");
    }
}
