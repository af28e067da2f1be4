//! `moewe quantize`: the written model computes what the original computes in int8 or int4, bit for
//! bit, and takes less room.

use std::{collections::BTreeMap, fs, path::Path};

use moewe::{
    device::DeviceChoice,
    llm::{LlmOptions, quantize},
    weights::WeightFormat,
};
use safetensors::Dtype;

use crate::{
    checkpoints::{
        GPU, W4, W8, copy, edit_json, edit_tensors, golden, gull, logits, open, options, read_json,
    },
    program::run,
};

const PROMPT: [u32; 9] = [5, 9, 31, 7, 60, 22, 8, 14, 3];

fn quantized(from: &Path, weights: WeightFormat) -> tempfile::TempDir {
    let out = tempfile::tempdir().expect("a temporary directory");
    let options = options(from, DeviceChoice::Cpu, weights);
    quantize(&options, out.path(), &|done, all| assert!(done <= all)).expect("quantised");
    out
}

fn assert_same(from: &Path, weights: WeightFormat, device: &DeviceChoice) {
    let out = quantized(from, weights);
    let mut original = open(from, device.clone(), weights);
    let mut written = open(out.path(), device.clone(), weights);
    let (expected, got) = (logits(&mut original, &PROMPT), logits(&mut written, &PROMPT));
    assert_eq!(got, expected, "{} as {weights} on {device}", from.display());
}

#[test]
fn the_written_model_computes_the_same() {
    for name in ["qwen3_moe", "glm4_moe", "mixtral"] {
        assert_same(&golden(name), W8, &DeviceChoice::Cpu);
        assert_same(&golden(name), W4, &DeviceChoice::Cpu);
    }
    for weights in [WeightFormat::W8 { group: Some(32) }, WeightFormat::W4 { group: 64 }] {
        assert_same(&golden("qwen3_moe"), weights, &DeviceChoice::Cpu);
    }
    assert_same(&golden("qwen3_moe"), W8, &GPU);
    assert_same(&golden("qwen3_moe"), W4, &GPU);
}

/// Int4 is too rough for tight bounds against the original; its own rounding is not.
#[test]
fn int4_experts_compute_what_their_rounded_weights_do() {
    let rounded = copy(&golden("qwen3_moe"));
    edit_tensors(&rounded.path().join("model.safetensors"), |tensors| {
        for (name, (dtype, shape, bytes)) in tensors {
            if !name.contains(".experts.") {
                continue;
            }
            assert_eq!(*dtype, Dtype::BF16);
            let values: Vec<f32> = bytes
                .as_chunks()
                .0
                .iter()
                .map(|&b| half::bf16::from_le_bytes(b).to_f32())
                .collect();
            let (rows, cols) = (shape[0], shape[1]);
            let row = |i, out: &mut [f32]| out.copy_from_slice(&values[i * cols..][..cols]);
            let packed = W4.encode(name, rows, cols, row).expect("finite");
            let scales = packed.scales.chunks(W4.scales_per_row(cols));
            let packed = packed.weights.chunks(W4.bytes_per_row(cols)).zip(scales);
            let floats = packed.flat_map(|(q, scales)| W4.decode_row(q, scales, cols));
            (*dtype, *bytes) = (Dtype::F32, floats.flat_map(f32::to_le_bytes).collect());
        }
    });
    for device in [GPU, DeviceChoice::Cpu] {
        let int4 = logits(&mut open(&golden("qwen3_moe"), device.clone(), W4), &PROMPT);
        let float = logits(&mut open(rounded.path(), device, WeightFormat::F16), &PROMPT);
        let square = |x: f32| f64::from(x) * f64::from(x);
        let pairs = || int4.iter().flatten().zip(float.iter().flatten());
        let error: f64 = pairs().map(|(a, b)| square(a - b)).sum();
        let power: f64 = pairs().map(|(_, b)| square(*b)).sum();
        // Of f16, that of the floats' weights.
        assert!(error < 1e-5 * power, "{error} of {power}");
    }
}

/// Puts the experts of each layer into one tensor each for gate and up, and for down.
fn fuse(dir: &Path) {
    edit_tensors(&dir.join("model.safetensors"), |tensors| {
        let mut fused = BTreeMap::new();
        let n_experts = read_json(&dir.join("config.json"))["num_experts"].as_u64().unwrap();
        for layer in 0.. {
            let prefix = format!("model.layers.{layer}.mlp.experts");
            if !tensors.contains_key(&format!("{prefix}.0.up_proj.weight")) {
                break;
            }
            for (name, parts) in
                [("gate_up_proj", &["gate_proj", "up_proj"][..]), ("down_proj", &["down_proj"])]
            {
                let (mut dtype, mut shape, mut bytes) = (Dtype::F32, vec![], vec![]);
                for expert in 0..n_experts {
                    for part in parts {
                        let part = tensors.remove(&format!("{prefix}.{expert}.{part}.weight"));
                        let part = part.expect("a matrix of an expert");
                        (dtype, shape) = (part.0, part.1);
                        bytes.extend(part.2);
                    }
                }
                let shape = vec![n_experts as usize, parts.len() * shape[0], shape[1]];
                fused.insert(format!("{prefix}.{name}"), (dtype, shape, bytes));
            }
        }
        assert!(!fused.is_empty());
        tensors.extend(fused);
    });
}

#[test]
fn fused_experts_are_quantised_too() {
    let dir = copy(&golden("qwen3_moe"));
    fuse(dir.path());
    assert_same(dir.path(), W8, &DeviceChoice::Cpu);
    assert_same(dir.path(), WeightFormat::W8 { group: Some(32) }, &DeviceChoice::Cpu);
    assert_same(dir.path(), W4, &DeviceChoice::Cpu);
}

#[test]
fn the_command_writes_a_model_that_runs() {
    let out = tempfile::tempdir().expect("a temporary directory");
    let size = |dir: &Path| -> u64 {
        let files = fs::read_dir(dir).expect("a directory").map(|e| e.expect("readable"));
        let weights = files.filter(|f| f.path().extension().is_some_and(|e| e == "safetensors"));
        weights.map(|f| f.metadata().expect("a size").len()).sum()
    };
    let args = ["run", "Once upon a time", "--raw", "-n", "8", "--temperature", "0"];
    let int4 = ["--weights", "w4a16", "--group-size", "64"];
    let int8 = ["--weights", "w8a8"];
    for (flags, name, percent) in
        [(&[][..], "w8a16", 70), (&int8[..], "w8a8", 70), (&int4[..], "w4a16-g64", 50)]
    {
        let path = out.path().join(name);
        let path = path.to_str().expect("UTF-8");
        let said = run(&[&["quantize", path], flags].concat()).stdout();
        assert!(said.contains(name), "{said}");
        let (before, after) = (size(&gull()), size(Path::new(path)));
        assert!(after * 100 < before * percent, "{before} -> {after} bytes");
        // Unless told otherwise it runs as it is packed.
        let expected = run(&[&args[..], flags].concat()).stdout();
        assert_eq!(run(&[&args[..], &["--model", path]].concat()).stdout(), expected);
        run(&["quantize", path]).fails_with(&["exists", "empty directory"]);
        let twice = out.path().join("twice");
        let twice = twice.to_str().expect("UTF-8");
        run(&["quantize", twice, "--model", path]).fails_with(&["quantised already", path]);
    }
}

#[test]
fn what_cannot_be_quantised_is_an_error_and_leaves_no_weights() {
    let out = tempfile::tempdir().expect("a temporary directory");
    let fails = |dir: &Path, weights, part: &str| {
        let options = options(dir, DeviceChoice::Cpu, weights);
        let error = quantize(&options, out.path(), &|_, _| {}).unwrap_err().to_string();
        assert!(error.contains(part), "{part:?} is not in {error:?}");
        assert!(!out.path().join("model.safetensors").exists());
        assert!(!out.path().join("model.safetensors.part").exists());
    };
    fails(&golden("qwen3_moe"), WeightFormat::F16, "f16 holds floats");
    let dir = copy(&golden("qwen3_moe"));
    edit_tensors(&dir.path().join("model.safetensors"), |tensors| {
        let down = tensors.get_mut("model.layers.1.mlp.experts.3.down_proj.weight");
        let (dtype, _, bytes) = down.expect("a matrix");
        assert_eq!(*dtype, Dtype::BF16);
        bytes[2..4].copy_from_slice(&0x7FC0_u16.to_le_bytes());
    });
    fails(dir.path(), W8, "NaN at row 0, column 1");
    edit_json(&dir.path().join("config.json"), |config| config["model_type"] = "unheard".into());
    fails(dir.path(), W8, "unheard");
}

#[test]
fn spoilt_scales_are_an_error() {
    let spoil = |edit: &dyn Fn(&mut Vec<usize>, &mut Vec<u8>), part: &str| {
        let dir = quantized(&golden("qwen3_moe"), W8);
        edit_tensors(&dir.path().join("model.safetensors"), |tensors| {
            let name = "model.layers.0.mlp.experts.1.up_proj.weight_scale";
            let (_, shape, bytes) = tensors.get_mut(name).expect("scales");
            edit(shape, bytes);
        });
        let options: LlmOptions = options(dir.path(), DeviceChoice::Cpu, W8);
        let error = moewe::llm::Llm::open(options).unwrap_err().to_string();
        assert!(error.contains("experts.1.up_proj") && error.contains(part), "{error}");
    };
    spoil(&|_, bytes| bytes[..4].copy_from_slice(&f32::INFINITY.to_le_bytes()), "inf at row 0");
    spoil(
        &|shape, bytes| {
            shape[0] -= 1;
            bytes.truncate(bytes.len() - 4);
        },
        "one per row",
    );
}
