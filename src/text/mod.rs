//! Text in and out: tokenizer, chat template, incremental detokenisation.
//!
//! Everything here works on bytes and JSON that came from outside, so every size is bounded and
//! every failure is a [`TextError`]. Nothing here knows tensors, sequences or HTTP.

mod chat_template;
mod date;
mod detokenizer;
mod error;
mod jinja_source;
mod sandbox;
mod stream;
#[cfg(test)]
mod tests;
mod to_json;
mod tokenizer;
mod tool_calls;

pub use chat_template::{ChatTemplate, Message};
pub use error::TextError;
pub use stream::{Chunk, TextStream};
pub use tokenizer::{SpecialTokens, Tokenizer};
pub use tool_calls::{ToolFormat, ToolParser, ToolPiece};
