//! Devices that fail under the real engine: the requests in flight are told, the server answers
//! 503 until the model is loaded again or gives up, and nothing hangs.

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use moewe::{
    Error, Result,
    device::{DeviceError, Fault, Faults},
    engine::{Request, SamplingParams},
    llm::{Llm, LlmOptions, PlannedLlm},
    server::{App, Death, ServerConfig, listen},
    weights::WeightFormat,
};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::{
    checkpoints::{GPU, golden, gull, options},
    server::{CHAT, check_error, chunks, get, hello, post, until},
};

/// Reaches the device of the engine that was made last.
pub(crate) type Device = Arc<Mutex<Option<Faults>>>;

fn gull_options() -> LlmOptions {
    let model = Some(gull().display().to_string());
    let (device, max_model_len, max_num_seqs) = (GPU, Some(256), 8);
    LlmOptions { model, device, max_model_len, max_num_seqs, ..LlmOptions::default() }
}

fn start(again: impl Fn(&Faults) -> Result<()> + Send + 'static) -> (Arc<App>, Device) {
    start_as(ServerConfig::default(), again)
}

/// A server on the first adapter whose models load after `again` was asked, the first excepted.
pub(crate) fn start_as(
    config: ServerConfig,
    again: impl Fn(&Faults) -> Result<()> + Send + 'static,
) -> (Arc<App>, Device) {
    let device = Device::default();
    let made = device.clone();
    let open = move || -> Result<Llm> {
        let planned = PlannedLlm::new(gull_options())?;
        let faults = planned.faults();
        if made.lock().unwrap().replace(faults.clone()).is_some() {
            again(&faults)?;
        }
        planned.load(&|_| {})
    };
    let config = ServerConfig { model_name: "gull".to_owned(), ..config };
    (App::start(Box::new(open), config).unwrap(), device)
}

pub(crate) fn fail(device: &Device, fault: Fault) {
    let faults = device.lock().unwrap().clone().unwrap();
    faults.inject(fault, u64::from(fault == Fault::OutOfMemory));
}

async fn text(app: &Arc<App>) -> Value {
    let (status, _, text) = post(app, CHAT, &hello(json!({}))).await;
    assert_eq!(status, 200, "{text}");
    serde_json::from_str::<Value>(&text).unwrap()["choices"].clone()
}

/// Waits until `/health` has this status.
pub(crate) async fn health(app: &Arc<App>, status: u16, within: Duration) {
    let start = Instant::now();
    loop {
        let answer = get(app, "/health").await;
        if answer.0 == status {
            if status == 503 {
                check_error(503, None, &answer);
            }
            return;
        }
        assert!(start.elapsed() < within, "{} after {within:?}", answer.0);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_in_flight_hear_of_a_failed_device_and_the_next_one_is_answered() {
    let (app, device) = start(|_| {
        // Long enough for the test to see that loading takes time.
        std::thread::sleep(Duration::from_millis(300));
        Ok(())
    });
    let expected = text(&app).await;
    for (fault, cause) in [(Fault::Lost, "lost"), (Fault::OutOfMemory, "memory")] {
        let long = |stream| hello(json!({"max_tokens": 200, "ignore_eos": true, "stream": stream}));
        let asked = [true, true, false].map(|stream| {
            let (app, body) = (app.clone(), long(stream));
            tokio::spawn(async move { post(&app, CHAT, &body).await })
        });
        until("all are answered", || app.engine.stats().running == 3).await;
        fail(&device, fault);
        health(&app, 503, Duration::from_secs(2)).await;
        let refused = post(&app, CHAT, &hello(json!({}))).await;
        check_error(503, None, &refused);
        for (i, answer) in asked.into_iter().enumerate() {
            let answer = tokio::time::timeout(Duration::from_secs(2), answer).await;
            let answer = answer.expect("nothing waits for a failed device").unwrap();
            if i == 2 {
                check_error(503, None, &answer);
                assert!(answer.2.contains("device"), "{}", answer.2);
            } else {
                let last = chunks(&answer.2).pop().unwrap();
                assert_eq!(last["error"]["code"], 503, "{last}");
            }
        }
        health(&app, 200, Duration::from_secs(60)).await;
        assert_eq!(text(&app).await, expected);
        let metrics = get(&app, "/metrics").await.2;
        let counted = format!("cause=\"{cause}\"}} 1\n");
        assert!(metrics.contains(&counted), "{metrics}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_lost_while_idle_is_missed_before_anybody_asks() {
    let (app, device) = start(|_| {
        std::thread::sleep(Duration::from_millis(300));
        Ok(())
    });
    assert_eq!(get(&app, "/health?deep=1").await.0, 200);
    fail(&device, Fault::Lost);
    health(&app, 503, Duration::from_secs(2)).await;
    health(&app, 200, Duration::from_secs(60)).await;
    assert_eq!(get(&app, "/health?deep=1").await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_does_not_fit_again_ends_the_engine() {
    let (app, device) = start(|faults| {
        faults.inject(Fault::OutOfMemory, 5);
        Ok(())
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let never = std::future::pending;
    let server = tokio::spawn(listen(listener, app.clone(), never(), never()));
    fail(&device, Fault::Lost);
    until("the engine is dead", || app.engine.death().is_some()).await;
    assert_eq!(app.engine.death(), Some(Death::OutOfMemory));
    let ended = tokio::time::timeout(Duration::from_secs(5), server).await;
    ended.expect("the server ends with its engine").unwrap().unwrap();
    check_error(503, None, &get(&app, "/health").await);
    check_error(503, None, &post(&app, CHAT, &hello(json!({}))).await);
    assert_eq!(get(&app, "/ping").await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_lost_again_and_again_ends_the_engine() {
    let (app, device) = start(|faults| {
        faults.inject(Fault::Lost, 1);
        Ok(())
    });
    fail(&device, Fault::Lost);
    until("the engine is dead", || app.engine.death().is_some()).await;
    assert_eq!(app.engine.death(), Some(Death::DeviceLost));
}

/// Loads a golden and generates a little on a device that fails at its `n`th check.
fn load_and_step(dir: &Path, fault: Fault, n: u64) -> Result<()> {
    let options = options(dir, GPU, WeightFormat::F32);
    let planned = PlannedLlm::new(options)?;
    planned.faults().inject(fault, n);
    let mut llm = planned.load(&|_| {})?;
    let params = SamplingParams { max_tokens: Some(3), ..SamplingParams::greedy() };
    llm.engine.add(Request::new(vec![1, 2, 3], params))?;
    while llm.engine.is_busy() {
        llm.engine.step()?;
    }
    llm.engine.probe()
}

#[test]
fn a_device_that_fails_anywhere_ends_in_a_typed_error() {
    let dir = golden("qwen3_moe");
    for fault in [Fault::Lost, Fault::OutOfMemory] {
        let mut n = 1;
        loop {
            let start = Instant::now();
            let outcome = load_and_step(&dir, fault, n);
            assert!(start.elapsed() < Duration::from_secs(30), "{fault:?} at {n} hangs");
            match outcome {
                Ok(()) => break,
                Err(Error::Device(DeviceError::Lost { .. })) if fault == Fault::Lost => {}
                Err(Error::Device(e)) if fault == Fault::OutOfMemory && e.is_out_of_memory() => {}
                Err(other) => panic!("{fault:?} at {n}: {other}"),
            }
            n += n.div_ceil(4);
        }
        assert!(n > 20, "{fault:?}: only {n} checks");
    }
}
