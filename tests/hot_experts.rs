//! Experts replaced in a running model: the result is that of a checkpoint with those experts, a
//! file with any fault changes nothing, and requests in flight go on.

use std::{collections::BTreeMap, fs, path::Path, sync::Arc, time::Duration};

use axum::body::Body;
use axum::http::Request;
use moewe::{
    device::{DeviceChoice, Fault},
    engine::{Request as Prompt, SamplingParams},
    llm::{Llm, LlmOptions},
    parallel::{CacheOptions, CachePolicy},
    server::{App, ServerConfig, app},
    weights::{Checkpoint, WeightFormat},
};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use crate::{
    checkpoints::{
        GPU, Stored, copy, edit_json, edit_tensors, golden, gull, options, write_tensors,
    },
    faults::{fail, health, start_as},
    parallel::{greedy, logits, worst},
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
    llm.take_experts(&Checkpoint::from_bytes("new.safetensors", bytes)?)
}

fn open(dir: &Path, devices: &[DeviceChoice], cache: Option<u64>) -> Llm {
    open_with_room(dir, devices, cache, 0)
}

fn open_with_room(dir: &Path, devices: &[DeviceChoice], cache: Option<u64>, spare: usize) -> Llm {
    let options = LlmOptions {
        spare_experts: spare,
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

/// Experts of a wider model than `tensors` that those of a narrower one do not have, and routers:
/// `n_new` copies of the first ones, altered, behind the `n_old` that there are.
fn wider(tensors: &Tensors, n_old: usize, n_new: usize) -> Tensors {
    let mut new = Tensors::new();
    for (name, stored) in altered(&experts_of(tensors, &(0..n_new).collect::<Vec<_>>())) {
        let (start, rest) = name.split_once(".experts.").expect("an expert");
        let (number, rest) = rest.split_once('.').expect("its projection");
        let number = n_old + number.parse::<usize>().expect("a number");
        new.insert(format!("{start}.experts.{number}.{rest}"), stored);
    }
    for (name, (dtype, shape, bytes)) in tensors {
        let Some((mixture, part)) = name.split_once("gate.") else { continue };
        let has_experts = new.keys().any(|new| new.starts_with(&format!("{mixture}experts.")));
        if has_experts && ["weight", "e_score_correction_bias"].contains(&part) {
            // New rows are old ones turned around.
            let (row, size) = (bytes.len() / n_old, if *dtype == Dtype::F32 { 4 } else { 2 });
            let mut bytes = bytes.clone();
            for e in 0..n_new {
                bytes.extend_from_within(e * row..(e + 1) * row);
                let at = bytes.len() - row;
                let turned: Vec<u8> = bytes[at..].chunks(size).rev().flatten().copied().collect();
                bytes[at..].copy_from_slice(&turned);
            }
            let shape = [&[n_old + n_new], &shape[1..]].concat();
            new.insert(name.clone(), (*dtype, shape, bytes));
        }
    }
    new
}

/// The same text as a checkpoint that had these experts from the start, on any devices and in any
/// cache: one router without groups, and one with a bias whose groups come whole.
#[test]
fn added_experts_are_those_of_a_wider_checkpoint() {
    for (name, key, n_old, n_new, groups) in
        [("qwen3_moe", "num_experts", 16, 3, None), ("glm4_moe", "n_routed_experts", 8, 4, Some(3))]
    {
        let dir = golden(name);
        let tensors = read(&dir);
        let new = wider(&tensors, n_old, n_new);
        let edited = copy(&dir);
        edit_tensors(&edited.path().join(NAME), |all| all.extend(new.clone()));
        edit_json(&edited.path().join("config.json"), |config| {
            config[key] = json!(n_old + n_new);
            if let Some(groups) = groups {
                config["n_group"] = json!(groups);
            }
        });
        for (devices, cache) in [
            (vec![CPU], None),
            (vec![GPU], None),
            (vec![CPU, CPU, CPU], None),
            (vec![GPU, CPU], None),
            (vec![GPU], Some(1 << 19)),
        ] {
            let what = format!("{name}, {devices:?}, {cache:?}");
            let mut narrow = open(&dir, &devices, cache);
            let narrow = (logits(&mut narrow, 20), greedy(&mut narrow, 8));
            let mut wide = open(edited.path(), &devices, cache);
            let wide = (logits(&mut wide, 20), greedy(&mut wide, 8));
            assert!(worst(&narrow.0, &wide.0) > 1e-3, "{what}: they make a difference");
            let mut llm = open_with_room(&dir, &devices, cache, n_new);
            // Room alone changes no choice; kernels may sum in another order.
            assert!(worst(&logits(&mut llm, 20), &narrow.0) < 1e-3, "{what}");
            assert_eq!(greedy(&mut llm, 8), narrow.1, "{what}");
            let taken = replace(&mut llm, file(&new)).expect("a good file");
            let n_layers = llm.engine.runner().model().spec.moe_layers().count();
            assert_eq!(taken.len(), n_new * n_layers, "{what}: {taken:?}");
            assert!(taken.iter().all(|&(_, expert)| expert >= n_old), "{what}: {taken:?}");
            assert!(logits(&mut llm, 20) == wide.0, "{what}");
            assert_eq!(greedy(&mut llm, 8), wide.1, "{what}");
            assert_eq!(llm.engine.stats().experts.n_present, n_old + n_new);
        }
    }
}

#[test]
fn experts_without_room_or_router_change_nothing() {
    let dir = golden("qwen3_moe");
    let good = wider(&read(&dir), 16, 2);
    let without = |part: &str| -> Tensors {
        let kept = good.iter().filter(|(name, _)| !name.contains(part));
        kept.map(|(name, stored)| (name.clone(), stored.clone())).collect()
    };
    let mut llm = open_with_room(&dir, &[CPU], None, 2);
    let before = logits(&mut llm, 20);
    for (tensors, says) in [
        (wider(&read(&dir), 16, 3), "room for 2 more"),
        (without(".gate.weight"), "gate.weight\" is not in"),
        (without(".experts.16."), "no number 17"),
        (without(".layers.0."), "others"),
        (without(".experts.17."), "shape"),
    ] {
        let error = replace(&mut llm, file(&tensors)).expect_err(says).to_string();
        assert!(error.contains(says), "{says}: {error}");
        assert!(logits(&mut llm, 20) == before, "{says}");
    }
    replace(&mut llm, file(&good)).expect("a good file");
    let mut wide = read(&dir);
    wide.extend(good);
    let error = replace(&mut llm, file(&wider(&wide, 18, 1))).expect_err("full").to_string();
    assert!(error.contains("has 18 experts, room for 0 more"), "{error}");
    let grouped = LlmOptions { spare_experts: 3, ..options(&golden("glm4_moe"), CPU, F32) };
    let error = Llm::open(grouped).expect_err("groups of 4").to_string();
    assert!(error.contains("multiples of 4"), "{error}");
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

/// A server that takes experts from a folder.
fn open_to(dir: &Path) -> ServerConfig {
    ServerConfig {
        api_keys: vec!["key".to_owned()],
        expert_dir: Some(dir.to_owned()),
        ..ServerConfig::default()
    }
}

/// The text of a streamed answer.
async fn streamed(app_: Arc<App>) -> String {
    let request = Request::post(CHAT)
        .header("content-type", "application/json")
        .header("authorization", "Bearer key");
    let body = hello(json!({"stream": true, "max_tokens": 40, "ignore_eos": true}));
    let request = request.body(Body::from(body.to_string())).expect("a request");
    let answer = call(app(app_), request).await.2;
    let pieces = chunks(&answer).into_iter();
    pieces.map(|c| c["choices"][0]["delta"]["content"].as_str().unwrap_or("").to_owned()).collect()
}

async fn ask(app_: &Arc<App>, key: &str, file: &Value) -> (u16, String) {
    let request = Request::post("/admin/experts")
        .header("content-type", "application/json")
        .header("authorization", format!("Bearer {key}"));
    let body = Body::from(json!({"file": file}).to_string());
    let (status, _, text) = call(app(app_.clone()), request.body(body).expect("a request")).await;
    (status.as_u16(), text)
}

fn serve(config: ServerConfig) -> Arc<App> {
    serve_with_room(config, 0)
}

fn serve_with_room(config: ServerConfig, spare_experts: usize) -> Arc<App> {
    let options = LlmOptions {
        spare_experts,
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
    let app_ = serve(open_to(dir.path()));
    let expected = streamed(app_.clone()).await;
    let answer = tokio::spawn(streamed(app_.clone()));
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
    assert_eq!(answer.await.expect("no panic"), expected);
    let (status, ..) = post(&app_, CHAT, &hello(json!({}))).await;
    assert_eq!(status, 401, "everything still needs the key");
}

#[tokio::test]
async fn experts_are_added_over_http() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    write_tensors(&dir.path().join("more.safetensors"), &wider(&read(&gull()), 32, 8));
    let app_ = serve_with_room(open_to(dir.path()), 8);
    let stats = || async {
        let request = Request::get("/moe/stats").header("authorization", "Bearer key");
        let body = call(app(app_.clone()), request.body(Body::empty()).expect("a request")).await.2;
        let stats: Value = serde_json::from_str(&body).expect("JSON");
        (stats["n_experts"].clone(), stats["layers"][0]["tokens"].as_array().map_or(0, Vec::len))
    };
    let weights = || async {
        let request = Request::get("/info").header("authorization", "Bearer key");
        let body = call(app(app_.clone()), request.body(Body::empty()).expect("a request")).await.2;
        let info: Value = serde_json::from_str(&body).expect("JSON");
        info["bytes"]["expert_weights"].as_u64().expect("bytes")
    };
    assert_eq!(stats().await, (json!(32), 32));
    let bytes = weights().await;
    let before = streamed(app_.clone()).await;
    // Taken again, they replace themselves.
    for (added, replaced) in [(7 * 8, 0), (0, 7 * 8)] {
        let (status, body) = ask(&app_, "key", &json!("more.safetensors")).await;
        assert_eq!(status, 200, "{body}");
        let body: Value = serde_json::from_str(&body).expect("JSON");
        let n = |what: &str| body[what].as_array().map_or(0, Vec::len);
        assert_eq!((n("added"), n("replaced")), (added, replaced), "{body}");
        assert_eq!(stats().await, (json!(40), 40));
        assert_ne!(streamed(app_.clone()).await, before);
        assert_eq!(weights().await, bytes / 32 * 40, "room does not count until it is taken");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn replaced_experts_outlive_a_lost_device() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let new = altered(&experts_of(&read(&gull()), &[0, 1, 2, 3]));
    write_tensors(&dir.path().join("new.safetensors"), &new);
    let (app_, device) = start_as(open_to(dir.path()), |_| Ok(()));
    let before = streamed(app_.clone()).await;
    let (status, body) = ask(&app_, "key", &json!("new.safetensors")).await;
    assert_eq!(status, 200, "{body}");
    let expected = streamed(app_.clone()).await;
    assert_ne!(expected, before);
    fail(&device, Fault::Lost);
    health(&app_, 503, Duration::from_secs(60)).await;
    health(&app_, 200, Duration::from_secs(60)).await;
    assert_eq!(streamed(app_.clone()).await, expected);
}
