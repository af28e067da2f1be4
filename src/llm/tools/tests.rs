//! A model that never saw a tool calls one when the grammar says so, and templates without tools
//! hear of them in words.

use super::*;
use crate::{
    engine::{FinishReason, Request, SamplingParams},
    llm::Llm,
    text::{SpecialTokens, ToolParser, ToolPiece},
};

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, SpecialTokens::default()).unwrap()
}

#[test]
fn the_template_tells_the_format() {
    let json = "{% if tools %}Respond with {\"name\": ..., \"parameters\": ...}{% endif %}";
    assert_eq!(tool_format(&template(json)), ToolFormat::Json);
    assert_eq!(tool_format(&template("{{ '<tool_call>' }}")), ToolFormat::Hermes);
    assert_eq!(tool_format(&template("{{ messages[0].content }}")), ToolFormat::Hermes);
}

#[test]
fn the_grammar_makes_calls_that_the_parser_reads() {
    let mut llm = Llm::builder().max_model_len(512).build().unwrap();
    let compiler = llm.grammar_compiler().unwrap();
    let city = json!({
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "maximum": 9}},
        "required": ["city"],
        "$defs": {"city": {"enum": ["Kiel", "Köln \"am\" Rhein"]}},
    });
    let functions = [("get_weather", city), ("now", Value::Null)];
    let prompt = llm.raw_prompt("Answer: ").unwrap();
    for (format, one, seed) in [
        (ToolFormat::Hermes, true, 1),
        (ToolFormat::Hermes, false, 2),
        (ToolFormat::Json, true, 3),
        (ToolFormat::Json, false, 4),
    ] {
        let grammar = tool_grammar(format, llm.tokenizer().unwrap(), &functions, one, None);
        let mask = Some(compiler.compile(&grammar).unwrap());
        let params = SamplingParams {
            temperature: 1.5,
            seed: Some(seed),
            max_tokens: Some(400),
            ..Default::default()
        };
        let request = Request { mask, ..Request::new(prompt.clone(), params) };
        let mut answer = llm.stream(request, vec![]).unwrap();
        let text = answer.by_ref().collect::<crate::Result<String>>().unwrap();
        let complete = answer.finish() == Some(FinishReason::Stop);
        drop(answer);
        let names = vec!["get_weather".to_owned(), "now".to_owned()];
        let mut parser = ToolParser::new(format, names, 99);
        let mut pieces = parser.push(&text);
        pieces.extend(parser.finish());
        let n = parser.n_calls();
        assert!(n == 1 || (n > 1 && !one), "{n} calls in {text:?}");
        let mut arguments: Vec<&String> = Vec::new();
        for piece in &pieces {
            match piece {
                ToolPiece::Text(text) => panic!("{text:?} is no call"),
                ToolPiece::Call { .. } => {}
                ToolPiece::Arguments(text) => arguments.push(text),
            }
        }
        // Only the last call may lack its end.
        let whole = if complete { arguments.len() } else { arguments.len() - 1 };
        for text in &arguments[..whole] {
            assert!(serde_json::from_str::<Map<String, Value>>(text).is_ok(), "{text:?}");
        }
    }
}

#[test]
fn templates_without_tools_hear_of_them_in_words() {
    let call = json!([{"function": {"name": "f", "arguments": {"a": 1}}}]);
    let mut called = Message::new("assistant", "Wait.");
    called.other.insert("tool_calls".to_owned(), call);
    let tools = [json!({"type": "function", "function": {"name": "f"}})];
    let mut messages = vec![Message::new("user", "Hi"), called];
    tell_tools(&mut messages, &tools, ToolFormat::Hermes);
    let texts: Vec<&str> = messages.iter().map(|m| m.content.as_str().unwrap()).collect();
    assert!(texts[0].contains("{\"name\":\"f\"}") && messages[0].role == "system", "{texts:?}");
    let call = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\":1}}\n</tool_call>";
    assert_eq!(texts[1..], ["Hi", &format!("Wait.\n{call}")]);
    tell_tools(&mut messages, &tools, ToolFormat::Json);
    assert_eq!(messages.len(), 3, "the system message takes more text");
}
