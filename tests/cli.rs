//! The binary as a user meets it: what goes to stdout and what to stderr, JSON that parses, exit
//! codes, the chat in a terminal. Numbers are the business of other modules.

use serde_json::Value;

use crate::{
    checkpoints::{copy, edit_json, edit_tensors, golden, gull, read_json},
    program::{command, finish, run},
};

const SKY: &str = "The light of the sun has many colors. The air scatters blue light more than the \
                   other colors. That is why the sky looks blue.";

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e} in {text}"))
}

#[test]
fn run_prints_the_answer_to_stdout_and_the_rest_to_stderr() {
    let ran = run(&["run", "Why is the sky blue?", "--temperature", "0"]);
    for part in ["model ", "device ", "memory ", "tokens/s", "first token after"] {
        assert!(ran.stderr.contains(part), "{part:?} is not in {}", ran.stderr);
    }
    assert_eq!(ran.stdout(), format!("{SKY}\n"));
}

#[test]
fn run_as_json() {
    let args = ["run", "Why is the sky blue?", "-t", "0", "--json", "--device", "cpu"];
    let answer = json(&run(&args).stdout());
    assert_eq!(answer["text"], SKY);
    assert_eq!(answer["finish_reason"], "stop");
    assert_eq!(answer["tokens"].as_array().map(Vec::len), Some(33));
    assert_eq!(answer["speed"]["prompt_tokens"], 14);
    assert_eq!(answer["speed"]["completion_tokens"], 33);
    for key in ["time_to_first_token_s", "prompt_tokens_per_s", "decode_tokens_per_s"] {
        assert!(answer["speed"][key].as_f64().is_some_and(|v| v > 0.0), "{key} in {answer}");
    }
    let short = json(&run(&[&args[..], &["-n", "3"]].concat()).stdout());
    assert_eq!(short["finish_reason"], "length");
    assert_eq!(short["tokens"].as_array().map(Vec::len), Some(3));
}

#[test]
fn raw_continues_and_stdin_is_a_prompt() {
    let reference = read_json(&gull().join("reference.json"));
    let expected = reference["greedy"][0]["text"].as_str().expect("a text");
    let args = ["run", "--raw", "-t", "0", "-n", "20", "--weights", "f32", "--device", "cpu"];
    let argument = run(&[&args[..], &["Once upon a time"]].concat()).stdout();
    let text = argument.strip_suffix('\n').expect("a line");
    assert!(text.len() > 40 && expected.starts_with(text), "{text:?}");
    for dash in [&["-"][..], &[]] {
        let piped = finish(command(&[&args[..], dash].concat()), "Once upon a time");
        assert_eq!(piped.stdout(), argument);
    }
}

#[test]
fn system_prompt_stop_string_and_seed_reach_the_model() {
    let args = ["run", "Tell me a story.", "-n", "30", "--device", "cpu"];
    let with = |more: &[&str]| run(&[&args[..], more].concat()).stdout();
    let plain = with(&["--seed", "1"]);
    assert_eq!(plain, with(&["--seed", "1"]));
    assert_ne!(plain, with(&["--seed", "2"]));
    assert_ne!(with(&["-t", "0"]), with(&["-t", "0", "--system", "Answer with one word."]));
    let stopped = run(&["run", "Why is the sky blue?", "-t", "0", "--stop", " many colors"]);
    assert_eq!(stopped.stdout(), "The light of the sun has\n");
}

#[test]
fn adapters_are_listed() {
    let table = run(&["adapters"]).stdout();
    assert!(table.lines().count() >= 3, "no adapter in\n{table}");
    assert!(table.lines().last().is_some_and(|line| line.starts_with("cpu")), "{table}");
    let rows = json(&run(&["adapters", "--json"]).stdout());
    let first = &rows.as_array().expect("an array")[0];
    assert!(first["name"].is_string() && first["max_binding_bytes"].is_u64(), "{first}");
    assert!(["portable", "fast", "matrix"].contains(&first["tier"].as_str().unwrap_or("")));
    // Index, backend and part of the name all choose it.
    let name = first["name"].as_str().expect("a name").to_uppercase();
    let backend = first["backend"].as_str().expect("a backend");
    for device in ["0", &name[..4], backend] {
        let ran = run(&["run", "Hello!", "-n", "1", "--device", device]);
        assert!(ran.stderr.contains(first["name"].as_str().expect("a name")), "{ran:?}");
        ran.stdout();
    }
}

#[test]
fn verify_exits_with_0_or_3() {
    let dir = copy(&golden("olmoe"));
    let path = dir.path().to_str().expect("UTF-8");
    let table = run(&["verify", path]).stdout();
    assert!(table.contains("within tolerance"), "{table}");
    let reference = read_json(&dir.path().join("expected.json"));
    let report = json(&run(&["verify", path, "--json", "--device", "cpu"]).stdout());
    assert_eq!(report["passed"], true);
    let names = |json: &Value| -> Vec<Value> {
        json["prompts"].as_array().expect("prompts").iter().map(|p| p["name"].clone()).collect()
    };
    assert_eq!(names(&report), names(&reference));
    // Verify needs no text.
    std::fs::remove_file(dir.path().join("tokenizer.json")).expect("removed");
    std::fs::write(dir.path().join("chat_template.jinja"), "{% broken").expect("written");
    let portable = run(&["verify", path, "--tier", "portable", "--weights", "f16"]);
    assert!(portable.stderr.contains("portable tier"), "{}", portable.stderr);
    portable.stdout();
    edit_tensors(&dir.path().join("expected.safetensors"), |tensors| {
        // The exponent of one logit.
        tensors.get_mut("text.logits").expect("logits").2[403] ^= 0x10;
    });
    let ran = run(&["verify", path]);
    assert_eq!(ran.code, Some(3), "{ran:?}");
    assert!(ran.stdout.contains("BEYOND TOLERANCE") && ran.stdout.contains("FAIL"), "{ran:?}");
}

#[test]
fn eval_prints_perplexity() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let text = dir.path().join("text.txt");
    let heldout = std::fs::read_to_string(gull().join("heldout.txt")).expect("readable");
    std::fs::write(&text, &heldout[..2000]).expect("written");
    let text = text.to_str().expect("UTF-8");
    let result = json(&run(&["eval", "--text", text, "--json", "--window", "128"]).stdout());
    let number = |key: &str| result[key].as_f64().unwrap_or_else(|| panic!("{key}: {result}"));
    assert!((number("mean_nll").exp() / number("perplexity") - 1.0).abs() < 1e-9);
    assert!((2.0..20.0).contains(&number("perplexity")) && number("tokens") > 300.0, "{result}");
    let line = run(&["eval", "--text", text, "--window", "128"]).stdout();
    assert!(line.contains(&format!("perplexity {:.4}", number("perplexity"))), "{line}");
    run(&["eval", "--text", "/nonexistent.txt"]).fails_with(&["/nonexistent.txt"]);
    run(&["eval", "--text", text, "--window", "0"]).fails_with(&["--window"]);
    run(&["eval", "--text", text, "--window", "1025"]).fails_with(&["--window", "1024"]);
}

/// Dispatches of a decode step with `n_layers` layers, the first of them dense.
fn dispatches(n_layers: usize) -> usize {
    let dir = copy(&gull());
    edit_json(&dir.path().join("config.json"), |c| c["num_hidden_layers"] = n_layers.into());
    let model = dir.path().to_str().expect("UTF-8");
    let args = ["run", "Hello!", "-n", "3", "--ignore-eos", "--profile", "-m", model];
    let ran = run(&[&args[..], &["--load-format", "dummy"]].concat());
    assert_eq!(ran.code, Some(0), "{ran:?}");
    for kernel in ["expert_gemv gate_up", "route", "attention_decode", "share", "total"] {
        assert!(ran.stderr.contains(kernel), "{kernel:?} is not in {}", ran.stderr);
    }
    let line = ran.stderr.lines().find(|line| line.ends_with("dispatches")).expect("a count");
    line.split(' ').rev().nth(1).and_then(|n| n.parse().ok()).expect("a number")
}

#[test]
fn profile_counts_at_most_10_dispatches_per_moe_layer() {
    let (short, long) = (dispatches(3), dispatches(5));
    let per_layer = (long - short) / 2;
    assert!((5..=10).contains(&per_layer) && (long - short).is_multiple_of(2), "{per_layer}");
}

#[test]
#[cfg(target_os = "linux")]
fn chat_in_a_terminal_remembers_and_resets() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let program = env!("CARGO_BIN_EXE_moewe");
    let line = format!("{program} run -t 0 --device cpu");
    // util-linux gives the program a terminal; a dumb one keeps lines typed ahead.
    let mut script = std::process::Command::new("script");
    script.args(["-qec", &line, "/dev/null"]).current_dir(&dir).env("TERM", "dumb");
    script.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let input = "Hello!\nHello!\n/nosuch\n\n/reset\nHello!\n/quit\nnever read\n";
    let screen = finish(script, input).stdout();
    let answers: Vec<&str> =
        screen.lines().filter_map(|line| line.trim_end().strip_prefix("> ")).collect();
    let greeting = "Hi there! It is nice to meet you. What can I do for you?";
    assert_eq!(screen.matches("(prompt ").count(), 3, "{screen}");
    assert!(screen.contains("/nosuch is not a command"), "{screen}");
    assert!(answers.first().is_some_and(|a| *a == greeting), "{answers:?}");
    // The second prompt carries the first turn; the one after /reset does not.
    assert_eq!(screen.matches("(prompt 10 tokens").count(), 2, "{screen}");
}

#[test]
fn every_command_has_help() {
    for name in ["run", "chat", "serve", "verify", "eval", "bench", "adapters"] {
        let help = run(&[name, "--help"]).stdout();
        assert!(help.contains("Usage: moewe") && help.contains(name), "{help}");
    }
    let all = run(&["--help"]).stdout();
    assert!(["run", "verify", "Exit codes"].iter().all(|part| all.contains(part)), "{all}");
    assert!(run(&["--version"]).stdout().starts_with("moewe "));
    assert_eq!(run(&["fly"]).code, Some(2));
    assert_eq!(run(&["run", "--weights", "f8"]).code, Some(2));
}

#[test]
fn bench_reports_are_json_that_can_be_drawn() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (rows, layer) = (dir.path().join("rows.json"), dir.path().join("layer.json"));
    let svg = dir.path().join("bench.svg");
    let args = ["bench", "-p", "8", "-n", "2", "-d", "0", "-b", "1,2", "-r", "1", "-o", "json"];
    let report = run(&args).stdout();
    let names: Vec<Value> = json(&report)["rows"]
        .as_array()
        .expect("rows")
        .iter()
        .map(|row| row["test"].clone())
        .collect();
    assert_eq!(names, ["pp8", "tg2", "tg2"]);
    assert!(json(&report)["memory"]["peak_bytes"].as_u64() > Some(20 << 20), "{report}");
    std::fs::write(&rows, report).expect("written");
    let report = run(&["bench", "kernels", "--tokens", "2", "-o", "json"]).stdout();
    let kernels = &json(&report)["moe_layer"][0]["kernels"];
    assert!(kernels.as_array().is_some_and(|all| all.len() > 2), "{report}");
    std::fs::write(&layer, report).expect("written");
    let path = |path: &std::path::Path| path.to_str().expect("UTF-8").to_owned();
    let picture = run(&["bench", "plot", &path(&rows), &path(&layer), "-s", &path(&svg)]);
    picture.stdout();
    assert!(std::fs::read_to_string(&svg).expect("a picture").starts_with("<svg"));
}
