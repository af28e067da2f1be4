//! A client of a server that speaks OpenAI's API, and what it sees of one streamed answer.

use std::{pin::Pin, time::Instant};

use anyhow::{Context, bail, ensure};
use axum::{
    body::{Body, Bytes, to_bytes},
    http::Request,
};
use futures_core::Stream;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;

/// What one request's client saw. Times in seconds.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Sending to first token.
    pub(super) ttft: f64,
    /// Token to token.
    pub(super) itls: Vec<f64>,
    /// Sending to last token.
    pub(super) latency: f64,
    pub(super) output_tokens: usize,
    pub(super) error: Option<String>,
}

impl Seen {
    pub(super) fn failed(error: &anyhow::Error) -> Self {
        Self { error: Some(format!("{error:#}")), ..Self::default() }
    }
}

/// A connection pool to one server.
#[derive(Clone)]
pub(super) struct Target {
    client: Client<HttpConnector, Body>,
    base_url: String,
    api_key: Option<String>,
}

impl Target {
    pub(super) fn new(base_url: &str, api_key: Option<String>) -> Self {
        let client = Client::builder(TokioExecutor::new()).build_http();
        Self { client, base_url: base_url.trim_end_matches('/').to_owned(), api_key }
    }

    async fn send(&self, path: &str, body: Option<&Value>) -> anyhow::Result<Body> {
        let uri = format!("{}{path}", self.base_url);
        let method = if body.is_some() { "POST" } else { "GET" };
        let mut request = Request::builder().method(method).uri(uri);
        request = request.header("content-type", "application/json");
        if let Some(key) = &self.api_key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let body = body.map_or(Body::empty(), |body| Body::from(body.to_string()));
        let response = self.client.request(request.body(body)?).await;
        let response = response.context("the server does not answer; is --base-url right?")?;
        let status = response.status();
        let body = Body::new(response.into_body());
        if !status.is_success() {
            let text = to_bytes(body, 1 << 20).await.unwrap_or_default();
            bail!("{status}: {}", String::from_utf8_lossy(&text));
        }
        Ok(body)
    }

    pub(super) async fn json(&self, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        let bytes = to_bytes(self.send(path, body).await?, 64 << 20).await?;
        serde_json::from_slice(&bytes).with_context(|| format!("{path} answers no JSON"))
    }

    /// Sends one streamed request and times its tokens.
    pub(super) async fn measure(&self, body: &Value) -> anyhow::Result<Seen> {
        let start = Instant::now();
        let mut frames = self.send("/v1/completions", Some(body)).await?.into_data_stream();
        let mut seen = Seen::default();
        let (mut rest, mut last, mut done) = (Vec::new(), start, false);
        while let Some(frame) = next(&mut frames).await {
            rest.extend_from_slice(&frame?);
            while let Some(end) = rest.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = rest.drain(..end + 2).collect();
                let Some(data) = event.strip_prefix(b"data: ") else { continue };
                if data.starts_with(b"[DONE]") {
                    done = true;
                    continue;
                }
                let chunk: Value = serde_json::from_slice(data)?;
                ensure!(chunk["error"].is_null(), "{}", chunk["error"]["message"]);
                if let Some(n) = chunk["usage"]["completion_tokens"].as_u64() {
                    seen.output_tokens = n as usize;
                }
                if chunk["choices"][0].is_object() {
                    let now = Instant::now();
                    let step = now.duration_since(last).as_secs_f64();
                    if last == start {
                        seen.ttft = step;
                    } else {
                        seen.itls.push(step);
                    }
                    (last, seen.latency) = (now, now.duration_since(start).as_secs_f64());
                }
            }
        }
        ensure!(done, "the stream ended without [DONE]");
        Ok(seen)
    }
}

async fn next(frames: &mut axum::body::BodyDataStream) -> Option<Result<Bytes, axum::Error>> {
    std::future::poll_fn(|cx| Pin::new(&mut *frames).poll_next(cx)).await
}
