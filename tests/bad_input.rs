//! Bad input, one small test per case: prompts, options, tokenizers, templates, files and the
//! system. The program ends with exit code 1 and one sentence that names the cause; the library
//! returns a typed error. Damaged checkpoints stand in `bad_checkpoint.rs`.

use std::fs;

use moewe::{
    Error,
    device::{Caps, DeviceChoice, Tally, Tier},
    engine::{EngineError, Request, SamplingParams},
    model::{Model, Precision, arch},
    parallel::ExpertLayout,
    weights::WeightFormat,
};
use serde_json::Value;

use crate::{
    bad_checkpoint::{run_in, spoilt, weights_of},
    checkpoints::{W8, copy, edit_json, edit_tensors, golden, gull, open, read_json},
    program::{Ran, command, finish, run},
};

// --- prompts and options ---

#[test]
fn token_id_out_of_range() {
    let dir = spoilt(|dir| {
        edit_json(&dir.join("config.json"), |config| config["vocab_size"] = 290.into());
        edit_tensors(&weights_of(dir), |tensors| {
            let embedding = tensors.get_mut("model.embed_tokens.weight").expect("the table");
            embedding.1[0] = 290;
            embedding.2.truncate(290 * 64 * 4);
        });
    });
    run_in(dir.path()).fails_with(&["token id", "vocabulary of 290"]);
}

#[test]
fn requests_that_the_engine_refuses() {
    let mut llm = open(&golden("llama"), DeviceChoice::Cpu, WeightFormat::F32);
    let mut refused =
        |prompt: &[u32], params: SamplingParams| match llm.engine.add(Request::new(prompt, params))
        {
            Err(Error::Engine(error)) => error,
            other => panic!("{other:?}"),
        };
    let greedy = SamplingParams::greedy;
    assert!(matches!(refused(&[], greedy()), EngineError::EmptyPrompt));
    for id in [512, u32::MAX] {
        let error = refused(&[1, id], greedy());
        assert!(matches!(error, EngineError::TokenOutOfRange { .. }), "{error}");
    }
    let error = refused(&vec![1; 5000], greedy());
    assert!(matches!(error, EngineError::PromptTooLong { tokens: 5000, .. }), "{error}");
    for params in [
        SamplingParams { temperature: f32::NAN, ..greedy() },
        SamplingParams { temperature: -0.1, ..greedy() },
        SamplingParams { top_p: 0.0, ..greedy() },
        SamplingParams { top_p: f32::INFINITY, ..greedy() },
        SamplingParams { min_p: 2.0, ..greedy() },
        SamplingParams { repetition_penalty: 0.0, ..greedy() },
        SamplingParams { presence_penalty: f32::NAN, ..greedy() },
        SamplingParams { frequency_penalty: -9.0, ..greedy() },
        SamplingParams { max_tokens: Some(0), ..greedy() },
    ] {
        let error = refused(&[1], params.clone());
        assert!(matches!(error, EngineError::Sampling { .. }), "{params:?}: {error}");
    }
}

#[test]
fn prompt_longer_than_the_context() {
    let args = ["run", "Why is the sky blue?", "--device", "cpu", "--max-model-len", "10"];
    run(&args).fails_with(&["14 tokens", "holds 10", "--max-model-len"]);
}

#[test]
fn int8_activations_on_an_adapter_that_does_better() {
    let spec = arch::parse(&read_json(&golden("mixtral").join("config.json"))).expect("a config");
    let matrix = Caps {
        f16: true,
        subgroups: Some((32, 32)),
        coop_matrix: Some(16),
        max_workgroup_bytes: 48 << 10,
        ..Caps::portable()
    };
    let plan = |caps: Caps, weights| {
        let (precision, layout) = (Precision::of(weights), ExpertLayout::default());
        Model::tally(&spec, precision, 64, &layout, &mut Tally::new(caps))
    };
    let error = plan(matrix.clone(), WeightFormat::W8A8).expect_err("refused").to_string();
    assert!(error.contains("cooperative matrices") && error.contains("use w8a16"), "{error}");
    plan(matrix.clone(), W8).expect("the cure");
    plan(matrix.shrink(Tier::Fast), WeightFormat::W8A8).expect("no matrices");
}

#[test]
fn empty_prompt() {
    run(&["run", "", "--raw", "--device", "cpu"]).fails_with(&["the prompt is empty"]);
}

#[test]
fn prompt_that_is_not_text() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("prompt");
    fs::write(&file, b"\xff\xfe").expect("written");
    let mut run = command(&["run", "-", "--device", "cpu"]);
    run.stdin(fs::File::open(file).expect("readable"));
    finish(run, "").fails_with(&["standard input"]);
}

#[test]
fn options_out_of_range() {
    let run_with = |args: &[&str]| run(&[&["run", "Hi", "--device", "cpu"], args].concat());
    let fails = |args: &[&str], parts: &[&str]| run_with(args).fails_with(parts);
    fails(&["--temperature", "NaN"], &["temperature is NaN"]);
    fails(&["--top-p", "1.5"], &["top_p is 1.5"]);
    fails(&["--max-tokens", "0"], &["max_tokens is 0"]);
    fails(&["--group-size", "48"], &["--group-size"]);
    fails(&["--group-size", "64", "--weights", "f16"], &["--group-size"]);
    fails(&["--group-size", "48", "--weights", "w4a16"], &["--group-size"]);
    fails(&["--group-size", "32", "--weights", "w8a8"], &["--group-size", "w8a16"]);
    fails(&["--dense-weights", "w8a8"], &["w8a8 is for experts only", "use w8a16"]);
    run_with(&["--memory-limit", "1"]).fails_as(4, &["does not fit", "1.0 MiB"]);
    let huge = ["--max-num-batched-tokens", "18446744073709551615", "--memory-limit", "500"];
    run_with(&huge).fails_as(4, &["does not fit"]);
    run(&["run", "Hi", "--device", "nosuch"]).fails_with(&["nosuch", "cpu"]);
    run(&["run", "Hi", "--device", "99"]).fails_with(&["99", "cpu"]);
}

#[test]
fn model_that_is_nowhere() {
    run(&["run", "Hi", "-m", "/nonexistent/model"]).fails_with(&["/nonexistent/model"]);
    run(&["run", "Hi", "-m", "nosuch"]).fails_with(&["nosuch"]);
    let empty = tempfile::tempdir().expect("a temporary directory");
    run_in(empty.path()).fails_with(&["config.json"]);
    let mut here = command(&["run", "Hi"]);
    here.env("MOEWE_MODEL", "/nonexistent/model");
    finish(here, "").fails_with(&["/nonexistent/model"]);
}

#[test]
fn hub_id_offline() {
    let cache = tempfile::tempdir().expect("a temporary directory");
    for extra in [&["--offline"][..], &[]] {
        let mut run = command(&[&["run", "Hi", "-m", "owner/name"], extra].concat());
        run.env("HF_HUB_CACHE", cache.path()).env("HF_HUB_OFFLINE", "1");
        finish(run, "").fails_with(&["owner/name", cache.path().to_str().expect("UTF-8")]);
    }
    let odd = ["run", "Hi", "--offline", "-m", "owner/na me"];
    run(&odd).fails_with(&["owner/na me"]);
}

// --- tokenizer and template ---

#[test]
fn missing_or_broken_tokenizer() {
    let dir = spoilt(|dir| fs::remove_file(dir.join("tokenizer.json")).expect("removed"));
    run_in(dir.path()).fails_with(&["tokenizer.json"]);
    let whole = fs::read_to_string(golden("llama").join("tokenizer.json")).expect("readable");
    let cut = &whole[..whole.len() / 2];
    for text in ["", "{}", "[]", "\0", cut, &whole.replace("ByteLevel", "Nothing")] {
        fs::write(dir.path().join("tokenizer.json"), text).expect("written");
        run_in(dir.path()).fails_with(&["tokenizer"]);
    }
}

/// Chats with a copy of the default model that has this template.
fn chat_with(template: &str) -> Ran {
    let dir = copy(&golden("llama"));
    fs::write(dir.path().join("chat_template.jinja"), template).expect("written");
    let model = dir.path().to_str().expect("UTF-8");
    run(&["run", "Hi", "-n", "1", "--device", "cpu", "-m", model])
}

#[test]
fn template_that_does_not_compile() {
    for template in ["{% for %}", "{{ messages", "{% if x %}", "{{ 'a' | nosuch }}"] {
        chat_with(template).fails_with(&["chat template"]);
    }
}

#[test]
fn template_that_fails_or_refuses() {
    for template in [
        "{{ raise_exception('no chats today') }}",
        "{{ messages.nosuch.deeper }}",
        "{{ 1 // 0 }}",
        "{% include '/etc/passwd' %}",
    ] {
        chat_with(template).fails_with(&["chat template"]);
    }
    chat_with("{{ raise_exception('no chats today') }}").fails_with(&["no chats today"]);
}

#[test]
fn template_without_end() {
    let nested = "{% for b in range(99999) %}".repeat(4) + "x" + &"{% endfor %}".repeat(4);
    let recursion = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
    let doubling = "{% set ns = namespace(x='x') %}{% for i in range(99) %}\
                    {% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}";
    for template in [nested.as_str(), recursion, doubling] {
        chat_with(template).fails_with(&["chat template"]);
    }
}

#[test]
fn template_that_renders_nothing() {
    chat_with("").fails_with(&["the prompt is empty"]);
}

#[test]
fn chat_without_a_template() {
    let dir = copy(&golden("llama"));
    edit_json(&dir.path().join("tokenizer_config.json"), |config| {
        config.as_object_mut().expect("an object").remove("chat_template");
    });
    let model = dir.path().to_str().expect("UTF-8");
    run(&["run", "Hi", "--device", "cpu", "-m", model]).fails_with(&["chat template", "--raw"]);
}

// --- files and the system ---

#[test]
fn unreadable_files() {
    // A directory in the file's place; permissions would not stop root.
    for name in ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"] {
        let dir = spoilt(|dir| {
            fs::remove_file(dir.join(name)).expect("removed");
            fs::create_dir(dir.join(name)).expect("made");
        });
        run_in(dir.path()).fails_with(&[name]);
    }
}

#[test]
#[cfg(target_os = "linux")]
fn disk_full() {
    let dir = golden("llama");
    let dir = dir.to_str().expect("UTF-8");
    let heldout = gull().join("config.json");
    let text = heldout.to_str().expect("UTF-8");
    for args in [
        &["run", "Hi", "-n", "2", "--device", "cpu"][..],
        &["run", "Hi", "-n", "2", "--device", "cpu", "--json"],
        &["adapters"],
        &["adapters", "--json"],
        &["verify", dir, "--device", "cpu"],
        &["verify", dir, "--device", "cpu", "--json"],
        &["eval", "--text", text, "--device", "cpu"],
    ] {
        let mut full = command(args);
        full.stdout(fs::File::options().write(true).open("/dev/full").expect("it is there"));
        finish(full, "").fails_with(&["No space left on device"]);
    }
}

#[test]
fn reference_that_is_missing_or_of_another_model() {
    let dir = copy(&golden("llama"));
    let model = dir.path().to_str().expect("UTF-8");
    let verify = || run(&["verify", model, "--device", "cpu"]);
    edit_json(&dir.path().join("expected.json"), |json| json["prompts"] = Value::Null);
    verify().fails_with(&["expected.json", "prompts"]);
    fs::remove_file(dir.path().join("expected.json")).expect("removed");
    verify().fails_with(&["expected.json"]);
    for file in ["expected.json", "expected.safetensors"] {
        fs::copy(golden("mixtral").join(file), dir.path().join(file)).expect("copied");
    }
    // Another model's numbers of the same shape are beyond tolerance, not an error.
    assert_eq!(verify().code, Some(3));
    assert!(read_json(&dir.path().join("expected.json"))["prompts"].is_array());
}
