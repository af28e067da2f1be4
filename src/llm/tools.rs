//! Functions that a model may call: which way it writes calls, how it hears of the functions, and
//! the grammar that makes it call one.

use serde_json::{Map, Value, json};

use crate::text::{ChatTemplate, Message, Tokenizer, ToolFormat};

use super::{Grammar, grammar};

/// Calls that a grammar lets follow one another.
const MAX_CALLS: usize = 16;

/// The way of writing calls that a chat template teaches.
pub fn tool_format(template: &ChatTemplate) -> ToolFormat {
    let json = ["<|python_tag|>", "ipython", "\"parameters\""];
    match json.iter().any(|mark| template.mentions(mark)) {
        true if !template.mentions("<tool_call>") => ToolFormat::Json,
        _ => ToolFormat::Hermes,
    }
}

/// The grammar of an answer that is one or more calls of `functions`, each a name and the JSON
/// schema of its arguments; `one` allows a single call. With `answer`, a JSON text of that schema
/// may stand in place of the calls.
pub fn tool_grammar(
    format: ToolFormat,
    tokenizer: &Tokenizer,
    functions: &[(&str, Value)],
    one: bool,
    answer: Option<Value>,
) -> Grammar {
    let quote = |text: &str| Value::from(text).to_string();
    // Marks that are special tokens are no text.
    let mark = |text: &str| {
        let special = format.marks().iter().find_map(|mark| {
            let id = tokenizer.token_to_id(mark).filter(|&id| tokenizer.is_special(id))?;
            let (before, after) = text.split_once(mark)?;
            Some([quote(before), format!("<[{id}]>"), quote(after)])
        });
        match special {
            Some(parts) => parts.into_iter().filter(|part| part != "\"\"").collect(),
            None if text.is_empty() => Vec::new(),
            None => vec![quote(text)],
        }
    };
    let mut lark = match answer {
        Some(_) => "start: calls | answer\n".to_owned(),
        None => "start: calls\n".to_owned(),
    };
    let more = format!(" ({} call){{0,{}}}", quote(format.separates()), MAX_CALLS - 1);
    lark += &format!("calls: call{}\n", if one { "" } else { &more });
    let names = (0..functions.len()).map(|i| format!("call_{i}")).collect::<Vec<_>>();
    lark += &format!("call: {}\n", names.join(" | "));
    for (i, (name, schema)) in functions.iter().enumerate() {
        let head = format!("{{\"name\": {}, {}: ", quote(name), quote(format.arguments_key()));
        let mut parts: Vec<String> = mark(format.opens());
        parts.extend([quote(&head), format!("arguments_{i}"), quote("}")]);
        parts.extend(mark(format.closes()));
        let schema = grammar::bounded(object(schema));
        lark += &format!("call_{i}: {}\narguments_{i}: %json {schema}\n", parts.join(" "));
    }
    if let Some(schema) = answer {
        lark += &format!("answer: %json {}\n", grammar::bounded(schema));
    }
    Grammar::Lark(lark)
}

/// The schema of arguments, which are an object whatever the schema forgets to say.
fn object(schema: &Value) -> Value {
    let mut schema = match schema {
        Value::Object(schema) => schema.clone(),
        _ => Map::new(),
    };
    let says =
        ["type", "$ref", "anyOf", "oneOf", "allOf"].iter().any(|key| schema.contains_key(*key));
    if !says {
        schema.insert("type".to_owned(), json!("object"));
    }
    // What a schema does not name a function rarely takes, and a weak model goes on naming.
    if schema.get("type") == Some(&json!("object")) {
        schema.entry("additionalProperties").or_insert(json!(false));
    }
    Value::Object(schema)
}

/// Tells a model whose template knows no tools of `tools` (as in OpenAI's requests) in words, and
/// writes the calls in `messages` out as the model would have.
pub fn tell_tools(messages: &mut Vec<Message>, tools: &[Value], format: ToolFormat) {
    for message in messages.iter_mut() {
        let calls = message.other.remove("tool_calls");
        let calls = calls.as_ref().and_then(Value::as_array).into_iter().flatten();
        let written: Vec<String> = calls
            .map(|call| {
                let (name, arguments) = (&call["function"]["name"], &call["function"]["arguments"]);
                let key = format.arguments_key();
                let object = format!("{{\"name\": {name}, \"{key}\": {arguments}}}");
                [format.opens(), &object, format.closes()].concat()
            })
            .collect();
        if !written.is_empty() {
            let said = message.content.as_str().filter(|said| !said.is_empty());
            let calls = written.join(format.separates());
            let parts: Vec<&str> = said.into_iter().chain([&*calls]).collect();
            message.content = Value::String(parts.join("\n"));
        }
    }
    if tools.is_empty() {
        return;
    }
    let functions: Vec<String> = tools.iter().map(|tool| tool["function"].to_string()).collect();
    let key = format.arguments_key();
    let text = format!(
        "You may call these functions:\n{}\nTo call one, answer with its name and {key}:\n{}",
        functions.join("\n"),
        [format.opens(), &format!("{{\"name\": NAME, \"{key}\": {{...}}}}"), format.closes()]
            .concat()
    );
    match messages.first_mut() {
        Some(Message { role, content: Value::String(content), .. }) if role == "system" => {
            content.push_str("\n\n");
            content.push_str(&text);
        }
        _ => messages.insert(0, Message::new("system", text)),
    }
}

#[cfg(test)]
mod tests;
