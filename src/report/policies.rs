//! The report of `policies`: every method of the layer, head and token dimensions.

use std::fmt;

use serde::Serialize;

use super::Program;
use super::table::{Align, table};
use crate::compression::{head, layer, token};

/// Every method of the three registries.
#[derive(Clone, Debug, Serialize)]
pub struct PoliciesReport {
    /// The program.
    pub program: Program,
    /// In the order of the registries.
    pub policies: Vec<PolicyReport>,
}

/// One method.
#[derive(Clone, Debug, Serialize)]
pub struct PolicyReport {
    /// Its dimension: `layer`, `head` or `token`.
    pub dimension: &'static str,
    /// Its name.
    pub name: &'static str,
    /// As `--compress` reads it, parameters as letters.
    pub syntax: &'static str,
    /// What it does.
    pub summary: &'static str,
    /// What is taken where a parameter is left out, as it is written.
    pub defaults: Vec<String>,
    /// Where it comes from; empty where nowhere.
    pub source: &'static str,
    /// Written-out examples.
    pub examples: &'static [&'static str],
}

impl PoliciesReport {
    /// The registries.
    pub fn new() -> Self {
        let owned = |defaults: &[&str]| defaults.iter().map(|text| (*text).to_owned()).collect();
        let layers = layer::REGISTRY.iter().map(|entry| {
            let layer::Entry { name, syntax, summary, source, defaults, examples } = *entry;
            PolicyReport { dimension: "layer", name, syntax, summary, defaults: owned(defaults), source, examples }
        });
        let heads = head::REGISTRY.iter().map(|entry| {
            let head::Entry { name, syntax, summary, source, defaults, examples } = *entry;
            PolicyReport { dimension: "head", name, syntax, summary, defaults: owned(defaults), source, examples }
        });
        let tokens = token::REGISTRY.iter().map(|entry| {
            let token::Entry { name, syntax, summary, source, parameters, examples, .. } = *entry;
            let defaults = parameters.iter().map(|p| format!("{}{}", p.name, p.show(p.default))).collect();
            PolicyReport { dimension: "token", name, syntax, summary, defaults, source, examples }
        });
        Self { program: Program::THIS, policies: layers.chain(heads).chain(tokens).collect() }
    }
}

impl Default for PoliciesReport {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for PoliciesReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Align::Left;
        let columns = [("method", Left), ("what it does", Left), ("defaults", Left)];
        for dimension in ["layer", "head", "token"] {
            writeln!(f, "{dimension}")?;
            let own = self.policies.iter().filter(|policy| policy.dimension == dimension);
            let rows = own.map(|p| vec![p.syntax.to_owned(), p.summary.to_owned(), p.defaults.join(", ")]);
            writeln!(f, "{}", table(&columns, rows))?;
        }
        writeln!(
            f,
            "BUDGET is the part of the tokens that stays (0.25; 1 is all) or a number of tokens per list (512). Methods by\n\
             which tokens leave also take :everyN, to evict while decoding whenever N tokens came, within a budget in tokens;\n\
             and :rerotate, to turn kept keys to their places in the cache. Layer methods join with +."
        )?;
        writeln!(f, "\nsources")?;
        let known = self.policies.iter().filter(|policy| !policy.source.is_empty());
        known.into_iter().try_for_each(|policy| writeln!(f, "  {}: {}", policy.name, policy.source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compression::{Compression, examples, hidden::HiddenCodec};

    #[test]
    fn every_method_is_listed_with_its_source() {
        let report = PoliciesReport::new();
        let text = report.to_string();
        for policy in &report.policies {
            for part in [policy.syntax, policy.summary, policy.source] {
                assert!(text.contains(part), "{part} in: {text}");
            }
            for example in policy.examples {
                let parsed: Compression = example.parse().unwrap_or_else(|error| panic!("{example}: {error}"));
                assert!(parsed.short().starts_with(&format!("{}=", policy.dimension)), "{example}: {parsed}");
            }
        }
        let listed: usize = report.policies.iter().map(|policy| policy.examples.len()).sum();
        assert_eq!(listed, examples().iter().filter(|c| c.hidden == HiddenCodec::F16).count() - 1, "all but f16");
        let snapkv = report.policies.iter().find(|policy| policy.name == "snapkv").expect("snapkv should be listed");
        assert_eq!(snapkv.defaults, ["window32", "kernel5"], "as they are written");
    }
}
