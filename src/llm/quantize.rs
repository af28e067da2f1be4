//! Writes a checkpoint whose routed experts are int8 or int4 already: half or a quarter of the
//! download, and loading copies bytes instead of rounding floats.

use std::{borrow::Cow, cell::Cell, fs, io, path::Path, sync::OnceLock};

use safetensors::{Dtype, View, serialize_to_file};
use serde_json::{Value, json};

use crate::{
    Result,
    model::{arch, expert_tensors},
    weights::{Checkpoint, Directory, Source, SourceDtype, WeightFormat, WeightsError, scale_name},
};

use super::{FilesError, LlmOptions, files};

/// Extensions of files that hold weights, in this or another format.
const WEIGHTS: [&str; 8] = ["safetensors", "bin", "pt", "pth", "gguf", "onnx", "h5", "msgpack"];

/// Sizes before and after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quantized {
    /// Tensors of experts, now integers.
    pub tensors: usize,
    /// Bytes of all tensors before.
    pub before: u64,
    /// Bytes of all tensors now.
    pub after: u64,
}

/// Reads the model of `options` and writes it to the directory `out`: routed experts as
/// `options.weights` packs them (under their own names I8 tensors, or U8 with two int4 a byte, each
/// with F32 scales `[rows, scales per row]` under its name and `_scale`), everything else as it is.
/// config.json says how, so that the model is loaded as it is packed unless told otherwise. It
/// computes exactly what the original does under the same `--weights`. `progress` hears of bytes
/// written, and of all that there are to write.
///
/// # Errors
/// [`FilesError::NotQuantized`] for float formats, [`FilesError::Quantized`] for a model that is
/// quantised already, [`FilesError::Write`], and those of reading a model.
pub fn quantize(
    options: &LlmOptions,
    out: &Path,
    progress: &dyn Fn(u64, u64),
) -> Result<Quantized> {
    let format = options.precision().experts;
    if !format.is_quantized() {
        return Err(FilesError::NotQuantized { format }.into());
    }
    let dir = files::resolve(options)?;
    let mut config = files::read_config_json(&Directory(dir.clone()), &dir)?;
    let spec = arch::parse(&config)?;
    let checkpoint = Checkpoint::open(&dir)?;
    let writer = Writer {
        checkpoint: &checkpoint,
        format,
        failure: OnceLock::new(),
        progress,
        done: Cell::new(0),
        all: Cell::new(0),
    };
    let experts = expert_tensors(&spec, &checkpoint);
    let mut parts = Vec::new();
    for name in checkpoint.names() {
        match experts.get(&name) {
            Some(shape) => {
                if checkpoint.tensor(&name, shape)?.quantized_format().is_some() {
                    return Err(FilesError::Quantized { dir }.into());
                }
                parts.extend(writer.expert(&name, shape));
            }
            None => parts.extend(writer.copy(&name)),
        }
    }
    let bytes = |name: String| checkpoint.stored(&name).map_or(0, |(t, s)| n_bytes(t, s) as u64);
    let before = checkpoint.names().into_iter().map(bytes).sum();
    let after: u64 = parts.iter().map(|part| part.data_len() as u64).sum();
    writer.all.set(after);
    let parts = parts.into_iter().map(|part| (part.name.clone(), part));

    let write = |path: &Path| {
        let path = path.to_owned();
        move |cause: io::Error| FilesError::Write { path, cause }
    };
    fs::create_dir_all(out).map_err(write(out))?;
    copy_rest(&dir, out)?;
    if let Value::Object(config) = &mut config {
        let weights = format.to_string();
        let how = json!({ "quant_method": files::QUANT_METHOD, "weights": weights });
        config.insert("quantization_config".into(), how);
    }
    let text = format!("{config:#}\n");
    fs::write(out.join("config.json"), text).map_err(write(&out.join("config.json")))?;
    // Whoever looks sees the whole file or none.
    let (unfinished, path) = (out.join("model.safetensors.part"), out.join("model.safetensors"));
    let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
    let written = serialize_to_file(parts, metadata, &unfinished)
        .map_err(io::Error::other)
        .and_then(|()| match writer.failure.get() {
            // The writing library lets nobody else read what it writes.
            None => fs::metadata(out.join("config.json"))
                .and_then(|like| fs::set_permissions(&unfinished, like.permissions()))
                .and_then(|()| fs::rename(&unfinished, &path)),
            Some(_) => fs::remove_file(&unfinished),
        });
    if let Some(error) = writer.failure.into_inner() {
        return Err(error.into());
    }
    written.map_err(write(&path))?;
    Ok(Quantized { tensors: experts.len(), before, after })
}

/// Copies what a model's directory holds beside weights and config.json.
fn copy_rest(from: &Path, to: &Path) -> Result<(), FilesError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |cause: io::Error| FilesError::Read { path, cause }
    };
    for entry in fs::read_dir(from).map_err(failed(from))? {
        let path = entry.map_err(failed(from))?.path();
        let extension = path.extension().unwrap_or_default();
        let name = path.file_name().unwrap_or_default();
        let index = name.to_string_lossy().ends_with(".index.json");
        let weights = index || WEIGHTS.iter().any(|e| *e == extension);
        if path.is_file() && !weights && name != "config.json" {
            fs::copy(&path, to.join(name)).map_err(failed(&path))?;
        }
    }
    Ok(())
}

fn n_bytes(dtype: Dtype, shape: &[usize]) -> usize {
    shape.iter().product::<usize>() * dtype.bitsize() / 8
}

/// Computes tensors when they are written, one at a time, so that no more than one is in memory.
struct Writer<'a> {
    checkpoint: &'a Checkpoint,
    format: WeightFormat,
    /// What went wrong while writing; the writing library cannot be told.
    failure: OnceLock<WeightsError>,
    progress: &'a dyn Fn(u64, u64),
    /// Bytes written, and to write.
    done: Cell<u64>,
    all: Cell<u64>,
}

#[derive(Clone, Copy)]
enum Content {
    Copy,
    Weights,
    Scales,
}

/// A tensor of the file to write.
struct Part<'a> {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    writer: &'a Writer<'a>,
    content: Content,
    /// The tensor it is made from.
    source: String,
    source_shape: Vec<usize>,
}

impl Writer<'_> {
    fn copy(&self, name: &str) -> Option<Part<'_>> {
        let (dtype, shape) = self.checkpoint.stored(name)?;
        Some(self.part(name.to_owned(), dtype, shape.to_vec(), Content::Copy, (name, shape)))
    }

    /// An expert's matrix, or those of all: the integers and their scales.
    fn expert(&self, name: &str, shape: &[usize]) -> [Part<'_>; 2] {
        let ints = self.format.source_dtype();
        let dtype = if ints == SourceDtype::I4 { Dtype::U8 } else { Dtype::I8 };
        let mut scales = shape.to_vec();
        if let Some(cols) = scales.last_mut() {
            *cols = self.format.scales_per_row(*cols);
        }
        let from = (name, shape);
        [
            self.part(name.to_owned(), dtype, ints.stored_shape(shape), Content::Weights, from),
            self.part(scale_name(name), Dtype::F32, scales, Content::Scales, from),
        ]
    }

    fn part(
        &self,
        name: String,
        dtype: Dtype,
        shape: Vec<usize>,
        content: Content,
        (source, source_shape): (&str, &[usize]),
    ) -> Part<'_> {
        let (source, source_shape) = (source.to_owned(), source_shape.to_vec());
        Part { name, dtype, shape, writer: self, content, source, source_shape }
    }
}

impl Part<'_> {
    fn compute(&self) -> Result<Cow<'_, [u8]>, WeightsError> {
        let Writer { checkpoint, format, .. } = self.writer;
        if matches!(self.content, Content::Copy) {
            return checkpoint.read(&self.source);
        }
        let tensor = checkpoint.tensor(&self.source, &self.source_shape)?;
        let (rows, cols) = (tensor.rows(), tensor.cols());
        let encoded =
            format.encode(&self.source, rows, cols, |row, out| tensor.row_into(row, out))?;
        Ok(match self.content {
            Content::Scales => encoded.scales.iter().flat_map(|s| s.to_le_bytes()).collect(),
            // Files hold no padding.
            _ => encoded
                .weights
                .chunks(format.bytes_per_row(cols).max(1))
                .flat_map(|row| &row[..format.source_dtype().row_bytes(cols)])
                .copied()
                .collect(),
        })
    }
}

impl View for Part<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let Writer { failure, progress, done, all, .. } = self.writer;
        let data = self.compute().unwrap_or_else(|error| {
            let _ = failure.set(error);
            vec![0; self.data_len()].into()
        });
        done.set(done.get() + data.len() as u64);
        progress(done.get(), all.get());
        data
    }

    fn data_len(&self) -> usize {
        n_bytes(self.dtype, &self.shape)
    }
}
