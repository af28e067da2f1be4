//! Tool calls over HTTP: the shipped model, which knows no tools, calls them when it must.

use std::sync::{Arc, LazyLock};

use moewe::{
    server::{App, ServerConfig},
    text::ToolFormat,
};
use serde_json::{Value, json};

use super::server::{CHAT, check_error, chunks, hello, post, start_with_context};

/// Tools told in words take a few hundred tokens of the small vocabulary.
static SHARED: LazyLock<Arc<App>> =
    LazyLock::new(|| start_with_context(768, ServerConfig::default()));

async fn post_ok(path: &str, body: &Value) -> Value {
    let (status, _, text) = post(&SHARED, path, body).await;
    assert_eq!(status, 200, "{text}");
    serde_json::from_str(&text).unwrap()
}

fn weather() -> Value {
    json!({"type": "function", "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Kiel", "Bonn"]}, "days": {"enum": [1, 2]}},
            "required": ["city", "days"],
        },
    }})
}

fn now() -> Value {
    json!({"type": "function", "function": {"name": "now"}})
}

fn arguments(call: &Value) -> Value {
    assert!(call["id"].as_str().is_some_and(|id| id.starts_with("call_")), "{call}");
    assert_eq!(call["type"], "function");
    serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap()
}

/// The message that the chunks of a stream add up to, and the reason that ends it.
fn add_up(stream: &str) -> (String, Vec<Value>, Value) {
    let (mut content, mut calls, mut finish) = (String::new(), Vec::<Value>::new(), Value::Null);
    for chunk in chunks(stream) {
        let choice = &chunk["choices"][0];
        content += choice["delta"]["content"].as_str().unwrap_or("");
        for part in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
            let index = part["index"].as_u64().unwrap() as usize;
            if index == calls.len() {
                calls.push(part.clone());
                continue;
            }
            assert_eq!(index + 1, calls.len(), "calls come one after another");
            assert!(part.get("id").is_none(), "{part}");
            let more = part["function"]["arguments"].as_str().unwrap();
            let sum = calls[index]["function"]["arguments"].as_str().unwrap().to_owned() + more;
            calls[index]["function"]["arguments"] = json!(sum);
        }
        if !choice["finish_reason"].is_null() {
            finish = choice["finish_reason"].clone();
        }
    }
    (content, calls, finish)
}

#[tokio::test]
async fn required_and_named_calls_are_made_whole_and_streamed() {
    let named = json!({"type": "function", "function": {"name": "get_weather"}});
    for choice in [json!("required"), named] {
        let ask = |stream: bool| {
            hello(json!({
                "tools": [weather(), now()], "tool_choice": choice, "parallel_tool_calls": false,
                "stream": stream, "max_tokens": 300,
            }))
        };
        let whole = post_ok(CHAT, &ask(false)).await;
        let answer = &whole["choices"][0];
        let calls = answer["message"]["tool_calls"].as_array().unwrap();
        assert_eq!((calls.len(), &answer["finish_reason"]), (1, &json!("tool_calls")));
        assert!(answer["message"]["content"].is_null());
        let given = arguments(&calls[0]);
        if choice.is_object() || calls[0]["function"]["name"] == "get_weather" {
            assert!(["Kiel", "Bonn"].contains(&given["city"].as_str().unwrap()), "{given}");
            assert!([1, 2].contains(&given["days"].as_u64().unwrap()), "{given}");
        }
        let (status, _, stream) = post(&SHARED, CHAT, &ask(true)).await;
        assert_eq!(status, 200);
        let (content, streamed, finish) = add_up(&stream);
        assert_eq!((content.as_str(), finish), ("", json!("tool_calls")));
        assert_eq!(streamed.len(), 1);
        assert_eq!(arguments(&streamed[0]), given);
        assert_eq!(streamed[0]["function"]["name"], calls[0]["function"]["name"]);
    }
}

#[tokio::test]
async fn the_format_of_calls_can_be_chosen() {
    let config = ServerConfig { tool_format: Some(ToolFormat::Json), ..ServerConfig::default() };
    let json_calls = start_with_context(768, config);
    let body = hello(json!({
        "tools": [weather()], "tool_choice": "required", "parallel_tool_calls": false,
        "max_tokens": 300,
    }));
    let (status, _, text) = post(&json_calls, CHAT, &body).await;
    assert_eq!(status, 200, "{text}");
    let answer: Value = serde_json::from_str(&text).unwrap();
    let given = arguments(&answer["choices"][0]["message"]["tool_calls"][0]);
    assert!(["Kiel", "Bonn"].contains(&given["city"].as_str().unwrap()), "{given}");
    // The same request in the words of the other format.
    let words = |text: &str| -> Value { serde_json::from_str(text).unwrap() };
    let tokens = words(&post(&json_calls, "/tokenize", &body).await.2)["tokens"].clone();
    let prompt = post(&json_calls, "/detokenize", &json!({"tokens": tokens})).await.2;
    assert!(prompt.contains("parameters") && !prompt.contains("<tool_call>"), "{prompt}");
}

#[tokio::test]
async fn a_conversation_with_calls_goes_on() {
    let call = json!({"id": "call_1", "type": "function",
        "function": {"name": "get_weather", "arguments": "{\"city\": \"Kiel\", \"days\": 1}"}});
    let messages = json!([
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]);
    let body = json!({"messages": messages, "tools": [weather()], "max_tokens": 8});
    let answer = post_ok(CHAT, &body).await;
    assert_eq!(answer["choices"][0]["message"]["role"], "assistant");
    // What the model is told: the functions, and its own call as it would have written it.
    let tokens = post_ok("/tokenize", &body).await["tokens"].clone();
    let prompt = post_ok("/detokenize", &json!({"tokens": tokens})).await;
    let prompt = prompt["prompt"].as_str().unwrap();
    for part in ["\"get_weather\"", "<tool_call>\n{\"name\": \"get_weather\"", "\"Kiel\"", "rain"] {
        assert!(prompt.contains(part), "{part} is not in {prompt}");
    }
    let none = json!({"messages": messages, "tools": [weather()], "tool_choice": "none"});
    let shorter = post_ok("/tokenize", &none).await["count"].as_u64().unwrap();
    assert!(shorter < tokens.as_array().unwrap().len() as u64);
}

#[tokio::test]
async fn an_answer_without_calls_is_as_without_tools() {
    let body = hello(json!({"tools": [now()], "tool_choice": "none"}));
    let plain = post_ok(CHAT, &hello(json!({}))).await;
    let answer = post_ok(CHAT, &body).await;
    assert_eq!(answer["choices"][0]["message"], plain["choices"][0]["message"]);
    // With JSON asked for, auto is a call or that JSON.
    let schema = json!({"type": "object", "properties": {"bird": {"enum": ["gull"]}},
        "required": ["bird"], "additionalProperties": false});
    let format = json!({"type": "json_schema", "json_schema": {"name": "b", "schema": schema}});
    let body = hello(json!({"tools": [now()], "response_format": format, "max_tokens": 60}));
    let message = post_ok(CHAT, &body).await["choices"][0]["message"].clone();
    match message["content"].as_str() {
        Some(text) => {
            let json: Value = serde_json::from_str(text).unwrap();
            assert_eq!(json, json!({"bird": "gull"}));
        }
        None => assert_eq!(message["tool_calls"][0]["function"]["name"], "now"),
    }
}

#[tokio::test]
async fn wrong_tools_are_a_400_that_names_the_field() {
    let function = |function: Value| json!([{"type": "function", "function": function}]);
    let many: Vec<Value> =
        (0..129).map(|i| function(json!({"name": format!("f{i}")}))[0].clone()).collect();
    for tools in [
        json!("f"),
        json!([{"type": "function"}]),
        json!([{"type": "web_search"}]),
        function(json!({})),
        function(json!({"name": ""})),
        function(json!({"name": "a b"})),
        function(json!({"name": "f".repeat(65)})),
        function(json!({"name": "f", "description": 1})),
        function(json!({"name": "f", "parameters": "none"})),
        function(json!({"name": "f", "description": "x".repeat(300_000)})),
        json!([now(), now()]),
        json!(many),
    ] {
        check_error(
            400,
            Some("tools"),
            &post(&SHARED, CHAT, &hello(json!({"tools": tools}))).await,
        );
    }
    // A schema that does not compile is found where it must be obeyed.
    let bad = function(json!({"name": "f", "parameters": {"type": 3}}));
    let body = hello(json!({"tools": bad, "tool_choice": "required"}));
    check_error(400, Some("tools"), &post(&SHARED, CHAT, &body).await);
    for choice in [
        json!("sometimes"),
        json!({"type": "function", "function": {"name": "other"}}),
        json!({"type": "allowed_tools"}),
    ] {
        let body = hello(json!({"tools": [now()], "tool_choice": choice}));
        check_error(400, Some("tool_choice"), &post(&SHARED, CHAT, &body).await);
    }
    let body = hello(json!({"tool_choice": "required"}));
    check_error(400, Some("tool_choice"), &post(&SHARED, CHAT, &body).await);
    let body = hello(json!({"tools": [now()], "structured_outputs": {"regex": "a"}}));
    check_error(400, Some("structured_outputs"), &post(&SHARED, CHAT, &body).await);
    for calls in [
        json!({}),
        json!([{}]),
        json!([{"function": {"name": "f", "arguments": "{"}}]),
        json!([{"function": {"name": "f", "arguments": [1]}}]),
    ] {
        let messages = json!([{"role": "assistant", "content": null, "tool_calls": calls}]);
        let body = hello(json!({"messages": messages}));
        check_error(400, Some("messages"), &post(&SHARED, CHAT, &body).await);
    }
}
