//! What `run` asks: documents, questions, and the prompts that they make.

use std::path::PathBuf;

use anyhow::{Result, anyhow};
use concertina::model::Tokenizer;
use concertina::schedule::SubmitError;

use super::failure::usage;
use super::load::{Model, read_text};

/// A document and what is asked about it.
#[derive(Clone, Debug)]
pub(super) struct Inquiry {
    /// Path as given.
    pub(super) document: String,
    /// The whole text.
    text: String,
    /// The question.
    pub(super) question: String,
}

/// A prompt made of an [`Inquiry`].
#[derive(Clone, Debug)]
pub(super) struct Prompt {
    /// The tokens.
    pub(super) tokens: Vec<u32>,
    /// Of these, those before the question.
    pub(super) compressed_tokens: u32,
    /// Tokens of the whole document.
    pub(super) document_tokens: usize,
    /// Of these, tokens that are in the prompt.
    pub(super) used_tokens: usize,
}

/// Reads the documents and gives each its question.
pub(super) fn inquiries(documents: &[PathBuf], questions: &[String]) -> Result<Vec<Inquiry>> {
    let (n, m) = (documents.len(), questions.len());
    if m != 1 && m != n {
        return Err(usage(format!(
            "{m} questions for {n} document{}; give each document its --ask, or a single --ask for all",
            if n == 1 { "" } else { "s" }
        )));
    }
    if let Some(at) = questions.iter().position(|question| question.trim().is_empty()) {
        return Err(usage(format!("--ask number {} of {m} is empty", at + 1)));
    }
    let question = |i: usize| questions[if m == 1 { 0 } else { i }].clone();
    let read = |(i, path): (usize, &PathBuf)| {
        let text = read_text("document", path)?;
        Ok(Inquiry { document: path.display().to_string(), text, question: question(i) })
    };
    documents.iter().enumerate().map(read).collect()
}

/// Makes the prompt of an inquiry, with the first `limit` tokens of its document.
pub(super) fn prompt(model: &Model, inquiry: &Inquiry, limit: Option<usize>) -> Result<Prompt> {
    let tokens = model.tokenizer.encode(&inquiry.text, false)?;
    let used_tokens = limit.map_or(tokens.len(), |limit| limit.min(tokens.len()));
    let cut = (used_tokens < tokens.len()).then(|| first_text(&model.tokenizer, &tokens[..used_tokens]));
    let document = cut.as_deref().unwrap_or(&inquiry.text);
    let prompt = model.chat(&format!("{document}\n\n{}", inquiry.question))?;
    // What every question about the document begins with is compressed before the question is read.
    let any_question = model.chat(&format!("{document}\n\n"))?;
    let common = prompt.iter().zip(&any_question).take_while(|(a, b)| a == b).count();
    let compressed_tokens = u32::try_from(common).map_err(|_| anyhow!("a prompt of {common} tokens is too long"))?;
    Ok(Prompt { tokens: prompt, compressed_tokens, document_tokens: tokens.len(), used_tokens })
}

/// The text of the first tokens, without the part of a character that a cut can leave at the end.
fn first_text(tokenizer: &Tokenizer, tokens: &[u32]) -> String {
    let mut stream = tokenizer.decode_stream();
    tokens.iter().map(|&id| stream.push(id)).collect()
}

/// What is asked after the first answer, with the tokens that follow it.
pub(super) fn later(model: &Model, questions: &[String]) -> Result<Vec<(String, Vec<u32>)>> {
    if let Some(at) = questions.iter().position(|question| question.trim().is_empty()) {
        return Err(usage(format!("--then number {} of {} is empty", at + 1, questions.len())));
    }
    questions.iter().map(|question| Ok((question.clone(), model.next_turn(question)?))).collect()
}

/// Checks that prompts and answers fit in the context: `later` questions follow the first.
pub(super) fn check_length(
    inquiry: &Inquiry,
    prompt: &Prompt,
    later: &[(String, Vec<u32>)],
    max_new: u32,
    context_length: u32,
) -> Result<()> {
    let n = (prompt.tokens.len() + later.iter().map(|(_, tokens)| tokens.len()).sum::<usize>()) as u64;
    let max_new = u64::from(max_new) * (1 + later.len() as u64);
    let over = (n + max_new).saturating_sub(u64::from(context_length));
    if over == 0 {
        return Ok(());
    }
    let error = SubmitError::TooLong { prompt: n, max_new, context_length };
    // One token less, since cutting a text can change how its end is tokenised.
    let advice = match (prompt.used_tokens as u64).checked_sub(over + 1) {
        Some(left) if left > 0 => format!("; --document-tokens {left} would fit"),
        _ => String::new(),
    };
    Err(anyhow!("document '{}': {error}{advice}", inquiry.document))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_match_documents_or_serve_all() {
        let folder = tempfile::tempdir().expect("a folder");
        let paths: Vec<_> = ["a", "b"].map(|name| folder.path().join(name)).into();
        paths.iter().for_each(|path| std::fs::write(path, "text").expect("written"));
        let ask = |questions: &[&str]| {
            let questions: Vec<_> = questions.iter().map(|&q| q.to_owned()).collect();
            inquiries(&paths, &questions).map(|all| all.into_iter().map(|i| i.question).collect::<Vec<_>>())
        };
        assert_eq!(ask(&["q"]).expect("one for all"), ["q", "q"], "one for all");
        assert_eq!(ask(&["q", "r"]).expect("one each"), ["q", "r"], "one each");
        let error = ask(&["q", "r", "s"]).expect_err("three for two").to_string();
        assert!(error.starts_with("3 questions for 2 documents"), "{error}");
        assert!(ask(&["q", " "]).is_err(), "an empty question");
    }
}
