//! Devices that fail while they share a model's experts: an error names the one that failed, and a
//! model made again afterwards works.

use moewe::{
    Error, Result,
    device::{Device, DeviceChoice, DeviceError, Fault, Faults},
    engine::{Engine, EngineConfig, Request, Runner, SamplingParams},
    model::{ExpertCache, ExpertShard, KvCache, Limits, Model, ModelSpec, Precision, arch},
    parallel::{CacheOptions, CachePolicy, ExpertLayout, Owners, ParallelError, Sharded, Share},
    weights::{Checkpoint, WeightFormat},
};
use pollster::block_on;

use crate::checkpoints::{GPU, golden, read_json};

const LIMITS: Limits =
    Limits { max_tokens: 64, max_sequences: 1, max_logits: 1, max_blocks: 8, max_penalized: 1 };

fn spec() -> (ModelSpec, Checkpoint) {
    let dir = golden("qwen3_moe");
    let spec = arch::parse(&read_json(&dir.join("config.json"))).expect("a config");
    (spec, Checkpoint::open(&dir).expect("a checkpoint"))
}

fn open(choice: &DeviceChoice) -> Device {
    block_on(Device::open(choice)).expect("an adapter")
}

/// A model on two logical adapters, and what makes each of them fail.
fn two_devices() -> (Engine, [Faults; 2]) {
    let (spec, source) = spec();
    let owners: Vec<Owners> =
        spec.moe_layers().map(|(_, moe)| Owners::linear(moe.routing.n_experts, 2)).collect();
    let share = |rank| Share { owners: owners.clone(), rank, redundant: None };
    let precision = Precision::of(WeightFormat::F32);
    let (mut primary, other) = (open(&GPU), open(&GPU));
    let faults = [primary.faults(), other.faults()];
    let shard = ExpertShard::load(other, &spec, &source, precision, &LIMITS, share(1));
    let shard = shard.expect("it fits");
    let layout = ExpertLayout::Share(share(0));
    let kv = KvCache::alloc(&mut primary, &spec, 9, 16, precision.activations).expect("it fits");
    let model = Model::load_part(spec, &source, &mut primary, precision, 112, &layout, &|_| {});
    let runner = Runner::new(primary, model.expect("it fits"), kv, LIMITS).expect("it fits");
    let exchange = Sharded::new(vec![Box::new(shard)], owners.clone());
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
                (1, Error::Parallel(ParallelError::Worker { rank: 1, cause })) => {
                    assert!(cause.contains("lost"), "{cause}");
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
        let error = (0..100).find_map(|_| engine.probe().err()).expect("one is gone");
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
    let (spec, source) = spec();
    let precision = Precision::of(WeightFormat::F32);
    let owners: Vec<Owners> =
        spec.moe_layers().map(|(_, moe)| Owners::linear(moe.routing.n_experts, 2)).collect();
    let load = |device: &mut Device, layout: &ExpertLayout| {
        Model::load_part(spec.clone(), &source, device, precision, 112, layout, &|_| {})
    };
    let whole = |mut device: Device| load(&mut device, &ExpertLayout::All).map(drop);
    let shared = |device: Device| {
        let share = Share { owners: owners.clone(), rank: 1, redundant: Some(2) };
        ExpertShard::load(device, &spec, &source, precision, &LIMITS, share).map(drop)
    };
    let cached = |mut device: Device| {
        let model = load(&mut device, &ExpertLayout::Cached(4))?;
        let options = CacheOptions { bytes: 0, policy: CachePolicy::Lru };
        ExpertCache::load(&model, &source, &mut device, options, &|_| {}).map(drop)
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
