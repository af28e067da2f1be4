//! `moewe bench serve`, `throughput` and `latency`: the fields of vLLM's JSON, counts that add up,
//! and a server started with the engine's flags to send requests to.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::Child,
    time::{Duration, Instant},
};

use moewe::{
    device::DeviceChoice,
    engine::{Engine, Request, SamplingParams},
    llm::Llm,
};
use serde_json::Value;

use crate::program::{command, finish, run};

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e} in {text}"))
}

#[track_caller]
fn check_positive(report: &Value, fields: &[&str]) {
    for field in fields {
        assert!(report[field].as_f64().is_some_and(|v| v > 0.0), "{field} in {report}");
    }
}

/// A server of the shipped model on the CPU that ends with its owner.
struct Server {
    child: Child,
    /// `host:port`
    address: String,
}

impl Server {
    fn start(args: &[&str]) -> Self {
        let all = ["serve", "--port", "0", "--device", "cpu"];
        let mut child = command(&[&all, args].concat()).spawn().expect("the server starts");
        let log = BufReader::new(child.stderr.take().expect("a log"));
        let mut lines = log.lines().map(|line| line.expect("UTF-8"));
        let line = lines.find(|line| line.starts_with("serving ")).expect("it serves");
        let address = line.split("http://").nth(1).expect("an address").to_owned();
        Self { child, address }
    }

    fn get(&self, path: &str) -> String {
        let mut socket = TcpStream::connect(&self.address).expect("it listens");
        let head = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        socket.write_all(head.as_bytes()).expect("sent");
        let mut answer = String::new();
        socket.read_to_string(&mut answer).expect("an answer");
        answer
    }

    fn bench(&self, args: &[&str]) -> crate::program::Ran {
        let url = format!("http://{}", self.address);
        let lengths = ["--num-prompts", "6", "--input-len", "8", "--output-len", "4"];
        run(&[&["bench", "serve", "--base-url", &url], &lengths[..], args].concat())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().expect("it runs until now");
        self.child.wait().expect("it ends");
    }
}

#[test]
fn serve_has_the_fields_of_vllm() {
    let server = Server::start(&[
        "--block-size",
        "32",
        "--kv-cache-memory",
        "4",
        "--gpu-memory-utilization",
        "0.5",
        "--max-num-seqs",
        "2",
        "--max-num-batched-tokens",
        "64",
        "--no-prefix-caching",
        "--scheduling-policy",
        "priority",
        "--tool-call-parser",
        "json",
    ]);
    let metrics = server.get("/metrics");
    for label in ["block_size=\"32\"", "enable_prefix_caching=\"false\""] {
        assert!(metrics.contains(label), "{label} is not in {metrics}");
    }
    let report = json(&server.bench(&["--max-concurrency", "2", "-o", "json"]).stdout());
    for (field, value) in [
        ("num_prompts", 6),
        ("completed", 6),
        ("failed", 0),
        ("max_concurrency", 2),
        ("total_input_tokens", 48),
        ("total_output_tokens", 24),
    ] {
        assert_eq!(report[field], value, "{field} in {report}");
    }
    check_positive(&report, &["duration", "request_throughput", "output_throughput"]);
    check_positive(&report, &["total_token_throughput"]);
    for time in ["ttft", "tpot", "itl", "e2el"] {
        let field = |kind| format!("{kind}_{time}_ms");
        check_positive(&report, &["mean", "median", "p99"].map(field).each_ref().map(|f| &**f));
        assert!(report[field("std")].is_number() && report[field("p99")].is_number());
    }
    assert!(report["mean_ttft_ms"].as_f64() < report["mean_e2el_ms"].as_f64(), "{report}");
    // At a rate, into a file, in words.
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("result.json");
    let path = file.to_str().expect("UTF-8");
    let args = ["--request-rate", "100", "--result-filename", path, "--save-detailed"];
    let table = server.bench(&args).stdout();
    assert!(table.contains("requests answered") && table.contains("p99 (ms)"), "{table}");
    let report = json(&std::fs::read_to_string(&file).expect("a result"));
    assert_eq!(report["request_rate"], 100.0);
    assert_eq!(report["ttfts"].as_array().map(Vec::len), Some(6));
    assert_eq!(report["itls"][0].as_array().map(Vec::len), Some(3));
    let failed = server.bench(&["--model", "other"]);
    failed.fails_with(&["404"]);
}

#[test]
fn serve_says_what_is_wrong() {
    let nobody = ["bench", "serve", "--base-url", "http://127.0.0.1:1"];
    run(&nobody).fails_with(&["--base-url"]);
    for args in [["--request-rate", "0"], ["--max-concurrency", "0"], ["--num-prompts", "0"]] {
        run(&[&nobody[..], &args[..]].concat()).fails_with(&[args[0]]);
    }
}

#[test]
fn throughput_counts_every_token() {
    let args = ["bench", "throughput", "--num-prompts", "5", "--input-len", "7"];
    let more = ["--output-len", "3", "--max-num-seqs", "2", "--max-concurrency", "1,2"];
    let lines = run(&[&args[..], &more, &["-o", "json"]].concat()).stdout();
    let reports: Vec<Value> = lines.lines().map(json).collect();
    let open: Vec<&Value> = reports.iter().map(|report| &report["max_concurrency"]).collect();
    assert_eq!(open, [1, 2]);
    for report in &reports {
        assert_eq!(report["num_requests"], 5);
        assert_eq!(report["total_num_tokens"], 50);
        check_positive(report, &["elapsed_time", "requests_per_second", "tokens_per_second"]);
    }
    let table = run(&[&args[..], &more, &["-o", "md"]].concat()).stdout();
    assert!(table.contains("| requests per second | "), "{table}");
    let shape = ["--shape", "olmoe", "--layers", "1", "--device", "cpu", "--num-prompts", "1"];
    let report = json(
        &run(&[
            &["bench", "throughput"],
            &shape[..],
            &["--input-len", "2"],
            &["--output-len", "2"],
            &["--max-num-seqs", "1", "-o", "json"],
        ]
        .concat())
        .stdout(),
    );
    assert_eq!((&report["model_id"], &report["total_num_tokens"]), (&"olmoe".into(), &4.into()));
    run(&["bench", "throughput", "--input-len", "5000"]).fails_with(&["--max-model-len"]);
}

#[test]
fn throughput_tells_what_the_cache_of_experts_did() {
    let args = ["bench", "throughput", "--num-prompts", "2", "--input-len", "4", "--device", "cpu"];
    let more = ["--output-len", "6", "--max-num-seqs", "1", "--max-concurrency", "1,1"];
    let open = |rest: &[&str]| run(&[&args[..], &more, rest].concat()).stdout();
    let plain = open(&["-o", "json"]);
    assert!(!plain.contains("expert_cache"), "{plain}");
    let lines = open(&["--expert-cache-memory", "4M", "-o", "json"]);
    let reports: Vec<Value> = lines.lines().map(json).collect();
    assert_eq!(reports.len(), 2);
    for report in &reports {
        check_positive(
            report,
            &["hit_rate", "mib_moved", "stalls"]
                .map(|name| format!("expert_cache_{name}"))
                .each_ref()
                .map(|f| &**f),
        );
        let field = |name: &str| report[format!("expert_cache_{name}")].as_f64().expect("a number");
        assert!(field("hit_rate") < 1.0 && field("slots") < field("experts"), "{report}");
        // Two answers of six steps, or one more, through seven layers with experts.
        assert!(field("stalls") <= 2.0 * 7.0 * 7.0, "{report}: counts of this row alone");
    }
    let table = open(&["--expert-cache-memory", "4M"]);
    assert!(table.contains("expert cache, hit rate"), "{table}");
}

#[test]
fn transfers_are_timed_by_every_way() {
    let table = run(&["bench", "transfers", "--device", "cpu", "--bytes", "256,4K"]).stdout();
    for bytes in ["256", "4096"] {
        let ways = table.lines().filter(|line| line.split_whitespace().any(|word| word == bytes));
        assert_eq!(ways.count(), 5, "{table}");
    }
    run(&["bench", "transfers", "--bytes", "100"]).fails_with(&["multiples of 16"]);
}

#[test]
fn latency_is_that_of_whole_batches() {
    let args = ["bench", "latency", "--batch-size", "2", "--input-len", "4", "--output-len", "3"];
    let more = ["--num-iters-warmup", "1", "--num-iters", "4", "-o", "json"];
    let report = json(&run(&[&args[..], &more].concat()).stdout());
    let latencies: Vec<f64> =
        report["latencies"].as_array().expect("latencies").iter().flat_map(Value::as_f64).collect();
    assert_eq!(latencies.len(), 4);
    let mean = latencies.iter().sum::<f64>() / 4.0;
    assert!((report["avg_latency"].as_f64().expect("a mean") / mean - 1.0).abs() < 1e-9);
    let percentiles = &report["percentiles"];
    check_positive(percentiles, &["10", "25", "50", "75", "90", "99"]);
    assert!(percentiles["10"].as_f64() <= percentiles["90"].as_f64(), "{report}");
}

#[test]
fn what_is_tuned_is_remembered() {
    let cache = tempfile::tempdir().expect("a temporary directory");
    let tune = |more: &[&str]| {
        let mut command = command(&[&["bench", "tune"], more].concat());
        command.env("XDG_CACHE_HOME", cache.path());
        finish(command, "")
    };
    let remembered = || {
        let files = std::fs::read_dir(cache.path().join("moewe")).into_iter().flatten();
        let paths = files.map(|file| file.expect("readable").path());
        let mut tuned = paths.filter(|path| path.extension().is_some_and(|e| e == "json"));
        tuned.next().map(|path| json(&std::fs::read_to_string(path).expect("readable")))
    };
    tune(&["--tokens", "1", "--dry-run"]).stdout();
    assert_eq!(remembered(), None);
    let ran = tune(&["--tokens", "1,4"]);
    assert!(ran.stderr.contains("remembered in"), "{}", ran.stderr);
    let table = ran.stdout();
    assert_eq!(table.lines().filter(|line| line.contains("best")).count(), 2, "{table}");
    let all = remembered().expect("a file");
    let (name, choices) = all.as_object().and_then(|all| all.iter().next()).expect("a shape");
    assert!(name.contains("4 of 32, w8a16, "), "{name}");
    let last = choices.as_array().and_then(|choices| choices.last()).expect("choices");
    assert_eq!(last[0], 4, "{choices}");
    assert!([1, 16, 32, 64, 128].map(Value::from).contains(&last[1]), "{choices}");
    for (wrong, says) in [("8,1", "ascending"), ("0", "from 1 to")] {
        assert!(tune(&["--tokens", wrong]).stderr.contains(says), "{says}");
    }
}

#[test]
fn engine_flags_are_checked() {
    for (flag, value) in [
        ("--block-size", "0"),
        ("--block-size", "5000"),
        ("--gpu-memory-utilization", "0"),
        ("--gpu-memory-utilization", "1.5"),
        ("--gpu-memory-utilization", "NaN"),
    ] {
        run(&["run", "Hello!", flag, value]).fails_with(&[flag]);
    }
    let small = ["run", "Hello!", "--kv-cache-memory", "0", "--device", "cpu"];
    run(&small).fails_as(4, &["KV cache"]);
    let args = ["run", "Hello!", "-n", "2", "-t", "0", "--device", "cpu"];
    let plain = run(&args).stdout();
    let flags = ["--block-size", "8", "--kv-cache-memory", "16", "--no-prefix-caching"];
    assert_eq!(run(&[&args[..], &flags].concat()).stdout(), plain);
}

fn time_to_first_token(engine: &mut Engine, prompt: &[u32]) -> Duration {
    let start = Instant::now();
    let params = SamplingParams { max_tokens: Some(1), ..SamplingParams::greedy() };
    engine.add(Request::new(prompt, params)).expect("taken");
    while engine.is_busy() {
        engine.step().expect("a step");
    }
    start.elapsed()
}

#[test]
fn a_repeated_prompt_of_500_tokens_answers_five_times_sooner() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/models/gull-20m");
    let llm = Llm::builder().model(model).device(DeviceChoice::Cpu).max_model_len(512).build();
    let mut engine = llm.expect("it loads").engine;
    let prompt: Vec<u32> = (0..500).map(|i| 100 + i * 31 % 3000).collect();
    let first = time_to_first_token(&mut engine, &prompt);
    let again = time_to_first_token(&mut engine, &prompt);
    assert_eq!(engine.stats().prefix_hits, 496);
    assert!(first > 5 * again, "{first:?}, then {again:?}");
}
