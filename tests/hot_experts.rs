//! Experts replaced in a running model: the result is that of a checkpoint with those experts, a
//! file with any fault changes nothing, and requests in flight go on.

use std::{collections::BTreeMap, fs, path::Path};

use axum::body::Body;
use axum::http::Request;
use moewe::{
    device::DeviceChoice,
    engine::{Request as Prompt, SamplingParams},
    llm::{Llm, LlmOptions},
    parallel::{CacheOptions, CachePolicy},
    server::{App, ServerConfig, app},
    weights::{Checkpoint, WeightFormat},
};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use crate::{
    checkpoints::{GPU, Stored, copy, edit_tensors, golden, gull, options, write_tensors},
    parallel::{greedy, logits},
    server::{CHAT, call, chunks, hello, post},
};

const CPU: DeviceChoice = DeviceChoice::Cpu;
const F32: WeightFormat = WeightFormat::F32;
const NAME: &str = "model.safetensors";

type Tensors = BTreeMap<String, Stored>;

/// All tensors of a checkpoint.
fn read(dir: &Path) -> Tensors {
    let mut all = Tensors::new();
    for entry in fs::read_dir(dir).expect("the checkpoint is there") {
        let path = entry.expect("readable").path();
        let name = path.file_name().expect("a name").to_string_lossy();
        if name.starts_with("model") && name.ends_with(".safetensors") {
            let bytes = fs::read(&path).expect("readable");
            let file = SafeTensors::deserialize(&bytes).expect("valid safetensors");
            let tensors = file.tensors().into_iter();
            all.extend(
                tensors.map(|(name, t)| (name, (t.dtype(), t.shape().to_vec(), t.data().to_vec()))),
            );
        }
    }
    all
}

/// The tensors of some experts of every layer.
fn experts_of(tensors: &Tensors, numbers: &[usize]) -> Tensors {
    let of = |name: &&String| numbers.iter().any(|n| name.contains(&format!(".experts.{n}.")));
    let kept = tensors.iter().filter(|(name, _)| of(name));
    kept.map(|(name, stored)| (name.clone(), stored.clone())).collect()
}

/// Other weights of the same shapes: bytes of each tensor turned around, element by element.
fn altered(tensors: &Tensors) -> Tensors {
    let turn = |(name, (dtype, shape, bytes)): (&String, &Stored)| {
        let size = if *dtype == Dtype::F32 { 4 } else { 2 };
        let turned = bytes.chunks(size).rev().flatten().copied().collect();
        (name.clone(), (*dtype, shape.clone(), turned))
    };
    tensors.iter().map(turn).collect()
}

/// A safetensors file in memory.
fn file(tensors: &Tensors) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    write_tensors(&dir.path().join(NAME), tensors);
    fs::read(dir.path().join(NAME)).expect("readable")
}

fn replace(llm: &mut Llm, bytes: Vec<u8>) -> moewe::Result<Vec<(usize, usize)>> {
    llm.replace_experts(&Checkpoint::from_bytes("new.safetensors", bytes)?)
}

fn open(dir: &Path, devices: &[DeviceChoice], cache: Option<u64>) -> Llm {
    let options = LlmOptions {
        text: false,
        max_model_len: Some(128),
        max_num_seqs: 4,
        expert_devices: devices[1..].to_vec(),
        expert_cache: cache.map(|bytes| CacheOptions { bytes, policy: CachePolicy::Lru }),
        ..options(dir, devices[0].clone(), F32)
    };
    Llm::open(options).unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
}

#[test]
fn replaced_experts_are_those_of_the_file_wherever_they_are() {
    let dir = golden("qwen3_moe");
    let tensors = read(&dir);
    let old = experts_of(&tensors, &[0, 3]);
    let new = altered(&old);
    assert!(!old.is_empty() && new != old);
    let edited = copy(&dir);
    edit_tensors(&edited.path().join(NAME), |all| all.extend(new.clone()));
    for (devices, cache) in [
        (vec![CPU], None),
        (vec![GPU], None),
        (vec![CPU, CPU, CPU], None),
        (vec![GPU, CPU], None),
        (vec![CPU], Some(1 << 20)),
        (vec![GPU], Some(1 << 19)),
    ] {
        let what = format!("{devices:?}, {cache:?}");
        let mut llm = open(&dir, &devices, cache);
        let before = (logits(&mut llm, 20), greedy(&mut llm, 8));
        let mut expected = open(edited.path(), &devices, cache);
        let expected = (logits(&mut expected, 20), greedy(&mut expected, 8));
        assert!(before.0 != expected.0, "{what}: other experts, other logits");
        let n_layers = llm.engine.runner().model().spec.moe_layers().count();
        let replaced = replace(&mut llm, file(&new)).expect("a good file");
        assert_eq!(replaced.len(), 2 * n_layers, "{what}: {replaced:?}");
        assert!(replaced.iter().all(|&(_, expert)| expert == 0 || expert == 3));
        assert!(logits(&mut llm, 20) == expected.0, "{what}");
        // The prompt was cached with the old experts.
        assert_eq!(greedy(&mut llm, 8), expected.1, "{what}");
        replace(&mut llm, file(&old)).expect("a good file");
        assert!(logits(&mut llm, 20) == before.0, "{what}: and back");
        assert_eq!(greedy(&mut llm, 8), before.1, "{what}");
    }
}

/// What is wrong with a file, and what the error says.
fn faults(good: &Tensors) -> Vec<(Vec<u8>, &'static str)> {
    let edited = |edit: fn(&mut Tensors, String)| {
        let mut tensors = good.clone();
        let last = tensors.keys().last().expect("tensors").clone();
        edit(&mut tensors, last);
        file(&tensors)
    };
    let whole = file(good);
    let mut flipped = whole.clone();
    flipped[20] ^= 0x55;
    vec![
        (edited(|t, last| drop(t.remove(&last))), "is not in"),
        (edited(|t, last| t.get_mut(&last).expect("there").1.reverse()), "shape"),
        (edited(|t, last| t.get_mut(&last).expect("there").0 = Dtype::I16), "dtype"),
        (edited(|t, last| t.get_mut(&last).expect("there").2[..4].fill(0xFF)), "NaN"),
        (
            edited(|t, last| {
                let stored = t[&last].clone();
                t.insert("model.norm.weight".to_owned(), stored);
            }),
            "belong to none",
        ),
        (
            edited(|t, last| {
                let stored = t[&last].clone();
                let (start, rest) = last.split_once(".experts.").expect("an expert");
                let (_, rest) = rest.split_once('.').expect("its projection");
                t.insert(format!("{start}.experts.999.{rest}"), stored);
            }),
            "no number 999",
        ),
        (whole[..whole.len() - 1].to_vec(), "bytes"),
        (whole[..whole.len() / 2].to_vec(), "bytes"),
        // A letter of a tensor's name.
        (flipped, "is not in"),
        (file(&Tensors::new()), "no tensor of an expert"),
        (Vec::new(), ""),
    ]
}

#[test]
fn a_faulty_file_changes_nothing() {
    let dir = golden("qwen3_moe");
    let good = altered(&experts_of(&read(&dir), &[0, 3]));
    for (devices, cache) in [(vec![CPU], None), (vec![GPU, CPU], None), (vec![CPU], Some(1 << 19))]
    {
        let mut llm = open(&dir, &devices, cache);
        let before = logits(&mut llm, 20);
        for (bytes, says) in faults(&good) {
            let error = replace(&mut llm, bytes).expect_err(says).to_string();
            assert!(error.contains(says), "{says}: {error}");
            assert!(logits(&mut llm, 20) == before, "{says}");
        }
    }
}

/// Replaced while a request runs, which goes on to its length.
#[test]
fn requests_in_flight_go_on() {
    let dir = golden("qwen3_moe");
    let new = altered(&experts_of(&read(&dir), &[0, 3]));
    let mut llm = open(&dir, &[GPU], None);
    let undisturbed = greedy(&mut llm, 24);
    let mut disturbed = |file: Vec<u8>, good: bool| {
        let params =
            SamplingParams { max_tokens: Some(24), ignore_eos: true, ..SamplingParams::greedy() };
        let prompt = crate::parallel::prompt(&mut llm, 9);
        llm.engine.add(Prompt::new(prompt, params)).expect("a valid request");
        let mut answer = Vec::new();
        while llm.engine.is_busy() {
            if answer.len() == 5 {
                let replaced = replace(&mut llm, file.clone());
                assert_eq!(replaced.is_ok(), good);
            }
            let outputs = llm.engine.step().expect("the step runs");
            answer.extend(outputs.into_iter().filter_map(|output| output.token));
        }
        answer
    };
    for (bytes, says) in faults(&new) {
        assert_eq!(disturbed(bytes, false), undisturbed, "{says}");
    }
    let answer = disturbed(file(&new), true);
    assert_eq!((answer.len(), &answer[..5]), (24, &undisturbed[..5]));
    assert_ne!(answer, undisturbed, "the rest is the new experts'");
}

async fn ask(app_: &std::sync::Arc<App>, key: &str, file: &Value) -> (u16, String) {
    let request = Request::post("/admin/experts")
        .header("content-type", "application/json")
        .header("authorization", format!("Bearer {key}"));
    let body = Body::from(json!({"file": file}).to_string());
    let (status, _, text) = call(app(app_.clone()), request.body(body).expect("a request")).await;
    (status.as_u16(), text)
}

fn serve(config: ServerConfig) -> std::sync::Arc<App> {
    let options = LlmOptions {
        max_model_len: Some(128),
        max_num_seqs: 4,
        ..options(&gull(), CPU, WeightFormat::W8 { group: None })
    };
    let config = ServerConfig { model_name: "gull".to_owned(), ..config };
    App::start(Box::new(move || Llm::open(options.clone())), config).expect("a server")
}

#[tokio::test]
async fn the_endpoint_is_off_unless_asked_for() {
    let off = serve(ServerConfig { api_keys: vec!["key".to_owned()], ..Default::default() });
    assert_eq!(ask(&off, "key", &json!("x")).await.0, 404);
    assert_eq!(ask(&off, "wrong", &json!("x")).await.0, 401);
    let dir = tempfile::tempdir().expect("a temporary directory");
    let open =
        serve(ServerConfig { expert_dir: Some(dir.path().to_owned()), ..Default::default() });
    assert_eq!(ask(&open, "key", &json!("x")).await.0, 403);
}

#[tokio::test]
async fn experts_are_replaced_over_http_while_answers_stream() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let good = experts_of(&read(&gull()), &[1]);
    write_tensors(&dir.path().join("same.safetensors"), &good);
    for (i, (bytes, _)) in faults(&altered(&good)).into_iter().enumerate() {
        fs::write(dir.path().join(format!("{i}.safetensors")), bytes).expect("written");
    }
    let config = ServerConfig {
        api_keys: vec!["key".to_owned()],
        expert_dir: Some(dir.path().to_owned()),
        ..ServerConfig::default()
    };
    let app_ = serve(config);
    let stream = || {
        let request = Request::post(CHAT)
            .header("content-type", "application/json")
            .header("authorization", "Bearer key");
        let body = hello(json!({"stream": true, "max_tokens": 40, "ignore_eos": true}));
        call(app(app_.clone()), request.body(Body::from(body.to_string())).expect("a request"))
    };
    let text = |answer: &str| -> String {
        let pieces = chunks(answer).into_iter();
        pieces
            .map(|c| c["choices"][0]["delta"]["content"].as_str().unwrap_or("").to_owned())
            .collect()
    };
    let expected = text(&stream().await.2);
    let answer = tokio::spawn(stream());
    let mut n_files = 0;
    while dir.path().join(format!("{n_files}.safetensors")).exists() {
        let (status, text) = ask(&app_, "key", &json!(format!("{n_files}.safetensors"))).await;
        assert_eq!(status, 400, "{text}");
        assert!(text.contains("\"param\":\"file\"") && !text.contains("/tmp"), "{text}");
        n_files += 1;
    }
    assert!(n_files > 5);
    for file in [json!("../x"), json!("/etc/passwd"), json!("."), json!("absent"), json!(3)] {
        let (status, text) = ask(&app_, "key", &file).await;
        assert_eq!(status, 400, "{file}: {text}");
    }
    let (status, body) = ask(&app_, "key", &json!("same.safetensors")).await;
    assert_eq!(status, 200, "{body}");
    let body: Value = serde_json::from_str(&body).expect("JSON");
    assert!(body["replaced"].as_array().is_some_and(|all| !all.is_empty()), "{body}");
    // The same weights, and faulty files before: nothing is to be seen in the answer.
    assert_eq!(text(&answer.await.expect("no panic").2), expected);
    let (status, ..) = post(&app_, CHAT, &hello(json!({}))).await;
    assert_eq!(status, 401, "everything still needs the key");
}
