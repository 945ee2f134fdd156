//! Joining a prelude and plain WGSL files into one text.
//!
//! WGSL declarations at module scope do not depend on order, so joining files is enough; a table of lines
//! leads an error message back to the file that it came from. Loops that ask for it are written out (`unroll`).

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::unroll::unroll;
use super::{Constant, GRID_WIDTH, KernelSpec, Part, words};
use crate::compression::hidden::Side;

/// A joined text and where its lines came from.
#[derive(Clone, Debug)]
pub struct LinkedShader {
    /// WGSL.
    pub wgsl: String,
    /// The file of each line, and its line there, from 1.
    pub lines: Vec<(&'static str, usize)>,
}

/// Joins the prelude and the modules of `spec`.
pub fn link(spec: &KernelSpec) -> LinkedShader {
    // WGSL wants these before everything else.
    let directives: BTreeSet<&str> =
        spec.parts.iter().flat_map(|part| part.module.text.lines()).filter(is_directive).collect();
    let mut wgsl: String = directives.into_iter().flat_map(|directive| [directive, "\n"]).collect();
    let _ = writeln!(wgsl, "const GRID_WIDTH = {GRID_WIDTH}u;");
    for (name, constant) in &spec.constants {
        let _ = match constant {
            Constant::U32(value) => writeln!(wgsl, "const {name} = {value}u;"),
            Constant::Bool(value) => writeln!(wgsl, "const {name} = {value};"),
            // The shortest decimal that reads back as the same number.
            Constant::F32(bits) => writeln!(wgsl, "const {name} = {:?}f;", f32::from_bits(*bits)),
        };
    }
    let mut lines = vec![("prelude", 0); wgsl.lines().count()];
    lines.iter_mut().zip(1..).for_each(|(line, number)| line.1 = number);
    let numbers = spec.constants.iter().filter_map(|(name, constant)| match constant {
        Constant::U32(value) => Some((name.as_ref(), *value)),
        Constant::Bool(_) | Constant::F32(_) => None,
    });
    let numbers = numbers.collect();
    for Part { module, side } in &spec.parts {
        let renamed = side.map(|side| rename(module.text, side));
        for (text, number) in unroll(renamed.as_deref().unwrap_or(module.text), &numbers) {
            wgsl.push_str(if is_directive(&text.as_str()) { "" } else { &text });
            wgsl.push('\n');
            lines.push((module.name, number));
        }
    }
    LinkedShader { wgsl, lines }
}

/// Whether a line switches on an extension of the language.
fn is_directive(line: &&str) -> bool {
    line.starts_with("enable ")
}

/// A text whose names of a codec are those of one side.
fn rename(text: &str, side: Side) -> String {
    let (lower, upper, camel) = match side {
        Side::Key => ("key_", "KEY_", "Key"),
        Side::Value => ("value_", "VALUE_", "Value"),
    };
    words::replace(text, |word| {
        let prefix = match word {
            _ if word.starts_with("codec_") => lower,
            _ if word.starts_with("CODEC_") => upper,
            _ if word.starts_with("Codec") => camel,
            _ if word.starts_with("side_") => return Some(format!("{lower}{}", &word["side_".len()..]).into()),
            _ => return word.strip_prefix("SIDE_").map(|name| format!("{upper}{name}").into()),
        };
        Some(format!("{prefix}{word}").into())
    })
}

impl LinkedShader {
    /// Which file, and which line in it, a line (from 1) of the joined text came from.
    pub fn origin(&self, line: usize) -> (&'static str, usize) {
        self.lines.get(line.max(1) - 1).copied().unwrap_or(("prelude", line))
    }

    /// Parses and validates with naga.
    ///
    /// # Errors
    /// `file:line: message` of the first error.
    pub fn validate(&self) -> Result<(naga::Module, naga::valid::ModuleInfo), String> {
        let module = naga::front::wgsl::parse_str(&self.wgsl).map_err(|e| {
            let line = e.location(&self.wgsl).map_or(1, |l| l.line_number as usize);
            let (file, line) = self.origin(line);
            format!("{file}:{line}: {}", e.emit_to_string(&self.wgsl))
        })?;
        let capabilities = naga::valid::Capabilities::IMMEDIATES
            | naga::valid::Capabilities::SUBGROUP
            | naga::valid::Capabilities::SHADER_FLOAT16_IN_FLOAT32
            | naga::valid::Capabilities::SHADER_FLOAT16
            | naga::valid::Capabilities::COOPERATIVE_MATRIX;
        let mut validator = naga::valid::Validator::new(naga::valid::ValidationFlags::all(), capabilities);
        let info = validator.validate(&module).map_err(|e| {
            let line = e.location(&self.wgsl).map_or(1, |l| l.line_number as usize);
            let (file, line) = self.origin(line);
            format!("{file}:{line}: {}", e.emit_to_string(&self.wgsl))
        })?;
        Ok((module, info))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Module;

    static GOOD: Module = Module { name: "good.wgsl", text: "fn twice(x: u32) -> u32 { return x * FACTOR; }\n" };
    static EXTENDED: Module =
        Module { name: "extended.wgsl", text: "enable f16;\nfn half() -> f16 { return 0.5h; }\n" };
    static BAD: Module = Module { name: "bad.wgsl", text: "// a comment\nfn broken( {\n" };

    fn spec(modules: Vec<&'static Module>) -> KernelSpec {
        let half = Constant::F32(0.5_f32.to_bits());
        let constants = [("FACTOR", Constant::U32(2)), ("ON", Constant::Bool(true)), ("HALF", half)];
        let constants = constants.map(|(name, value)| (name.into(), value)).into();
        let parts = modules.into_iter().map(Part::from).collect();
        KernelSpec { name: "test", constants, parts, bindings: &[], immediate_bytes: 0 }
    }

    #[test]
    fn an_error_names_the_file_and_its_own_line() {
        let linked = link(&spec(vec![&GOOD, &BAD]));
        let message = linked.validate().expect_err("broken text should not parse");
        assert!(message.starts_with("bad.wgsl:2:"), "{message}");
        assert!(link(&spec(vec![&GOOD])).validate().is_ok(), "the good file alone should parse");
    }

    #[test]
    fn directives_come_first_and_lines_keep_their_numbers() {
        let linked = link(&spec(vec![&GOOD, &EXTENDED, &BAD]));
        assert!(linked.wgsl.starts_with("enable f16;\n"), "{}", linked.wgsl);
        let message = linked.validate().expect_err("broken text should not parse");
        assert!(message.starts_with("bad.wgsl:2:"), "{message}");
        let linked = link(&spec(vec![&GOOD, &EXTENDED]));
        linked.validate().unwrap_or_else(|e| panic!("{e}"));
    }

    #[test]
    fn a_file_joined_for_a_side_has_the_names_of_that_side() {
        let text =
            "struct CodecRow { x: u32 } // SIDE_AT\nfn codec_row() -> CodecRow { return CODEC_A + SIDE_AT + side; }";
        assert_eq!(
            rename(text, Side::Key),
            "struct KeyCodecRow { x: u32 } // KEY_AT\nfn key_codec_row() -> KeyCodecRow { return KEY_CODEC_A + KEY_AT + side; }",
            "keys"
        );
        assert_eq!(rename("codec_a(SIDE_B, side_c)", Side::Value), "value_codec_a(VALUE_B, value_c)", "values");
    }
}
