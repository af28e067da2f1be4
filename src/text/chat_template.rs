//! The model's chat template: Jinja source from the checkpoint, rendered with the semantics of
//! Hugging Face transformers. A template is a stranger's program, so it gets no files, no network,
//! a budget of steps and bytes, and every failure is an error with its line.
//! Never knows tokens or requests.

use std::{collections::BTreeMap, fmt, io};

use minijinja::value::{Serde, Value, ValueKind};
use minijinja::{AutoEscape, Environment, ErrorKind, syntax::SyntaxConfig};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use super::jinja_source::{self, MAX_SOURCE_BYTES};
use super::{SpecialTokens, TextError, date, error, sandbox, to_json, tokenizer};

/// Largest accepted template source, in bytes.
const MAX_TEMPLATE_BYTES: u64 = MAX_SOURCE_BYTES as u64;
/// Largest rendered prompt, in bytes.
const MAX_RENDERED_BYTES: usize = 32 << 20;
/// Steps of one render; each pays for one instruction or 64 bytes of data.
const FUEL: u64 = 1_000_000;
/// Nesting of calls and blocks; a macro call counts as several.
const MAX_RECURSION: usize = 200;
/// Longest part of an error message that the template controls, in characters.
const MAX_DETAIL_CHARS: usize = 1000;

/// One turn of a conversation, as a template sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, `tool`.
    pub role: String,
    /// A string, a list of parts (text, images), or null.
    #[serde(default)]
    pub content: Json,
    /// Everything else (`tool_calls`, `name`, `reasoning_content`), passed through.
    #[serde(flatten)]
    pub other: Map<String, Json>,
}

impl Message {
    /// A message with text content only.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: Json::String(content.into()), other: Map::new() }
    }
}

/// A compiled chat template and the special tokens it may print.
pub struct ChatTemplate {
    env: Environment<'static>,
    special_tokens: SpecialTokens,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("special_tokens", &self.special_tokens)
            .finish_non_exhaustive()
    }
}

/// Names of the templates inside the environment.
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

impl ChatTemplate {
    /// Loads the template of a model directory: `chat_template.jinja`, else `chat_template` of
    /// `tokenizer_config.json` (one source, or a list of named ones), else `None`.
    ///
    /// # Errors
    /// An unreadable or oversized file, malformed JSON, or a template that does not compile.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn from_dir(dir: &std::path::Path) -> Result<Option<Self>, TextError> {
        let jinja = error::read_bounded(dir, "chat_template.jinja", MAX_TEMPLATE_BYTES)?;
        let limit = tokenizer::MAX_CONFIG_BYTES;
        let config = error::read_bounded(dir, "tokenizer_config.json", limit)?;
        Self::from_bytes(jinja.as_deref(), config.as_deref())
    }

    /// As [`ChatTemplate::from_dir`], from the contents of the two files.
    ///
    /// # Errors
    /// As [`ChatTemplate::from_dir`].
    pub fn from_bytes(
        jinja: Option<&[u8]>,
        config: Option<&[u8]>,
    ) -> Result<Option<Self>, TextError> {
        let config = config.map(tokenizer::parse_config).transpose()?.unwrap_or(Json::Null);
        let special_tokens = SpecialTokens::from_config(&config);
        if let Some(bytes) = jinja {
            let source = std::str::from_utf8(bytes).map_err(|error| TextError::TemplateSyntax {
                line: 0,
                detail: error.to_string(),
            })?;
            return Self::new(source, special_tokens).map(Some);
        }
        match config.get("chat_template") {
            None | Some(Json::Null) => Ok(None),
            Some(Json::String(source)) => Self::new(source, special_tokens).map(Some),
            Some(Json::Array(named)) => Self::from_list(named, special_tokens).map(Some),
            Some(_) => {
                Err(TextError::BadConfig("chat_template is neither a string nor a list".to_owned()))
            }
        }
    }

    fn from_list(named: &[Json], special_tokens: SpecialTokens) -> Result<Self, TextError> {
        let template = |wanted: &str| {
            named.iter().find(|entry| entry["name"] == *wanted)?.get("template")?.as_str()
        };
        let default = template(DEFAULT).ok_or_else(|| {
            TextError::BadConfig("its list of chat templates has no \"default\"".to_owned())
        })?;
        let mut chat = Self::new(default, special_tokens)?;
        if let Some(source) = template(TOOL_USE) {
            chat.add(TOOL_USE, source)?;
        }
        Ok(chat)
    }

    /// Compiles one template.
    ///
    /// # Errors
    /// More than 64 KiB of source, or a syntax error with its line.
    pub fn new(source: &str, special_tokens: SpecialTokens) -> Result<Self, TextError> {
        let mut chat = Self { env: environment(), special_tokens };
        #[cfg(not(target_arch = "wasm32"))]
        chat.set_clock(|| {
            let since_epoch = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
            i64::try_from(since_epoch.as_secs()).unwrap_or(i64::MAX)
        });
        chat.add(DEFAULT, source)?;
        Ok(chat)
    }

    fn add(&mut self, name: &'static str, source: &str) -> Result<(), TextError> {
        error::check_size("the chat template", source.len() as u64, MAX_TEMPLATE_BYTES)?;
        if let Some(line) = jinja_source::overlong_tag(source) {
            let detail = "a tag or text without tags is longer than 8 KiB".to_owned();
            return Err(TextError::TemplateSyntax { line, detail });
        }
        let source = jinja_source::rewrite(source);
        let env = &mut self.env;
        sandbox::run(|| env.add_template_owned(name, source).map_err(|e| template_error(&e)))
    }

    /// Whether the template's source, or that of its variant for tools, has this text.
    pub fn mentions(&self, text: &str) -> bool {
        self.env.templates().any(|(_, template)| template.source().contains(text))
    }

    /// Sets where `strftime_now` takes the time from: seconds since 1970, UTC. The browser, which
    /// has no system clock for WebAssembly, must call this; elsewhere it is set.
    pub fn set_clock(&mut self, unix_seconds: fn() -> i64) {
        let now = move |format: &str| date::strftime(unix_seconds(), format);
        self.env.add_function("strftime_now", now);
    }

    /// The prompt for `messages`; `add_generation_prompt` opens the assistant's turn.
    ///
    /// `extra` are further variables by name: `tools`, `documents` and the entries of a request's
    /// `chat_template_kwargs` (`enable_thinking`). `messages` and `add_generation_prompt` in it
    /// have no effect. With `tools`, the template named `tool_use` is taken where there is one.
    ///
    /// # Errors
    /// Whatever the template does wrong, with its line; `raise_exception` is
    /// [`TextError::TemplateRefused`], more than 32 MiB or too many steps
    /// [`TextError::TemplateBudget`].
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        extra: &Map<String, Json>,
    ) -> Result<String, TextError> {
        sandbox::run(|| {
            let context = self.context(messages, add_generation_prompt, extra);
            let tools = extra.get("tools").is_some_and(|tools| !tools.is_null());
            let template = tools.then(|| self.env.get_template(TOOL_USE).ok()).flatten();
            let template = match template {
                Some(template) => template,
                None => self.env.get_template(DEFAULT).map_err(|e| template_error(&e))?,
            };
            let mut prompt = BoundedWriter { bytes: Vec::new() };
            template.render_captured_to(context, &mut prompt).map_err(|e| template_error(&e))?;
            String::from_utf8(prompt.bytes)
                .map_err(|error| TextError::TemplateFailed { line: 0, detail: error.to_string() })
        })
    }

    /// The variables that a template sees.
    fn context(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        extra: &Map<String, Json>,
    ) -> Value {
        let special = &self.special_tokens;
        let mut context: BTreeMap<&str, Value> = BTreeMap::new();
        // Transformers passes these two as None: `tools is not none` must be false without tools.
        context.insert("tools", Value::from(()));
        context.insert("documents", Value::from(()));
        for (name, token) in [
            ("bos_token", &special.bos),
            ("eos_token", &special.eos),
            ("pad_token", &special.pad),
            ("unk_token", &special.unk),
        ] {
            if let Some(token) = token {
                context.insert(name, Value::from(token.as_str()));
            }
        }
        for (name, value) in extra {
            context.insert(name, Value::from(Serde(value)));
        }
        context.insert("messages", Value::from(Serde(messages)));
        context.insert("add_generation_prompt", Value::from(add_generation_prompt));
        Value::from(context)
    }
}

/// The engine as transformers configures Jinja (`utils/chat_template_utils.py`), with limits.
fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    // A failure here is a bug of this file; the default syntax would show at the first golden.
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.unwrap_or_default());
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(MAX_RECURSION);
    env.set_formatter(sandbox::print);
    env.set_unknown_method_callback(sandbox::call_method);
    env.add_function("namespace", sandbox::Namespace::create);
    // Its time grows with the cube of the nesting, outside of any budget.
    env.remove_filter("pprint");
    env.remove_global("debug");
    // Python's answers: None is not iterable, and everything with a length and items is a sequence.
    env.add_test("iterable", |value: &Value| {
        !matches!(value.kind(), ValueKind::None | ValueKind::Bool | ValueKind::Number)
    });
    env.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map)
    });
    env.add_filter("tojson", to_json::to_json);
    env.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
        let error = minijinja::Error::new(ErrorKind::InvalidOperation, message);
        Err(error.with_source(Refusal))
    });
    env
}

/// Marks the errors that a template raised on purpose.
#[derive(Debug, thiserror::Error)]
#[error("raise_exception")]
struct Refusal;

/// Turns the engine's error into ours; the first error of the chain with a line gives the line.
fn template_error(error: &minijinja::Error) -> TextError {
    let mut line = 0;
    let mut detail = String::new();
    let mut kind = error.kind();
    let mut refused = false;
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(engine) = current.downcast_ref::<minijinja::Error>() {
            (line, kind) = (engine.line().unwrap_or(line), engine.kind());
            detail = match engine.detail() {
                Some(detail) => detail.chars().take(MAX_DETAIL_CHARS).collect(),
                None => kind.to_string(),
            };
        }
        refused |= current.is::<Refusal>();
        cause = current.source();
    }
    match kind {
        _ if refused => TextError::TemplateRefused { line, detail },
        ErrorKind::OutOfFuel | ErrorKind::WriteFailure => TextError::TemplateBudget { line },
        ErrorKind::SyntaxError => TextError::TemplateSyntax { line, detail },
        _ => TextError::TemplateFailed { line, detail },
    }
}

/// Collects a prompt until it is too long.
struct BoundedWriter {
    bytes: Vec<u8>,
}

impl io::Write for BoundedWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_RENDERED_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
