//! Joining a prelude and plain WGSL files into one text.
//!
//! WGSL declarations at module scope do not depend on order, so joining files is enough; a table of first lines
//! leads an error message back to the file that it came from.

use std::fmt::Write as _;

use super::{Constant, GRID_WIDTH, KernelSpec};

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
        };
    }
    let mut files = vec![(1, "prelude")];
    for module in &spec.modules {
        files.push((wgsl.lines().count() + 1, module.name));
        wgsl.push_str(module.text);
        if !module.text.ends_with('\n') {
            wgsl.push('\n');
        }
    }
    LinkedShader { wgsl, files }
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
        let constants = vec![("FACTOR", Constant::U32(2)), ("ON", Constant::Bool(true))];
        KernelSpec { name: "test", constants, modules, bindings: &[], immediate_bytes: 0 }
    }

    #[test]
    fn an_error_names_the_file_and_its_own_line() {
        let linked = link(&spec(vec![&GOOD, &BAD]));
        let message = linked.validate().expect_err("broken text should not parse");
        assert!(message.starts_with("bad.wgsl:2:"), "{message}");
        assert!(link(&spec(vec![&GOOD])).validate().is_ok(), "the good file alone should parse");
    }
}
