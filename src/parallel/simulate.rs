//! How long a step takes on how many adapters, by arithmetic: every matrix is read once or
//! multiplied out, whichever takes longer, and every layer of experts costs a trip over the link.
//! Knows the numbers in a config.json and a data sheet, no device and no weights.

use serde_json::Value;

use super::{Cluster, Owners, ParallelError, Placement, Rank, balancedness, rebalance};

/// The sizes of a model that time depends on.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Layers without experts.
    pub n_dense: usize,
    /// Layers with experts.
    pub n_moe: usize,
    /// Experts of a layer.
    pub n_experts: usize,
    /// Groups that a token's experts come from.
    pub n_groups: usize,
    /// Experts of a token.
    pub top_k: usize,
    /// Weights of one expert.
    pub expert_weights: f64,
    /// Weights of attention, in one layer.
    pub attention_weights: f64,
    /// Weights of the dense feed-forward half of a layer without experts.
    pub dense_weights: f64,
    /// Weights of shared experts and router in a layer with experts.
    pub shared_weights: f64,
    /// Weights of the output projection; the embedding is looked up.
    pub head_weights: f64,
    /// Bytes of keys and values of one position in one layer.
    pub kv_bytes: f64,
}

impl Shape {
    /// From a config.json of any architecture with experts.
    ///
    /// # Errors
    /// [`ParallelError::Simulate`] with the key that is missing.
    pub fn from_config(config: &Value) -> Result<Self, ParallelError> {
        let number = |key: &str| config.get(key).and_then(Value::as_f64);
        let any = |keys: &[&str]| keys.iter().find_map(|key| number(key));
        let need = |keys: &[&str]| {
            let cause = format!("config.json has no {}", keys[0]);
            any(keys).filter(|&n| n > 0.0).ok_or(ParallelError::Simulate { cause })
        };
        let hidden = need(&["hidden_size"])?;
        let n_layers = need(&["num_hidden_layers"])?;
        let n_experts = need(&["n_routed_experts", "num_experts", "num_local_experts"])?;
        let n_dense = number("first_k_dense_replace").unwrap_or(0.0).min(n_layers);
        let width = need(&["moe_intermediate_size", "intermediate_size"])?;
        let expert_weights = 3.0 * hidden * width;
        let shared = match number("shared_expert_intermediate_size") {
            Some(width) => 3.0 * hidden * width,
            None => number("n_shared_experts").unwrap_or(0.0) * expert_weights,
        };
        let n_heads = need(&["num_attention_heads"])?;
        let (attention_weights, kv) = attention(hidden, n_heads, number);
        Ok(Self {
            hidden: hidden as usize,
            n_dense: n_dense as usize,
            n_moe: (n_layers - n_dense) as usize,
            n_experts: n_experts as usize,
            n_groups: number("n_group").unwrap_or(1.0).max(1.0) as usize,
            top_k: need(&["num_experts_per_tok"])? as usize,
            expert_weights,
            attention_weights,
            dense_weights: 3.0 * hidden * number("intermediate_size").unwrap_or(0.0),
            shared_weights: shared + hidden * n_experts,
            head_weights: hidden * need(&["vocab_size"])?,
            kv_bytes: 2.0 * kv,
        })
    }
}

/// Weights of a layer's attention, and values kept for a position: latent (DeepSeek) or grouped.
fn attention(hidden: f64, n_heads: f64, number: impl Fn(&str) -> Option<f64>) -> (f64, f64) {
    if let Some(latent) = number("kv_lora_rank") {
        let rope = number("qk_rope_head_dim").unwrap_or(0.0);
        let nope = number("qk_nope_head_dim").unwrap_or(0.0);
        let v = number("v_head_dim").unwrap_or(nope);
        let q = match number("q_lora_rank") {
            Some(rank) => hidden * rank + rank * n_heads * (nope + rope),
            None => hidden * n_heads * (nope + rope),
        };
        let kv = hidden * (latent + rope) + latent * n_heads * (nope + v);
        return (q + kv + n_heads * v * hidden, latent + rope);
    }
    let dim = number("head_dim").unwrap_or(hidden / n_heads);
    let n_kv = number("num_key_value_heads").unwrap_or(n_heads);
    (hidden * dim * (2.0 * n_heads + 2.0 * n_kv), 2.0 * n_kv * dim)
}

/// One adapter. Rates are those that kernels reach, not those of a data sheet.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adapter {
    /// Bytes read in a second.
    pub bandwidth: f64,
    /// Multiplications and additions in a second.
    pub flops: f64,
    /// Bytes that it holds.
    pub memory: f64,
    /// Seconds that a layer takes however little it computes: launches that wait for each other.
    pub layer: f64,
}

/// What joins the adapters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    /// Bytes in a second into, and out of, one adapter.
    pub bandwidth: f64,
    /// Seconds from sending to having it, one way.
    pub latency: f64,
}

/// Who runs what is not an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dense {
    /// The primary adapter, for all tokens, as moewe does.
    Primary,
    /// Every adapter, each for its share of the tokens (data-parallel attention).
    Everywhere,
}

/// What is simulated.
#[derive(Debug, Clone, PartialEq)]
pub struct Scenario {
    /// The model.
    pub shape: Shape,
    /// Each of the adapters.
    pub adapter: Adapter,
    /// Between them.
    pub link: Link,
    /// Who runs the rest.
    pub dense: Dense,
    /// Tokens of a step, over all adapters.
    pub tokens: usize,
    /// Positions that each token looks back over.
    pub context: usize,
    /// Bytes of an expert's weight.
    pub expert_bytes: f64,
    /// Bytes of any other weight.
    pub dense_bytes: f64,
    /// Copies of experts beyond one of each, over all adapters.
    pub redundant: usize,
    /// Share of a layer's work that each expert has. `[layers of the trace][experts]`
    pub trace: Vec<Vec<f64>>,
}

/// What is expected of one number of adapters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// How many.
    pub n: usize,
    /// Seconds of a step.
    pub step: f64,
    /// Share of it that the link takes.
    pub exchange: f64,
    /// Bytes that the fullest adapter holds.
    pub memory: f64,
    /// Whether that fits.
    pub fits: bool,
    /// Name of the placement with the shortest step.
    pub placement: &'static str,
    /// [`balancedness`] under it.
    pub balancedness: f64,
}

impl Scenario {
    /// The step on `n` adapters under the best of the placements.
    ///
    /// # Errors
    /// [`ParallelError::NoRoom`] never, as slots are made to hold all experts.
    pub fn predict(&self, n: usize) -> Result<Prediction, ParallelError> {
        let mut best: Option<Prediction> = None;
        for (name, placement) in self.placements(n)? {
            let prediction = self.step(n, name, &placement);
            if best.is_none_or(|best| prediction.step < best.step) {
                best = Some(prediction);
            }
        }
        best.ok_or(ParallelError::Simulate { cause: "there is no trace of a layer".to_owned() })
    }

    fn placements(&self, n: usize) -> Result<Vec<(&'static str, Placement)>, ParallelError> {
        let (n_experts, layers) = (self.shape.n_experts, self.trace.len());
        if layers == 0 {
            return Ok(Vec::new());
        }
        let slots = (n_experts + self.redundant).div_ceil(n).min(n_experts);
        let ranks = vec![Rank { slots, speed: 1.0, visit_s: 0.0 }; n];
        let mut all = vec![
            ("linear", Placement::linear(layers, n_experts, n)),
            ("round_robin", Placement::round_robin(layers, n_experts, n)),
            ("balanced", Placement::balanced(&self.trace, &ranks, self.redundant)?),
        ];
        let nodes = n.div_ceil(8);
        let cluster = Cluster {
            n_slots: slots * n,
            n_groups: self.shape.n_groups,
            n_nodes: nodes,
            n_devices: n,
        };
        let eplb = self.trace.iter().map(|load| eplb(load, cluster)).collect::<Option<_>>();
        all.extend(eplb.map(|layers| ("eplb", Placement::new(layers))));
        Ok(all)
    }

    /// Seconds to read and multiply dense matrices of so many weights with so many rows.
    fn seconds(&self, weights: f64, rows: f64) -> f64 {
        let Adapter { bandwidth, flops, .. } = self.adapter;
        (weights * self.dense_bytes / bandwidth).max(2.0 * weights * rows / flops)
    }

    fn step(&self, n: usize, placement_name: &'static str, placement: &Placement) -> Prediction {
        let (s, tokens) = (&self.shape, self.tokens as f64);
        let rows = match self.dense {
            Dense::Primary => tokens,
            Dense::Everywhere => (tokens / n as f64).ceil(),
        };
        let kv = rows * self.context as f64 * s.kv_bytes;
        let Adapter { bandwidth, layer, .. } = self.adapter;
        let attention = layer + self.seconds(s.attention_weights, rows) + kv / bandwidth;
        let dense = s.n_dense as f64 * (attention + self.seconds(s.dense_weights, rows))
            + s.n_moe as f64 * (attention + self.seconds(s.shared_weights, rows))
            + self.seconds(s.head_weights, rows);
        let layers = placement.layers().iter().zip(&self.trace);
        let (mut experts, mut trips) = (0.0, 0.0);
        for (owners, load) in layers {
            let (compute, trip) = self.layer(owners, load, n);
            experts += compute;
            trips += trip;
        }
        // Layers of the trace stand for all layers.
        let scale = s.n_moe as f64 / self.trace.len() as f64;
        let step = dense + (experts + trips) * scale;
        let per_layer = (0..n).map(|rank| placement.slots(rank)).max().unwrap_or(0) as f64;
        let n_layers = (s.n_moe + s.n_dense) as f64;
        let rest = s.attention_weights * n_layers
            + s.dense_weights * s.n_dense as f64
            + s.shared_weights * s.n_moe as f64
            + 2.0 * s.head_weights;
        let memory = self.expert_bytes * per_layer * s.expert_weights * s.n_moe as f64
            + self.dense_bytes * rest
            + kv * n_layers;
        Prediction {
            n,
            step,
            exchange: trips * scale / step,
            memory,
            fits: memory <= self.adapter.memory,
            placement: placement_name,
            balancedness: balancedness(&placement.rank_loads(&self.trace), &vec![1.0; n]),
        }
    }

    /// Seconds of the slowest adapter's experts, and of the trip there and back.
    fn layer(&self, owners: &Owners, load: &[f64], n: usize) -> (f64, f64) {
        let total: f64 = load.iter().sum();
        let slots = self.tokens as f64 * self.shape.top_k as f64;
        let mut copies = vec![0.0; load.len()];
        (0..n).flat_map(|rank| owners.held(rank)).for_each(|&e| copies[e] += 1.0);
        let share = |e: usize| load[e] / copies[e] / total.max(f64::MIN_POSITIVE);
        let (mut compute, mut away) = (0.0f64, 0.0f64);
        for rank in 0..n {
            let held = || owners.held(rank).iter().map(|&e| share(e));
            // Experts that any token chose are read; each of the chosen is a binomial's tail.
            let read: f64 = held().map(|p| 1.0 - (1.0 - p.min(1.0)).powf(slots)).sum();
            let work: f64 = held().sum::<f64>() * slots;
            let Adapter { bandwidth, flops, .. } = self.adapter;
            let weights = self.shape.expert_weights;
            let time =
                (read * weights * self.expert_bytes / bandwidth).max(2.0 * weights * work / flops);
            compute = compute.max(time);
            // Rows with a chosen expert here.
            let p: f64 = held().sum();
            let rows =
                self.tokens as f64 * (1.0 - (1.0 - p.min(1.0)).powi(self.shape.top_k as i32));
            let is_local = match self.dense {
                Dense::Primary => f64::from(u8::from(rank == 0)),
                Dense::Everywhere => 1.0 / n as f64,
            };
            let there = rows * (1.0 - is_local);
            away = match self.dense {
                // All rows leave the one primary adapter.
                Dense::Primary => away + there,
                Dense::Everywhere => away.max(there),
            };
        }
        if n == 1 {
            return (compute, 0.0);
        }
        // f16 there, f32 back.
        let bytes = away * self.shape.hidden as f64 * (2.0 + 4.0);
        (compute, 2.0 * self.link.latency + bytes / self.link.bandwidth)
    }
}

/// DeepSeek's placement; copies of an expert beside each other are one.
fn eplb(load: &[f64], cluster: Cluster) -> Option<Owners> {
    let slots = rebalance(load, cluster)?;
    let held = slots.chunks(cluster.n_slots / cluster.n_devices).map(|slots| {
        let mut held = slots.to_vec();
        held.sort_unstable();
        held.dedup();
        held
    });
    Owners::new(load.len(), held.collect()).ok()
}

/// A trace in which the expert of rank r has work in proportion to 1 / r^skew, ranks shuffled
/// differently in each layer; 0 is even.
pub fn zipf(n_layers: usize, n_experts: usize, skew: f64) -> Vec<Vec<f64>> {
    let layer = |layer: usize| {
        // Any odd factor permutes a power of two; others are permuted well enough by sorting.
        let mut order: Vec<usize> = (0..n_experts).collect();
        let mix = |e: usize| ((e + 1) * (2 * layer + 1)).wrapping_mul(0x9E37_79B9) as u32;
        order.sort_by_key(|&e| mix(e));
        let mut load = vec![0.0; n_experts];
        for (rank, &expert) in order.iter().enumerate() {
            load[expert] = ((rank + 1) as f64).powf(-skew);
        }
        load
    };
    (0..n_layers).map(layer).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Sizes of DeepSeek-V3, from its config.json.
    fn deepseek() -> Shape {
        Shape::from_config(&json!({
            "hidden_size": 7168, "num_hidden_layers": 61, "first_k_dense_replace": 3,
            "n_routed_experts": 256, "n_group": 8, "num_experts_per_tok": 8,
            "n_shared_experts": 1, "moe_intermediate_size": 2048, "intermediate_size": 18432,
            "num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512,
            "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "v_head_dim": 128, "vocab_size": 129280,
        }))
        .unwrap()
    }

    fn scenario(shape: Shape) -> Scenario {
        let trace = zipf(4, shape.n_experts, 0.0);
        Scenario {
            shape,
            adapter: Adapter { bandwidth: 1e12, flops: 1e14, memory: 80e9, layer: 0.0 },
            link: Link { bandwidth: 25e9, latency: 20e-6 },
            dense: Dense::Primary,
            tokens: 1,
            context: 0,
            expert_bytes: 1.0,
            dense_bytes: 1.0,
            redundant: 0,
            trace,
        }
    }

    #[test]
    fn sizes_add_up_to_the_published_ones() {
        let s = deepseek();
        let experts = s.n_experts as f64 * s.expert_weights;
        let layers = (s.n_dense + s.n_moe) as f64;
        let rest = s.attention_weights * layers + s.dense_weights * s.n_dense as f64;
        let moe = (experts + s.shared_weights) * s.n_moe as f64;
        let total = moe + rest + 2.0 * s.head_weights;
        // 671 B parameters, 37 B of them active.
        assert!((total / 671e9 - 1.0).abs() < 0.01, "{total}");
        let active = s.expert_weights * s.top_k as f64 * s.n_moe as f64
            + s.shared_weights * s.n_moe as f64
            + rest
            + s.head_weights;
        assert!((active / 37e9 - 1.0).abs() < 0.03, "{active}");
        let error = Shape::from_config(&json!({"hidden_size": 8})).unwrap_err().to_string();
        assert!(error.contains("num_hidden_layers"), "{error}");
    }

    #[test]
    fn one_token_reads_its_active_weights_once() {
        let scenario = scenario(deepseek());
        let one = scenario.predict(1).unwrap();
        // 37 B bytes at 1 TB/s; all is read by the one adapter, and nothing is sent.
        assert!((one.step / 37e-3 - 1.0).abs() < 0.05, "{one:?}");
        assert_eq!((one.exchange, one.balancedness, one.fits), (0.0, 1.0, false));
        let adapter = Adapter { layer: 1e-5, ..scenario.adapter };
        let slower = Scenario { adapter, ..scenario.clone() }.predict(1).unwrap();
        assert!((slower.step - one.step - 61e-5).abs() < 1e-9, "{slower:?}");
        // 17.6 B of the active weights are not experts'.
        let wide = Scenario { dense_bytes: 2.0, ..scenario.clone() }.predict(1).unwrap();
        assert!(((wide.step - one.step) / 17.6e-3 - 1.0).abs() < 0.1, "{wide:?}");
        let many = scenario.predict(16).unwrap();
        assert!(many.exchange > 0.0 && many.fits, "{many:?}");
        // 58 layers, two ways, 20 us.
        assert!(many.exchange * many.step > 58.0 * 40e-6, "{many:?}");
    }

    #[test]
    fn balancing_and_more_adapters_help_where_experts_are_the_work() {
        let shape = Shape { attention_weights: 1.0, ..deepseek() };
        let even = Scenario {
            tokens: 4096,
            link: Link { bandwidth: 1e15, latency: 0.0 },
            dense: Dense::Everywhere,
            ..scenario(shape)
        };
        let step = |scenario: &Scenario, n| scenario.predict(n).unwrap().step;
        let speedup = step(&even, 1) / step(&even, 8);
        assert!((7.0..8.1).contains(&speedup), "{speedup}");
        let skewed = Scenario { trace: zipf(4, 256, 1.0), ..even.clone() };
        assert!(step(&skewed, 64) > 1.5 * step(&even, 64));
        let copied = Scenario { redundant: 64, ..skewed.clone() };
        let (before, after) = (skewed.predict(64).unwrap(), copied.predict(64).unwrap());
        assert!(after.step < before.step && after.balancedness > before.balancedness);
        assert!(["balanced", "eplb"].contains(&after.placement), "{after:?}");
    }
}
