//! The kernels of a mixture of experts in the shape of the shipped model, each launched and waited
//! for by itself on whatever adapter moewe picks: `cargo bench --bench kernels`. Small ones measure
//! what a launch costs. Knows tensors, no model.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::f16;
use moewe::{
    device::{Allocate, DType, Device, DeviceChoice, Plan, Recording, Tensor},
    kernels::{
        AlignShape, Aligned, ExpertGemm, ExpertGemv, ExpertMode, GroupedTopk, Matrix, Norm,
        QuantizeRows, Route, Routing, Scoring, SiluMul, align_experts,
    },
    weights::{PAD, WeightFormat, padded},
};

const HIDDEN: usize = 256;
const WIDTH: usize = 96;
const ROUTING: Routing = Routing {
    scoring: Scoring::Sigmoid,
    n_experts: 32,
    top_k: 4,
    n_group: 4,
    topk_group: 2,
    renormalize: true,
    scale: 2.5,
};
const FORMATS: [WeightFormat; 2] = [WeightFormat::W8 { group: None }, WeightFormat::F16];

/// A device and numbers to fill its memory with.
struct Bench {
    device: Device,
    state: u32,
}

impl Bench {
    fn open() -> Self {
        let device = pollster::block_on(Device::open(&DeviceChoice::Auto)).expect("a device");
        Self { device, state: 1 }
    }

    /// Uniform in -1..1.
    fn value(&mut self) -> f32 {
        self.state = self.state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.state >> 8) as f32 / (1u32 << 23) as f32 - 1.0
    }

    /// Zeros.
    fn tensor(&mut self, shape: &[usize], dtype: DType) -> Tensor {
        self.device.alloc("bench", shape, dtype).expect("it fits")
    }

    /// Noise. F32 or F16
    fn noise(&mut self, shape: &[usize], dtype: DType) -> Tensor {
        let tensor = self.tensor(shape, dtype);
        let values: Vec<f32> = (0..tensor.len()).map(|_| self.value()).collect();
        match dtype {
            DType::F16 => {
                let values: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
                self.device.write(&tensor, &values);
            }
            _ => self.device.write(&tensor, &values),
        }
        tensor
    }

    /// Noise in packed rows. `[n_experts, rows, cols]`
    fn matrix(
        &mut self,
        format: WeightFormat,
        n_experts: usize,
        rows: usize,
        cols: usize,
    ) -> Matrix {
        let values: Vec<f32> = (0..n_experts * rows * cols).map(|_| self.value()).collect();
        let fill = |row: usize, out: &mut [f32]| out.copy_from_slice(&values[row * cols..][..cols]);
        let mut packed = format.encode("bench", n_experts * rows, cols, fill).expect("finite");
        format.interleave(&mut packed.weights, cols);
        let weights = self.tensor(&[n_experts, rows, format.bytes_per_row(cols)], DType::U8);
        self.device.write(&weights, &packed.weights);
        let scales = match format.scales_per_row(cols) {
            0 => weights,
            n => self.tensor(&[n_experts, rows, n], DType::F32),
        };
        if scales != weights {
            self.device.write(&scales, &packed.scales);
        }
        Matrix { weights, scales, format, rows, cols, n_experts }
    }

    /// Experts drawn evenly. I32 `[n, top_k]`
    fn ids(&mut self, n: usize) -> Tensor {
        let ids = self.tensor(&[n, ROUTING.top_k], DType::I32);
        let half = ROUTING.n_experts as f32 / 2.0;
        let drawn: Vec<i32> =
            (0..ids.len()).map(|_| ((self.value() + 1.0) * half) as i32).collect();
        self.device.write(&ids, &drawn);
        ids
    }

    fn plan(&mut self, record: impl FnOnce(&mut Recording)) -> Plan {
        let mut rec = Recording::new(&self.device.caps());
        record(&mut rec);
        self.device.prepare(rec).expect("it compiles")
    }

    fn run(&mut self, plan: &Plan) {
        self.device.run(black_box(plan)).expect("it runs");
        self.device.wait().expect("it ends");
    }

    /// Times a plan that serves `n` tokens.
    fn time(&mut self, c: &mut Criterion, group: &str, what: &str, n: usize, plan: &Plan) {
        let mut group = c.benchmark_group(group);
        group.throughput(Throughput::Elements(n as u64));
        group.bench_function(BenchmarkId::new(what, n), |b| b.iter(|| self.run(plan)));
    }
}

/// Gate and up, then down, indexed by expert id: steps of few tokens.
fn expert_gemv(c: &mut Criterion) {
    let mut bench = Bench::open();
    for format in FORMATS {
        let gate_up = bench.matrix(format, ROUTING.n_experts, 2 * WIDTH, HIDDEN);
        let down = bench.matrix(format, ROUTING.n_experts, HIDDEN, WIDTH);
        for n in [1, 8, 32] {
            let (x, ids) = (bench.noise(&[n, HIDDEN], DType::F16), bench.ids(n));
            let inner = bench.tensor(&[n * ROUTING.top_k, WIDTH], DType::F16);
            let weights = bench.noise(&[n, ROUTING.top_k], DType::F32);
            let out = bench.tensor(&[n, HIDDEN], DType::F32);
            let gated = ExpertGemv {
                label: "gate_up",
                bank: gate_up,
                first_expert: 0,
                x,
                ids,
                weights: None,
                out: inner,
                mode: ExpertMode::Gated,
            };
            let combined = ExpertGemv {
                label: "down",
                bank: down,
                x: inner,
                weights: Some(weights),
                out,
                mode: ExpertMode::Combine,
                ..gated
            };
            let plan = bench.plan(|rec| {
                rec.push(gated);
                rec.push(combined);
            });
            bench.time(c, "expert_gemv", &format.to_string(), n, &plan);
        }
    }
}

/// The same in blocks of each expert's tokens: steps of many, also with activations in int8.
fn expert_gemm(c: &mut Criterion) {
    let mut bench = Bench::open();
    let (caps, n_experts) = (bench.device.caps(), ROUTING.n_experts);
    for format in FORMATS.into_iter().chain([WeightFormat::W8A8]) {
        let int8 = format == WeightFormat::W8A8;
        let input = if int8 { DType::I8 } else { DType::F16 };
        let gate_up = bench.matrix(format, n_experts, 2 * WIDTH, HIDDEN);
        let down = bench.matrix(format, n_experts, HIDDEN, WIDTH);
        for n in [128, 512] {
            let (x, ids) = (bench.noise(&[n, HIDDEN], DType::F16), bench.ids(n));
            let n_slots = ids.len();
            let block_size = ExpertGemm::block_size(&caps, input, n_slots, n_experts);
            let aligned = aligned(&mut bench, n, block_size);
            let align = bench.plan(|rec| align_experts(rec, ids, n_experts, block_size, &aligned));
            bench.run(&align);
            let both = bench.tensor(&[n_slots, 2 * WIDTH], DType::F16);
            let mut rows = |n, cols| match int8 {
                true => bench.tensor(&[n, QuantizeRows::width(cols)], input),
                false => bench.tensor(&[n, cols], input),
            };
            let (rounded, inner) = (rows(n, HIDDEN), rows(n_slots, WIDTH));
            let weights = bench.noise(&[n_slots], DType::F32);
            let out = bench.tensor(&[n_slots, HIDDEN], DType::F16);
            let gated = ExpertGemm::gates(&caps, input);
            let first = ExpertGemm {
                label: "gate_up",
                bank: gate_up,
                first_expert: 0,
                x: if int8 { rounded } else { x },
                divide: ROUTING.top_k,
                sorted_token_ids: aligned.sorted_token_ids,
                expert_ids: aligned.expert_ids,
                num_tokens_post_pad: aligned.num_tokens_post_pad,
                weights: None,
                out: if gated { inner } else { both },
                gated,
                block_size,
                most_blocks: None,
                n_slots,
            };
            let second = ExpertGemm {
                label: "down",
                bank: down,
                x: inner,
                divide: 1,
                weights: Some(weights),
                out,
                gated: false,
                ..first
            };
            let plan = bench.plan(|rec| {
                if int8 {
                    rec.push(QuantizeRows { x, gated: false, out: rounded });
                }
                rec.push(first);
                if int8 {
                    rec.push(QuantizeRows { x: both, gated: true, out: inner });
                } else if !gated {
                    rec.push(SiluMul { x: both, out: inner });
                }
                rec.push(second);
            });
            bench.time(c, "expert_gemm", &format.to_string(), n, &plan);
        }
    }
}

fn aligned(bench: &mut Bench, n: usize, block_size: usize) -> Aligned {
    let (top_k, n_experts) = (ROUTING.top_k, ROUTING.n_experts);
    let shape = AlignShape { n_entries: n * top_k, n_experts, block_size };
    let sizes = block_size..=block_size;
    let aligned = Aligned::alloc(&mut bench.device, n, top_k, n_experts, sizes).expect("it fits");
    aligned.reshape(shape)
}

fn align(c: &mut Criterion) {
    let mut bench = Bench::open();
    for n in [32, 128, 512, 2048] {
        let (ids, block_size) = (bench.ids(n), 32);
        let out = aligned(&mut bench, n, block_size);
        let plan = bench.plan(|rec| align_experts(rec, ids, ROUTING.n_experts, block_size, &out));
        bench.time(c, "align_experts", "block_32", n, &plan);
    }
}

/// Experts from logits; and where the device can, norm, router and choice in one.
fn router(c: &mut Criterion) {
    let mut bench = Bench::open();
    let (caps, n_experts) = (bench.device.caps(), ROUTING.n_experts);
    let router = bench.matrix(WeightFormat::F32, 1, padded(n_experts), HIDDEN);
    let norm = Norm { weight: bench.noise(&[HIDDEN], DType::F32), cols: HIDDEN, eps: 1e-5 };
    for n in [1, 32, 512] {
        let tokens = bench.tensor(&[n, 4], DType::U32);
        let ids = bench.tensor(&[n, ROUTING.top_k], DType::I32);
        let weights = bench.tensor(&[n, ROUTING.top_k], DType::F32);
        let logits = bench.noise(&[n, padded(n_experts)], DType::F32);
        let (bias, routing) = (None, ROUTING);
        let topk = GroupedTopk { logits, bias, tokens, ids, weights, routing };
        let plan = bench.plan(|rec| rec.push(topk));
        bench.time(c, "grouped_topk", "logits", n, &plan);
        if n <= Route::MOST_TOKENS && Route::serves(&caps, &ROUTING) {
            let x = bench.noise(&[n, HIDDEN], DType::F32);
            let scratch = bench.tensor(&[n, padded(n_experts) + PAD], DType::F32);
            let normed = bench.tensor(&[n, HIDDEN], DType::F16);
            let has_bias = false;
            let route =
                Route { x, norm, has_bias, router, tokens, scratch, ids, weights, normed, routing };
            let plan = bench.plan(|rec| rec.push(route));
            bench.time(c, "route", "rows", n, &plan);
        }
    }
}

criterion_group!(kernels, expert_gemv, expert_gemm, align, router);
criterion_main!(kernels);
