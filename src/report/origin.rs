//! What a record is a record of, and when it was made.

use std::process::Command;
use std::time::SystemTime;

/// What a build says of its source, so that a program that is carried elsewhere still knows it.
const COMMIT: Option<&str> = option_env!("CONCERTINA_COMMIT");

/// What was measured and when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Year, month and day in UTC, `2026-01-31`.
    pub date: String,
    /// The program's source.
    pub commit: String,
}

impl Origin {
    /// Today, and the program's source: what is given, what the build said, or what git says of the folder that the program runs
    /// in.
    ///
    /// # Errors
    /// A sentence where none of them says anything, or where it can not be a part of a file's name.
    pub fn now(given: Option<&str>) -> Result<Self, String> {
        let commit = given.or(COMMIT).map(str::to_owned).or_else(described).ok_or(
            "a record names the commit of this program, which neither its build nor git can tell; give --commit",
        )?;
        let safe = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if commit.is_empty() || commit.starts_with('.') || !commit.chars().all(safe) {
            return Err(format!(
                "the commit '{commit}' can not be a part of a file's name: use letters, digits, '-', '_' and '.'"
            ));
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let seconds = now.map_err(|_| "this machine's clock says that it is before 1970")?.as_secs();
        Ok(Self { date: date(seconds / 86_400), commit })
    }
}

/// The commit of the folder that the program runs in.
fn described() -> Option<String> {
    let output = Command::new("git").args(["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]).output();
    let output = output.ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}

/// Year, month and day, so many days after the first of January 1970.
fn date(days: u64) -> String {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let (mut year, mut left) = (1970, days);
    while left >= 365 + u64::from(leap(year)) {
        left -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while left >= lengths[month] {
        left -= lengths[month];
        month += 1;
    }
    format!("{year}-{:02}-{:02}", month + 1, left + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_become_dates() {
        let shown = [0, 58, 59, 11_016, 11_017, 19_723, 20_088, 20_089].map(date);
        let expected = [
            "1970-01-01",
            "1970-02-28",
            "1970-03-01",
            "2000-02-29",
            "2000-03-01",
            "2024-01-01",
            "2024-12-31",
            "2025-01-01",
        ];
        assert_eq!(shown, expected, "edges of months and leap years");
    }

    #[test]
    fn a_commit_is_a_part_of_a_name_and_nothing_else() {
        let given = Origin::now(Some("abc123-dirty")).expect("a name");
        assert_eq!((given.commit.as_str(), given.date.len()), ("abc123-dirty", 10), "given");
        for bad in ["", "../up", "a/b", "a b", ".."] {
            assert!(Origin::now(Some(bad)).is_err(), "'{bad}' should be refused");
        }
    }
}
