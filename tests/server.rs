//! The server over the shipped model on the CPU device: no mocks. Most tests call the router
//! without a socket; what only sockets have is tested on one.

use std::{
    pin::Pin,
    sync::{Arc, LazyLock},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::{Body, to_bytes},
    http::{HeaderMap, Request, StatusCode},
};
use moewe::{
    device::DeviceChoice,
    llm::{Llm, LlmOptions},
    server::{App, ROUTES, ServerConfig, app, listen},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::oneshot,
};
use tower::ServiceExt;

pub(crate) const CHAT: &str = "/v1/chat/completions";
pub(crate) const COMPLETIONS: &str = "/v1/completions";

pub(crate) fn start(config: ServerConfig) -> Arc<App> {
    start_with_context(256, config)
}

/// A server whose prompts and answers have at most `max_model_len` tokens together.
pub(crate) fn start_with_context(max_model_len: usize, config: ServerConfig) -> Arc<App> {
    let options = LlmOptions {
        model: Some(concat!(env!("CARGO_MANIFEST_DIR"), "/models/gull-20m").to_owned()),
        device: DeviceChoice::Cpu,
        max_model_len: Some(max_model_len),
        max_num_seqs: 8,
        ..LlmOptions::default()
    };
    let open = move || Llm::open(options.clone());
    App::start(Box::new(open), ServerConfig { model_name: "gull".to_owned(), ..config }).unwrap()
}

/// The server with default limits, for tests that leave no mark on it.
pub(crate) static SHARED: LazyLock<Arc<App>> = LazyLock::new(|| start(ServerConfig::default()));

pub(crate) async fn call(
    router: Router,
    request: Request<Body>,
) -> (StatusCode, HeaderMap, String) {
    let response = router.oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let bytes = to_bytes(body, 64 << 20).await.unwrap();
    (parts.status, parts.headers, String::from_utf8(bytes.to_vec()).unwrap())
}

pub(crate) fn post_request(path: &str, body: &Value) -> Request<Body> {
    let request = Request::post(path).header("content-type", "application/json");
    request.body(Body::from(body.to_string())).unwrap()
}

pub(crate) async fn post(
    app_: &Arc<App>,
    path: &str,
    body: &Value,
) -> (StatusCode, HeaderMap, String) {
    call(app(app_.clone()), post_request(path, body)).await
}

pub(crate) async fn post_ok(path: &str, body: &Value) -> Value {
    let (status, _, text) = post(&SHARED, path, body).await;
    assert_eq!(status, 200, "{text}");
    serde_json::from_str(&text).unwrap()
}

pub(crate) async fn get(app_: &Arc<App>, path: &str) -> (StatusCode, HeaderMap, String) {
    call(app(app_.clone()), Request::get(path).body(Body::empty()).unwrap()).await
}

pub(crate) fn hello(extra: Value) -> Value {
    let mut body = json!({
        "model": "gull",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 12,
        "temperature": 0,
    });
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

/// The chunks of a stream, which must end with `[DONE]`.
pub(crate) fn chunks(stream: &str) -> Vec<Value> {
    let events: Vec<&str> = stream.split("\n\n").filter(|e| e.starts_with("data: ")).collect();
    let (done, chunks) = events.split_last().unwrap();
    assert_eq!(*done, "data: [DONE]");
    chunks.iter().map(|chunk| serde_json::from_str(&chunk[6..]).unwrap()).collect()
}

pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what} did not come true");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub(crate) fn check_error(
    status: u16,
    param: Option<&str>,
    answer: &(StatusCode, HeaderMap, String),
) {
    let (found, headers, text) = answer;
    assert_eq!(found.as_u16(), status, "{text}");
    let body: Value = serde_json::from_str(text).unwrap();
    let error = &body["error"];
    assert_eq!(error["code"], status, "{text}");
    assert!(error["type"].is_string() && !error["message"].as_str().unwrap().is_empty());
    assert_eq!(error["param"].as_str(), param, "{text}");
    assert!(!text.contains("/work") && !text.contains("src/"), "{text}");
    assert!(headers.contains_key("x-request-id"));
    assert_eq!(headers.contains_key("retry-after"), status == 503);
}

#[tokio::test]
async fn a_wrong_field_is_a_400_that_names_it() {
    let deep = format!("{}1{}", "[".repeat(500), "]".repeat(500));
    for (field, value) in [
        ("messages", json!("Hello")),
        ("messages", json!([])),
        ("messages", json!([{"role": "user"}])),
        ("messages", json!([{"role": "user", "content": [{"type": "image_url"}]}])),
        ("messages", json!([{"role": "user", "content": "sea ".repeat(400)}])),
        ("messages", json!([{"role": "user", "content": "s".repeat(1_000_000)}])),
        ("temperature", json!(-1)),
        ("temperature", json!(1e308)),
        ("temperature", json!("hot")),
        ("top_p", json!(0)),
        ("top_p", json!(1.5)),
        ("top_k", json!(-2)),
        ("min_p", json!(2)),
        ("repetition_penalty", json!(0)),
        ("presence_penalty", json!(3)),
        ("frequency_penalty", json!(-3)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(1.5)),
        ("messages", json!(null)),
        ("n", json!(17)),
        ("n", json!(0)),
        ("seed", json!("x")),
        ("stop", json!(["a", "b", "c", "d", "e"])),
        ("stop", json!("s".repeat(257))),
        ("stop", json!([1])),
        ("stream", json!("yes")),
        ("stream_options", json!({"include_usage": true})),
        ("logit_bias", json!({"99999999": 1})),
        ("logit_bias", json!({"x": 1})),
        ("allowed_token_ids", json!([])),
        ("allowed_token_ids", json!([4096])),
        ("min_tokens", json!(13)),
        ("stop_token_ids", json!([4096])),
        ("top_logprobs", json!(21)),
        ("top_logprobs", json!(2)),
        ("chat_template", json!("{{ x }}")),
        ("use_beam_search", json!(true)),
        ("response_format", json!({"type": "xml"})),
        ("response_format", json!({"type": "json_schema", "json_schema": {"schema": {"type": 3}}})),
        ("structured_outputs", json!({"regex": "("})),
        ("structured_outputs", json!({"regex": "a", "choice": ["b"]})),
    ] {
        let answer = post(&SHARED, CHAT, &hello(json!({field: value}))).await;
        assert_eq!(answer.0, 400, "{field}: {}", answer.2);
        check_error(400, Some(field), &answer);
    }
    for body in ["", "{", "[]", "\"x\"", "{\"n\": 1e999}", &deep, "{\"a\": \"\\ud800\"}"] {
        let request = Request::post(CHAT).header("content-type", "application/json");
        let request = request.body(Body::from(body.to_owned())).unwrap();
        check_error(400, None, &call(app(SHARED.clone()), request).await);
    }
    for prompt in [json!(""), json!([]), json!([[]]), json!([99_999_999]), json!({}), json!([{}])] {
        let body = json!({"prompt": prompt, "max_tokens": 1});
        check_error(400, Some("prompt"), &post(&SHARED, COMPLETIONS, &body).await);
    }
}

#[tokio::test]
async fn every_other_status_is_an_error_object_too() {
    let other = post(&SHARED, CHAT, &hello(json!({"model": "gpt-5"}))).await;
    check_error(404, Some("model"), &other);
    check_error(404, Some("model"), &get(&SHARED, "/v1/models/other").await);
    check_error(404, None, &get(&SHARED, "/v2").await);
    check_error(405, None, &get(&SHARED, CHAT).await);
    let text = Request::post(CHAT).body(Body::from("{}")).unwrap();
    check_error(415, None, &call(app(SHARED.clone()), text).await);

    let strict = start(ServerConfig {
        max_body_bytes: 1000,
        body_timeout: Duration::from_millis(50),
        request_timeout: Some(Duration::from_millis(30)),
        allowed_hosts: Some(vec!["gulls.example".to_owned()]),
        ..ServerConfig::default()
    });
    let long = hello(json!({"user": "x".repeat(1000)}));
    check_error(413, None, &post(&strict, CHAT, &long).await);
    let silent = Body::from_stream(Silent);
    let request = Request::post(CHAT).header("content-type", "application/json");
    check_error(408, None, &call(app(strict.clone()), request.body(silent).unwrap()).await);
    let late = post(&strict, CHAT, &hello(json!({"max_tokens": 200, "ignore_eos": true}))).await;
    check_error(504, None, &late);
    for (host, status) in
        [("localhost:1", 200), ("gulls.example", 200), ("evil.example", 403), ("a\"", 403)]
    {
        let request = Request::get("/v1/models").header("host", host).body(Body::empty()).unwrap();
        assert_eq!(call(app(strict.clone()), request).await.0, status, "{host}");
    }
    // One open request fills this server.
    let full = start(ServerConfig { max_jobs: 1, ..ServerConfig::default() });
    let open = hello(json!({"stream": true, "max_tokens": 200, "ignore_eos": true}));
    let held = app(full.clone()).oneshot(post_request(CHAT, &open)).await.unwrap();
    check_error(503, None, &post(&full, CHAT, &hello(json!({}))).await);
    drop(held);
}

/// A body that never says anything.
struct Silent;

impl futures_core::Stream for Silent {
    type Item = Result<Vec<u8>, std::io::Error>;

    fn poll_next(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Poll::Pending
    }
}

#[tokio::test]
async fn priorities_are_for_servers_that_order_by_them() {
    let body = hello(json!({"priority": -3}));
    check_error(400, Some("priority"), &post(&SHARED, CHAT, &body).await);
    post_ok(CHAT, &hello(json!({"priority": 0}))).await;
    let ordered = start(ServerConfig { priorities: true, ..ServerConfig::default() });
    assert_eq!(post(&ordered, CHAT, &body).await.0, 200);
}

#[tokio::test]
async fn keys_open_everything_but_probes_and_the_page() {
    let config = ServerConfig { api_keys: vec!["k1".into(), "k2".into()], ..Default::default() };
    let keyed = start(config);
    for &(method, path) in ROUTES
        .iter()
        .filter(|r| !r.1.contains('{'))
        .chain(&[("get", "/nothing"), ("post", "/admin")])
    {
        let public = ["/", "/health", "/ping", "/ready"].contains(&path);
        for (name, value, right) in [
            ("x-none", "", false),
            ("authorization", "Bearer k1", true),
            ("authorization", "bearer k2", true),
            ("authorization", "Bearer k", false),
            ("authorization", "Bearer k11", false),
            ("authorization", "Basic k1", false),
            ("x-api-key", "k2", true),
            ("x-api-key", "", false),
        ] {
            let request = Request::builder().method(&*method.to_uppercase()).uri(path);
            let request = request.header(name, value).body(Body::empty()).unwrap();
            let status = call(app(keyed.clone()), request).await.0;
            assert_eq!(status == 401, !public && !right, "{method} {path} {name}: {value}");
        }
    }
}

#[tokio::test]
async fn pages_of_this_machine_may_call_and_others_may_not() {
    for (origin, allowed) in [
        ("http://localhost:3000", true),
        ("http://127.0.0.1", true),
        ("https://evil.example", false),
        ("http://localhost.evil.example", false),
        ("null", false),
    ] {
        let preflight = Request::options(CHAT)
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization")
            .body(Body::empty())
            .unwrap();
        let (status, headers, _) = call(app(SHARED.clone()), preflight).await;
        assert_eq!(status, 204);
        assert_eq!(headers.contains_key("access-control-allow-origin"), allowed, "{origin}");
    }
}

#[tokio::test]
async fn a_stream_is_openais_and_says_what_the_whole_answer_says() {
    let whole = post_ok(CHAT, &hello(json!({}))).await;
    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let (status, headers, text) = post(&SHARED, CHAT, &hello(options)).await;
    assert_eq!(status, 200);
    assert_eq!(headers["content-type"], "text/event-stream");
    let chunks = chunks(&text);
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let (usage, rest) = chunks.split_last().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], whole["usage"]["completion_tokens"]);
    let (finish, content) = rest.split_last().unwrap();
    assert_eq!(finish["choices"][0]["delta"], json!({}));
    assert_eq!(finish["choices"][0]["finish_reason"], whole["choices"][0]["finish_reason"]);
    let text: String = content
        .iter()
        .inspect(|chunk| {
            assert_eq!(chunk["object"], "chat.completion.chunk");
            assert_eq!(chunk["id"], chunks[0]["id"]);
            assert!(chunk["choices"][0]["finish_reason"].is_null() && chunk["usage"].is_null());
        })
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(whole["choices"][0]["message"]["content"], text);
    assert!(!text.is_empty());
}

#[tokio::test]
async fn stop_seed_n_logprobs_and_usage_do_what_they_say() {
    let body = hello(json!({"n": 2, "stop": ["nice"], "logprobs": true, "top_logprobs": 2}));
    let answer = post_ok(CHAT, &body).await;
    for choice in answer["choices"].as_array().unwrap() {
        assert_eq!(choice["finish_reason"], "stop");
        assert_eq!(choice["stop_reason"], "nice");
        assert!(!choice["message"]["content"].as_str().unwrap().contains("nice"));
        for token in choice["logprobs"]["content"].as_array().unwrap() {
            assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 2);
            assert!(token["logprob"].as_f64().unwrap() <= 0.0);
        }
    }
    let seeded = json!({"prompt": "Once", "max_tokens": 20, "temperature": 1.5, "seed": 7, "n": 2});
    let (one, two) = (post_ok(COMPLETIONS, &seeded).await, post_ok(COMPLETIONS, &seeded).await);
    assert_eq!(one["choices"], two["choices"]);
    assert_ne!(one["choices"][0]["text"], one["choices"][1]["text"]);
    let usage = &one["usage"];
    let sum =
        usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap();
    assert_eq!(usage["total_tokens"], sum);
    let ids = post_ok("/tokenize", &json!({"prompt": "The sea"})).await["tokens"].clone();
    let body = json!({"prompt": [ids, ids], "max_tokens": 3, "echo": true, "temperature": 0});
    let answer = post_ok(COMPLETIONS, &body).await;
    assert_eq!(answer["choices"][0]["text"], answer["choices"][1]["text"]);
    assert!(answer["choices"][0]["text"].as_str().unwrap().starts_with("The sea"));
    let text = post_ok("/detokenize", &json!({"tokens": ids})).await;
    assert_eq!(text["prompt"], "The sea");
}

#[tokio::test]
async fn a_schema_makes_the_answer_fit() {
    let schema = json!({
        "type": "object",
        "properties": {"bird": {"enum": ["gull", "tern"]}},
        "required": ["bird"],
        "additionalProperties": false,
    });
    let format = json!({"type": "json_schema", "json_schema": {"name": "b", "schema": schema}});
    let body = hello(json!({"response_format": format, "max_tokens": 100}));
    let answer = post_ok(CHAT, &body).await;
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
    let value: Value = serde_json::from_str(text).unwrap();
    assert!(["gull", "tern"].contains(&value["bird"].as_str().unwrap()), "{text}");
}

#[tokio::test]
async fn clients_that_leave_free_their_blocks() {
    let own = start(ServerConfig::default());
    for round in 0..20 {
        let mut held = Vec::new();
        for stream in [true, false, true] {
            let body = hello(json!({"stream": stream, "max_tokens": 200, "ignore_eos": true}));
            let task = tokio::spawn(app(own.clone()).oneshot(post_request(CHAT, &body)));
            held.push(task);
        }
        tokio::time::sleep(Duration::from_millis(5 * round)).await;
        for task in held {
            task.abort();
            drop(task.await);
        }
    }
    until("all blocks are free", || {
        let stats = own.engine.stats();
        own.engine.n_open() == 0 && stats.running + stats.waiting + stats.kv_blocks_used == 0
    })
    .await;
    assert_eq!(post(&own, CHAT, &hello(json!({}))).await.0, 200);
    let metrics = get(&own, "/metrics").await.2;
    assert!(!metrics.contains("finished_reason=\"abort\"} 0\n"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_streams_say_what_one_says() {
    let alone = post_ok(CHAT, &hello(json!({}))).await;
    let text = alone["choices"][0]["message"]["content"].as_str().unwrap();
    let streams = (0..64).map(|_| {
        tokio::spawn(async { post(&SHARED, CHAT, &hello(json!({"stream": true}))).await })
    });
    for stream in streams.collect::<Vec<_>>() {
        let chunks = chunks(&stream.await.unwrap().2);
        let pieces = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str());
        assert_eq!(pieces.collect::<String>(), text);
    }
}

#[tokio::test]
async fn a_draining_server_ends_what_is_open_and_takes_nothing_new() {
    let own = start(ServerConfig {
        header_timeout: Duration::from_millis(200),
        ..ServerConfig::default()
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let stopped = async { drop(stopped.await) };
    let server = tokio::spawn(listen(listener, own.clone(), stopped, std::future::pending()));

    // A client that never finishes its header is cut off.
    let mut slow = TcpStream::connect(address).await.unwrap();
    slow.write_all(b"GET /health HTTP/1.1\r\n").await.unwrap();
    let mut rest = Vec::new();
    let cut = tokio::time::timeout(Duration::from_secs(5), slow.read_to_end(&mut rest));
    cut.await.expect("a half header is not waited for").unwrap();

    let mut client = TcpStream::connect(address).await.unwrap();
    let body = hello(json!({"stream": true, "max_tokens": 120, "ignore_eos": true})).to_string();
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    client.write_all(head.as_bytes()).await.unwrap();
    until("the request runs", || own.engine.stats().running == 1).await;
    stop.send(()).unwrap();
    while get(&own, "/health").await.0 == 200 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    check_error(503, None, &get(&own, "/health").await);
    check_error(503, None, &post(&own, CHAT, &hello(json!({}))).await);
    let mut text = String::new();
    client.read_to_string(&mut text).await.unwrap();
    assert!(text.contains("[DONE]") && text.contains("\"finish_reason\":\"length\""), "{text}");
    server.await.unwrap().unwrap();
}
