//! Writing loops out, where a shader asks for it.
//!
//! Arrays in functions stay in registers only where every index is a constant. Whether a driver unrolls a loop to get
//! there is its own decision, and drivers that bound loops never do. So a loop whose line ends in `// unroll`,
//!
//! ```text
//! for (var u = 0u; u < LOADS; u++) {  // unroll
//!   raw[u] = load(first + u);
//! }
//! ```
//!
//! is replaced by its body, once for each value of the variable, in braces of its own. The bound is a literal or a `u32`
//! constant of the prelude. The file stays WGSL that means the same without this pass.

use std::collections::HashMap;

use super::words;

/// A line of text and the line of the file that it came from.
pub(super) type Line = (String, usize);

const MARK: &str = "// unroll";

/// Writes out the marked loops of a file's text.
///
/// # Panics
/// When a marked loop is not of the form above or its bound is unknown: files are part of the crate, and a test links all of them.
pub(super) fn unroll(text: &str, constants: &HashMap<&str, u32>) -> Vec<Line> {
    let lines: Vec<Line> = text.lines().map(str::to_owned).zip(1..).collect();
    // Most files have no such loop.
    if text.contains(MARK) { expand(&lines, constants) } else { lines }
}

fn expand(lines: &[Line], constants: &HashMap<&str, u32>) -> Vec<Line> {
    let mut out = Vec::with_capacity(lines.len());
    let mut i = 0;
    while let Some((line, number)) = lines.get(i) {
        i += 1;
        if !line.trim_end().ends_with(MARK) {
            out.push((line.clone(), *number));
            continue;
        }
        let (head, inline) = line.split_once('{').expect("a loop that is written out should open its body on its line");
        let (variable, count) = parse(head, constants);
        let body = match inline.rsplit_once(MARK).expect("the line ends in the mark").0.trim_end().strip_suffix('}') {
            Some(statements) => vec![(statements.to_owned(), *number)],
            None => {
                let length = body_length(&lines[i..]);
                let body = expand(&lines[i..i + length], constants);
                i += length + 1;
                body
            }
        };
        for value in 0..count {
            let value = format!("{value}u");
            out.push(("{".to_owned(), *number));
            let replaced = |text: &str| words::replace(text, |word| (word == variable).then(|| value.as_str().into()));
            out.extend(body.iter().map(|(text, number)| (replaced(text), *number)));
            out.push(("}".to_owned(), *number));
        }
    }
    out
}

/// Lines up to the one that closes the body.
fn body_length(lines: &[Line]) -> usize {
    let mut depth = 1;
    for (i, (line, _)) in lines.iter().enumerate() {
        for c in line.split("//").next().unwrap_or_default().chars() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                return i;
            }
        }
    }
    panic!("a loop that is written out should end on a line of its own")
}

/// The variable and the number of rounds of `for (var u = 0u; u < BOUND; u++) `.
fn parse<'a>(head: &'a str, constants: &HashMap<&str, u32>) -> (&'a str, u32) {
    let parsed = (|| {
        let inside = head.trim().strip_prefix("for (var ")?.strip_suffix(')')?;
        let (variable, rest) = inside.split_once(" = 0u; ")?;
        let bound = rest.strip_prefix(variable)?.strip_prefix(" < ")?.strip_suffix(&format!("; {variable}++"))?;
        let literal = bound.strip_suffix('u').and_then(|digits| digits.parse().ok());
        Some((variable, literal.or_else(|| constants.get(bound).copied())?))
    })();
    parsed.unwrap_or_else(|| panic!("'{head}' is no loop from 0u to a constant of the prelude"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(source: &str) -> String {
        let constants = HashMap::from([("LOADS", 2), ("NONE", 0)]);
        unroll(source, &constants).into_iter().map(|(line, _)| line.trim().to_owned() + "\n").collect()
    }

    #[test]
    fn a_loop_is_its_body_once_for_each_value() {
        let source = "a();\nfor (var u = 0u; u < LOADS; u++) {  // unroll\n  if (x.u > u) { raw[u] = 0u; }\n}\nb();\n";
        let expected = "a();\n{\nif (x.u > 0u) { raw[0u] = 0u; }\n}\n{\nif (x.u > 1u) { raw[1u] = 0u; }\n}\nb();\n";
        assert_eq!(text(source), expected, "members and literals keep their names");
        assert_eq!(
            text("for (var u = 0u; u < 2u; u++) { f(u); }  // unroll"),
            "{\nf(0u);\n}\n{\nf(1u);\n}\n",
            "one line"
        );
        assert_eq!(text("for (var u = 0u; u < NONE; u++) { f(u); }  // unroll\ng();"), "g();\n", "no rounds");
        assert_eq!(
            text("for (var u = 0u; u < 9u; u++) { f(u); }"),
            "for (var u = 0u; u < 9u; u++) { f(u); }\n",
            "not marked"
        );
    }

    #[test]
    fn loops_may_be_nested_and_lines_keep_their_numbers() {
        let source = "for (var i = 0u; i < 2u; i++) {  // unroll\n  for (var j = 0u; j < 2u; j++) {  // unroll\n    f(i, j);\n  }\n}";
        let lines = unroll(source, &HashMap::new());
        let calls: Vec<_> = lines.iter().filter(|(line, _)| line.contains('f')).collect();
        assert_eq!(
            calls.iter().map(|(line, _)| line.trim()).collect::<Vec<_>>(),
            ["f(0u, 0u);", "f(0u, 1u);", "f(1u, 0u);", "f(1u, 1u);"]
        );
        assert!(calls.iter().all(|(_, number)| *number == 3), "an error is shown where it is written");
    }

    #[test]
    #[should_panic(expected = "is no loop from 0u to a constant of the prelude")]
    fn an_unknown_bound_is_refused() {
        text("for (var u = 0u; u < OTHER; u++) { f(u); }  // unroll");
    }
}
