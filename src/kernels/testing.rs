//! What every kernel test does: run the same recording on the GPU, at every tier it has, and on
//! the CPU with the twins, and compare all memory; translate every variant for the GPUs that are
//! not here; hold shader and launch side by side.

use std::{collections::HashSet, sync::Mutex};

use half::f16;

use crate::{
    device::{
        Access, Allocate, Caps, DType, Device, DeviceChoice, Dispatch, Recording, Tensor, Tier,
        compose,
    },
    weights::{WeightFormat, padded},
};

use super::{
    Matrix, QuantizeRows,
    quantize_rows::{dequantized, quantize},
};

/// Every weight format, with its smallest and its largest groups.
pub(crate) const FORMATS: [WeightFormat; 7] = [
    WeightFormat::F32,
    WeightFormat::F16,
    WeightFormat::W8 { group: None },
    WeightFormat::W8 { group: Some(32) },
    WeightFormat::W8 { group: Some(128) },
    WeightFormat::W4 { group: 32 },
    WeightFormat::W4 { group: 128 },
];

/// Bytes before and after every tensor that no kernel may touch.
const MARGIN: usize = 256;
/// What the margins hold, and what outputs hold before the kernel runs.
const SENTINEL: u8 = 0xA5;

/// A device with tensors of reproducible random content.
pub(crate) struct Bench {
    /// Where the tensors live.
    pub(crate) device: Device,
    state: u64,
    tensors: Vec<Tensor>,
}

impl Bench {
    fn new(device: Device) -> Self {
        Self { device, state: 0x9E37_79B9_7F4A_7C15, tensors: Vec::new() }
    }

    /// Bytes of all tensors, with their margins.
    fn contents(&mut self) -> Vec<Vec<u8>> {
        let tensors = self.tensors.clone();
        tensors.iter().map(|t| self.device.read_now(t).unwrap()).collect()
    }

    /// Uniform in [0, 1): xorshift64*, the same on every device.
    pub(crate) fn uniform(&mut self) -> f32 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        (self.state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 40) as f32 / (1u64 << 24) as f32
    }

    /// Roughly normal, with one value in 64 twenty times larger: kernels that are right only for
    /// tame input should fail.
    pub(crate) fn value(&mut self) -> f32 {
        let sum: f32 = (0..4).map(|_| self.uniform()).sum();
        let scale = if self.uniform() < 1.0 / 64.0 { 20.0 } else { 1.0 };
        (sum - 2.0) * 1.7 * scale
    }

    fn tensor(&mut self, shape: &[usize], dtype: DType, content: &[u8]) -> Tensor {
        let mut bytes = vec![SENTINEL; MARGIN];
        bytes.extend_from_slice(content);
        bytes.resize((bytes.len() + MARGIN).next_multiple_of(16), SENTINEL);
        let whole = self.device.alloc("test", &[bytes.len()], DType::U8).unwrap();
        self.device.write(&whole, &bytes);
        self.tensors.push(whole);
        Tensor { offset: MARGIN as u64, ..Tensor::new(whole.buffer, shape, dtype) }
    }

    /// A tensor of floats (F32 or F16) made by index; as I8 their rows rounded, scales behind them.
    pub(crate) fn floats(
        &mut self,
        shape: &[usize],
        dtype: DType,
        mut f: impl FnMut(&mut Self, usize) -> f32,
    ) -> Tensor {
        let values: Vec<f32> = (0..shape.iter().product()).map(|i| f(self, i)).collect();
        match dtype {
            DType::F16 => {
                let values: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
                self.tensor(shape, dtype, bytemuck::cast_slice(&values))
            }
            DType::I8 => {
                let cols = shape[shape.len() - 1];
                let width = QuantizeRows::width(cols);
                let mut bytes = vec![0; values.len() / cols * width];
                let rows = values.chunks(cols).zip(bytes.chunks_mut(width));
                rows.for_each(|(row, out)| quantize(row, out));
                self.tensor(&[bytes.len() / width, width], dtype, &bytes)
            }
            _ => self.tensor(shape, dtype, bytemuck::cast_slice(&values)),
        }
    }

    /// A tensor of random floats.
    pub(crate) fn normal(&mut self, shape: &[usize], dtype: DType) -> Tensor {
        self.floats(shape, dtype, |bench, _| bench.value())
    }

    /// Rows of random floats `[n, padded(cols)]`, zero in the padding.
    pub(crate) fn activations(&mut self, n: usize, cols: usize, dtype: DType) -> Tensor {
        let stride = padded(cols);
        self.floats(
            &[n, stride],
            dtype,
            |bench, i| {
                if i % stride < cols { bench.value() } else { 0.0 }
            },
        )
    }

    /// A tensor of integers (U32 or I32; as bits).
    pub(crate) fn ints(&mut self, shape: &[usize], dtype: DType, values: &[u32]) -> Tensor {
        assert_eq!(values.len(), shape.iter().product::<usize>());
        self.tensor(shape, dtype, bytemuck::cast_slice(values))
    }

    /// A bank of random matrices `[n_experts, padded(rows), padded(cols)]`, zero in the padding.
    pub(crate) fn matrix(
        &mut self,
        format: WeightFormat,
        n_experts: usize,
        rows: usize,
        cols: usize,
    ) -> Matrix {
        let n_rows = n_experts * padded(rows);
        let values: Vec<f32> = (0..n_rows * cols)
            .map(|i| if i / cols % padded(rows) < rows { self.value() * 0.1 } else { 0.0 })
            .collect();
        let mut encoded = format
            .encode("test", n_rows, cols, |r, out| out.copy_from_slice(&values[r * cols..][..cols]))
            .unwrap();
        format.interleave(&mut encoded.weights, cols);
        let shape = [n_experts, padded(rows), format.bytes_per_row(cols)];
        let weights = self.tensor(&shape, DType::U8, &encoded.weights);
        let scales = match encoded.scales.len() {
            0 => weights,
            n => self.tensor(&[n], DType::F32, bytemuck::cast_slice(&encoded.scales)),
        };
        Matrix { weights, scales, format, rows: padded(rows), cols: padded(cols), n_experts }
    }
}

/// The test machine's adapter. Tests need one: a missing driver fails them.
pub(crate) fn gpu() -> Device {
    let choice: DeviceChoice =
        std::env::var("MOEWE_TEST_DEVICE").unwrap_or_default().parse().unwrap();
    let device = pollster::block_on(Device::open(&choice)).unwrap();
    assert!(matches!(device, Device::Gpu(_)), "kernel tests need a Vulkan, Metal or DX12 adapter");
    device
}

/// Builds and runs a recording on the CPU device and at each of the adapter's tiers, and compares
/// every byte of every tensor: integers and margins exactly, floats by normalised mean squared
/// error, NaN and infinities by position.
pub(crate) fn check(tolerance: f64, build: impl Fn(&mut Bench, &mut Recording)) {
    check_where(|_| true, tolerance, build);
}

/// The same for what only cooperative matrices of 16 x 16 can; twins run it everywhere.
pub(crate) fn check_matrix(tolerance: f64, build: impl Fn(&mut Bench, &mut Recording)) {
    check_edge(16, tolerance, build);
}

/// The same for cooperative matrices of `edge` x `edge`.
pub(crate) fn check_edge(edge: u32, tolerance: f64, build: impl Fn(&mut Bench, &mut Recording)) {
    check_where(|caps| caps.coop_matrix == Some(edge), tolerance, build);
}

/// The same on adapters without cooperative matrices: threads play their parts of them.
pub(crate) fn check_played(edge: u32, tolerance: f64, build: impl Fn(&mut Bench, &mut Recording)) {
    let imagined = imagined_caps();
    let caps = imagined.iter().find(|caps| caps.coop_matrix == Some(edge)).unwrap();
    check_recorded("played", tolerance, |bench| {
        let mut rec = Recording::new(caps);
        build(bench, &mut rec);
        for (name, file) in rec.dispatches.iter_mut().flat_map(|d| &mut d.shader.slots) {
            if *name == "edge" {
                *file = if edge == 16 { "played_16" } else { "played_8" };
            }
        }
        rec
    });
}

/// The same with the code that GPUs run, also where the adapter is a CPU.
pub(crate) fn check_as_gpu(tolerance: f64, build: impl Fn(&mut Bench, &mut Recording)) {
    check_recorded("as on GPUs", tolerance, |bench| {
        let mut rec = Recording::new(&Caps { software: false, ..bench.device.caps() });
        build(bench, &mut rec);
        rec
    });
}

fn check_recorded(what: &str, tolerance: f64, record: impl Fn(&mut Bench) -> Recording) {
    let run = |device: Device| {
        let mut bench = Bench::new(device);
        let rec = record(&mut bench);
        let plan = bench.device.prepare(rec.clone()).unwrap();
        bench.device.run(&plan).unwrap();
        (rec, bench.contents())
    };
    let (rec, expected) = run(Device::cpu());
    compare_all(&rec, &run(gpu()).1, &expected, tolerance, what);
}

fn check_where(
    able: impl Fn(&Caps) -> bool,
    tolerance: f64,
    build: impl Fn(&mut Bench, &mut Recording),
) {
    let imagined: Vec<Caps> = imagined_caps().into_iter().filter(&able).collect();
    let run = |device: Device| -> (Recording, Vec<Vec<u8>>) {
        let mut bench = Bench::new(device);
        let caps = bench.device.caps();
        let mut rec = Recording::new(if able(&caps) { &caps } else { &imagined[0] });
        build(&mut bench, &mut rec);
        let plan = bench.device.prepare(rec.clone()).unwrap();
        bench.device.run(&plan).unwrap();
        (rec, bench.contents())
    };
    let (rec, expected) = run(Device::cpu());
    let kernels = |rec: &Recording| rec.dispatches.iter().map(|d| d.shader.stem).collect();
    let mut compared: Vec<Vec<&str>> = vec![kernels(&rec)];
    for caps in &imagined {
        let mut bench = Bench::new(Device::cpu());
        let mut other = Recording::new(caps);
        build(&mut bench, &mut other);
        other.dispatches.iter().for_each(|d| check_shader(d, caps));
        // Where other kernels do the same, so must their twins.
        if !compared.contains(&kernels(&other)) {
            compared.push(kernels(&other));
            let plan = bench.device.prepare(other).unwrap();
            bench.device.run(&plan).unwrap();
            let actual = bench.contents();
            compare_all(&rec, &actual, &expected, tolerance, "twins of other kernels");
        }
    }
    let caps = gpu().caps();
    // Once more as kernels are launched on the best and on the least of real GPUs, if this is a
    // software adapter.
    let tiers = caps.tiers().into_iter().map(|tier| (tier, caps.software));
    let real = caps.software.then_some([(caps.tier(), false), (Tier::Portable, false)]);
    let all = tiers.chain(real.into_iter().flatten());
    for (tier, software) in all.filter(|(tier, _)| able(&caps.shrink(*tier))) {
        let mut device = gpu();
        device.shrink(tier);
        device.set_software(software);
        let (_, actual) = run(device);
        let what = format!("{tier} tier, software {software}");
        compare_all(&rec, &actual, &expected, tolerance, &what);
    }
}

/// Compares tensors and their margins after a recording.
fn compare_all(
    rec: &Recording,
    actual: &[Vec<u8>],
    expected: &[Vec<u8>],
    tolerance: f64,
    what: &str,
) {
    // Each buffer as some kernel writes it; unwritten buffers are compared as bytes.
    let tensor = |i: usize| {
        let written = rec
            .dispatches
            .iter()
            .flat_map(|d| &d.bindings)
            .find(|b| b.tensor.buffer.0 as usize == i && b.access == Access::Write);
        written.map(|b| b.tensor)
    };
    for (i, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        let content = MARGIN..expected.len() - MARGIN;
        let what = format!("{what}, tensor {i}\n{rec}");
        assert_eq!(actual[..MARGIN], expected[..MARGIN], "before {what}");
        assert_eq!(actual[content.end..], expected[content.end..], "after {what}");
        compare(&actual[content.clone()], &expected[content], tensor(i), tolerance, &what);
    }
}

fn compare(actual: &[u8], expected: &[u8], tensor: Option<Tensor>, tolerance: f64, what: &str) {
    let dtype = tensor.map_or(DType::U8, |tensor| tensor.dtype);
    let floats = |bytes: &[u8]| -> Vec<f64> {
        match dtype {
            DType::F16 => {
                bytemuck::pod_collect_to_vec::<u8, f16>(bytes).iter().map(|x| x.to_f64()).collect()
            }
            DType::I8 => {
                let cols = tensor.map_or(0, |tensor| tensor.cols()) - QuantizeRows::width(0);
                dequantized(bytes, cols).into_iter().map(f64::from).collect()
            }
            _ => bytemuck::pod_collect_to_vec::<u8, f32>(bytes).iter().map(|&x| x.into()).collect(),
        }
    };
    if !matches!(dtype, DType::F16 | DType::F32 | DType::I8) {
        let first = actual.iter().zip(expected).position(|(a, b)| a != b).map(|at| at / 4);
        assert!(first.is_none(), "word {first:?} differs: {what}");
        return;
    }
    let (mut error, mut power, mut pairs) = (0.0, 0.0, Vec::new());
    for (i, (a, b)) in floats(actual).into_iter().zip(floats(expected)).enumerate() {
        if a.is_finite() && b.is_finite() {
            error += (a - b) * (a - b);
            power += b * b;
        } else {
            assert!(a == b || (a.is_nan() && b.is_nan()), "{a} for {b} at {i}: {what}");
        }
        if (a - b).abs() > 1e-3 * (1.0 + b.abs()) && pairs.len() < 10 {
            pairs.push((i, a, b));
        }
    }
    let nmse = error / f64::max(power, 1e-30);
    assert!(nmse <= tolerance, "NMSE {nmse:.2e} > {tolerance:.0e}: {what}(at, gpu, cpu) {pairs:?}");
}

/// Devices that are not here but must be served.
fn imagined_caps() -> Vec<Caps> {
    let core = Caps::portable();
    let fast = |sizes| Caps { f16: true, subgroups: Some(sizes), ..core.clone() };
    let matrix =
        |edge| Caps { coop_matrix: Some(edge), max_workgroup_bytes: 48 << 10, ..fast((32, 32)) };
    let no_f16 = Caps { f16: false, ..fast((4, 4)) };
    vec![core.clone(), no_f16, fast((4, 4)), fast((8, 8)), fast((16, 128)), matrix(16), matrix(8)]
}

/// The variant translates to SPIR-V, MSL and HLSL, and its parameters and bindings are those of
/// the launch.
fn check_shader(dispatch: &Dispatch, caps: &Caps) {
    static SEEN: Mutex<Option<HashSet<String>>> = Mutex::new(None);
    let key = format!("{}{:?}", dispatch.shader, caps.tier());
    if !SEEN.lock().unwrap().get_or_insert_default().insert(key) {
        return;
    }
    let what = dispatch.shader.to_string();
    let source = compose(&dispatch.shader).unwrap();
    let module = naga::front::wgsl::parse_str(&source)
        .unwrap_or_else(|e| panic!("{what}: {}", e.emit_to_string(&source)));
    check_interface(dispatch, &module);
    let mut allowed = naga::valid::Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    if caps.f16 {
        allowed |= naga::valid::Capabilities::SHADER_FLOAT16;
    }
    if caps.subgroups.is_some() {
        allowed |= naga::valid::Capabilities::SUBGROUP;
    }
    if caps.tier() == Tier::Matrix {
        allowed |= naga::valid::Capabilities::COOPERATIVE_MATRIX;
    }
    let info = naga::valid::Validator::new(naga::valid::ValidationFlags::all(), allowed)
        .subgroup_stages(naga::valid::ShaderStages::COMPUTE)
        .subgroup_operations(naga::valid::SubgroupOperationSet::all())
        .validate(&module)
        .unwrap_or_else(|e| panic!("{what}: {}", e.emit_to_string(&source)));
    let constants = dispatch
        .shader
        .overrides
        .iter()
        .map(|&(name, value)| (name.to_owned(), f64::from(value)))
        .collect();
    let (module, info) =
        naga::back::pipeline_constants::process_overrides(&module, &info, None, &constants)
            .unwrap_or_else(|e| panic!("{what}: {e:?}"));
    translate(&what, &module, &info, caps);
}

fn translate(what: &str, module: &naga::Module, info: &naga::valid::ModuleInfo, caps: &Caps) {
    use naga::back::{hlsl, msl, spv};
    let options = spv::Options { lang_version: (1, 3), ..Default::default() };
    spv::write_vec(module, info, &options, None).unwrap_or_else(|e| panic!("{what}: SPIR-V: {e}"));
    let options =
        msl::Options { lang_version: (3, 1), fake_missing_bindings: true, ..Default::default() };
    msl::write_string(module, info, &options, &Default::default())
        .unwrap_or_else(|e| panic!("{what}: MSL: {e}"));
    // Cooperative matrices do not exist in HLSL; such an adapter never lists them.
    if caps.coop_matrix.is_none() {
        let options = hlsl::Options {
            shader_model: hlsl::ShaderModel::V6_2,
            fake_missing_bindings: true,
            ..Default::default()
        };
        let pipeline = Default::default();
        let mut text = String::new();
        hlsl::Writer::new(&mut text, &options, &pipeline)
            .write(module, info, None)
            .unwrap_or_else(|e| panic!("{what}: HLSL: {e}"));
    }
}

fn check_interface(dispatch: &Dispatch, module: &naga::Module) {
    let what = &dispatch.shader;
    let mut bindings = Vec::new();
    for (_, global) in module.global_variables.iter() {
        let Some(at) = &global.binding else { continue };
        match global.space {
            naga::AddressSpace::Uniform => {
                let naga::TypeInner::Struct { members, .. } = &module.types[global.ty].inner else {
                    panic!("{what}: params are not a struct");
                };
                let shader: Vec<_> = members
                    .iter()
                    .enumerate()
                    .map(|(i, m)| {
                        assert_eq!(m.offset as usize, 4 * i, "{what}: params are 4-byte scalars");
                        let scalar = match module.types[m.ty].inner {
                            naga::TypeInner::Scalar(naga::Scalar::U32) => "u32",
                            naga::TypeInner::Scalar(naga::Scalar::I32) => "i32",
                            naga::TypeInner::Scalar(naga::Scalar::F32) => "f32",
                            _ => "?",
                        };
                        (m.name.as_deref().unwrap_or_default(), scalar)
                    })
                    .collect();
                assert_eq!(shader, dispatch.fields, "{what}: struct Params differs");
            }
            naga::AddressSpace::Storage { access } => {
                let write = access.contains(naga::StorageAccess::STORE);
                bindings.push((at.binding, if write { Access::Write } else { Access::Read }));
            }
            _ => panic!("{what}: unexpected binding {at:?}"),
        }
    }
    bindings.sort_by_key(|b| b.0);
    let launch: Vec<_> =
        dispatch.bindings.iter().enumerate().map(|(i, b)| (i as u32 + 1, b.access)).collect();
    assert_eq!(bindings, launch, "{what}: bindings differ");
    assert!(launch.len() <= 8, "{what}: WebGPU core has 8 storage buffers");
}
