//! Chat templates: from messages to the prompt that a model was trained on.
//!
//! A template is a program in the file (Jinja), and messages are text of users; neither may forge the other. So the
//! template never sees a message's text. It renders placeholders, the result is cut at them, and only the template's
//! own parts are searched for markers:
//!
//! ```text
//! messages ──> placeholders ──> template ──> "<|im_start|>user\n" P0 "<|im_end|>\n<|im_start|>assistant\n"
//!                                                 markers         |      markers
//! contents ───────────────────────────────────────────────────> text
//! ```
//!
//! Text on both sides of a cut is tokenised together, so the ids are those of the whole prompt. The price: a template
//! that looks into a message (searches it, cuts it at a marker) works on the placeholder instead. White space at the
//! ends of a message stays visible to the template, because many trim it.
//!
//! A template's output, size, nesting, ranges and instructions are bounded; the texts it builds in variables are
//! not. A file with a malicious template can therefore use memory, but not read or forge anything.

use std::io::Write;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind, context};
use serde::{Deserialize, Serialize};

use super::tokenizer::Fragment;
use super::{GgufFile, ModelError, Tokenizer, one_line};

/// Largest template.
const TEMPLATE_BYTES_MAX: usize = 256 << 10;
/// Largest rendering, without the contents of messages.
const RENDERED_BYTES_MAX: usize = 4 << 20;
/// Nested calls and blocks of a template.
const RECURSION_MAX: usize = 100;
/// Instructions that a template may execute: a chat of thousands of messages needs fewer.
const FUEL_MAX: u64 = 1_000_000;

/// Around a placeholder: private characters, which no filter for letters or white space changes.
const OPEN: char = '\u{F8F0}';
const CLOSE: char = '\u{F8F1}';

/// Who says something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions before the conversation.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
}

impl Role {
    /// The name that templates know it by.
    pub const fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who says it.
    pub role: Role,
    /// What is said, as plain text: markers in it have no effect.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into() }
    }
}

/// The template of a model file.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
}

impl ChatTemplate {
    /// The template in a file; `None` when the file has none, and prompts are to be given raw.
    ///
    /// # Errors
    /// [`ModelError::ChatTemplate`] when it is too large or is not a Jinja template, [`ModelError::Malformed`] when
    /// it is not a text.
    pub fn from_gguf(gguf: &GgufFile) -> Result<Option<Self>, ModelError> {
        gguf.text("tokenizer.chat_template")?.map(Self::new).transpose()
    }

    fn new(source: &str) -> Result<Self, ModelError> {
        if source.len() > TEMPLATE_BYTES_MAX {
            let message = format!("it has {} bytes, at most {TEMPLATE_BYTES_MAX} are read", source.len());
            return Err(ModelError::ChatTemplate(message));
        }
        let mut environment = Environment::new();
        // As in the transformers library, for which templates are written.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| template_error(&e))?);
        environment.set_recursion_limit(RECURSION_MAX);
        environment.set_fuel(Some(FUEL_MAX));
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned("chat", source.to_owned()).map_err(|e| template_error(&e))?;
        Ok(Self { environment })
    }

    /// The prompt for the model's next turn.
    ///
    /// # Errors
    /// [`ModelError::ChatTemplate`] when the template refuses the messages, takes a message apart, leaves out the
    /// last one, or writes too much.
    pub fn prompt_tokens(&self, tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<u32>, ModelError> {
        let segments = self.segments(tokenizer, messages)?;
        Self::encode(tokenizer, messages, segments)
    }

    /// What follows an answer: the end of its turn, the next question, and the beginning of the next answer.
    ///
    /// # Errors
    /// As [`Self::prompt_tokens`]; [`ModelError::ChatTemplate`] also when the template leaves out answers before the last
    /// question.
    pub fn next_turn_tokens(&self, tokenizer: &Tokenizer, question: &str) -> Result<Vec<u32>, ModelError> {
        let messages = [(Role::User, "a"), (Role::Assistant, "b"), (Role::User, question)];
        let messages = messages.map(|(role, text)| Message::new(role, text));
        let segments = self.segments(tokenizer, &messages)?;
        let answer = segments.iter().position(|segment| *segment == Segment::Content(1));
        let answer = answer.ok_or_else(|| ModelError::ChatTemplate("it leaves out an answer".to_owned()))?;
        Self::encode(tokenizer, &messages, segments.into_iter().skip(answer + 1))
    }

    fn segments(&self, tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<Segment>, ModelError> {
        let marker = |id: Option<u32>| id.and_then(|id| tokenizer.marker_text(id)).unwrap_or_default();
        self.render(messages, marker(tokenizer.bos_id()), marker(tokenizer.eos_id()))
    }

    fn encode(
        tokenizer: &Tokenizer,
        messages: &[Message],
        segments: impl IntoIterator<Item = Segment>,
    ) -> Result<Vec<u32>, ModelError> {
        let mut fragments: Vec<Fragment> = Vec::new();
        for segment in segments {
            let parts = match segment {
                Segment::Template(text) => tokenizer.fragments(&text),
                Segment::Content(i) => vec![Fragment::Text(messages[i].content.trim().to_owned())],
            };
            for part in parts {
                match (fragments.last_mut(), part) {
                    (Some(Fragment::Text(before)), Fragment::Text(text)) => before.push_str(&text),
                    (_, part) => fragments.push(part),
                }
            }
        }
        tokenizer.encode_fragments(&fragments)
    }

    /// Renders placeholders in place of the contents and cuts the result at them.
    fn render(&self, messages: &[Message], bos: &str, eos: &str) -> Result<Vec<Segment>, ModelError> {
        let template = self.environment.get_template("chat").map_err(|e| template_error(&e))?;
        let stem = unused_stem(messages, template.source());
        let placeholders: Vec<String> = (0..messages.len()).map(|i| format!("{stem}{i}{CLOSE}")).collect();
        let turns: Vec<Value> = messages
            .iter()
            .zip(&placeholders)
            .map(|(message, placeholder)| {
                let content = &message.content;
                let inner = content.trim_start();
                let (lead, trail) = (&content[..content.len() - inner.len()], &inner[inner.trim_end().len()..]);
                context! { role => message.role.name(), content => format!("{lead}{placeholder}{trail}") }
            })
            .collect();
        let mut out = Bounded(Vec::new());
        template
            .render_captured_to(
                context! { messages => turns, add_generation_prompt => true, bos_token => bos, eos_token => eos },
                &mut out,
            )
            .map_err(|e| template_error(&e))?;
        let rendered = String::from_utf8(out.0)
            .map_err(|_| ModelError::ChatTemplate("it wrote bytes that are not UTF-8".to_owned()))?;
        cut(&rendered, &stem, &placeholders)
    }
}

/// A part of a rendered template.
#[derive(Debug, PartialEq, Eq)]
enum Segment {
    /// Text of the template itself.
    Template(String),
    /// The trimmed content of this message.
    Content(usize),
}

/// The beginning of all placeholders: one that occurs nowhere else. Counting up is as good as chance here, because
/// the messages are fixed before the count starts.
fn unused_stem(messages: &[Message], template: &str) -> String {
    let mut count = 0u64;
    loop {
        let stem = format!("{OPEN}{count}:");
        if !template.contains(&stem) && messages.iter().all(|message| !message.content.contains(&stem)) {
            return stem;
        }
        count += 1;
    }
}

/// Cuts a rendering at its placeholders.
fn cut(rendered: &str, stem: &str, placeholders: &[String]) -> Result<Vec<Segment>, ModelError> {
    let mut segments = Vec::new();
    let mut last_seen = false;
    let mut rest = rendered;
    while let Some(at) = rest.find(stem) {
        if at > 0 {
            segments.push(Segment::Template(rest[..at].to_owned()));
        }
        let index = placeholders.iter().position(|placeholder| rest[at..].starts_with(placeholder.as_str()));
        let Some(index) = index else {
            return Err(ModelError::ChatTemplate("it takes the text of a message apart".to_owned()));
        };
        last_seen |= index + 1 == placeholders.len();
        segments.push(Segment::Content(index));
        rest = &rest[at + placeholders[index].len()..];
    }
    if !rest.is_empty() {
        segments.push(Segment::Template(rest.to_owned()));
    }
    let torn = segments.iter().any(|s| matches!(s, Segment::Template(text) if text.contains([OPEN, CLOSE])));
    if torn {
        return Err(ModelError::ChatTemplate("it takes the text of a message apart".to_owned()));
    }
    if !placeholders.is_empty() && !last_seen {
        return Err(ModelError::ChatTemplate("it leaves out the last message".to_owned()));
    }
    Ok(segments)
}

/// A buffer that refuses to grow past [`RENDERED_BYTES_MAX`].
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > RENDERED_BYTES_MAX {
            return Err(std::io::Error::other(format!("more than {RENDERED_BYTES_MAX} bytes of output")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn template_error(error: &Error) -> ModelError {
    ModelError::ChatTemplate(one_line(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + \
        message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

    fn user(content: &str) -> Vec<Message> {
        vec![Message::new(Role::User, content)]
    }

    fn render(source: &str, messages: &[Message]) -> Result<Vec<Segment>, ModelError> {
        ChatTemplate::new(source)?.render(messages, "<s>", "</s>")
    }

    fn template(text: &str) -> Segment {
        Segment::Template(text.to_owned())
    }

    #[test]
    fn contents_are_segments_of_their_own() {
        let messages = [Message::new(Role::System, "Be brief."), Message::new(Role::User, "<|im_end|>")];
        let expected = [
            template("<|im_start|>system\n"),
            Segment::Content(0),
            template("<|im_end|>\n<|im_start|>user\n"),
            Segment::Content(1),
            template("<|im_end|>\n<|im_start|>assistant\n"),
        ];
        assert_eq!(render(CHATML, &messages).expect("a known template"), expected, "ChatML");
    }

    #[test]
    fn text_that_looks_like_a_placeholder_is_text() {
        let messages = user(&format!("{OPEN}0:0{CLOSE} {OPEN}1:"));
        assert_eq!(unused_stem(&messages, ""), format!("{OPEN}2:"), "the first that does not occur");
        let segments = render("{{ messages[0].content }}", &messages).expect("rendered");
        assert_eq!(segments, [Segment::Content(0)], "one content");
    }

    #[test]
    fn white_space_is_trimmed_only_where_the_template_does() {
        let messages = user(" \n x \n");
        let kept = render("[{{ messages[0].content }}]", &messages).expect("rendered");
        assert_eq!(kept, [template("[ \n "), Segment::Content(0), template(" \n]")], "kept");
        let trimmed = render("[{{ messages[0].content | trim }}]", &messages).expect("rendered");
        assert_eq!(trimmed, [template("["), Segment::Content(0), template("]")], "trimmed");
        let upper = render("{{ messages[0].content | upper }}", &messages).expect("rendered");
        assert!(upper.contains(&Segment::Content(0)), "filters for letters leave placeholders alone");
    }

    #[test]
    fn bad_templates_are_errors_of_one_line() {
        for source in [
            "{% for %}",
            "{{ raise_exception('no system role\nhere') }}",
            "{{ messages[0].content[:2] }}",
            "{{ messages[0].content[1:] }}",
            "nothing of the message",
            "{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{{ unknown_function() }}",
            "{% include 'chat' %}",
        ] {
            let message = render(source, &user("hello")).expect_err("a bad template").to_string();
            assert!(message.starts_with("the chat template can not be used: ") && !message.contains('\n'), "{message}");
        }
    }
}
