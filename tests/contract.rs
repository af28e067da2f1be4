//! What the server promises in documents: the OpenAPI description, and the metrics that the files
//! in `deploy/` read.

use std::collections::{BTreeMap, BTreeSet};

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
    // Nothing would be left to choose: the request's fault, not the server's.
    let nothing = json!({"prompt": "a", "allowed_token_ids": [0], "min_tokens": 1});
    check_error(400, Some("allowed_token_ids"), &post(&SHARED, COMPLETIONS, &nothing).await);
    let apart = json!({
        "prompt": "a", "allowed_token_ids": [300], "structured_outputs": {"choice": ["yes"]},
    });
    check_error(400, None, &post(&SHARED, COMPLETIONS, &apart).await);
    let special = hello(json!({"add_special_tokens": true}));
    check_error(400, Some("add_special_tokens"), &post(&SHARED, CHAT, &special).await);
}

#[tokio::test]
async fn a_deep_look_at_the_health_is_asked_for_in_one_way() {
    for query in ["", "?deep=0", "?deep=1", "?deep=true", "?x=2&deep=1"] {
        assert_eq!(get(&SHARED, &format!("/health{query}")).await.0, 200, "{query}");
    }
    for query in ["?deep", "?deep=", "?deep=2", "?deep=1&deep=1"] {
        check_error(400, Some("deep"), &get(&SHARED, &format!("/ready{query}")).await);
    }
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
        let is_off = status == 404 && path == "/admin/experts";
        let refuses = status == 415 && method == "post";
        assert!(status == 200 || refuses || is_off, "{method} {path}: {status}");
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

/// What `promtool check metrics` checks, but for names that vLLM forces.
#[tokio::test]
async fn metrics_are_well_formed() {
    post_ok(CHAT, &hello(json!({}))).await;
    let metrics = get(&SHARED, "/metrics").await.2;
    let (mut families, mut series) = (BTreeMap::new(), BTreeSet::new());
    let mut described = BTreeSet::new();
    let mut buckets: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for line in metrics.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, text) = help.split_once(' ').unwrap();
            assert!(!text.is_empty() && described.insert(name), "{line}");
        } else if let Some(family) = line.strip_prefix("# TYPE ") {
            let (name, kind) = family.split_once(' ').unwrap();
            assert!(described.contains(name), "no HELP before {line}");
            assert!(families.insert(name, kind).is_none(), "{name} comes twice");
            let total = name.ends_with("_total") && name != "vllm:iteration_tokens_total";
            assert_eq!(kind == "counter", total, "{line}");
        } else {
            let (labelled, value) = line.rsplit_once(' ').unwrap();
            let (name, labels) = labelled.split_once('{').unwrap();
            assert!(labels.ends_with('}') && labels.contains("model_name=\"gull\""), "{line}");
            let value: f64 = value.parse().unwrap();
            assert!(value.is_finite() && series.insert(labelled), "{line}");
            let part = ["_bucket", "_sum", "_count"].iter().find_map(|s| name.strip_suffix(s));
            let histogram = part.filter(|part| families.get(part) == Some(&"histogram"));
            assert!(families.contains_key(histogram.unwrap_or(name)), "{line}");
            if let Some(of) = histogram.filter(|_| name.ends_with("_bucket")) {
                buckets.entry(of).or_default().push(value);
            }
            if let Some(of) = histogram.filter(|_| name.ends_with("_count")) {
                let counts = &buckets[of];
                assert!(counts.is_sorted() && *counts.last().unwrap() == value, "{line}");
            }
        }
    }
    assert!(families.len() > 30, "{metrics}");
}

#[tokio::test]
async fn info_and_fragmentation_count_the_bytes_of_expert_banks() {
    let info: Value = serde_json::from_str(&get(&SHARED, "/info").await.2).unwrap();
    assert_eq!(info["model"]["id"], "gull");
    assert_eq!(info["limits"]["max_model_len"], 256);
    assert!(info["device"]["name"].as_str().unwrap().starts_with("cpu"));
    let config: Value =
        serde_json::from_str(include_str!("../models/gull-20m/config.json")).unwrap();
    let of = |name: &str| config[name].as_f64().unwrap();
    let (hidden, width) = (of("hidden_size"), of("moe_intermediate_size"));
    let layers = of("num_hidden_layers") - of("first_k_dense_replace");
    // An int8 weight is a byte, each output channel has a scale of four.
    let expert = 3.0 * hidden * width + 4.0 * (2.0 * width + hidden);
    let used = layers * of("n_routed_experts") * expert;
    assert_eq!(info["bytes"]["expert_weights"].as_f64().unwrap(), used);
    let banks = info["bytes"]["expert_banks"].as_f64().unwrap();
    assert!(used <= banks && banks < info["bytes"]["device"].as_f64().unwrap_or(f64::MAX));
    let metrics = get(&SHARED, "/metrics").await.2;
    let line = metrics.lines().find(|l| l.contains("of=\"experts\"") && l.contains("fragment"));
    let share: f64 = line.unwrap().rsplit_once(' ').unwrap().1.parse().unwrap();
    assert!((share - (1.0 - used / banks)).abs() < 1e-9, "{share}");
}
