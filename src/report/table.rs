//! How tables and numbers look.

use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};

/// How a column is aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// A table with a line under its header and none elsewhere; it ends with a line break.
pub(super) fn table(columns: &[(&str, Align)], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─')));
    table.set_header(columns.iter().map(|(name, _)| *name));
    for row in rows {
        table.add_row(row);
    }
    for (column, (_, align)) in table.column_iter_mut().zip(columns) {
        column.set_cell_alignment(match align {
            Align::Left => CellAlignment::Left,
            Align::Right => CellAlignment::Right,
        });
    }
    table.trim_fmt() + "\n"
}

/// A title and lines of a name and a text each, the texts below one another.
pub(super) fn block(title: &str, lines: &[(&str, String)]) -> String {
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut text = format!("{title}\n");
    for (name, line) in lines {
        text.push_str(&format!("  {name:width$}  {line}\n"));
    }
    text
}

/// A count with its digits in groups of three.
pub(super) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A count and its noun, which takes an s unless there is one.
pub(super) fn counted(n: u64, noun: &str) -> String {
    format!("{} {noun}{}", count(n), if n == 1 { "" } else { "s" })
}

/// A number with as many decimals as its size deserves, or a dash where there is none.
pub(super) fn number(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(x) if x.abs() >= 100.0 => format!("{x:.0}"),
        Some(x) if x.abs() >= 10.0 => format!("{x:.1}"),
        Some(x) => format!("{x:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_as_long_as_they_deserve() {
        assert_eq!(["1", "12", "123", "1,234", "12,345,678"], [1, 12, 123, 1234, 12_345_678].map(count), "groups");
        assert_eq!(counted(1, "token") + &counted(2, " token"), "1 token2  tokens", "plural");
        let shown = [None, Some(0.126), Some(12.34), Some(1234.5)].map(number);
        assert_eq!(["-", "0.13", "12.3", "1234"], shown.each_ref().map(String::as_str), "decimals");
    }

    #[test]
    fn columns_are_aligned_and_lines_end_without_spaces() {
        let text = table(&[("name", Align::Left), ("n", Align::Right)], [vec!["a".into(), "100".into()]]);
        assert_eq!(text, " name     n\n────────────\n a      100\n", "a table");
        assert_eq!(block("t", &[("a", "x".into()), ("long", "y".into())]), "t\n  a     x\n  long  y\n", "a block");
    }
}
