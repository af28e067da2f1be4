//! What the experts did, in numbers: gauges for `/metrics` and counts for `/moe/stats`.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde_json::{Value, json};

use crate::{
    engine::{EngineStats, ExpertStats},
    parallel::Owners,
};

use super::{
    App,
    histogram::{Page, label},
};

/// Share of the token slots of expert blocks that held a token; 1 while nothing was counted.
fn utilization(experts: &ExpertStats) -> f64 {
    let used: u64 = experts.layers.iter().map(|l| l.slots_used).sum();
    let slots: u64 = experts.layers.iter().map(|l| l.slots).sum();
    if slots == 0 { 1.0 } else { used as f64 / slots as f64 }
}

/// Mean share of a layer's experts that a step used.
fn active(experts: &ExpertStats) -> f64 {
    let active: u64 = experts.layers.iter().map(|l| l.active).sum();
    let steps: u64 = experts.layers.iter().map(|l| l.steps).sum();
    active as f64 / (steps * experts.n_present as u64).max(1) as f64
}

/// Largest load of an expert over the mean of its layer, averaged over layers; 1 is balance.
fn imbalance(experts: &ExpertStats) -> f64 {
    let layer = |tokens: &[u64]| {
        let sum: u64 = tokens.iter().sum();
        let max = tokens.iter().max().copied().unwrap_or(0);
        (sum > 0).then(|| max as f64 * tokens.len() as f64 / sum as f64)
    };
    let ratios: Vec<f64> = experts.rows().filter_map(layer).collect();
    if ratios.is_empty() { 1.0 } else { ratios.iter().sum::<f64>() / ratios.len() as f64 }
}

/// Bytes that are allocated and hold nothing, over those that are allocated.
fn fragmentation(stats: &EngineStats) -> [(&'static str, f64); 3] {
    let kv = stats.kv_blocks_used as f64 * stats.kv_block_bytes as f64;
    let position = stats.kv_block_bytes as f64 / stats.block_size.max(1) as f64;
    let kv_empty = stats.kv_positions_empty as f64 * position;
    let experts = stats.expert_bytes as f64;
    let padding = experts - stats.expert_bytes_used as f64;
    let share = |empty: f64, allocated: f64| if allocated > 0.0 { empty / allocated } else { 0.0 };
    [
        ("all", share(kv_empty + padding, kv + experts)),
        ("kv_cache", share(kv_empty, kv)),
        ("experts", share(padding, experts)),
    ]
}

/// Adds the experts' metrics to a page.
pub(super) fn metrics(page: &mut Page, stats: &EngineStats, per_expert: bool) {
    let experts = &stats.experts;
    page.series(
        "vllm_moe_expert_utilization",
        "gauge",
        "Share of expert token slots with a token, and of experts with any token.",
        [(label("of", "slots"), utilization(experts)), (label("of", "experts"), active(experts))],
    );
    let help = "Device time of routing and alignment in the last step that was timed.";
    page.gauge("vllm_moe_routing_latency_ms", help, stats.routing_ms.unwrap_or(0.0));
    let help = "Largest expert load over the mean, averaged over layers.";
    page.gauge("vllm_moe_token_imbalance", help, imbalance(experts));
    let help = "Allocated minus used over allocated: owned KV cache blocks, and expert banks.";
    let shares = fragmentation(stats).map(|(of, share)| (label("of", of), share));
    page.series("vllm_moe_memory_fragmentation", "gauge", help, shares);
    let help = "Bytes of all buffers on the device.";
    page.gauge("vllm_moe_device_bytes", help, stats.device_bytes as f64);
    exchange_metrics(page, stats);
    if per_expert && experts.n_experts > 0 {
        let series = experts.rows().zip(&experts.layers).flat_map(|(row, layer)| {
            let layer = label("layer", &layer.layer.to_string());
            row.iter().enumerate().map(move |(expert, &tokens)| {
                let expert = label("expert", &expert.to_string());
                (format!("{layer},{expert}"), tokens as f64)
            })
        });
        let help = "Tokens that each expert computed.";
        page.series("vllm_moe_expert_tokens_total", "counter", help, series);
    }
}

/// Traffic to other devices and of the cache, where there are any.
fn exchange_metrics(page: &mut Page, stats: &EngineStats) {
    if let Some(sent) = &stats.exchange {
        for (name, help, value) in [
            ("exchange_rounds", "Layers of steps in which the host took part.", sent.rounds),
            ("exchange_visits", "Rows sent to another device, in batches.", sent.visits),
            ("exchange_bytes_sent", "Bytes of activations sent.", sent.bytes_sent),
            ("exchange_bytes_received", "Bytes of sums that came back.", sent.bytes_received),
        ] {
            page.counter(&format!("vllm_moe_{name}_total"), help, value);
        }
    }
    if let Some(eplb) = &stats.eplb {
        let help = "Mean over largest load of a device in the last window, 0 to 1.";
        page.gauge("vllm_moe_balancedness", help, eplb.balancedness);
        let when = |name, value| (label("when", name), value);
        let moves = eplb.last_move.map(|(before, after)| [("before", before), ("after", after)]);
        let moves = moves.into_iter().flatten().map(|(name, value)| when(name, value));
        let help = "Balancedness that made experts move last, and that the move promised.";
        page.series("vllm_moe_eplb_balancedness", "gauge", help, moves);
        for (name, help, value) in [
            ("rebalances", "Times that experts were moved.", eplb.rebalances),
            ("experts_moved", "Experts written to a place.", eplb.experts_moved),
            ("bytes_moved", "Bytes of experts written to a place.", eplb.bytes_moved),
        ] {
            page.counter(&format!("vllm_moe_eplb_{name}_total"), help, value);
        }
    }
    let Some(cache) = &stats.expert_cache else { return };
    for (name, help, value) in [
        ("hits", "Chosen experts that were on the device, by layer and step.", cache.hits),
        ("misses", "Chosen experts that had to be copied to it.", cache.misses),
        ("bytes_moved", "Bytes of weights copied to the device.", cache.bytes_moved),
        ("stalls", "Turns of layers that waited for a copy.", cache.stalls),
        ("extra_turns", "Turns of layers that chose more experts than slots.", cache.extra_turns),
    ] {
        page.counter(&format!("vllm_moe_expert_cache_{name}_total"), help, value);
    }
    let help = "Device time of copying experts in the last step that was timed.";
    page.gauge("vllm_moe_expert_cache_fetch_ms", help, stats.fetch_ms.unwrap_or(0.0));
    page.gauge("vllm_moe_expert_cache_hit_rate", "Hits over all.", cache.hit_rate());
    let help = "Experts that fit the device, over all.";
    let share = cache.slots as f64 / cache.experts.max(1) as f64;
    page.gauge("vllm_moe_expert_cache_resident_ratio", help, share);
}

/// The devices that hold each of the first `n` experts of a layer.
fn devices(owners: &Owners, n: usize) -> Vec<Vec<usize>> {
    let of = |expert| owners.places(expert).map(|(device, _)| device).collect();
    (0..n.min(owners.n_experts())).map(of).collect()
}

/// `GET /moe/stats`: counts since the start, one row of experts for each layer that has some.
pub(super) async fn stats(State(app): State<Arc<App>>) -> Json<Value> {
    let stats = app.engine.stats();
    let experts = &stats.experts;
    let layers: Vec<Value> = experts
        .rows()
        .zip(&experts.layers)
        .enumerate()
        .map(|(i, (tokens, layer))| {
            let owners = stats.owners.as_ref().and_then(|owners| owners.get(i));
            json!({
                "layer": layer.layer,
                "tokens": tokens,
                "devices": owners.map(|owners| devices(owners, experts.n_present)),
                "slots_used": layer.slots_used,
                "slots": layer.slots,
                "active_experts": layer.active,
                "steps": layer.steps,
            })
        })
        .collect();
    Json(json!({
        "n_experts": experts.n_present,
        "layers": layers,
        "utilization": utilization(experts),
        "active": active(experts),
        "imbalance": imbalance(experts),
        "routing_ms": stats.routing_ms,
    }))
}
