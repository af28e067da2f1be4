//! Tool calls in a model's answer: text in as it comes, calls and the text around them out as soon
//! as they are certain. Knows neither tokens nor HTTP.
//!
//! The formats are those of vLLM's parsers `hermes` and `llama3_json`
//! (`vllm/tool_parsers/{hermes,llama}_tool_parser.py`).

mod object;

use object::{CallObject, Step};

/// How a model writes a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes, Qwen) within text.
    Hermes,
    /// The whole answer is `{"name": ..., "parameters": {...}}` (Llama 3), several of them with
    /// `;` between.
    Json,
}

impl ToolFormat {
    /// What stands in front of a call.
    pub fn opens(self) -> &'static str {
        match self {
            Self::Hermes => "<tool_call>\n",
            Self::Json => "",
        }
    }

    /// What stands behind a call.
    pub fn closes(self) -> &'static str {
        match self {
            Self::Hermes => "\n</tool_call>",
            Self::Json => "",
        }
    }

    /// What stands between two calls.
    pub fn separates(self) -> &'static str {
        match self {
            Self::Hermes => "\n",
            Self::Json => "; ",
        }
    }

    /// The key of a call's arguments.
    pub fn arguments_key(self) -> &'static str {
        match self {
            Self::Hermes => "arguments",
            Self::Json => "parameters",
        }
    }

    /// Marks that a tokenizer may hold as special tokens, which text would lack.
    pub fn marks(self) -> &'static [&'static str] {
        match self {
            Self::Hermes => &[OPEN, CLOSE],
            Self::Json => &[PYTHON_TAG],
        }
    }
}

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";
/// Llama 3.1 writes it in front of its calls.
const PYTHON_TAG: &str = "<|python_tag|>";

/// What became certain about an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolPiece {
    /// Text outside of calls.
    Text(String),
    /// The next call begins; calls are numbered from 0.
    Call {
        /// The function's name.
        name: String,
    },
    /// More of the current call's arguments, JSON text.
    Arguments(String),
}

#[derive(Debug)]
enum State {
    /// Outside of calls; `pending` waits for more.
    Outside,
    /// In the object of a call.
    Object(Box<CallObject>),
    /// Behind the object of a call.
    Behind,
    /// No call can follow.
    Plain,
}

/// Reads one answer.
#[derive(Debug)]
pub struct ToolParser {
    format: ToolFormat,
    /// Functions that may be called; calls of others are text.
    names: Vec<String>,
    max_calls: usize,
    state: State,
    /// Text that may become part of a call.
    pending: String,
    n_calls: usize,
}

impl ToolParser {
    /// A parser before an answer's first text. Calls beyond `max_calls` are dropped.
    pub fn new(format: ToolFormat, names: Vec<String>, max_calls: usize) -> Self {
        let (state, pending, n_calls) = (State::Outside, String::new(), 0);
        Self { format, names, max_calls, state, pending, n_calls }
    }

    /// Calls so far.
    pub fn n_calls(&self) -> usize {
        self.n_calls.min(self.max_calls)
    }

    /// Takes more of the answer.
    pub fn push(&mut self, text: &str) -> Vec<ToolPiece> {
        let mut pieces = Vec::new();
        self.pending.push_str(text);
        while self.advance(&mut pieces) {}
        pieces
    }

    /// Ends the answer: what waited for more is text now.
    pub fn finish(&mut self) -> Vec<ToolPiece> {
        let mut pieces = Vec::new();
        let mut rest = match std::mem::replace(&mut self.state, State::Plain) {
            State::Object(object) => object.into_text(),
            State::Behind => String::new(),
            State::Outside | State::Plain => std::mem::take(&mut self.pending),
        };
        if self.n_calls > 0 {
            let between = |c: char| c.is_whitespace() || self.format.separates().contains(c);
            rest.truncate(rest.trim_end_matches(between).len());
        }
        emit(&mut pieces, rest);
        pieces
    }

    /// Moves on in `pending`; false if more text is needed.
    fn advance(&mut self, pieces: &mut Vec<ToolPiece>) -> bool {
        match &mut self.state {
            State::Plain => {
                emit(pieces, std::mem::take(&mut self.pending));
                false
            }
            State::Outside => match self.format {
                ToolFormat::Hermes => self.find_mark(pieces),
                ToolFormat::Json => self.find_brace(),
            },
            State::Object(_) => self.read_object(pieces),
            State::Behind => self.leave_call(),
        }
    }

    /// Gives out text up to a mark, or up to what may be the start of one. White space waits: in
    /// front of a call it is no text.
    fn find_mark(&mut self, pieces: &mut Vec<ToolPiece>) -> bool {
        if let Some(at) = self.pending.find(OPEN) {
            let certain = self.pending[..at].trim_end().len();
            emit(pieces, self.pending.drain(..certain).collect());
            let raw = self.pending.drain(..at - certain + OPEN.len()).collect();
            self.state = State::Object(Box::new(CallObject::new(raw)));
            return true;
        }
        let certain = self.pending.len() - partial(&self.pending, OPEN);
        let certain = self.pending[..certain].trim_end().len();
        emit(pieces, self.pending.drain(..certain).collect());
        false
    }

    /// A call begins with the answer or behind another one, or not at all.
    fn find_brace(&mut self) -> bool {
        let mut rest = self.pending.trim_start();
        if let Some(behind) = rest.strip_prefix(PYTHON_TAG) {
            rest = behind.trim_start();
        } else if PYTHON_TAG.starts_with(rest) {
            return false; // White space, or the start of the tag.
        }
        if self.n_calls > 0 {
            rest = rest.trim_start_matches(|c: char| c == ';' || c == ',' || c.is_whitespace());
        }
        if rest.is_empty() {
            return false;
        }
        if !rest.starts_with('{') {
            self.state = State::Plain;
            return true;
        }
        let at = self.pending.len() - rest.len();
        let raw = self.pending.drain(..at).collect();
        self.state = State::Object(Box::new(CallObject::new(raw)));
        true
    }

    fn read_object(&mut self, pieces: &mut Vec<ToolPiece>) -> bool {
        let State::Object(object) = &mut self.state else { return false };
        let known = |name: &str| self.names.iter().any(|n| n == name);
        // A call too many is read to its end, but not told.
        let before = self.n_calls - usize::from(object.is_named());
        let told = before < self.max_calls;
        let (mut taken, mut arguments, mut ended) = (0, String::new(), false);
        for c in self.pending.chars() {
            taken += c.len_utf8();
            match object.push(c, &known, &mut arguments) {
                Step::More => {}
                Step::Named(name) => {
                    self.n_calls += 1;
                    if told {
                        pieces.push(ToolPiece::Call { name });
                    }
                }
                Step::End | Step::Broken => {
                    ended = true;
                    break;
                }
            }
        }
        self.pending.drain(..taken);
        if ended && object.is_named() && !object.has_arguments() {
            arguments.push_str("{}");
        }
        if told && !arguments.is_empty() {
            pieces.push(ToolPiece::Arguments(arguments));
        }
        if ended {
            let state = std::mem::replace(&mut self.state, State::Outside);
            let State::Object(object) = state else { return true };
            if object.is_named() {
                self.state = State::Behind;
            } else {
                emit(pieces, object.into_text());
                // An answer that is JSON but no call stays text to its end.
                if self.format == ToolFormat::Json {
                    self.state = State::Plain;
                }
            }
        }
        ended
    }

    fn leave_call(&mut self) -> bool {
        if self.format == ToolFormat::Hermes {
            let rest = self.pending.trim_start();
            if rest.len() < CLOSE.len() && CLOSE.starts_with(rest) {
                return false;
            }
            let rest = rest.strip_prefix(CLOSE).unwrap_or(rest);
            self.pending = rest.to_owned();
        }
        self.state = State::Outside;
        true
    }
}

/// Adds text, if there is any.
fn emit(pieces: &mut Vec<ToolPiece>, text: String) {
    if !text.is_empty() {
        pieces.push(ToolPiece::Text(text));
    }
}

/// Length of the longest end of `text` that begins `mark`.
fn partial(text: &str, mark: &str) -> usize {
    let longest = text.len().min(mark.len() - 1);
    let ends = |n: &usize| text.as_bytes().ends_with(&mark.as_bytes()[..*n]);
    (1..=longest).rev().find(ends).unwrap_or(0)
}

#[cfg(test)]
mod tests;
