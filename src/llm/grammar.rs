//! Structured answers: grammars compiled to token masks through the llguidance crate. Compiling is
//! bounded and happens before a request enters the engine, which knows only [`TokenMask`].

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use llguidance::{Matcher, ParserFactory, api::TopLevelGrammar, earley::SlicedBiasComputer};
use serde_json::{Value, json};
use toktrie::{ApproximateTokEnv, InferenceCapabilities, TokRxInfo, TokTrie};

use crate::{engine::TokenMask, text::Tokenizer};

/// Largest grammar, bytes of its text.
const MAX_GRAMMAR_BYTES: usize = 1 << 20;
/// Deepest nesting of brackets in a grammar; parsers of grammars are recursive.
const MAX_NESTING: usize = 128;
/// Between the parts of a JSON text: enough to indent, too little to go on for ever.
const JSON_SPACE: &str = r"[\x20\x0A\x0D\x09]{1,24}";

/// What an answer must look like.
#[derive(Debug, Clone, PartialEq)]
pub enum Grammar {
    /// JSON that fits a schema.
    JsonSchema(Value),
    /// Any JSON object.
    JsonObject,
    /// Text that a regular expression (Rust's syntax) matches as a whole.
    Regex(String),
    /// A context-free grammar in llguidance's variant of Lark.
    Lark(String),
    /// One of these texts.
    Choice(Vec<String>),
}

/// A grammar that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GrammarError {
    /// Too much text.
    #[error("the grammar has {bytes} bytes, but {MAX_GRAMMAR_BYTES} is the most")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// Brackets inside brackets inside brackets.
    #[error("the grammar nests more than {MAX_NESTING} brackets; make it flatter")]
    TooDeep,
    /// Nothing to choose from.
    #[error("choice needs at least one text, and none of them empty")]
    NoChoice,
    /// The grammar has an error, or needs more than the limits allow.
    #[error("the grammar does not compile: {cause}")]
    Invalid {
        /// What llguidance says.
        cause: String,
    },
}

/// Compiles grammars for one tokenizer. Costly to make, cheap to share.
pub struct GrammarCompiler {
    factory: ParserFactory,
    eos: Arc<[u32]>,
}

impl fmt::Debug for GrammarCompiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrammarCompiler").field("eos", &self.eos).finish_non_exhaustive()
    }
}

impl GrammarCompiler {
    /// A compiler for a model of `vocab_size` tokens, of which `eos` end a text.
    ///
    /// # Errors
    /// [`GrammarError::Invalid`] if the tokenizer is unusable for this.
    pub fn new(
        tokenizer: &Tokenizer,
        vocab_size: usize,
        eos: &[u32],
    ) -> Result<Self, GrammarError> {
        let word = |id: u32| match tokenizer.token_bytes(id) {
            // Special tokens are never part of a text; the trie marks them with 0xff.
            Ok(bytes) if tokenizer.is_special(id) || eos.contains(&id) => [&[0xff], bytes].concat(),
            Ok(bytes) => bytes.to_vec(),
            Err(_) => Vec::new(),
        };
        let words: Vec<Vec<u8>> = (0..vocab_size as u32).map(word).collect();
        let end = eos.first().copied().unwrap_or(0);
        let mut factory = contain(|| {
            let trie = TokTrie::from(&TokRxInfo::new(vocab_size as u32, end), &words);
            let env: toktrie::TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            let slices = SlicedBiasComputer::general_slices();
            ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
        })?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        factory.limits_mut().max_grammar_size = 100_000;
        Ok(Self { factory, eos: eos.into() })
    }

    /// A mask for one request.
    ///
    /// # Errors
    /// [`GrammarError`] for grammars that are wrong or too large.
    pub fn compile(&self, grammar: &Grammar) -> Result<Box<dyn TokenMask>, GrammarError> {
        let top = match grammar {
            Grammar::JsonSchema(schema) => {
                check(&schema.to_string())?;
                TopLevelGrammar::from_json_schema(bounded(schema.clone()))
            }
            Grammar::JsonObject => TopLevelGrammar::from_json_schema(bounded(json!({
                "type": "object"
            }))),
            Grammar::Regex(regex) => {
                check(regex)?;
                TopLevelGrammar::from_regex(regex)
            }
            Grammar::Lark(lark) => {
                check(lark)?;
                TopLevelGrammar::from_lark(lark.clone())
            }
            Grammar::Choice(texts) => TopLevelGrammar::from_lark(choice(texts)?),
        };
        let parser = contain(|| self.factory.create_parser(top))?;
        let matcher = Matcher::new(Ok(parser));
        Ok(Box::new(GrammarMask { matcher, eos: self.eos.clone() }))
    }
}

/// The state of one answer.
struct GrammarMask {
    matcher: Matcher,
    eos: Arc<[u32]>,
}

impl fmt::Debug for GrammarMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrammarMask").finish_non_exhaustive()
    }
}

impl TokenMask for GrammarMask {
    fn fill(&mut self, mask: &mut [u32]) -> Result<(), String> {
        let matcher = &mut self.matcher;
        let allowed = contain(|| matcher.compute_mask_or_eos()).map_err(|e| e.to_string())?;
        mask.fill(0);
        mask.iter_mut().zip(allowed.as_slice()).for_each(|(word, &bits)| *word = bits);
        // The crate knows one token that ends a text; a model may have several.
        let set = |mask: &[u32], id: u32| mask[id as usize / 32] >> (id % 32) & 1 == 1;
        if self.eos.iter().any(|&id| set(mask, id)) {
            self.eos.iter().for_each(|&id| mask[id as usize / 32] |= 1 << (id % 32));
        }
        if mask.iter().all(|&word| word == 0) { Err("no token fits".into()) } else { Ok(()) }
    }

    fn accept(&mut self, token: u32) -> Result<(), String> {
        let matcher = &mut self.matcher;
        contain(|| matcher.consume_token(token)).map_err(|e| e.to_string())
    }

    fn fork(&self) -> Box<dyn TokenMask> {
        Box::new(Self { matcher: self.matcher.deep_clone(), eos: self.eos.clone() })
    }
}

/// Keeps a panic of the crate from taking the server down.
fn contain<T, E: fmt::Display>(run: impl FnOnce() -> Result<T, E>) -> Result<T, GrammarError> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(GrammarError::Invalid { cause: error.to_string() }),
        Err(_) => Err(GrammarError::Invalid { cause: "the grammar library failed".into() }),
    }
}

fn check(text: &str) -> Result<(), GrammarError> {
    if text.len() > MAX_GRAMMAR_BYTES {
        return Err(GrammarError::TooLarge { bytes: text.len() });
    }
    let (mut depth, mut deepest) = (0usize, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    if deepest > MAX_NESTING { Err(GrammarError::TooDeep) } else { Ok(()) }
}

/// The schema with a bound on white space, unless it says something itself.
pub(super) fn bounded(mut schema: Value) -> Value {
    if schema == Value::Bool(true) {
        schema = json!({});
    }
    if let Value::Object(object) = &mut schema {
        object.entry("x-guidance").or_insert_with(|| json!({ "whitespace_pattern": JSON_SPACE }));
    }
    schema
}

/// A Lark grammar of some texts; its strings are written as in JSON.
fn choice(texts: &[String]) -> Result<String, GrammarError> {
    if texts.is_empty() || texts.iter().any(String::is_empty) {
        return Err(GrammarError::NoChoice);
    }
    let bytes = texts.iter().map(String::len).sum();
    if bytes > MAX_GRAMMAR_BYTES {
        return Err(GrammarError::TooLarge { bytes });
    }
    let quoted: Vec<String> = texts.iter().map(|text| Value::from(&**text).to_string()).collect();
    Ok(format!("start: {}", quoted.join(" | ")))
}

#[cfg(test)]
mod tests;
