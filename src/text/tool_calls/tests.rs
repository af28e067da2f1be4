//! Answers cut everywhere say the same: text and calls do not depend on how tokens fall.

use super::*;

/// Text, and name and arguments of each call.
type Read = (String, Vec<(String, String)>);

fn read<'a>(
    format: ToolFormat,
    max_calls: usize,
    parts: impl IntoIterator<Item = &'a str>,
) -> Read {
    let names = ["get_weather", "f"].map(String::from).to_vec();
    let mut parser = ToolParser::new(format, names, max_calls);
    let mut pieces: Vec<ToolPiece> = parts.into_iter().flat_map(|p| parser.push(p)).collect();
    pieces.extend(parser.finish());
    let (mut text, mut calls) = (String::new(), Vec::<(String, String)>::new());
    for piece in pieces {
        match piece {
            ToolPiece::Text(more) => text += &more,
            ToolPiece::Call { name } => calls.push((name, String::new())),
            ToolPiece::Arguments(more) => calls.last_mut().expect("a call began").1 += &more,
        }
    }
    assert_eq!(parser.n_calls(), calls.len());
    (text, calls)
}

#[track_caller]
fn check(format: ToolFormat, answer: &str, text: &str, calls: &[(&str, &str)]) {
    let calls = calls.iter().map(|&(n, a)| (n.to_owned(), a.to_owned())).collect();
    let expected = (text.to_owned(), calls);
    assert_eq!(read(format, 9, [answer]), expected, "whole: {answer:?}");
    for (at, _) in answer.char_indices() {
        let (a, b) = answer.split_at(at);
        assert_eq!(read(format, 9, [a, b]), expected, "cut at {at}: {answer:?}");
    }
    let chars: Vec<String> = answer.chars().map(String::from).collect();
    assert_eq!(read(format, 9, chars.iter().map(|c| &**c)), expected, "by chars: {answer:?}");
}

const WEATHER: &str = r#"{"city": "Köln \"}</tool_call>", "days": [1, {"a": "]"}]}"#;

#[test]
fn hermes_calls_are_found_within_text() {
    let check = |answer: &str, text: &str, calls: &[(&str, &str)]| {
        check(ToolFormat::Hermes, answer, text, calls);
    };
    let one = format!(
        "<tool_call>\n{{\"name\": \"get_weather\", \"arguments\": {WEATHER}}}\n</tool_call>"
    );
    check(&one, "", &[("get_weather", WEATHER)]);
    check(&format!("Let me see. <b>\n\n{one}\n"), "Let me see. <b>", &[("get_weather", WEATHER)]);
    let two = format!("{one}\n<tool_call>{{\"name\":\"f\"}}</tool_call>\n");
    check(&two, "", &[("get_weather", WEATHER), ("f", "{}")]);
    check(&format!("{one} done. "), " done.", &[("get_weather", WEATHER)]);
    let strange = [
        // The other order, another key, arguments as a string, none.
        ("{\"arguments\": {\"a\": 1}, \"name\": \"f\"}", "{\"a\": 1}"),
        ("{\"type\": \"function\", \"name\": \"f\", \"parameters\": {} , \"x\": 1}", "{}"),
        ("{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": 1}\"}", "{\"a\": 1}"),
        ("{\"name\": \"f\", \"arguments\": null}", "{}"),
        ("{ \"id\" : 3, \"name\" : \"f\" , \"arguments\" : { } }", "{ }"),
    ];
    for (object, arguments) in strange {
        check(&format!("<tool_call>{object}</tool_call>"), "", &[("f", arguments)]);
        // The end mark is often forgotten.
        check(&format!("<tool_call>{object}"), "", &[("f", arguments)]);
    }
}

#[test]
fn what_is_no_hermes_call_stays_text() {
    for text in [
        "",
        "Hello",
        " a < b, <tool, <tool_cal  \n",
        "<tool_call>",
        "a\n <tool_call> no </tool_call> b",
        "<tool_call>{\"name\": \"unknown\", \"arguments\": {}}</tool_call>",
        "<tool_call>{\"name\": 3}</tool_call>",
        "<tool_call>{\"city\": \"Köln\"}</tool_call>",
        "<tool_call>{}</tool_call>",
        "<tool_call>{\"name\": \"f",
        "<tool_call>[1]</tool_call>",
        "<tool_call>{\"name\"; 1}",
    ] {
        check(ToolFormat::Hermes, text, text, &[]);
    }
}

#[test]
fn json_calls_are_the_whole_answer() {
    let check = |answer: &str, text: &str, calls: &[(&str, &str)]| {
        check(ToolFormat::Json, answer, text, calls);
    };
    let one = format!("{{\"name\": \"get_weather\", \"parameters\": {WEATHER}}}");
    check(&one, "", &[("get_weather", WEATHER)]);
    check(&format!(" \n<|python_tag|>{one}"), "", &[("get_weather", WEATHER)]);
    let f = "{\"name\": \"f\", \"arguments\": {}}";
    check(&format!("{one}; {f};\n"), "", &[("get_weather", WEATHER), ("f", "{}")]);
    check(&format!("{f}\n{f}"), "", &[("f", "{}"), ("f", "{}")]);
    for text in [
        "Hello {\"name\": \"f\"}",
        " <|python",
        "{\"name\": \"Bob\", \"age\": 3} and so on {}",
        "{\"age\": 3}",
        "[1]",
        "  ",
    ] {
        check(text, text, &[]);
    }
}

#[test]
fn calls_beyond_the_limit_are_dropped() {
    let call = "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}}</tool_call>";
    let three = call.repeat(3);
    for at in 0..three.len() {
        let (a, b) = three.split_at(at);
        let (text, calls) = read(ToolFormat::Hermes, 1, [a, b]);
        assert_eq!((text.as_str(), calls.len()), ("", 1), "cut at {at}");
        assert_eq!(calls[0].1, "{\"a\": 1}");
    }
}
