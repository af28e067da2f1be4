//! From a conversation or plain text to prompt tokens.

use serde_json::{Map, Value};

use crate::{
    Result,
    text::{ChatTemplate, Message, Tokenizer},
};

use super::{FilesError, Llm};

impl Llm {
    /// Tokens of text to continue; special tokens in it count as such.
    ///
    /// # Errors
    /// [`crate::text::TextError`].
    pub fn raw_prompt(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.tokenizer()?.encode(text, true)?)
    }

    /// Tokens of a conversation through the model's chat template, up to where the answer starts.
    /// Special tokens spelled out inside messages stay plain text.
    ///
    /// # Errors
    /// [`FilesError::NoTemplate`], [`crate::text::TextError`].
    pub fn chat_prompt(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let template = self.template.as_ref().ok_or(FilesError::NoTemplate)?;
        chat_prompt(template, self.tokenizer()?, messages, true, &Map::new())
    }
}

/// As [`Llm::chat_prompt`], for callers that hold template and tokenizer apart from the engine.
/// `extra` and `add_generation_prompt` as for [`ChatTemplate::render`].
///
/// # Errors
/// [`crate::text::TextError`].
pub fn chat_prompt(
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    messages: &[Message],
    add_generation_prompt: bool,
    extra: &Map<String, Value>,
) -> Result<Vec<u32>> {
    let special = specials(tokenizer);
    let mut hidden = Hidden { special: &special, texts: Vec::new() };
    let mut messages = messages.to_vec();
    for message in &mut messages {
        hidden.hide_content(&mut message.content);
        message.other.values_mut().for_each(|value| hidden.hide_inside(value));
    }
    let mut extra = extra.clone();
    extra.values_mut().for_each(|value| hidden.hide_inside(value));
    let text = template.render(&messages, add_generation_prompt, &extra)?;
    let mut tokens = Vec::new();
    let mut rest = text.as_str();
    while let Some((before, hidden, after)) = hidden.next(rest) {
        tokens.extend(tokenizer.encode(before, false)?);
        tokens.extend(tokenizer.encode_plain(hidden)?);
        rest = after;
    }
    tokens.extend(tokenizer.encode(rest, false)?);
    Ok(tokens)
}

/// Texts of a conversation that spell special tokens. They go through the template as placeholders
/// from a private-use plane, and are put in as plain text afterwards.
struct Hidden<'a> {
    special: &'a [String],
    texts: Vec<String>,
}

impl Hidden<'_> {
    /// Hides a message's content, whole: its parts would be other tokens.
    fn hide_content(&mut self, content: &mut Value) {
        if let Value::String(text) = content
            && self.special.iter().any(|token| text.contains(token))
        {
            let placeholder = placeholder(self.texts.len());
            self.texts.push(std::mem::replace(text, placeholder));
        }
    }

    /// Hides the special tokens inside of the strings of tools and calls, which the template may
    /// yet write as JSON.
    fn hide_inside(&mut self, value: &mut Value) {
        match value {
            Value::String(text) => {
                for token in self.special {
                    if text.contains(token) {
                        *text = text.replace(token, &placeholder(self.texts.len()));
                        self.texts.push(token.clone());
                    }
                }
            }
            Value::Array(values) => values.iter_mut().for_each(|value| self.hide_inside(value)),
            Value::Object(map) => map.values_mut().for_each(|value| self.hide_inside(value)),
            _ => {}
        }
    }

    /// What stands before the first placeholder, what it hides, and the rest.
    fn next<'a>(&'a self, text: &'a str) -> Option<(&'a str, &'a str, &'a str)> {
        if self.texts.is_empty() {
            return None;
        }
        text.match_indices(OPENS).find_map(|(at, opens)| {
            let (number, after) = text[at + opens.len()..].split_once(CLOSES)?;
            let hidden = self.texts.get(number.parse::<usize>().ok()?)?;
            Some((&text[..at], &**hidden, after))
        })
    }
}

const OPENS: char = '\u{F0000}';
const CLOSES: char = '\u{F0001}';

fn placeholder(i: usize) -> String {
    format!("{OPENS}{i}{CLOSES}")
}

/// The special tokens' texts, the longest first: one may hold another.
fn specials(tokenizer: &Tokenizer) -> Vec<String> {
    let ids = tokenizer.special_ids().iter();
    let mut texts: Vec<String> = ids.filter_map(|&id| tokenizer.id_to_token(id)).collect();
    texts.retain(|text| !text.is_empty());
    texts.sort_by_key(|text| std::cmp::Reverse(text.len()));
    texts
}
