//! The header of a safetensors file: parsed, and checked before any offset of it is believed.
//!
//! The `safetensors` crate defines entries and dtypes; its own reader lets a repeated key win
//! silently and mostly does not say which tensor is wrong, so the checks are made here, by name.
//! Works on bytes alone: files and the network are the business of others.

use std::{
    collections::{BTreeMap, HashSet},
    fmt, io,
    marker::PhantomData,
    ops::Range,
    path::{Path, PathBuf},
};

use ::safetensors::tensor::{Dtype, TensorInfo};
use serde::{
    Deserialize, Deserializer,
    de::{Error, IgnoredAny, MapAccess, Visitor},
};

use super::{FileBytes, SourceDtype, WeightsError};

/// Largest header accepted, as in the `safetensors` crate.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Length field in front of the header: u64, little endian.
const LENGTH_BYTES: usize = 8;

/// The checked header of one file.
#[derive(Debug, Clone)]
pub struct Header {
    file: PathBuf,
    entries: BTreeMap<String, Entry>,
}

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Dimensions, the slowest first.
    pub shape: Vec<usize>,
    /// Place in the file, in bytes from its beginning.
    pub bytes: Range<usize>,
    dtype: Dtype,
}

impl Header {
    /// Parses the header at the beginning of a file. `start` holds at least the header (it may be
    /// the whole file), `file_bytes` is the length of the file, `file` its name in errors.
    ///
    /// # Errors
    /// [`WeightsError::Header`], [`WeightsError::Entry`] or [`WeightsError::Length`], for anything
    /// but a well-formed header whose tensors fill the rest of the file without gap or overlap.
    pub fn parse(file: &Path, start: &[u8], file_bytes: u64) -> Result<Self, WeightsError> {
        let header_error =
            |cause: String| WeightsError::Header { file: file.into(), cause: brief(cause) };
        let length = |expected| WeightsError::Length {
            file: file.into(),
            expected,
            actual: file_bytes.min(start.len() as u64),
        };
        let n = *start.first_chunk::<LENGTH_BYTES>().ok_or(length(LENGTH_BYTES as u64))?;
        let n = u64::from_le_bytes(n);
        if n > MAX_HEADER_BYTES {
            let cause = format!("it claims {n} bytes, more than the limit of {MAX_HEADER_BYTES}");
            return Err(header_error(cause));
        }
        let data_start = LENGTH_BYTES + n as usize;
        let text = start.get(LENGTH_BYTES..data_start).ok_or(length(data_start as u64))?;
        let text = std::str::from_utf8(text).map_err(|e| header_error(e.to_string()))?;
        let infos: UniqueMap<TensorInfo> =
            serde_json::from_str(text).map_err(|e| header_error(e.to_string()))?;
        let entries = check(file, infos.0, data_start, file_bytes)?;
        Ok(Self { file: file.into(), entries })
    }

    /// Length of the header of `file` with the field in front of it, as far as the file goes;
    /// [`parse`](Self::parse) says what is wrong with it.
    pub(super) fn n_bytes(file: &dyn FileBytes) -> io::Result<u64> {
        let all = file.n_bytes();
        let field = file.read(0..all.min(LENGTH_BYTES as u64))?;
        let claimed = field.first_chunk().map_or(0, |&n| u64::from_le_bytes(n));
        Ok(claimed.min(MAX_HEADER_BYTES).saturating_add(LENGTH_BYTES as u64).min(all))
    }

    /// The file's name, as given to [`parse`](Self::parse).
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The tensors by name.
    pub fn entries(&self) -> &BTreeMap<String, Entry> {
        &self.entries
    }

    /// The dtype of an entry of this header.
    ///
    /// # Errors
    /// [`WeightsError::Dtype`] where it is none that weights may have. Only now, because a file
    /// may well hold integers that nobody asks for.
    pub fn dtype(&self, name: &str, entry: &Entry) -> Result<SourceDtype, WeightsError> {
        match entry.dtype {
            Dtype::F32 => Ok(SourceDtype::F32),
            Dtype::F16 => Ok(SourceDtype::F16),
            Dtype::BF16 => Ok(SourceDtype::BF16),
            Dtype::I8 => Ok(SourceDtype::I8),
            // There is no name for int4; what fills bytes with anything else has other scales.
            Dtype::U8 => Ok(SourceDtype::I4),
            _ => Err(self.wrong_dtype(name, entry)),
        }
    }

    /// The error for an entry whose dtype no weight can have.
    pub(super) fn wrong_dtype(&self, name: &str, entry: &Entry) -> WeightsError {
        let (file, dtype) = (self.file.clone(), entry.dtype.to_string());
        WeightsError::Dtype { name: name.into(), file, dtype }
    }
}

impl Entry {
    /// Element type as the file spells it.
    #[cfg(not(target_arch = "wasm32"))]
    pub(super) fn dtype(&self) -> Dtype {
        self.dtype
    }
}

/// Checks every entry by itself, then that all together fill the file from `data_start` on.
fn check(
    file: &Path,
    mut infos: Vec<(String, TensorInfo)>,
    data_start: usize,
    file_bytes: u64,
) -> Result<BTreeMap<String, Entry>, WeightsError> {
    infos.sort_by(|a, b| a.1.data_offsets.cmp(&b.1.data_offsets).then_with(|| a.0.cmp(&b.0)));
    let mut entries = BTreeMap::new();
    let mut next = 0;
    let mut previous = String::new();
    for (name, TensorInfo { dtype, shape, data_offsets: (begin, end) }) in infos {
        let invalid = |cause: String| WeightsError::Entry {
            file: file.into(),
            name: brief(name.clone()),
            cause: brief(cause),
        };
        // Zeros aside: a product that vanishes must not hide dimensions that overflow.
        let n_bits = shape
            .iter()
            .filter(|&&dim| dim != 0)
            .try_fold(dtype.bitsize(), |n, &dim| n.checked_mul(dim))
            .ok_or_else(|| invalid(format!("its shape {shape:?} overflows")))?;
        let n_bits = if shape.contains(&0) { 0 } else { n_bits };
        if end < begin {
            return Err(invalid(format!("its offsets {begin}..{end} run backwards")));
        }
        if n_bits % 8 != 0 || n_bits / 8 != end - begin {
            let has = end - begin;
            let cause =
                format!("shape {shape:?} of {dtype} needs {n_bits} bits, it has {has} bytes");
            return Err(invalid(cause));
        }
        if begin < next {
            return Err(invalid(format!("it overlaps {previous:?}, which ends at byte {next}")));
        }
        if begin > next {
            return Err(invalid(format!("bytes {next}..{begin} before it belong to no tensor")));
        }
        next = end;
        previous.clone_from(&name);
        // Cannot saturate unless the length check below fails.
        let bytes = data_start.saturating_add(begin)..data_start.saturating_add(end);
        entries.insert(name, Entry { dtype, shape, bytes });
    }
    let expected = (data_start as u64).saturating_add(next as u64);
    if expected != file_bytes {
        return Err(WeightsError::Length { file: file.into(), expected, actual: file_bytes });
    }
    Ok(entries)
}

/// The beginning of a text that may be as long as the file it came from.
pub(super) fn brief(mut text: String) -> String {
    if text.len() > 300 {
        text.truncate(text.floor_char_boundary(300));
        text.push_str("...");
    }
    text
}

/// The entries of a JSON object in their order, an error where a key repeats. The safetensors
/// key `__metadata__`, which is free text, is skipped.
pub(super) struct UniqueMap<V>(pub(super) Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(UniqueMapVisitor(PhantomData))
    }
}

struct UniqueMapVisitor<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for UniqueMapVisitor<V> {
    type Value = UniqueMap<V>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with one entry per tensor")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        let mut seen = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            let shown = || brief(format!("{key:?}"));
            if !seen.insert(key.clone()) {
                return Err(A::Error::custom(format_args!("tensor {} appears twice", shown())));
            }
            if key == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let value = map
                .next_value()
                .map_err(|e| A::Error::custom(format_args!("tensor {}: {e}", shown())))?;
            entries.push((key, value));
        }
        Ok(UniqueMap(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with this header and `data` zero bytes after it.
    fn file(header: impl AsRef<[u8]>, data: usize) -> Vec<u8> {
        let header = header.as_ref();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header);
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn parse(bytes: &[u8]) -> Result<Header, WeightsError> {
        Header::parse(Path::new("m.safetensors"), bytes, bytes.len() as u64)
    }

    /// The error must name the file and hold every one of `parts`.
    fn assert_error(bytes: &[u8], parts: &[&str]) {
        let error = parse(bytes).unwrap_err().to_string();
        for part in parts.iter().chain(&["\"m.safetensors\"", "download"]) {
            assert!(error.contains(part), "{part:?} is not in: {error}");
        }
        assert!(error.len() < 1000, "{error}");
    }

    #[test]
    fn a_good_header_gives_names_shapes_and_places() {
        let header = r#"{"b":{"dtype":"F16","shape":[2,3],"data_offsets":[8,20]},
            "__metadata__":{"format":"pt"},
            "a":{"dtype":"I64","shape":[],"data_offsets":[0,8]},
            "zero":{"dtype":"F32","shape":[0,9],"data_offsets":[8,8]}}"#;
        let parsed = parse(&file(header, 20)).unwrap();
        assert_eq!(parsed.entries().keys().collect::<Vec<_>>(), ["a", "b", "zero"]);
        let b = &parsed.entries()["b"];
        let start = 8 + header.len();
        assert_eq!((&b.shape[..], b.bytes.clone()), (&[2, 3][..], start + 8..start + 20));
        assert_eq!(parsed.dtype("b", b).unwrap(), SourceDtype::F16);
        let error = parsed.dtype("a", &parsed.entries()["a"]).unwrap_err().to_string();
        assert!(error.contains("\"a\" in \"m.safetensors\" has dtype I64"), "{error}");
    }

    #[test]
    fn the_beginning_of_a_file_is_enough() {
        let bytes = file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8);
        let start = &bytes[..bytes.len() - 8];
        let header = Header::parse(Path::new("m"), start, bytes.len() as u64).unwrap();
        assert_eq!(header.entries()["a"].bytes, start.len()..bytes.len());
    }

    #[test]
    fn a_file_too_short_for_a_length() {
        assert_error(&[], &["has 0 bytes", "describes 8"]);
        assert_error(&[1, 0, 0], &["has 3 bytes", "describes 8"]);
    }

    #[test]
    fn a_header_longer_than_the_file() {
        let mut bytes = file("{}", 0);
        bytes[0] = 200;
        assert_error(&bytes, &["has 10 bytes", "describes 208", "cut off"]);
    }

    #[test]
    fn an_oversized_header() {
        for length in [MAX_HEADER_BYTES + 1, u64::MAX] {
            let mut bytes = file("{}", 0);
            bytes[..8].copy_from_slice(&length.to_le_bytes());
            assert_error(&bytes, &[&format!("claims {length} bytes"), "limit"]);
        }
    }

    #[test]
    fn a_header_that_is_not_utf8() {
        assert_error(&file(b"{\"a\xff\":1}", 0), &["utf-8", "index 3"]);
    }

    #[test]
    fn a_header_that_is_not_json_or_no_object() {
        assert_error(&file("{\"a\":", 0), &["EOF"]);
        assert_error(&file("[]", 0), &["an object"]);
        assert_error(&file("", 0), &["EOF"]);
        assert_error(&file("{\"x\":".repeat(500_000), 0), &["tensor \"x\""]);
        assert_error(&file("[".repeat(500_000), 0), &["an object"]);
    }

    #[test]
    fn an_entry_that_lacks_something_or_lies() {
        for (entry, part) in [
            (r#"{"dtype":"F32","shape":[2]}"#, "data_offsets"),
            (r#"{"dtype":"F99","shape":[2],"data_offsets":[0,8]}"#, "F99"),
            (r#"{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}"#, "-2"),
            (r#"{"dtype":"F32","shape":[2.5],"data_offsets":[0,8]}"#, "2.5"),
            (r#"{"dtype":"F32","shape":[1e30],"data_offsets":[0,8]}"#, "1e+30"),
            (r#"{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#, "backwards"),
            (r#"{"dtype":"F32","shape":[3],"data_offsets":[0,8]}"#, "needs 96 bits"),
            (r#"{"dtype":"F4","shape":[3],"data_offsets":[0,1]}"#, "needs 12 bits"),
        ] {
            assert_error(&file(format!("{{\"w.x\":{entry}}}"), 8), &["\"w.x\"", part]);
        }
    }

    #[test]
    fn a_duplicate_key() {
        let entry = r#""a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
        assert_error(&file(format!("{{{entry},{entry}}}"), 8), &["\"a\" appears twice"]);
    }

    #[test]
    fn an_overflowing_shape() {
        for shape in ["[18446744073709551615,2]", "[4294967296,4294967296]", "[0,1e0]"] {
            let entry = format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":[0,8]}}"#);
            assert_error(&file(format!("{{\"big\":{entry}}}"), 8), &["\"big\""]);
        }
        let zero =
            r#"{"big":{"dtype":"U8","shape":[0,18446744073709551615,2],"data_offsets":[0,0]}}"#;
        assert_error(&file(zero, 0), &["\"big\"", "overflows"]);
    }

    #[test]
    fn overlapping_tensors_and_gaps() {
        for (second, part) in [
            ("[4,12]", "overlaps \"a\", which ends at byte 8"),
            ("[0,8]", "overlaps \"a\""),
            ("[12,20]", "bytes 8..12 before it"),
        ] {
            let header = format!(
                r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}},
                     "b":{{"dtype":"F32","shape":[2],"data_offsets":{second}}}}}"#
            );
            assert_error(&file(header, 20), &["\"b\"", part]);
        }
    }

    #[test]
    fn a_truncated_or_overlong_file() {
        let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        let start = 8 + header.len();
        for data in [0, 7, 9] {
            let has = format!("has {} bytes", start + data);
            assert_error(&file(header, data), &[&has, &format!("describes {}", start + 8)]);
        }
        let far = format!(
            r#"{{"a":{{"dtype":"U8","shape":[{0}],"data_offsets":[0,{0}]}}}}"#,
            usize::MAX / 8
        );
        assert_error(&file(far, 8), &["damaged"]);
    }

    #[test]
    fn long_names_do_not_flood_the_error() {
        let name = "x".repeat(100_000);
        let entry = r#"{"dtype":"F32","shape":[3],"data_offsets":[0,8]}"#;
        assert_error(&file(format!("{{\"{name}\":{entry}}}"), 8), &["xxx...", "needs 96 bits"]);
        assert_error(&file(format!("{{\"a\":\"{name}\"}}"), 0), &["\"a\"", "..."]);
    }
}
