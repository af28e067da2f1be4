//! Devices that fail or dawdle while they share a model's experts: an error names the one that
//! failed, and a model made again afterwards works; one that is late changes nothing.

use std::{
    collections::HashMap,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use moewe::{
    Error, Result,
    device::{Device, DeviceChoice, DeviceError, Fault, Faults},
    engine::{Engine, EngineConfig, Request, RequestId, Runner, SamplingParams},
    llm::{Llm, LlmOptions},
    model::{ExpertShard, KvCache, Limits, Model, ModelSpec, Precision, arch},
    parallel::{
        CachePolicy, CacheSlots, ExpertLayout, Owners, ParallelError, Rows, Sharded, Share, Worker,
    },
    server::{App, Death, ServerConfig},
    weights::{Checkpoint, WeightFormat},
};
use pollster::block_on;
use serde_json::{Value, json};

use crate::{
    checkpoints::{GPU, golden, gull, options, read_json},
    server::{CHAT, check_error, get, hello, post, until},
};

const LIMITS: Limits =
    Limits { max_tokens: 64, max_sequences: 4, max_logits: 4, max_blocks: 8, max_penalized: 1 };

fn spec(dir: &Path) -> (ModelSpec, Checkpoint) {
    let spec = arch::parse(&read_json(&dir.join("config.json"))).expect("a config");
    (spec, Checkpoint::open(dir).expect("a checkpoint"))
}

fn open(choice: &DeviceChoice) -> Device {
    block_on(Device::open(choice)).expect("an adapter")
}

/// A model on two logical adapters, and what makes each of them fail.
fn two_devices() -> (Engine, [Faults; 2]) {
    sharded(&golden("qwen3_moe"), |shard| Box::new(shard))
}

/// The same of any model, whose second device is reached through what `wrap` makes of it.
fn sharded(dir: &Path, wrap: impl FnOnce(ExpertShard) -> Box<dyn Worker>) -> (Engine, [Faults; 2]) {
    let (spec, source) = spec(dir);
    let owners: Vec<Owners> =
        spec.moe_layers().map(|(_, moe)| Owners::linear(moe.routing.n_experts, 2)).collect();
    let share = |rank| Share { owners: owners.clone(), rank, redundant: None };
    let precision = Precision::of(WeightFormat::F32);
    let (mut primary, other) = (open(&GPU), open(&GPU));
    let faults = [primary.faults(), other.faults()];
    let layout = |rank| ExpertLayout { share: Some(share(rank)), slots: None };
    let shard = ExpertShard::load(other, &spec, &source, precision, &LIMITS, &layout(1));
    let shard = shard.expect("it fits");
    let kv = KvCache::alloc(&mut primary, &spec, 33, 16, precision.activations).expect("it fits");
    let model = Model::load_part(spec, &source, &mut primary, precision, 112, &layout(0), &|_| {});
    let runner = Runner::new(primary, model.expect("it fits"), kv, LIMITS).expect("it fits");
    let exchange = Sharded::new(vec![wrap(shard)], owners.clone());
    let runner = runner.with_exchange(Box::new(exchange));
    (Engine::new(runner, EngineConfig::default()), faults)
}

/// Tokens of an answer; `at` is called before each step with its number.
fn answer(engine: &mut Engine, mut at: impl FnMut(usize)) -> Result<Vec<u32>> {
    let params =
        SamplingParams { max_tokens: Some(12), ignore_eos: true, ..SamplingParams::greedy() };
    engine.add(Request::new((1..20).collect::<Vec<u32>>(), params))?;
    let (mut tokens, mut n) = (Vec::new(), 0);
    while engine.is_busy() {
        at(n);
        n += 1;
        tokens.extend(engine.step()?.into_iter().filter_map(|output| output.token));
    }
    Ok(tokens)
}

#[test]
fn a_device_lost_in_the_middle_of_a_step_is_named() {
    let (mut engine, _) = two_devices();
    let expected = answer(&mut engine, |_| {}).expect("nothing fails");
    for lost in [0, 1] {
        // At once, and at later moments of a step: within one of its layers.
        for moment in [0, 1, 4, 9] {
            let (mut engine, faults) = two_devices();
            let break_it = |n| {
                if n == 3 {
                    faults[lost].inject(Fault::Lost, moment);
                }
            };
            let error = answer(&mut engine, break_it).expect_err("a device is gone");
            match (lost, &error) {
                (0, Error::Device(DeviceError::Lost { .. })) => {}
                (1, Error::Parallel(ParallelError::Worker { rank: 1, source })) => {
                    let is_lost = matches!(**source, Error::Device(DeviceError::Lost { .. }));
                    assert!(is_lost, "{source}");
                }
                _ => panic!("device {lost} at {moment}: {error}"),
            }
        }
    }
    let (mut engine, _) = two_devices();
    assert_eq!(answer(&mut engine, |_| {}).expect("new devices work"), expected);
}

#[test]
fn a_device_lost_while_idle_is_missed() {
    for lost in [0, 1] {
        let (mut engine, faults) = two_devices();
        engine.probe().expect("both are there");
        faults[lost].inject(Fault::Lost, 0);
        // On a busy machine the loss is heard of late.
        let error = (0..3000).find_map(|_| {
            std::thread::sleep(Duration::from_millis(10));
            engine.probe().err()
        });
        let error = error.expect("one is gone");
        let is_named = match error {
            Error::Device(DeviceError::Lost { .. }) => lost == 0,
            Error::Parallel(ParallelError::Worker { rank, .. }) => lost == rank,
            _ => false,
        };
        assert!(is_named, "device {lost}: {error}");
    }
}

/// Memory runs out at the n-th allocation, for every n, while banks of experts, whole, shared or
/// cached, are made.
#[test]
fn memory_that_runs_out_at_any_bank_is_an_error() {
    let (spec, source) = spec(&golden("qwen3_moe"));
    let precision = Precision::of(WeightFormat::F32);
    let owners: Vec<Owners> =
        spec.moe_layers().map(|(_, moe)| Owners::linear(moe.routing.n_experts, 2)).collect();
    let load = |device: &mut Device, layout: &ExpertLayout| {
        Model::load_part(spec.clone(), &source, device, precision, 112, layout, &|_| {})
    };
    let whole = |mut device: Device| load(&mut device, &ExpertLayout::default()).map(drop);
    let shared = |device: Device| {
        let share = Some(Share { owners: owners.clone(), rank: 1, redundant: Some(2) });
        let layout = ExpertLayout { share, slots: None };
        ExpertShard::load(device, &spec, &source, precision, &LIMITS, &layout).map(drop)
    };
    let cached = |mut device: Device| {
        let slots = Some(CacheSlots { n: 2, policy: CachePolicy::Lru });
        load(&mut device, &ExpertLayout { share: None, slots }).map(drop)
    };
    let ways: [&dyn Fn(Device) -> Result<()>; 3] = [&whole, &shared, &cached];
    for load in ways {
        let mut failures = 0;
        // Steps of 5 keep this short; all kinds of tensors are hit.
        for n in (1..).step_by(5) {
            let device = open(&GPU);
            device.faults().inject(Fault::OutOfMemory, n);
            match load(device) {
                Err(Error::Device(DeviceError::OutOfMemory { bytes })) => {
                    assert!(bytes > 0, "it names a size");
                    failures += 1;
                }
                Err(error) => panic!("at {n}: {error}"),
                Ok(()) => break,
            }
        }
        assert!(failures > 3, "{failures} loads failed");
    }
}

/// How long a late device is waited for.
const LIMIT: Duration = Duration::from_secs(1);

/// A device whose sums come `delay` milliseconds late, or after [`LIMIT`] not at all.
#[derive(Debug)]
struct Late {
    shard: ExpertShard,
    delay: Arc<AtomicU64>,
}

impl Worker for Late {
    fn submit(&mut self, layer: usize, rows: &Rows<'_>) -> Result<()> {
        self.shard.submit(layer, rows)
    }

    fn finish(&mut self, take: &mut dyn FnMut(&[f32])) -> Result<()> {
        let delay = Duration::from_millis(self.delay.load(Ordering::Relaxed));
        thread::sleep(delay.min(LIMIT));
        if delay > LIMIT {
            return Err(DeviceError::Timeout { seconds: LIMIT.as_secs() }.into());
        }
        self.shard.finish(take)
    }

    fn forget(&mut self) {
        self.shard.forget();
    }

    fn read_expert(&mut self, layer: usize, place: usize) -> Result<Vec<u8>> {
        self.shard.read_expert(layer, place)
    }

    fn write_expert(&mut self, layer: usize, place: usize, packed: &[u8]) -> Result<()> {
        self.shard.write_expert(layer, place, packed)
    }

    fn rearrange(
        &mut self,
        layer: usize,
        owners: (&Owners, &Owners),
        rank: usize,
        packed: &HashMap<usize, Vec<u8>>,
    ) -> Result<()> {
        self.shard.rearrange(layer, owners, rank, packed)
    }

    fn probe(&self) -> Result<()> {
        self.shard.probe()
    }

    fn describe(&self) -> String {
        self.shard.describe()
    }
}

/// A model whose second device is late.
fn late(dir: &Path, delay: &Arc<AtomicU64>) -> Engine {
    let delay = delay.clone();
    sharded(dir, |shard| Box::new(Late { shard, delay })).0
}

/// Tokens of three answers made together, of which the second is cancelled after `n` steps.
fn three_answers(engine: &mut Engine, n: usize) -> [Vec<u32>; 3] {
    let params =
        SamplingParams { max_tokens: Some(8), ignore_eos: true, ..SamplingParams::greedy() };
    let ids: [RequestId; 3] = [20, 5, 11].map(|n: u32| {
        let prompt: Vec<u32> = (1..n).collect();
        engine.add(Request::new(prompt, params.clone())).expect("a valid request")
    });
    let (mut answers, mut n_steps) = ([const { Vec::new() }; 3], 0);
    while engine.is_busy() {
        if n_steps == n {
            engine.cancel(ids[1]);
        }
        n_steps += 1;
        for output in engine.step().expect("late is not wrong") {
            let index = ids.iter().position(|&id| id == output.request).expect("one of them");
            answers[index].extend(output.token);
        }
    }
    answers
}

#[test]
fn a_late_device_changes_no_answer() {
    let delay = Arc::new(AtomicU64::new(0));
    let expected = three_answers(&mut late(&golden("qwen3_moe"), &delay), usize::MAX);
    assert!(expected.iter().all(|tokens| tokens.len() == 8), "{expected:?}");
    delay.store(20, Ordering::Relaxed);
    let mut engine = late(&golden("qwen3_moe"), &delay);
    let answers = three_answers(&mut engine, 3);
    assert_eq!((&answers[0], &answers[2]), (&expected[0], &expected[2]));
    let cut = answers[1].len();
    assert!(cut < 8, "it was cancelled");
    assert_eq!(answers[1], expected[1][..cut]);
    let traffic = engine.stats().exchange.expect("two devices");
    assert!(traffic.visits > 0);
    let least = Duration::from_millis(20) * u32::try_from(traffic.visits).expect("few");
    assert!(traffic.waited >= least, "{traffic:?}: it was late each time");
}

#[test]
fn a_device_that_does_not_answer_in_time_is_named() {
    let delay = Arc::new(AtomicU64::new(0));
    let mut engine = late(&golden("qwen3_moe"), &delay);
    let mut start = Instant::now();
    let error = answer(&mut engine, |n| {
        if n == 3 {
            delay.store(60_000, Ordering::Relaxed);
            start = Instant::now();
        }
    });
    let error = error.expect_err("a device is silent");
    let waited = start.elapsed();
    assert!(waited >= LIMIT && waited < 5 * LIMIT, "{waited:?}");
    assert!(matches!(error, Error::Parallel(ParallelError::Worker { rank: 1, .. })), "{error}");
    let text = error.to_string();
    assert!(text.contains("device 1") && text.contains("did not finish within 1 s"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_device_holds_up_nobody_who_does_not_need_it() {
    let delay = Arc::new(AtomicU64::new(0));
    let of_engine = delay.clone();
    let open = move || -> Result<Llm> {
        let text = LlmOptions {
            max_model_len: Some(112),
            ..options(&gull(), DeviceChoice::Cpu, WeightFormat::F32)
        };
        Ok(Llm { engine: late(&gull(), &of_engine), ..Llm::open(text)? })
    };
    let config = ServerConfig { model_name: "gull".to_owned(), ..ServerConfig::default() };
    let app = App::start(Box::new(open), config).expect("a server");
    let ask = |extra: Value| {
        let (app, body) = (app.clone(), hello(extra));
        tokio::spawn(async move { post(&app, CHAT, &body).await })
    };
    let text = |answer: &str| {
        serde_json::from_str::<Value>(answer).expect("JSON")["choices"][0]["message"].clone()
    };
    let short = || ask(json!({"max_tokens": 4, "ignore_eos": true}));
    let long = || ask(json!({"max_tokens": 80, "ignore_eos": true}));
    let expected = text(&short().await.expect("no panic").2);

    // Seven layers of experts: a step takes 0.7 s or more.
    delay.store(100, Ordering::Relaxed);
    let (leaves, stays) = (long(), short());
    until("both run", || app.engine.stats().running == 2).await;
    for path in ["/health", "/v1/models", "/metrics"] {
        let start = Instant::now();
        assert_eq!(get(&app, path).await.0, 200, "{path}");
        assert!(start.elapsed() < Duration::from_millis(500), "{path} waited for the device");
    }
    leaves.abort();
    let stays = stays.await.expect("no panic");
    assert_eq!((stays.0.as_u16(), text(&stays.2)), (200, expected.clone()));
    until("who left is forgotten", || app.engine.stats().running == 0).await;
    assert!(app.engine.death().is_none());

    // Silence beyond the limit fails what is in flight. Giving back the memory of a device that
    // hangs would wait for it: the server stops, so that a supervisor starts it again.
    let fails = long();
    until("it runs", || app.engine.stats().running == 1).await;
    delay.store(60_000, Ordering::Relaxed);
    check_error(503, None, &fails.await.expect("no panic"));
    until("the engine has stopped", || app.engine.death() == Some(Death::DeviceLost)).await;
    assert_eq!(get(&app, "/health").await.0, 503);
    check_error(503, None, &short().await.expect("no panic"));
}
