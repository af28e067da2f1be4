//! Incremental detokenisation: tokens in, whole characters out, cut at the first stop string.
//! Knows no sampling and no protocol.
//!
//! vLLM (`v1/engine/detokenizer.py`) re-decodes a window of tokens with a prefix and a read
//! offset. Here each token's bytes are known, so a token costs its own length: at most three
//! bytes of an unfinished character and one stop string of text wait at any time.

use std::sync::Arc;

use super::{Tokenizer, detokenizer::DecodeState};

/// Text that one token made certain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chunk {
    /// May be empty: an unfinished character or the possible start of a stop string.
    pub text: String,
    /// The stop string that was reached with this token; the stream is over.
    pub stopped: Option<String>,
}

/// Turns one sequence's tokens into text.
///
/// The chunks and [`TextStream::finish`] concatenate to [`Tokenizer::decode`] of all tokens
/// (special ones skipped), up to the stop string that is completed first.
#[derive(Clone, Debug)]
pub struct TextStream {
    tokenizer: Arc<Tokenizer>,
    state: DecodeState,
    stop: Vec<String>,
    include_stop: bool,
    /// Special tokens that are text all the same.
    kept: Vec<u32>,
    /// Text that may be the start of a stop string.
    held: String,
    stopped: bool,
}

impl TextStream {
    /// A stream before its first token. Empty strings in `stop` are ignored; `include_stop`
    /// leaves the stop string in the text.
    pub fn new(tokenizer: Arc<Tokenizer>, mut stop: Vec<String>, include_stop: bool) -> Self {
        stop.retain(|text| !text.is_empty());
        let state = tokenizer.start_decoding();
        let (kept, held) = (Vec::new(), String::new());
        Self { tokenizer, state, stop, include_stop, kept, held, stopped: false }
    }

    /// Keeps these special tokens in the text.
    #[must_use]
    pub fn keep(mut self, ids: Vec<u32>) -> Self {
        self.kept = ids;
        self
    }

    /// Adds the next token. After a stop string, tokens add nothing. Neither do ids that the
    /// tokenizer lacks: many models pad their vocabulary with rows that have no text, and may
    /// choose one all the same.
    pub fn push(&mut self, token_id: u32) -> Chunk {
        let bytes = self.tokenizer.token_bytes(token_id).unwrap_or_default();
        let special = self.tokenizer.is_special(token_id) && !self.kept.contains(&token_id);
        if !self.stopped && !special {
            self.state.push(bytes, &mut self.held);
        }
        self.release()
    }

    /// Ends the stream: the text that waited for more, which is no stop string now.
    pub fn finish(&mut self) -> String {
        if !self.stopped {
            self.state.finish(&mut self.held);
        }
        // U+FFFD for an unfinished character may itself complete a stop string.
        let mut text = self.release().text;
        text.push_str(&std::mem::take(&mut self.held));
        self.stopped = true;
        text
    }

    /// Takes from `held` what cannot belong to a later stop string.
    fn release(&mut self) -> Chunk {
        if let Some((start, stop)) = self.first_stop() {
            self.stopped = true;
            let stopped = self.stop[stop].clone();
            let end = if self.include_stop { start + stopped.len() } else { start };
            let mut text = std::mem::take(&mut self.held);
            text.truncate(end);
            return Chunk { text, stopped: Some(stopped) };
        }
        let rest = self.held.split_off(self.held.len() - self.partial_stop_bytes());
        Chunk { text: std::mem::replace(&mut self.held, rest), stopped: None }
    }

    /// The stop string completed first, the longest of several that end together: its position
    /// in `held` and its index.
    fn first_stop(&self) -> Option<(usize, usize)> {
        let found = self.stop.iter().enumerate();
        let found = found.filter_map(|(index, stop)| Some((self.held.find(stop)?, index)));
        found.min_by_key(|(start, index)| (start + self.stop[*index].len(), *start))
    }

    /// Length of the longest end of `held` that begins a stop string.
    fn partial_stop_bytes(&self) -> usize {
        let held = self.held.as_bytes();
        let partial = |stop: &String| {
            let longest = held.len().min(stop.len() - 1);
            (1..=longest).rev().find(|n| held.ends_with(&stop.as_bytes()[..*n])).unwrap_or(0)
        };
        self.stop.iter().map(partial).max().unwrap_or(0)
    }
}
