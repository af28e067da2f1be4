//! A model's files as the worker holds them: blobs, read piece by piece.

use std::{borrow::Cow, cell::RefCell, io, ops::Range};

use js_sys::Uint8Array;
use moewe::weights::{FileBytes, Files};
use wasm_bindgen::prelude::*;

#[wasm_bindgen(typescript_custom_section)]
const TYPES: &str = "
/** Files of one model, read without waiting as workers can. */
export interface ModelFiles {
    /** The file of that name, or undefined. */
    open(name: string): ModelFile | undefined;
}
export interface ModelFile {
    /** Bytes in all. */
    readonly size: number;
    /** Bytes start to end, end excluded. */
    read(start: number, end: number): Uint8Array;
}
";

#[wasm_bindgen]
extern "C" {
    /// All files of a model.
    #[derive(Debug)]
    #[wasm_bindgen(typescript_type = "ModelFiles")]
    pub type ModelFiles;
    #[wasm_bindgen(method, catch)]
    fn open(this: &ModelFiles, name: &str) -> Result<Option<ModelFile>, JsValue>;

    /// One of them.
    pub(crate) type ModelFile;
    #[wasm_bindgen(method, getter)]
    fn size(this: &ModelFile) -> f64;
    #[wasm_bindgen(method, catch)]
    fn read(this: &ModelFile, start: f64, end: f64) -> Result<Uint8Array, JsValue>;
}

thread_local! {
    /// JavaScript's objects stay on their thread, while those that point to them may be sent.
    static OPEN: RefCell<Vec<Option<ModelFile>>> = const { RefCell::new(Vec::new()) };
}

/// A file by its place among the open ones.
#[derive(Debug)]
struct Opened {
    place: usize,
    n_bytes: u64,
}

impl Files for ModelFiles {
    fn open(&self, name: &str) -> io::Result<Option<Box<dyn FileBytes>>> {
        let Some(file) = ModelFiles::open(self, name).map_err(failed)? else { return Ok(None) };
        let n_bytes = file.size() as u64;
        let place = OPEN.with_borrow_mut(|open| {
            open.push(Some(file));
            open.len() - 1
        });
        Ok(Some(Box::new(Opened { place, n_bytes })))
    }
}

impl FileBytes for Opened {
    fn n_bytes(&self) -> u64 {
        self.n_bytes
    }

    fn read(&self, range: Range<u64>) -> io::Result<Cow<'_, [u8]>> {
        if range.end > self.n_bytes {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (start, end) = (range.start as f64, range.end as f64);
        let bytes = OPEN.with_borrow(|open| match &open[self.place] {
            Some(file) => file.read(start, end).map_err(failed),
            None => Err(io::ErrorKind::NotFound.into()),
        })?;
        // A file that changed meanwhile may be shorter.
        if u64::from(bytes.length()) != range.end - range.start {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Cow::Owned(bytes.to_vec()))
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        OPEN.with_borrow_mut(|open| open[self.place] = None);
    }
}

fn failed(error: JsValue) -> io::Error {
    let text = error.dyn_ref::<js_sys::Error>().map(|e| String::from(e.message()));
    io::Error::other(text.unwrap_or_else(|| format!("{error:?}")))
}
