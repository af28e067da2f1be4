//! `response_format` and vLLM's `structured_outputs`: what an answer must look like. Grammars are
//! compiled here, away from the engine's thread, and a bad one is the client's error.

use serde_json::{Value, json};

use crate::{engine::TokenMask, llm::Grammar};

use super::{ApiError, App, error::no_tokenizer, fields::Fields, tools::Tools};

/// Largest JSON schema and regular expression, bytes.
const MAX_SCHEMA_BYTES: usize = 256 << 10;
const MAX_REGEX_BYTES: usize = 4 << 10;
const MAX_CHOICES: usize = 1024;

/// The mask that the request asks for, if any. Tools that must be called decide alone; with those
/// that may be called, JSON may stand in place of a call.
pub(super) fn read_mask(
    app: &App,
    fields: &mut Fields,
    tools: Option<&Tools>,
) -> Result<Option<Box<dyn TokenMask>>, ApiError> {
    let asked = read_grammar(fields)?;
    let (grammar, param) = match (tools, asked) {
        (Some(tools), _) if tools.must_call() => (tools.grammar(app, None)?, "tools"),
        (_, None) => return Ok(None),
        (None, Some(asked)) => asked,
        (Some(tools), Some((Grammar::JsonSchema(schema), param))) => {
            (tools.grammar(app, Some(schema))?, param)
        }
        (Some(tools), Some((Grammar::JsonObject, param))) => {
            (tools.grammar(app, Some(json!({"type": "object"})))?, param)
        }
        (Some(_), Some((_, param))) => {
            let message = "with tools, only JSON can be asked for; set tool_choice to none";
            return Err(ApiError::field(param, message));
        }
    };
    let compiler = app.grammars.as_ref().ok_or_else(no_tokenizer)?;
    let mask = compiler.compile(&grammar);
    mask.map(Some).map_err(|error| ApiError::field(param, error.to_string()))
}

/// The grammar that the request spells, and the field that does.
fn read_grammar(fields: &mut Fields) -> Result<Option<(Grammar, &'static str)>, ApiError> {
    let format = fields.take("response_format").map(response_format).transpose()?.flatten();
    let structured = fields.take("structured_outputs").map(structured_outputs).transpose()?;
    match (format, structured.flatten()) {
        (None, None) => Ok(None),
        (Some(grammar), None) => Ok(Some((grammar, "response_format"))),
        (None, Some(grammar)) => Ok(Some((grammar, "structured_outputs"))),
        (Some(_), Some(_)) => {
            let message = "give response_format or structured_outputs, not both";
            Err(ApiError::field("structured_outputs", message))
        }
    }
}

fn response_format(format: Value) -> Result<Option<Grammar>, ApiError> {
    let param = "response_format";
    match format["type"].as_str() {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(Grammar::JsonObject)),
        Some("json_schema") => {
            let schema = &format["json_schema"]["schema"];
            if !schema.is_object() {
                let message = "response_format needs json_schema with an object as schema";
                return Err(ApiError::field(param, message));
            }
            json_schema(schema.clone(), param).map(Some)
        }
        _ => {
            let message = "response_format.type must be text, json_object or json_schema";
            Err(ApiError::field(param, message))
        }
    }
}

fn structured_outputs(value: Value) -> Result<Option<Grammar>, ApiError> {
    let param = "structured_outputs";
    let mut fields = Fields::of(value, param)?;
    let mut found = Vec::new();
    if let Some(schema) = fields.take("json") {
        // vLLM takes a schema as an object or as its text.
        let schema = match schema {
            Value::String(text) => serde_json::from_str(&text)
                .map_err(|_| ApiError::field(param, "structured_outputs.json is no JSON"))?,
            schema => schema,
        };
        found.push(json_schema(schema, param)?);
    }
    if fields.bool("json_object")?.unwrap_or(false) {
        found.push(Grammar::JsonObject);
    }
    if let Some(regex) = fields.string("regex")? {
        if regex.len() > MAX_REGEX_BYTES {
            let message = format!("the regex has more than {MAX_REGEX_BYTES} bytes");
            return Err(ApiError::field(param, message));
        }
        found.push(Grammar::Regex(regex));
    }
    if let Some(lark) = fields.string("grammar")? {
        found.push(Grammar::Lark(lark));
    }
    if let Some(choices) = fields.take("choice") {
        let texts = choices.as_array().filter(|texts| texts.len() <= MAX_CHOICES);
        let texts = texts.and_then(|t| t.iter().map(|t| t.as_str().map(str::to_owned)).collect());
        let message = format!("choice must be at most {MAX_CHOICES} strings");
        found.push(Grammar::Choice(texts.ok_or_else(|| ApiError::field(param, message))?));
    }
    fields.refuse("structural_tag", |_| false)?;
    if found.len() > 1 {
        let message = "structured_outputs takes one of json, json_object, regex, grammar, choice";
        return Err(ApiError::field(param, message));
    }
    Ok(found.pop())
}

fn json_schema(schema: Value, param: &'static str) -> Result<Grammar, ApiError> {
    if schema.to_string().len() > MAX_SCHEMA_BYTES {
        let message = format!("the schema has more than {MAX_SCHEMA_BYTES} bytes");
        return Err(ApiError::field(param, message));
    }
    Ok(Grammar::JsonSchema(schema))
}
