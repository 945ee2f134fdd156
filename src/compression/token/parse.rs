//! Reading and printing token policies.

use std::fmt;
use std::str::FromStr;

use super::{
    Action, Allocation, Budget, Entry, Eviction, Method, Number, Parameter, REGISTRY, Score, Share, TokenPolicy,
};
use super::{adakv, quest};
use crate::compression::syntax;

/// Whether a text begins with the name of a method.
pub(in crate::compression) fn knows(text: &str) -> bool {
    find(text.split(':').next().unwrap_or_default()).is_some()
}

fn find(name: &str) -> Option<&'static Entry> {
    REGISTRY.iter().find(|entry| entry.name == name)
}

/// All ways to write a method.
pub(in crate::compression) fn known() -> String {
    let methods: Vec<_> = REGISTRY.iter().map(|entry| entry.syntax).collect();
    format!("token knows full, {}", methods.join(", "))
}

impl FromStr for Budget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ratio = text.contains('.') || text == "1";
        let budget = if ratio {
            syntax::permille(text).filter(|p| *p > 0).map(|permille| Self::Ratio { permille })
        } else {
            syntax::count(text).filter(|n| *n > 1).map(Self::Tokens)
        };
        budget.ok_or_else(|| {
            format!(
                "'{text}' is no budget: give the part of the tokens, from 0.001 to 1, such as 0.25, \
                 or a number of tokens per list, such as 512"
            )
        })
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ratio { permille } => write!(f, "{}", syntax::part(*permille)),
            Self::Tokens(tokens) => write!(f, "{tokens}"),
        }
    }
}

/// The values of `parameters` among `options`, which are taken out.
fn take(parameters: &[Parameter], options: &mut Vec<&str>) -> Result<Vec<u32>, String> {
    let mut value_of = |parameter: &Parameter| {
        let Some(i) = options.iter().position(|option| syntax::option(option, parameter.name).is_some()) else {
            return Ok(parameter.default);
        };
        let option = options.remove(i);
        let number = &option[parameter.name.len()..];
        let (value, wanted) = match parameter.number {
            Number::From(least) => {
                (syntax::count(number).filter(|n| *n >= least), format!("a whole number from {least} on"))
            }
            Number::Odd => (syntax::count(number).filter(|n| n % 2 == 1), "an odd number".to_owned()),
            Number::Part => (syntax::permille(number), "a part from 0 to 1".to_owned()),
        };
        value.ok_or_else(|| format!("'{option}': {} is {wanted} ({})", parameter.name, parameter.summary))
    };
    parameters.iter().map(&mut value_of).collect()
}

/// The method that heads compete by.
fn scorer(options: &mut Vec<&str>) -> Result<Method, String> {
    let Some(i) = options.iter().position(|option| find(option).is_some()) else {
        return Ok(Method::SnapKv);
    };
    let name = options.remove(i);
    let refused = |why| Err(format!("adakv lets heads compete by their scores, and {name} {why}"));
    let entry = find(name).expect("the option should be a name");
    let Action::Evict(method, rule) = entry.action else {
        return refused("has none");
    };
    // Only what the rule scores and how it shares out matters here, whatever the budget.
    let rule = rule(entry.defaults(), 1);
    match (rule.score, rule.share, rule.allocation) {
        (Score::None, ..) => refused("has none"),
        (_, Share::Layer, _) => refused("has one for all heads of a layer"),
        (.., Allocation::Pyramid { .. }) => refused("shares budgets out itself; name snapkv"),
        _ => Ok(method),
    }
}

/// What is left are options that nobody took.
fn none_left(text: &str, options: &[&str], known: &[&[Parameter]], more: &[&str]) -> Result<(), String> {
    let Some(option) = options.first() else {
        return Ok(());
    };
    let names = known.iter().flat_map(|parameters| parameters.iter().map(|p| p.name)).chain(more.iter().copied());
    let names: Vec<_> = names.collect();
    if names.iter().any(|name| option == name || syntax::option(option, name).is_some()) {
        return Err(format!("'{text}': '{option}' is given twice or lacks its number"));
    }
    Err(format!("'{text}' does not know '{option}': options are {}, each followed by its number", names.join(", ")))
}

fn eviction(text: &str, entry: &Entry, budget: Budget, mut options: Vec<&str>) -> Result<Eviction, String> {
    let (method, across_heads) = match entry.action {
        Action::Evict(method, _) => (method, None),
        Action::Compete => (scorer(&mut options)?, Some(take(&[adakv::FLOOR], &mut options)?[0])),
        Action::Read => unreachable!("nothing leaves"),
    };
    let parameters = method.entry().parameters;
    let mut eviction = Eviction { across_heads, ..Eviction::new(method, budget) };
    eviction.values.iter_mut().zip(take(parameters, &mut options)?).for_each(|(value, given)| *value = given);
    if let Some(i) = options.iter().position(|option| *option == "rerotate") {
        options.remove(i);
        eviction.rerotate = true;
    }
    if let Some(i) = options.iter().position(|option| syntax::option(option, "every").is_some()) {
        let option = options.remove(i);
        let every = syntax::count(&option["every".len()..]);
        eviction.every = Some(every.ok_or_else(|| format!("'{option}': every is followed by a number of tokens"))?);
    }
    let floor: &[Parameter] = if across_heads.is_some() { &[adakv::FLOOR] } else { &[] };
    none_left(text, &options, &[parameters, floor], &["every", "rerotate"])?;
    eviction.check()?;
    Ok(eviction)
}

impl FromStr for TokenPolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "full" {
            return Ok(Self::Full);
        }
        let mut parts = text.split(':');
        let entry = parts.next().and_then(find).ok_or_else(|| format!("token={text} is not available: {}", known()))?;
        let budget = parts.next().ok_or_else(|| {
            format!(
                "token={text} lacks a budget: write {} with the part of the tokens that stays (full is all), such as \
                     {}",
                entry.syntax, entry.examples[0]
            )
        })?;
        let budget: Budget = budget.parse()?;
        let mut options: Vec<&str> = parts.collect();
        match entry.action {
            Action::Read => {
                let values = take(quest::ENTRY.parameters, &mut options)?;
                none_left(text, &options, &[quest::ENTRY.parameters], &[])?;
                Ok(Self::Quest { budget, dense_layers: values[0] })
            }
            Action::Evict(..) | Action::Compete => eviction(text, entry, budget, options).map(Self::Evict),
        }
    }
}

/// The parameters that are not as they would be anyway.
fn write_changed(f: &mut fmt::Formatter<'_>, parameters: &[Parameter], values: &[u32]) -> fmt::Result {
    let changed = parameters.iter().zip(values).filter(|(parameter, value)| parameter.default != **value);
    for (parameter, value) in changed {
        write!(f, ":{}{}", parameter.name, parameter.show(*value))?;
    }
    Ok(())
}

impl fmt::Display for Eviction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entry = self.method.entry();
        match self.across_heads {
            None => write!(f, "{}:{}", entry.name, self.budget)?,
            Some(floor) => {
                write!(f, "{}:{}", adakv::ENTRY.name, self.budget)?;
                if self.method != Method::SnapKv {
                    write!(f, ":{}", entry.name)?;
                }
                write_changed(f, &[adakv::FLOOR], &[floor])?;
            }
        }
        write_changed(f, entry.parameters, &self.values)?;
        if let Some(every) = self.every {
            write!(f, ":every{every}")?;
        }
        if self.rerotate { f.write_str(":rerotate") } else { Ok(()) }
    }
}

impl fmt::Display for TokenPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full => f.write_str("full"),
            Self::Evict(eviction) => eviction.fmt(f),
            Self::Quest { budget, dense_layers } => {
                write!(f, "{}:{budget}", quest::ENTRY.name)?;
                write_changed(f, quest::ENTRY.parameters, &[*dense_layers])
            }
        }
    }
}
