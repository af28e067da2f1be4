//! Experts in the host's memory with a cache of slots on each device: any size of it down to a
//! token's experts, either policy, CPU device and adapter, one device or several, gives what
//! resident experts give.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use moewe::{
    device::{DeviceChoice, Tier},
    engine::EngineConfig,
    llm::{Llm, LlmOptions},
    parallel::{CacheOptions, CachePolicy, CacheStats},
    server::{App, ServerConfig},
    weights::WeightFormat,
};
use serde_json::json;

use crate::{
    checkpoints::{GPU, W8, golden, gull, options},
    parallel::{greedy, logits, worst},
    server::{CHAT, get, hello, post},
};

const CPU: DeviceChoice = DeviceChoice::Cpu;
const F32: WeightFormat = WeightFormat::F32;

fn open(
    dir: &Path,
    device: DeviceChoice,
    weights: WeightFormat,
    cache: Option<(u64, CachePolicy)>,
) -> moewe::Result<Llm> {
    open_all(dir, device, Vec::new(), weights, cache)
}

fn open_all(
    dir: &Path,
    device: DeviceChoice,
    expert_devices: Vec<DeviceChoice>,
    weights: WeightFormat,
    cache: Option<(u64, CachePolicy)>,
) -> moewe::Result<Llm> {
    Llm::open(LlmOptions {
        expert_devices,
        text: false,
        max_model_len: Some(128),
        max_num_seqs: 4,
        expert_cache: cache.map(|(bytes, policy)| CacheOptions { bytes, policy }),
        ..options(dir, device, weights)
    })
}

/// Bytes that one slot in every layer takes, from the error that names the least size.
fn slot_bytes(dir: &Path, device: DeviceChoice, weights: WeightFormat) -> (u64, usize) {
    let error = open(dir, device.clone(), weights, Some((1, CachePolicy::Lru)));
    let error = error.expect_err("one byte holds no expert").to_string();
    let least = error.split(" need ").nth(1).and_then(|rest| rest.split(' ').next());
    let least: u64 = least.and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("{error}"));
    let mut llm = open(dir, device, weights, None).expect("a model");
    let spec = &llm.engine.runner().model().spec;
    let top_k = spec.moe_layers().map(|(_, moe)| moe.routing.top_k).max().expect("experts");
    (least / top_k as u64, top_k)
}

fn stats(llm: &Llm) -> CacheStats {
    llm.engine.stats().expert_cache.expect("a cache")
}

/// Holds caches of several sizes against resident experts; returns what each of those did that are
/// smaller than all experts.
fn check(dir: &Path, device: &DeviceChoice, weights: WeightFormat) -> Vec<CacheStats> {
    let (slot, top_k) = slot_bytes(dir, device.clone(), weights);
    let mut resident = open(dir, device.clone(), weights, None).expect("a model");
    let n_experts = resident.engine.runner().model().spec.n_experts();
    let expected = (logits(&mut resident, 40), greedy(&mut resident, 12));
    let mut all = Vec::new();
    for (n_slots, policy) in [
        (top_k, CachePolicy::Lru),
        ((top_k + n_experts) / 2, CachePolicy::Lfu),
        (n_experts, CachePolicy::Lru),
    ] {
        let what = format!("{}, {n_slots} slots, {policy}, {weights}", dir.display());
        let cache = Some((n_slots as u64 * slot, policy));
        let mut llm = open(dir, device.clone(), weights, cache).expect("a model");
        let off = worst(&logits(&mut llm, 40), &expected.0);
        // Sums of several turns are rounded in between: in f16 beside int8 experts.
        let tolerance = if weights == F32 { 1e-4 } else { 2e-2 };
        assert!(off < tolerance, "{what}: logits are {off} off");
        assert_eq!(greedy(&mut llm, 12), expected.1, "{what}");
        assert_eq!(greedy(&mut llm, 12), expected.1, "{what}: the second time");
        if n_slots == n_experts {
            assert_eq!(llm.engine.stats().expert_cache, None, "{what}: all are on the device");
            continue;
        }
        let stats = stats(&llm);
        assert!(stats.misses > 0 && stats.stalls > 0, "{what}: {stats:?}");
        assert_eq!(stats.bytes_moved % stats.misses, 0, "{what}: {stats:?}");
        all.push(stats);
    }
    all
}

#[test]
fn any_cache_gives_what_resident_experts_give() {
    for name in ["mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "olmoe"] {
        for device in [CPU, GPU] {
            let all = check(&golden(name), &device, F32);
            // 40 rows choose more experts than the least cache holds.
            assert!(all[0].extra_turns > 0, "{name}: {:?}", all[0]);
            assert!(all[1].hit_rate() > all[0].hit_rate(), "{name}: larger is better");
        }
    }
    check(&golden("qwen3_moe"), &GPU, W8);
    check(&golden("qwen3_moe"), &CPU, WeightFormat::W8A8);
}

/// 90 rows of 8 experts are enough for blocks on any device, which multiply in int8.
#[test]
fn int8_activations_are_the_same_with_a_cache_on_two_devices() {
    let dir = golden("mixtral");
    let weights = WeightFormat::W8A8;
    let (slot, top_k) = slot_bytes(&dir, CPU, weights);
    for device in [CPU, GPU] {
        let open = |expert_devices, bytes: Option<u64>| {
            let policy = CachePolicy::Lru;
            let options = LlmOptions {
                tier: Some(Tier::Fast),
                expert_devices,
                text: false,
                max_model_len: Some(128),
                expert_cache: bytes.map(|bytes| CacheOptions { bytes, policy }),
                ..options(&dir, device.clone(), weights)
            };
            Llm::open(options).expect("a model")
        };
        let mut alone = open(Vec::new(), None);
        let mut spread = open(vec![device.clone()], Some(top_k as u64 * slot));
        let off = worst(&logits(&mut spread, 90), &logits(&mut alone, 90));
        // Sums of several turns are rounded to f16 in between.
        assert!(off < 2e-2, "{device}: logits are {off} off");
        assert_eq!(greedy(&mut spread, 8), greedy(&mut alone, 8), "{device}");
        assert!(stats(&spread).misses > 0, "{device}: the cache was not used");
    }
}

#[test]
fn the_default_model_is_the_same_from_the_hosts_memory() {
    check(&gull(), &GPU, W8);
}

/// The device holds the slots and not the rest.
#[test]
fn memory_is_what_was_asked_for() {
    let dir = gull();
    let (slot, top_k) = slot_bytes(&dir, GPU, F32);
    let mut resident = open(&dir, GPU, F32, None).expect("a model");
    let cache = Some((top_k as u64 * slot, CachePolicy::Lru));
    let mut cached = open(&dir, GPU, F32, cache).expect("a model");
    let n_experts = resident.engine.runner().model().spec.n_experts();
    let bytes = |llm: &mut Llm| llm.engine.runner().device().allocated_bytes();
    let saved = bytes(&mut resident) - bytes(&mut cached);
    let expected = (n_experts - top_k) as u64 * slot;
    assert!(saved.abs_diff(expected) < 1 << 16, "{saved} bytes saved, {expected} expected");
}

/// Each adapter has its own share of the experts in the host's memory, and its own slots; the CPU
/// computes its share where that is.
#[test]
fn several_devices_have_a_cache_each() {
    let dir = gull();
    let (slot, top_k) = slot_bytes(&dir, GPU, F32);
    let mut resident = open(&dir, GPU, F32, None).expect("a model");
    let expected = (logits(&mut resident, 40), greedy(&mut resident, 12));
    let cache = Some((top_k as u64 * slot, CachePolicy::Lru));
    for (others, n_adapters, share) in [(vec![GPU], 2, 32), (vec![CPU, GPU], 2, 21)] {
        let n_devices = 1 + others.len();
        let mut llm = open_all(&dir, GPU, others, F32, cache).expect("a model");
        let off = worst(&logits(&mut llm, 40), &expected.0);
        assert!(off < 1e-4, "{n_devices} devices: logits are {off} off");
        assert_eq!(greedy(&mut llm, 12), expected.1, "{n_devices} devices");
        let (spec, stats) = (llm.engine.runner().model().spec.clone(), stats(&llm));
        let n_layers = spec.moe_layers().count() as u64;
        assert_eq!(stats.slots, n_adapters * n_layers * top_k as u64, "{stats:?}");
        assert_eq!(stats.experts, n_layers * share, "{stats:?}");
        assert!(stats.hits > 0 && stats.misses > 0 && stats.extra_turns > 0, "{stats:?}");
    }
}

#[tokio::test]
async fn the_metrics_show_hits_and_bytes() {
    let cache = Some(CacheOptions { bytes: 4 << 20, policy: CachePolicy::Lru });
    // Every step is timed.
    let engine = EngineConfig { routing_timing_interval: 1, ..EngineConfig::default() };
    let options = LlmOptions {
        max_model_len: Some(64),
        expert_cache: cache,
        engine,
        ..options(&gull(), CPU, WeightFormat::W8 { group: None })
    };
    let open = move || Llm::open(options.clone());
    let config = ServerConfig { model_name: "gull".to_owned(), ..ServerConfig::default() };
    let app = App::start(Box::new(open), config).expect("a server");
    let (status, _, text) = post(&app, CHAT, &hello(json!({}))).await;
    assert_eq!(status, 200, "{text}");
    // The page may be that of the moment before the last step's counts.
    let mut page = String::new();
    let start = Instant::now();
    while page.is_empty() || page.contains("expert_cache_hits_total 0") {
        assert!(start.elapsed() < Duration::from_secs(20), "{page}");
        tokio::time::sleep(Duration::from_millis(10)).await;
        page = get(&app, "/metrics").await.2;
    }
    let value = |name: &str| -> f64 {
        let line = page.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("{page}"));
        line.rsplit(' ').next().and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("{line}"))
    };
    for name in ["hits_total", "misses_total", "bytes_moved_total", "stalls_total", "fetch_ms"] {
        assert!(value(&format!("vllm_moe_expert_cache_{name}")) > 0.0, "{name}");
    }
    let share = value("vllm_moe_expert_cache_resident_ratio");
    assert!(share > 0.0 && share < 1.0, "{share}");
}
