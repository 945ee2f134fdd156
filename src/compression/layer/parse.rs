//! Reading and printing layer policies.

use std::fmt;
use std::str::FromStr;

use super::{LayerPolicy, Sharing, known};
use crate::compression::syntax;

/// Part of the tokens that [`Sharing::Merge`] leaves alone where none is given, of 1000.
const RETAIN: u32 = 50;

/// The layer of `18..`.
fn from_layer(text: &str) -> Option<u32> {
    syntax::count(text.strip_suffix("..")?)
}

fn share(text: &str) -> Result<Sharing, String> {
    if !text.contains(',') {
        let every = syntax::count(text).filter(|every| *every > 1);
        return every.map(Sharing::Every).ok_or_else(|| {
            format!(
                "layer=share:{text}: give how many layers read one cache, from 2 on, or an owner per layer: 0,0,2,2"
            )
        });
    }
    let owners: Option<Vec<u16>> = text.split(',').map(|owner| owner.trim().parse().ok()).collect();
    let owners = owners.ok_or_else(|| format!("layer=share:{text}: owners are numbers of layers, such as 0,0,2,2"))?;
    for (layer, owner) in owners.iter().enumerate() {
        let owner = usize::from(*owner);
        if owner > layer {
            return Err(format!(
                "layer=share:{text}: layer {layer} can not read the cache of layer {owner}, which comes after it"
            ));
        }
        if usize::from(owners[owner]) != owner {
            return Err(format!(
                "layer=share:{text}: layer {layer} would read layer {owner}, which owns no cache but reads layer {}",
                owners[owner]
            ));
        }
    }
    Ok(Sharing::Map(owners.into()))
}

fn merge(parameters: Option<&str>) -> Result<Sharing, String> {
    let (mut from, mut retain) = (None, None);
    for parameter in parameters.into_iter().flat_map(|parameters| parameters.split(':')) {
        let read = match syntax::option(parameter, "retain") {
            Some(part) if retain.is_none() => {
                retain = syntax::permille(part);
                retain
            }
            None if from.is_none() => {
                from = from_layer(parameter);
                from
            }
            _ => None,
        };
        if read.is_none() {
            return Err(format!(
                "layer=minicache: '{parameter}' is neither the first layer, such as 16.., nor the part of the tokens that \
                 stays apart, such as retain0.05; each is given once"
            ));
        }
    }
    Ok(Sharing::Merge { from, retain_permille: retain.unwrap_or(RETAIN) })
}

impl FromStr for LayerPolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "full" {
            return Ok(Self::default());
        }
        let mut policy = Self::default();
        for method in text.split('+') {
            let (name, parameters) = match method.split_once(':') {
                Some((name, parameters)) => (name, Some(parameters)),
                None => (method, None),
            };
            let sharing = match name {
                "share" => share(parameters.unwrap_or_default())?,
                "minicache" => merge(parameters)?,
                "skip-prefill" => {
                    let from = parameters.and_then(from_layer).filter(|from| *from > 0).ok_or_else(|| {
                        format!(
                            "layer={method}: give the first layer that prompt tokens do not reach, from 1 on, such as \
                             skip-prefill:18.."
                        )
                    })?;
                    if policy.skip_prefill.replace(from).is_some() {
                        return Err(format!("layer={text} gives skip-prefill twice"));
                    }
                    continue;
                }
                _ => return Err(format!("layer={method} is not available: {}", known())),
            };
            if policy.share != Sharing::None {
                return Err(format!(
                    "layer={text}: a layer either reads another layer's cache or is merged with it, by one method; two \
                     would take the same layers"
                ));
            }
            policy.share = sharing;
        }
        Ok(policy)
    }
}

impl fmt::Display for Sharing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("full"),
            Self::Every(every) => write!(f, "share:{every}"),
            Self::Map(owners) => {
                let owners: Vec<_> = owners.iter().map(ToString::to_string).collect();
                write!(f, "share:{}", owners.join(","))
            }
            Self::Merge { from, retain_permille } => {
                f.write_str("minicache")?;
                if let Some(from) = from {
                    write!(f, ":{from}..")?;
                }
                if *retain_permille == RETAIN { Ok(()) } else { write!(f, ":retain{}", syntax::part(*retain_permille)) }
            }
        }
    }
}

impl fmt::Display for LayerPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.share, self.skip_prefill) {
            (share, None) => share.fmt(f),
            (Sharing::None, Some(from)) => write!(f, "skip-prefill:{from}.."),
            (share, Some(from)) => write!(f, "{share}+skip-prefill:{from}.."),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::examples;
    use super::*;

    fn read(text: &str) -> LayerPolicy {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn what_is_printed_parses_back() {
        for policy in examples() {
            assert_eq!(policy.to_string().parse(), Ok(policy.clone()), "{policy}");
        }
        assert_eq!(read("minicache:retain0.05").to_string(), "minicache", "defaults are left out");
        assert_eq!(read("skip-prefill:9..+share:3").to_string(), "share:3+skip-prefill:9..", "one order");
        for (text, reason) in [
            ("", "layer knows full, share:N"),
            ("drop:3", "layer knows full"),
            ("share", "from 2 on"),
            ("share:1", "from 2 on"),
            ("share:0,x", "numbers of layers"),
            ("share:0,2,2", "comes after"),
            ("share:1,1", "comes after"),
            ("share:0,0,1", "owns no cache but reads layer 0"),
            ("minicache:16", "first layer, such as 16.."),
            ("minicache:1..:2..", "once"),
            ("minicache:retain2", "retain0.05"),
            ("skip-prefill", "from 1 on"),
            ("skip-prefill:0..", "from 1 on"),
            ("skip-prefill:3", "such as"),
            ("skip-prefill:3..+skip-prefill:4..", "twice"),
            ("share:2+minicache", "the same layers"),
            ("minicache+share:2", "the same layers"),
            ("share:2+full", "not available"),
        ] {
            let refused = text.parse::<LayerPolicy>().expect_err(text);
            assert!(refused.contains(reason), "{text}: {refused}");
        }
    }
}
