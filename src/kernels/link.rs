//! Joining a prelude and plain WGSL files into one text.
//!
//! WGSL declarations at module scope do not depend on order, so joining files is enough; a table of first lines
//! leads an error message back to the file that it came from.

use std::fmt::Write as _;

use super::{Constant, GRID_WIDTH, KernelSpec, Part};
use crate::compression::hidden::Side;

/// A joined text and where its files begin.
#[derive(Clone, Debug)]
pub struct LinkedShader {
    /// WGSL.
    pub wgsl: String,
    /// First line (from 1) of each file, ascending.
    pub files: Vec<(usize, &'static str)>,
}

/// Joins the prelude and the modules of `spec`.
pub fn link(spec: &KernelSpec) -> LinkedShader {
    let mut wgsl = String::new();
    let _ = writeln!(wgsl, "const GRID_WIDTH = {GRID_WIDTH}u;");
    for (name, constant) in &spec.constants {
        let _ = match constant {
            Constant::U32(value) => writeln!(wgsl, "const {name} = {value}u;"),
            Constant::Bool(value) => writeln!(wgsl, "const {name} = {value};"),
            // The shortest decimal that reads back as the same number.
            Constant::F32(bits) => writeln!(wgsl, "const {name} = {:?}f;", f32::from_bits(*bits)),
        };
    }
    let mut files = vec![(1, "prelude")];
    for Part { module, side } in &spec.parts {
        files.push((wgsl.lines().count() + 1, module.name));
        match side {
            None => wgsl.push_str(module.text),
            Some(side) => wgsl.push_str(&rename(module.text, *side)),
        }
        if !wgsl.ends_with('\n') {
            wgsl.push('\n');
        }
    }
    LinkedShader { wgsl, files }
}

/// A text whose names of a codec are those of one side.
fn rename(text: &str, side: Side) -> String {
    let (lower, upper, camel) = match side {
        Side::Key => ("key_", "KEY_", "Key"),
        Side::Value => ("value_", "VALUE_", "Value"),
    };
    let mut out = String::with_capacity(text.len() + text.len() / 8);
    let mut rest = text;
    while let Some(start) = rest.find(|c: char| c.is_ascii_alphabetic() || c == '_') {
        let (before, from) = rest.split_at(start);
        let end = from.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(from.len());
        let (word, after) = from.split_at(end);
        out.push_str(before);
        if word.starts_with("codec_") {
            out.push_str(lower);
        } else if word.starts_with("CODEC_") {
            out.push_str(upper);
        } else if word.starts_with("Codec") {
            out.push_str(camel);
        }
        match word.strip_prefix("SIDE_") {
            Some(name) => {
                out.push_str(upper);
                out.push_str(name);
            }
            None => out.push_str(word),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

impl LinkedShader {
    /// Which file, and which line in it, a line of the joined text came from.
    pub fn origin(&self, line: usize) -> (&'static str, usize) {
        let at = self.files.partition_point(|(first, _)| *first <= line).max(1) - 1;
        let (first, name) = self.files[at];
        (name, line + 1 - first)
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
            | naga::valid::Capabilities::SHADER_FLOAT16_IN_FLOAT32;
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
    fn a_file_joined_for_a_side_has_the_names_of_that_side() {
        let text =
            "struct CodecRow { x: u32 } // SIDE_AT\nfn codec_row() -> CodecRow { return CODEC_A + SIDE_AT + side; }";
        assert_eq!(
            rename(text, Side::Key),
            "struct KeyCodecRow { x: u32 } // KEY_AT\nfn key_codec_row() -> KeyCodecRow { return KEY_CODEC_A + KEY_AT + side; }",
            "keys"
        );
        assert_eq!(rename("codec_a(SIDE_B", Side::Value), "value_codec_a(VALUE_B", "values");
    }
}
