//! A checkpoint: one safetensors file, or shards and their index.
//!
//! Opening reads headers only; a tensor's bytes are touched when they are converted, so that the
//! resident memory is the working set of one tensor. Knows files, and no model.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
};

use serde::Deserialize;

use super::{
    FileBytes, Files, Header, Source, SourceDtype, SourceTensor, WeightsError, read_bounded,
    safetensors::{Entry, UniqueMap, brief},
    source::{check_shape, missing, scale_name},
};

/// Name of the weights of a checkpoint that is a single file.
pub(super) const SINGLE_FILE: &str = "model.safetensors";

/// Name of the index of a checkpoint that is split into shards.
pub(super) const INDEX_FILE: &str = "model.safetensors.index.json";

/// Largest index read: those of the biggest published checkpoints have less than 10 MiB.
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// The safetensors files of a model, opened and checked.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    shards: Vec<Shard>,
    places: BTreeMap<String, usize>, // Tensor name -> position in `shards`.
}

/// One file.
#[derive(Debug)]
struct Shard {
    header: Header,
    bytes: Box<dyn FileBytes>,
}

impl Checkpoint {
    /// Opens the checkpoint in a directory, its files mapped.
    ///
    /// # Errors
    /// Those of [`Checkpoint::from_files`], and [`WeightsError::Io`] for a directory that cannot
    /// be read.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn open(dir: &Path) -> Result<Self, WeightsError> {
        std::fs::read_dir(dir).map_err(|cause| WeightsError::Io { path: dir.into(), cause })?;
        Self::from_files(&super::Directory(dir.into()), dir)
    }

    /// Opens `model.safetensors`, or else the shards of `model.safetensors.index.json`; `dir` is
    /// what errors call the place.
    ///
    /// # Errors
    /// [`WeightsError::NoCheckpoint`] where there is neither; [`WeightsError::Index`],
    /// [`WeightsError::MissingShard`], [`WeightsError::NotInShard`], [`WeightsError::Duplicate`]
    /// for a set of files that does not fit together, and the errors of [`Header::parse`].
    pub fn from_files(files: &dyn Files, dir: &Path) -> Result<Self, WeightsError> {
        let mut checkpoint = Self { dir: dir.into(), shards: Vec::new(), places: BTreeMap::new() };
        if checkpoint.add_shard(files, SINGLE_FILE)? {
            return Ok(checkpoint);
        }
        let index = dir.join(INDEX_FILE);
        let Some(shards) = read_index(files, dir)? else {
            return Err(WeightsError::NoCheckpoint { dir: dir.into() });
        };
        for (shard, names) in shards {
            if !checkpoint.add_shard(files, &shard)? {
                return Err(WeightsError::MissingShard { index, shard });
            }
            let entries = checkpoint.shards.last().map(|shard| shard.header.entries());
            let absent = |name: &&String| !entries.is_some_and(|e| e.contains_key(*name));
            if let Some(name) = names.iter().find(absent) {
                let (file, name) = (dir.join(&shard), brief(name.clone()));
                return Err(WeightsError::NotInShard { file, name });
            }
        }
        Ok(checkpoint)
    }

    /// A single safetensors file that is in memory; `name` is what errors call it.
    ///
    /// # Errors
    /// Those of [`Header::parse`].
    pub fn from_bytes(name: &str, bytes: Vec<u8>) -> Result<Self, WeightsError> {
        let dir = PathBuf::from(name);
        let mut checkpoint = Self { dir: dir.clone(), shards: Vec::new(), places: BTreeMap::new() };
        checkpoint.add_file(dir, Box::new(bytes))?;
        Ok(checkpoint)
    }

    /// Opens a file, checks its header and takes in its tensors; false where it is absent.
    fn add_shard(&mut self, files: &dyn Files, name: &str) -> Result<bool, WeightsError> {
        let path = self.dir.join(name);
        let io = |cause| WeightsError::Io { path: path.clone(), cause };
        let Some(bytes) = files.open(name).map_err(io)? else { return Ok(false) };
        self.add_file(path, bytes)?;
        Ok(true)
    }

    fn add_file(&mut self, path: PathBuf, bytes: Box<dyn FileBytes>) -> Result<(), WeightsError> {
        let io = |cause| WeightsError::Io { path: path.clone(), cause };
        let n_bytes = bytes.n_bytes();
        let start = bytes.read(0..Header::n_bytes(&*bytes).map_err(io)?).map_err(io)?;
        let header = Header::parse(&path, &start, n_bytes)?;
        drop(start);
        for name in header.entries().keys() {
            if let Some(first) = self.places.insert(name.clone(), self.shards.len()) {
                return Err(WeightsError::Duplicate {
                    name: brief(name.clone()),
                    first: self.shards[first].header.file().into(),
                    second: path,
                });
            }
        }
        self.shards.push(Shard { header, bytes });
        Ok(())
    }
}

impl Source for Checkpoint {
    fn contains(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    fn names(&self) -> Vec<String> {
        self.places.keys().cloned().collect()
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<SourceTensor<'_>, WeightsError> {
        let Some((header, entry)) = self.entry(name) else {
            return Err(missing(name, &self.dir, self.places.keys()));
        };
        let dtype = header.dtype(name, entry)?;
        let scales = scale_name(name);
        let scale = match dtype {
            SourceDtype::I8 | SourceDtype::I4 => {
                Some(self.entry(&scales).ok_or_else(|| header.wrong_dtype(name, entry))?)
            }
            _ => None,
        };
        check_shape(name, header.file(), &dtype.stored_shape(shape), &entry.shape)?;
        let tensor = SourceTensor::new(name, dtype, shape, self.read(name)?)?;
        let Some((_, scale)) = scale else { return Ok(tensor) };
        tensor.with_scales(self.tensor(&scales, &scale.shape)?.to_f32())
    }
}

impl Checkpoint {
    fn entry(&self, name: &str) -> Option<(&Header, &Entry)> {
        let header = &self.shards[*self.places.get(name)?].header;
        Some((header, header.entries().get(name)?))
    }

    /// Shape and dtype of a tensor as the file has them, whatever the dtype.
    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) fn stored(&self, name: &str) -> Option<(::safetensors::Dtype, &[usize])> {
        let (_, entry) = self.entry(name)?;
        Some((entry.dtype(), &entry.shape))
    }

    /// The bytes of a tensor, whatever its dtype.
    pub(crate) fn read(&self, name: &str) -> Result<Cow<'_, [u8]>, WeightsError> {
        let absent = || missing(name, &self.dir, self.places.keys());
        let (header, entry) = self.entry(name).ok_or_else(absent)?;
        let shard = &self.shards[self.places[name]];
        let range = entry.bytes.start as u64..entry.bytes.end as u64;
        let io = |cause| WeightsError::Io { path: header.file().into(), cause };
        shard.bytes.read(range).map_err(io)
    }
}

/// Shards in the order of their names, each with the tensors that the index says it holds; `None`
/// without an index.
pub(super) fn read_index(
    files: &dyn Files,
    dir: &Path,
) -> Result<Option<BTreeMap<String, Vec<String>>>, WeightsError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: UniqueMap<String>,
    }
    let index = dir.join(INDEX_FILE);
    let invalid = |cause: String| WeightsError::Index { file: index.clone(), cause: brief(cause) };
    let bytes = read_bounded(files, INDEX_FILE, MAX_INDEX_BYTES);
    let Some(bytes) = bytes.map_err(|cause| invalid(cause.to_string()))? else { return Ok(None) };
    let Index { weight_map } =
        serde_json::from_slice(&bytes).map_err(|e| invalid(e.to_string()))?;
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, shard) in weight_map.0 {
        if !is_inside(&shard) {
            let cause = format!("tensor {name:?} lies in {shard:?}, outside of the directory");
            return Err(invalid(cause));
        }
        shards.entry(shard).or_default().push(name);
    }
    if shards.is_empty() {
        return Err(invalid("it names no tensor".into()));
    }
    Ok(Some(shards))
}

/// Whether a shard's name is a plain path below the checkpoint's directory, on any system.
fn is_inside(shard: &str) -> bool {
    let plain = |part: Component<'_>| matches!(part, Component::Normal(_));
    !shard.is_empty() && !shard.contains(['\\', ':']) && Path::new(shard).components().all(plain)
}

#[cfg(test)]
mod tests {
    use ::safetensors::{Dtype, serialize, tensor::TensorView};
    use std::fs::{self, File};

    use tempfile::TempDir;

    use super::*;

    /// A safetensors file of F32 vectors that hold 0, 1, 2...
    fn file(tensors: &[(&str, usize)]) -> Vec<u8> {
        let data: Vec<Vec<u8>> = tensors
            .iter()
            .map(|(_, n)| (0..*n).flat_map(|i| (i as f32).to_le_bytes()).collect())
            .collect();
        let views = tensors.iter().zip(&data).map(|((name, n), data)| {
            (name.to_string(), TensorView::new(Dtype::F32, vec![*n], data).unwrap())
        });
        serialize(views, None).unwrap()
    }

    /// A directory with these files.
    fn dir(files: &[(&str, &[u8])]) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            fs::write(dir.path().join(name), bytes).unwrap();
        }
        dir
    }

    fn index(entries: &str) -> String {
        format!(r#"{{"metadata":{{"total_size":1}},"weight_map":{{{entries}}}}}"#)
    }

    fn assert_error(files: &[(&str, &[u8])], parts: &[&str]) {
        let error = Checkpoint::open(dir(files).path()).unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "{part:?} is not in: {error}");
        }
    }

    #[test]
    fn a_single_file_opens() {
        let dir = dir(&[(SINGLE_FILE, &file(&[("b", 3), ("a", 2)])), ("config.json", b"{}")]);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.names(), ["a", "b"]);
        assert!(checkpoint.contains("a") && !checkpoint.contains("c"));
        let b = checkpoint.tensor("b", &[3]).unwrap();
        assert_eq!((b.dtype(), b.to_f32()), (SourceDtype::F32, vec![0.0, 1.0, 2.0]));
    }

    #[test]
    fn shards_open_through_their_index() {
        let index = index(r#""a":"1.safetensors","b":"2.safetensors","c":"1.safetensors""#);
        let dir = dir(&[
            (INDEX_FILE, index.as_bytes()),
            ("1.safetensors", &file(&[("a", 1), ("c", 4)])),
            ("2.safetensors", &file(&[("b", 2)])),
        ]);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.names(), ["a", "b", "c"]);
        assert_eq!(checkpoint.tensor("b", &[2]).unwrap().to_f32(), [0.0, 1.0]);
        assert_eq!(checkpoint.tensor("c", &[4]).unwrap().to_f32(), [0.0, 1.0, 2.0, 3.0]);
    }

    #[test]
    fn absent_and_misshapen_tensors_name_tensor_and_file() {
        let dir = dir(&[(SINGLE_FILE, &file(&[("layers.0.gate.weight", 6)]))]);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let error = checkpoint.tensor("layers.1.gate.weight", &[6]).unwrap_err().to_string();
        assert!(error.contains("\"layers.1.gate.weight\""), "{error}");
        assert!(error.contains("close names: layers.0.gate.weight"), "{error}");
        let error = checkpoint.tensor("layers.0.gate.weight", &[2, 3]).unwrap_err().to_string();
        assert!(error.contains("layers.0.gate.weight") && error.contains(SINGLE_FILE), "{error}");
        assert!(error.contains("[6]") && error.contains("[2, 3]"), "{error}");
    }

    #[test]
    fn integers_are_an_error_only_when_asked_for() {
        let ids = TensorView::new(Dtype::I32, vec![1], &[1, 0, 0, 0]).unwrap();
        let weight = TensorView::new(Dtype::BF16, vec![1], &[0x80, 0x3F]).unwrap();
        let bytes = serialize([("ids", ids), ("weight", weight)], None).unwrap();
        let dir = dir(&[(SINGLE_FILE, &bytes)]);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.tensor("weight", &[1]).unwrap().to_f32(), [1.0]);
        let error = checkpoint.tensor("ids", &[1]).unwrap_err().to_string();
        assert!(error.contains("\"ids\"") && error.contains("dtype I32"), "{error}");
    }

    #[test]
    fn integers_need_their_scales() {
        let scale = TensorView::new(Dtype::BF16, vec![2, 1], &[0x80, 0x3F, 0, 0x40]).unwrap();
        // Rows of int4 are whole words.
        for (dtype, cols, bytes) in
            [(Dtype::I8, 2, &[1, 2, 0xFF, 4][..]), (Dtype::U8, 4, &[1, 2, 0, 0, 0xF, 4, 0, 0])]
        {
            let ints = TensorView::new(dtype, vec![2, cols], bytes).unwrap();
            let both = [("w", ints.clone()), ("w_scale", scale.clone())];
            let both = dir(&[(SINGLE_FILE, &serialize(both, None).unwrap())]);
            let checkpoint = Checkpoint::open(both.path()).unwrap();
            assert_eq!(checkpoint.tensor("w", &[2, 2]).unwrap().to_f32(), [1.0, 2.0, -2.0, 8.0]);
            let error = checkpoint.tensor("w", &[2, 9]).unwrap_err().to_string();
            assert!(error.contains("\"w\"") && error.contains("shape"), "{error}");
            let alone = dir(&[(SINGLE_FILE, &serialize([("w", ints)], None).unwrap())]);
            let checkpoint = Checkpoint::open(alone.path()).unwrap();
            let error = checkpoint.tensor("w", &[2, 2]).unwrap_err().to_string();
            assert!(
                error.contains(&format!("dtype {dtype}")) && error.contains("w_scale"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_directory_without_weights_or_no_directory() {
        assert_error(&[("pytorch_model.bin", b"x")], &["neither", SINGLE_FILE, INDEX_FILE]);
        let error = Checkpoint::open(Path::new("/no/such/dir")).unwrap_err().to_string();
        assert!(error.contains("/no/such/dir") && error.contains("check"), "{error}");
    }

    #[test]
    fn a_directory_in_place_of_the_file() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(SINGLE_FILE)).unwrap();
        let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(SINGLE_FILE) && error.contains("not a regular file"), "{error}");
    }

    #[test]
    fn an_empty_or_truncated_file() {
        assert_error(&[(SINGLE_FILE, b"")], &[SINGLE_FILE, "has 0 bytes"]);
        let bytes = file(&[("a", 100)]);
        assert_error(&[(SINGLE_FILE, &bytes[..bytes.len() - 1])], &[SINGLE_FILE, "cut off"]);
    }

    #[test]
    fn every_truncation_and_every_flipped_byte_of_the_header_ends_well() {
        let bytes = file(&[("a", 2), ("b", 3)]);
        for end in 0..bytes.len() {
            Checkpoint::open(dir(&[(SINGLE_FILE, &bytes[..end])]).path()).unwrap_err();
        }
        for at in 0..bytes.len() - 20 {
            let mut bytes = bytes.clone();
            bytes[at] ^= 0x15;
            // Some flips give another valid file; none may panic.
            if let Ok(checkpoint) = Checkpoint::open(dir(&[(SINGLE_FILE, &bytes)]).path()) {
                for name in checkpoint.names() {
                    let _ = checkpoint.tensor(&name, &[2]).map(|tensor| tensor.to_f32());
                }
            }
        }
    }

    #[test]
    fn an_index_that_names_an_absent_shard() {
        let index = index(r#""a":"gone.safetensors""#);
        assert_error(&[(INDEX_FILE, index.as_bytes())], &[INDEX_FILE, "\"gone.safetensors\""]);
    }

    #[test]
    fn an_index_that_names_an_absent_tensor() {
        let index = index(r#""a":"1.safetensors","gone":"1.safetensors""#);
        let files = [(INDEX_FILE, index.as_bytes()), ("1.safetensors", &file(&[("a", 1)])[..])];
        assert_error(&files, &["\"gone\"", "1.safetensors"]);
    }

    #[test]
    fn a_tensor_in_two_shards() {
        let index = index(r#""a":"1.safetensors","b":"2.safetensors""#);
        let files = [
            (INDEX_FILE, index.as_bytes()),
            ("1.safetensors", &file(&[("a", 1)])[..]),
            ("2.safetensors", &file(&[("a", 1), ("b", 1)])[..]),
        ];
        assert_error(&files, &["tensor \"a\"", "1.safetensors", "2.safetensors"]);
    }

    #[test]
    fn a_shard_outside_of_the_directory() {
        for shard in ["../x.safetensors", "/etc/passwd", "a/../../x", ".", "", "c:x", "..\\\\x"] {
            let index = index(&format!(r#""w":"{shard}""#));
            assert_error(&[(INDEX_FILE, index.as_bytes())], &[INDEX_FILE, "\"w\"", "outside"]);
        }
    }

    #[test]
    fn an_index_that_is_no_index() {
        for (text, part) in [
            ("{", "EOF"),
            ("{}", "weight_map"),
            (r#"{"weight_map":{}}"#, "no tensor"),
            (r#"{"weight_map":{"a":3}}"#, "tensor \"a\""),
            (r#"{"weight_map":{"a":"x","a":"y"}}"#, "\"a\" appears twice"),
        ] {
            assert_error(&[(INDEX_FILE, text.as_bytes())], &[INDEX_FILE, part]);
        }
    }

    #[test]
    fn an_oversized_index_is_not_read() {
        let dir = dir(&[]);
        let file = File::create(dir.path().join(INDEX_FILE)).unwrap();
        file.set_len(MAX_INDEX_BYTES + 1).unwrap();
        let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(INDEX_FILE) && error.contains("larger than"), "{error}");
    }
}
