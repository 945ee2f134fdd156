//! From what a user calls a model to a file on this machine.

use std::path::PathBuf;

use hf_hub::api::sync::ApiBuilder;

use super::{ModelError, one_line};

/// The file that `spec` means.
///
/// `spec` is the path of a file, or a Hugging Face repository `owner/name` with one GGUF file, or
/// `owner/name/file.gguf`. Files from a repository are fetched once, with a progress bar, and kept in the cache of
/// the Hugging Face tools (`HF_HOME`); `HF_ENDPOINT` names another server.
///
/// # Errors
/// [`ModelError::NotFound`] when there is no such file or repository, the repository has no or several GGUF files
/// and none is named, or the transfer fails.
pub fn locate(spec: &str) -> Result<PathBuf, ModelError> {
    let path = PathBuf::from(spec);
    if path.is_file() {
        return Ok(path);
    }
    let not_found = |reason: String| ModelError::NotFound { spec: spec.to_owned(), reason };
    let (repository, file) = split_spec(spec).ok_or_else(|| {
        not_found(
            "no such file, and not a Hugging Face repository either; give a path, owner/name or owner/name/file.gguf"
                .to_owned(),
        )
    })?;
    let failed = |error: hf_hub::api::sync::ApiError| {
        not_found(format!(
            "no such file, and fetching it from the Hugging Face repository {repository} failed ({}); check the \
             name and the network, or give the path of a file",
            one_line(&error)
        ))
    };
    let api = ApiBuilder::from_env().with_progress(true).build().map_err(failed)?.model(repository.clone());
    let file = match file {
        Some(file) => file,
        None => {
            let siblings = api.info().map_err(failed)?.siblings;
            only_gguf(siblings.into_iter().map(|s| s.rfilename).collect(), &repository).map_err(not_found)?
        }
    };
    api.get(&file).map_err(failed)
}

/// `owner/name` and, where named, the file in it.
fn split_spec(spec: &str) -> Option<(String, Option<String>)> {
    // A name with a leading dot or slash, or of one part, was meant as a path.
    let is_name = |part: &&str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    let parts: Vec<&str> = spec.split('/').collect();
    if parts.len() < 2 || !parts.iter().all(is_name) {
        return None;
    }
    let repository = parts[..2].join("/");
    match parts.len() {
        2 if parts[1].ends_with(".gguf") => None,
        2 => Some((repository, None)),
        _ if spec.ends_with(".gguf") => Some((repository, Some(parts[2..].join("/")))),
        _ => None,
    }
}

/// The one GGUF file among a repository's files, or a sentence that says why there is not one.
fn only_gguf(mut files: Vec<String>, repository: &str) -> Result<String, String> {
    files.retain(|file| file.ends_with(".gguf"));
    files.sort();
    match files.as_slice() {
        [file] => Ok(file.clone()),
        [] => Err("the repository has no .gguf file; name a repository with GGUF files".to_owned()),
        several => Err(format!(
            "the repository has {} .gguf files; name one, as in {repository}/{}: {}",
            several.len(),
            several[0],
            several.join(", ")
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_and_files_are_told_from_paths() {
        assert_eq!(split_spec("o/n"), Some(("o/n".into(), None)), "a repository");
        assert_eq!(split_spec("o/n/f.gguf"), Some(("o/n".into(), Some("f.gguf".into()))), "a file in one");
        assert_eq!(split_spec("o/n/q4/f.gguf"), Some(("o/n".into(), Some("q4/f.gguf".into()))), "in a folder");
        for path in
            ["model.gguf", "./o/n", "/o/n", "../n", "o/../n/f.gguf", "dir/model.gguf", "o/n/readme.md", "", "a/"]
        {
            assert_eq!(split_spec(path), None, "{path} is no repository");
        }
    }

    #[test]
    fn several_files_are_listed() {
        let files = |names: &[&str]| names.iter().map(|&s| s.to_owned()).collect::<Vec<_>>();
        assert_eq!(only_gguf(files(&["README.md", "a.gguf"]), "o/n"), Ok("a.gguf".into()), "one");
        let message = only_gguf(files(&["b.gguf", "a.gguf"]), "o/n").expect_err("two files are ambiguous");
        assert!(message.contains("2 .gguf files") && message.ends_with("a.gguf, b.gguf"), "{message}");
        assert!(only_gguf(files(&["x.bin"]), "o/n").is_err(), "none");
    }

    #[test]
    fn a_missing_path_is_a_clear_error_without_a_network() {
        let message = locate("./no/such/model.gguf").expect_err("there is no such file").to_string();
        assert!(message.starts_with("no model './no/such/model.gguf': no such file"), "{message}");
    }
}
