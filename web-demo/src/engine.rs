//! The engine as a JavaScript class: load, add requests, step, cancel, ask.

use std::{collections::HashMap, path::PathBuf};

use js_sys::Function;
use moewe::{
    device::{Device, DeviceChoice},
    engine::{self, EngineConfig, FinishReason, RequestId, SamplingParams},
    llm::{Llm, LlmOptions, PlannedLlm},
    text::TextStream,
};
use serde::Deserialize;
use serde_json::{Value, json};
use wasm_bindgen::prelude::*;

use crate::{
    error::{from, named},
    files::ModelFiles,
    request::Request,
};

/// What [`WebEngine::load`] takes beside the files.
#[derive(Debug, Deserialize)]
#[serde(default)]
struct Options {
    /// What errors call the model.
    name: String,
    /// Longest context, tokens.
    max_model_len: usize,
    /// Requests that run at a time.
    max_num_seqs: usize,
    /// Tokens per step.
    max_num_batched_tokens: usize,
    seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        let engine = EngineConfig::default();
        Self {
            name: "model".into(),
            max_model_len: 2048,
            max_num_seqs: 4,
            max_num_batched_tokens: 256,
            seed: engine.seed,
        }
    }
}

/// A loaded model.
#[derive(Debug)]
#[wasm_bindgen]
pub struct WebEngine {
    llm: Llm,
    streams: HashMap<RequestId, TextStream>,
    info: Value,
}

#[wasm_bindgen]
impl WebEngine {
    /// Loads a model from its files. `options` is JSON; `progress(phase, done, total)` hears of
    /// bytes uploaded, then of the compilation of shaders.
    ///
    /// # Errors
    /// A named `Error`: `ModelError`, `WebGPUNotFoundError`, `OutOfMemoryError`, ...
    pub async fn load(
        files: ModelFiles,
        options: &str,
        progress: Function,
    ) -> Result<WebEngine, JsValue> {
        console_error_panic_hook::set_once();
        let options: Options =
            serde_json::from_str(options).map_err(|e| named("RequestError", &e.to_string()))?;
        let config =
            EngineConfig { seed: options.seed, routed_experts: true, ..EngineConfig::default() };
        let dir = PathBuf::from(&options.name);
        let planned = PlannedLlm::from_files(
            Box::new(files),
            dir,
            LlmOptions {
                // The CPU device would take minutes for a word here.
                device: DeviceChoice::Index(0),
                max_model_len: Some(options.max_model_len),
                max_num_seqs: options.max_num_seqs.max(1),
                max_num_batched_tokens: options.max_num_batched_tokens.max(1),
                engine: config,
                ..LlmOptions::default()
            },
        )
        .await
        .map_err(from)?;
        let tell = |phase: &str, done: u64, total: u64| {
            let [done, total] = [done, total].map(|n| JsValue::from_f64(n as f64));
            // A callback that throws is the page's own affair.
            let _ = progress.call3(&JsValue::NULL, &phase.into(), &done, &total);
        };
        let (total, done) = (planned.memory.weights, std::cell::Cell::new(0));
        let info = describe(&planned, &options.name);
        let llm = planned
            .load(&|bytes| {
                done.set(done.get() + bytes);
                tell("upload", done.get(), total);
            })
            .map_err(from)?;
        let mut engine = Self { llm, streams: HashMap::new(), info };
        tell("compile", 0, 1);
        engine.warm_up().await?;
        tell("compile", 1, 1);
        Ok(engine)
    }

    /// Adapter, tier, sizes of model and memory. JSON
    pub fn info(&mut self) -> String {
        let device: &mut Device = self.llm.engine.runner().device();
        let (memory, timestamps) = (device.allocated_bytes(), device.caps().timestamps);
        self.info["device_bytes"] = memory.into();
        self.info["timestamps"] = timestamps.into();
        self.info["context"] = self.llm.engine.max_model_len().into();
        self.info.to_string()
    }

    /// Queues a chat or completion request, JSON in OpenAI's words. Gives its `id` and
    /// `prompt_tokens`. JSON
    ///
    /// # Errors
    /// `RequestError`.
    pub fn add(&mut self, request: &str) -> Result<String, JsValue> {
        let request = Request::parse(request).map_err(|text| named("RequestError", &text))?;
        let prompt = match (&request.messages, &request.prompt) {
            (Some(messages), _) => self.llm.chat_prompt(messages),
            (None, prompt) => self.llm.raw_prompt(prompt.as_deref().unwrap_or_default()),
        };
        let prompt = prompt.map_err(from)?;
        let n_prompt = prompt.len();
        let params = request.params(&self.llm.defaults);
        let tokenizer = self.llm.tokenizer().map_err(from)?.clone();
        let id = self.llm.engine.add(engine::Request::new(prompt, params)).map_err(from)?;
        self.streams.insert(id, TextStream::new(tokenizer, request.stop(), false));
        Ok(json!({ "id": id.0, "prompt_tokens": n_prompt }).to_string())
    }

    /// Whether any request is unfinished.
    pub fn busy(&self) -> bool {
        self.llm.engine.is_busy()
    }

    /// One step of all requests. A JSON list of `{id, text, token, experts, finish}`; `experts`
    /// holds those that computed the token, layer by layer; `finish` is null until the end.
    ///
    /// # Errors
    /// `DeviceLostError`, `OutOfMemoryError`; all requests are then lost.
    pub async fn step(&mut self) -> Result<String, JsValue> {
        let mut list = Vec::new();
        for output in self.llm.engine.step_async().await.map_err(from)? {
            // Others are cancelled.
            let Some(stream) = self.streams.get_mut(&output.request) else { continue };
            let mut text = String::new();
            let mut finish = output.finished.map(reason);
            if let Some(token) = output.token {
                let piece = stream.push(token);
                text = piece.text;
                if piece.stopped.is_some() {
                    if finish.is_none() {
                        self.llm.engine.cancel(output.request);
                    }
                    finish = Some("stop");
                } else if finish.is_some() {
                    text += &stream.finish();
                }
            }
            if finish.is_some() {
                self.streams.remove(&output.request);
            }
            list.push(json!({
                "id": output.request.0,
                "text": text,
                "token": output.token,
                "experts": output.experts,
                "finish": finish,
            }));
        }
        Ok(Value::from(list).to_string())
    }

    /// Ends a request; nothing more is heard of it.
    pub fn cancel(&mut self, id: u32) {
        let id = RequestId(id.into());
        self.streams.remove(&id);
        self.llm.engine.cancel(id);
    }

    /// Times every kernel from now on.
    pub fn start_profile(&mut self) {
        self.llm.engine.runner().start_profile();
    }

    /// Ends that. Kernels timed since: a JSON list of `{kernel, calls, ms}`, the longest first.
    ///
    /// # Errors
    /// `DeviceLostError`.
    pub async fn kernels(&mut self) -> Result<String, JsValue> {
        let runner = self.llm.engine.runner();
        let timings = runner.take_profile().await.map_err(from)?;
        runner.stop_profile();
        let rows = moewe::bench::by_kernel(&timings).into_iter().map(|(kernel, calls, seconds)| {
            json!({ "kernel": kernel, "calls": calls, "ms": seconds * 1e3 })
        });
        Ok(Value::from(rows.collect::<Vec<_>>()).to_string())
    }
}

impl WebEngine {
    /// Compiles the shaders of a prompt and of a token that follows.
    async fn warm_up(&mut self) -> Result<(), JsValue> {
        let params =
            SamplingParams { max_tokens: Some(2), ignore_eos: true, ..self.llm.defaults.clone() };
        self.llm.engine.add(engine::Request::new([0; 16], params)).map_err(from)?;
        while self.llm.engine.is_busy() {
            self.llm.engine.step_async().await.map_err(from)?;
        }
        Ok(())
    }
}

fn describe(planned: &PlannedLlm, name: &str) -> Value {
    let spec = &planned.spec;
    let layers = spec.moe_layers().map(|(layer, moe)| {
        let routing = &moe.routing;
        json!({ "layer": layer, "experts": routing.n_experts, "top_k": routing.top_k })
    });
    json!({
        "model": name,
        "architecture": spec.architecture,
        "adapter": planned.device(),
        "layers": spec.layers.len(),
        "moe_layers": layers.collect::<Vec<_>>(),
        "weight_bytes": planned.memory.weights,
    })
}

fn reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::NonFinite | FinishReason::Mask => "error",
    }
}
