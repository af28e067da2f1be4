//! What the server promises in documents: the OpenAPI description, and the metrics that the files
//! in `deploy/` read.

use axum::{body::Body, http::Request};
use moewe::server::{ROUTES, app};
use serde_json::{Value, json};

use crate::server::{CHAT, COMPLETIONS, SHARED, call, check_error, get, hello, post, post_ok};

#[tokio::test]
async fn the_document_draws_the_line_where_the_server_does() {
    let (_, _, text) = get(&SHARED, "/openapi.json").await;
    let document: Value = serde_json::from_str(&text).unwrap();
    let schemas = &document["components"]["schemas"];
    let last = schemas["TokenId"]["maximum"].as_u64().unwrap();
    assert_eq!(schemas["NewTokens"]["maximum"], 255);
    // 0.0 is an integer as JSON schemas count, and the smallest double is above 0.
    post_ok("/detokenize", &json!({"tokens": [0.0, last]})).await;
    let beyond = post(&SHARED, "/detokenize", &json!({"tokens": [last + 1]})).await;
    check_error(400, Some("tokens"), &beyond);
    post_ok(COMPLETIONS, &json!({"prompt": "a", "max_tokens": 255, "top_p": 5e-324})).await;
    let messages = json!([{"role": "user", "content": "Hello"}]);
    for (param, body) in [
        (Some("prompt"), json!({})),
        (Some("prompt"), json!({"prompt": null, "messages": null})),
        (Some("messages"), json!({"prompt": "a", "messages": messages})),
        (Some("messages"), json!({"prompt": "a", "messages": 3})),
    ] {
        check_error(400, param, &post(&SHARED, "/tokenize", &body).await);
    }
    post_ok("/tokenize", &json!({"prompt": null, "messages": messages})).await;
    let special = hello(json!({"add_special_tokens": true}));
    check_error(400, Some("add_special_tokens"), &post(&SHARED, CHAT, &special).await);
}

#[tokio::test]
async fn every_documented_path_is_served_and_every_served_path_documented() {
    let (_, _, text) = get(&SHARED, "/openapi.json").await;
    let document: Value = serde_json::from_str(&text).unwrap();
    let mut documented: Vec<(String, String)> = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        documented.extend(methods.as_object().unwrap().keys().map(|m| (m.clone(), path.clone())));
    }
    let mut served: Vec<_> = ROUTES.iter().map(|(m, p)| (m.to_string(), p.to_string())).collect();
    documented.sort();
    served.sort();
    assert_eq!(documented, served);
    for (method, path) in served {
        let path = path.replace("{id}", "gull");
        let request = Request::builder().method(&*method.to_uppercase()).uri(&path);
        let status = call(app(SHARED.clone()), request.body(Body::empty()).unwrap()).await.0;
        assert!(status == 200 || (status == 415 && method == "post"), "{method} {path}: {status}");
    }
}

#[tokio::test]
async fn every_metric_named_in_deploy_exists() {
    post_ok(CHAT, &hello(json!({}))).await;
    let metrics = get(&SHARED, "/metrics").await.2;
    let mut n = 0;
    for file in [
        include_str!("../deploy/grafana.json"),
        include_str!("../deploy/recording_rules.yml"),
        include_str!("../deploy/kubernetes/inference_pool.yaml"),
    ] {
        let name = |c: char| !(c.is_ascii_alphanumeric() || c == ':' || c == '_');
        for word in file.split(name).filter(|w| w.starts_with("vllm:") || w.starts_with("vllm_")) {
            n += 1;
            assert!(metrics.contains(&format!("\n{word}{{")), "{word} is not in /metrics");
        }
    }
    assert!(n > 25, "the files name only {n} metrics");
}
