//! Checkpoints to test with: those of the tree, edited copies of them, and how to open them.
//! Knows files and tensors as bytes, and nothing of what a test expects.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use moewe::{
    device::DeviceChoice,
    engine::{Batch, BatchSequence, LogitRows},
    llm::{Llm, LlmOptions},
    weights::WeightFormat,
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::Value;
use tempfile::TempDir;

/// A tensor as a file holds it: dtype, shape, little-endian bytes.
pub(crate) type Stored = (Dtype, Vec<usize>, Vec<u8>);

/// The first adapter; opening fails where there is none, which is what a test wants.
pub(crate) const GPU: DeviceChoice = DeviceChoice::Index(0);

/// Int8 experts with one scale per output channel.
pub(crate) const W8: WeightFormat = WeightFormat::W8 { group: None };

/// Int4 experts with as many scales as there can be.
pub(crate) const W4: WeightFormat = WeightFormat::W4 { group: 32 };

pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

pub(crate) fn gull() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/gull-20m")
}

/// Options for a directory; enough rows of logits to see every position of a step.
pub(crate) fn options(dir: &Path, device: DeviceChoice, weights: WeightFormat) -> LlmOptions {
    let (model, weights) = (Some(dir.display().to_string()), Some(weights));
    LlmOptions { model, device, weights, max_logits: 512, ..LlmOptions::default() }
}

pub(crate) fn open(dir: &Path, device: DeviceChoice, weights: WeightFormat) -> Llm {
    Llm::open(options(dir, device, weights)).unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
}

/// Logits of every position of a sequence, in one step. `[n][vocabulary]`
pub(crate) fn logits(llm: &mut Llm, tokens: &[u32]) -> Vec<Vec<f32>> {
    let runner = llm.engine.runner();
    let blocks: Vec<u32> = (1..=tokens.len().div_ceil(16) as u32).collect();
    let logits = LogitRows::All;
    let sequence = BatchSequence { tokens, blocks: &blocks, logits, ..BatchSequence::default() };
    runner.run(&Batch { sequences: vec![sequence] }, false).expect("the step runs");
    runner.logits(tokens.len()).expect("logits")
}

/// A copy of a checkpoint that a test may spoil.
pub(crate) fn copy(from: &Path) -> TempDir {
    let to = tempfile::tempdir().expect("a temporary directory");
    for entry in fs::read_dir(from).expect("the checkpoint is there") {
        let path = entry.expect("readable").path();
        if path.is_file() {
            fs::copy(&path, to.path().join(path.file_name().expect("a name"))).expect("copied");
        }
    }
    to
}

pub(crate) fn read_json(path: &Path) -> Value {
    let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

pub(crate) fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut json = read_json(path);
    edit(&mut json);
    fs::write(path, json.to_string()).expect("written");
}

pub(crate) fn edit_tensors(path: &Path, edit: impl FnOnce(&mut BTreeMap<String, Stored>)) {
    let bytes = fs::read(path).expect("readable");
    let file = SafeTensors::deserialize(&bytes).expect("valid safetensors");
    let read = file.tensors().into_iter();
    let mut tensors = read
        .map(|(name, t)| (name, (t.dtype(), t.shape().to_vec(), t.data().to_vec())))
        .collect::<BTreeMap<_, _>>();
    edit(&mut tensors);
    write_tensors(path, &tensors);
}

pub(crate) fn write_tensors(path: &Path, tensors: &BTreeMap<String, Stored>) {
    let views = tensors.iter().map(|(name, (dtype, shape, data))| {
        (name, TensorView::new(*dtype, shape.clone(), data).expect("shape and bytes agree"))
    });
    let bytes = safetensors::serialize(views, None).expect("serialised");
    fs::write(path, bytes).expect("written");
}
