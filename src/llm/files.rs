//! Finds a model's files and reads its JSON configuration.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{
    Result,
    engine::SamplingParams,
    model::{ModelSpec, arch},
    weights::{Files, WeightFormat, read_bounded},
};

/// Name of the model that every command uses unless told otherwise.
pub const DEFAULT_MODEL: &str = "gull-20m";

/// What config.json calls the work of `moewe quantize`.
pub(super) const QUANT_METHOD: &str = "moewe";

/// No file beside the weights is larger; the largest is tokenizer.json.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// Model files that are missing or cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FilesError {
    /// `--model` names neither a directory nor a hub id.
    #[error("{name:?} is neither a model directory nor an owner/name on the hub")]
    NoModel {
        /// What was asked for.
        name: String,
    },
    /// The shipped model is not where it should be.
    #[error(
        "the default model {DEFAULT_MODEL} was not found in {searched}; give --model DIR or set \
         MOEWE_MODEL"
    )]
    NoDefault {
        /// Directories that were tried.
        searched: String,
    },
    /// A file that cannot be read.
    #[error("{path:?} cannot be read ({cause}); check that the model directory is complete")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// A file that is not JSON.
    #[error("{path:?} is not valid JSON ({cause}); download it again")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and what.
        cause: String,
    },
    /// A file that cannot be written.
    #[error("{path:?} cannot be written ({cause}); check space and permissions")]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// A model was to be quantised to floats.
    #[error(
        "{format} holds floats; quantise to w8a16, w8a8, or w8a16-g32 or w4a16-g32, -g64, -g128"
    )]
    NotQuantized {
        /// What was asked for.
        format: WeightFormat,
    },
    /// A model was to be quantised twice.
    #[error("{dir:?} is quantised already; start from the model it was made from")]
    Quantized {
        /// The model's directory.
        dir: PathBuf,
    },
    /// A model without a tokenizer was asked for text.
    #[error("{dir:?} has no tokenizer.json; only bench --load-format dummy does without")]
    NoTokenizer {
        /// The model's directory.
        dir: PathBuf,
    },
    /// A chat was asked of a model that has no template.
    #[error("this model has no chat template; use --raw for plain continuation")]
    NoTemplate,
}

/// The default model's directory. In order: `$MOEWE_MODEL`, `$MOEWE_HOME/models`, beside the
/// executable, its `share/moewe`, the source checkout it was built from, the user's data directory.
///
/// # Errors
/// [`FilesError::NoDefault`] with the list that was tried.
pub fn locate() -> Result<PathBuf, FilesError> {
    let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(dir) = var("MOEWE_MODEL") {
        return Ok(dir);
    }
    let below = Path::new("models").join(DEFAULT_MODEL);
    let exe = std::env::current_exe().ok().and_then(|p| Some(p.parent()?.to_owned()));
    let data = var("XDG_DATA_HOME").or_else(|| Some(var("HOME")?.join(".local/share")));
    let candidates = [
        var("MOEWE_HOME").map(|dir| dir.join(&below)),
        exe.as_ref().map(|dir| dir.join(&below)),
        exe.as_ref().map(|dir| dir.join("../share/moewe").join(&below)),
        Some(Path::new(env!("CARGO_MANIFEST_DIR")).join(&below)),
        data.map(|dir| dir.join("moewe").join(&below)),
    ];
    let candidates: Vec<PathBuf> = candidates.into_iter().flatten().collect();
    let found = candidates.iter().find(|dir| dir.join("config.json").is_file()).cloned();
    found.ok_or_else(|| FilesError::NoDefault {
        searched: candidates.iter().map(|d| d.display().to_string()).collect::<Vec<_>>().join(", "),
    })
}

/// The directory that `options.model` means, downloaded from the hub if it is an id.
#[cfg(not(target_arch = "wasm32"))]
pub(super) fn resolve(options: &super::LlmOptions) -> Result<PathBuf> {
    let Some(name) = &options.model else { return Ok(locate()?) };
    if Path::new(name).is_dir() {
        return Ok(PathBuf::from(name));
    }
    #[cfg(feature = "hub")]
    if name.split('/').count() == 2 && !name.starts_with(['.', '/', '~']) {
        let mut hub = crate::weights::hub::HubOptions::from_env();
        if let Some(revision) = &options.revision {
            hub.revision = revision.clone();
        }
        hub.offline |= options.offline;
        return Ok(crate::weights::hub::resolve(name, &hub)?);
    }
    Err(FilesError::NoModel { name: name.clone() }.into())
}

/// Reads config.json, which no model is without; `dir` is what errors call the place.
pub(super) fn read_config_json(files: &dyn Files, dir: &Path) -> Result<Value> {
    let absent = || FilesError::Read {
        path: dir.join("config.json"),
        cause: std::io::ErrorKind::NotFound.into(),
    };
    Ok(read_json(files, dir, "config.json")?.ok_or_else(absent)?)
}

/// What a model's JSON files say.
pub(super) struct Config {
    pub(super) spec: ModelSpec,
    pub(super) defaults: SamplingParams,
    /// How `moewe quantize` has packed the experts, if it has.
    pub(super) weights: Option<WeightFormat>,
}

/// Reads config.json and, if there, generation_config.json; `dir` is what errors call the place.
pub(super) fn read_config(files: &dyn Files, dir: &Path) -> Result<Config> {
    let json = read_config_json(files, dir)?;
    let mut spec = arch::parse(&json)?;
    let weights = match &json["quantization_config"] {
        how if how["quant_method"] == QUANT_METHOD => {
            Some(how["weights"].as_str().unwrap_or_default().parse()?)
        }
        _ => None,
    };
    let mut defaults = SamplingParams::default();
    if let Some(json) = read_json(files, dir, "generation_config.json")? {
        let number = |key: &str| json.get(key).and_then(Value::as_f64).map(|v| v as f32);
        let set = |field: &mut f32, key| *field = number(key).unwrap_or(*field);
        set(&mut defaults.temperature, "temperature");
        if json.get("do_sample") == Some(&Value::Bool(false)) {
            defaults.temperature = 0.0; // As transformers: greedy whatever the temperature says.
        }
        set(&mut defaults.top_p, "top_p");
        set(&mut defaults.min_p, "min_p");
        set(&mut defaults.repetition_penalty, "repetition_penalty");
        defaults.top_k = json.get("top_k").and_then(Value::as_u64).map_or(0, |k| k as u32);
        let ids = match json.get("eos_token_id") {
            Some(Value::Array(ids)) => ids.iter().filter_map(Value::as_u64).collect(),
            Some(id) => id.as_u64().into_iter().collect(),
            None => Vec::new(),
        };
        let ids = ids.into_iter().filter_map(|id| u32::try_from(id).ok());
        spec.eos_token_ids.extend(ids.collect::<Vec<_>>());
        spec.eos_token_ids.sort_unstable();
        spec.eos_token_ids.dedup();
    }
    Ok(Config { spec, defaults, weights })
}

/// Reads a JSON file of bounded size; `None` where there is none.
pub(crate) fn read_json(
    files: &dyn Files,
    dir: &Path,
    name: &str,
) -> Result<Option<Value>, FilesError> {
    let Some(bytes) = read(files, dir, name)? else { return Ok(None) };
    let json = serde_json::from_slice(&bytes);
    json.map(Some).map_err(|e| FilesError::Json { path: dir.join(name), cause: e.to_string() })
}

/// Reads a file beside the weights; `None` where there is none.
pub(super) fn read(
    files: &dyn Files,
    dir: &Path,
    name: &str,
) -> Result<Option<Vec<u8>>, FilesError> {
    let bytes = read_bounded(files, name, MAX_FILE_BYTES);
    bytes.map_err(|cause| FilesError::Read { path: dir.join(name), cause })
}
