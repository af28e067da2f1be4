//! Where a model's files lie: a directory here, a browser's storage elsewhere. Knows names and
//! bytes, and no format.

use std::{
    borrow::Cow,
    fmt::Debug,
    io::{self, Error},
    ops::Range,
};

/// The files of one model by name.
pub trait Files: Debug {
    /// Opens a file; `None` where there is none of that name.
    ///
    /// # Errors
    /// What the system says of a file that is there and cannot be read.
    fn open(&self, name: &str) -> io::Result<Option<Box<dyn FileBytes>>>;
}

/// The bytes of one file, of a length that stays.
pub trait FileBytes: Debug + Send + Sync {
    /// Bytes in all.
    fn n_bytes(&self) -> u64;

    /// Some of them, borrowed where the file is mapped.
    ///
    /// # Errors
    /// What the system says; [`io::ErrorKind::UnexpectedEof`] for a range that ends past the end.
    fn read(&self, range: Range<u64>) -> io::Result<Cow<'_, [u8]>>;
}

/// A whole file of at most `limit` bytes; `None` where there is none of that name.
///
/// # Errors
/// Those of [`Files::open`] and [`FileBytes::read`], and one for a larger file.
pub fn read_bounded(files: &dyn Files, name: &str, limit: u64) -> io::Result<Option<Vec<u8>>> {
    let Some(file) = files.open(name)? else { return Ok(None) };
    if file.n_bytes() > limit {
        return Err(Error::other(format!("it is larger than {limit} bytes")));
    }
    Ok(Some(file.read(0..file.n_bytes())?.into_owned()))
}

impl FileBytes for Vec<u8> {
    fn n_bytes(&self) -> u64 {
        self.len() as u64
    }

    fn read(&self, range: Range<u64>) -> io::Result<Cow<'_, [u8]>> {
        part(self, range)
    }
}

fn part(bytes: &[u8], range: Range<u64>) -> io::Result<Cow<'_, [u8]>> {
    let inside = usize::try_from(range.start).ok().zip(usize::try_from(range.end).ok());
    let part = inside.and_then(|(start, end)| bytes.get(start..end));
    part.map(Cow::Borrowed).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// A directory whose files are mapped.
#[cfg(not(target_arch = "wasm32"))]
#[derive(Debug, Clone)]
pub struct Directory(pub std::path::PathBuf);

#[cfg(not(target_arch = "wasm32"))]
#[derive(Debug)]
struct Mapped(memmap2::Mmap);

#[cfg(not(target_arch = "wasm32"))]
impl Files for Directory {
    fn open(&self, name: &str) -> io::Result<Option<Box<dyn FileBytes>>> {
        let path = self.0.join(name);
        if !path.exists() {
            return Ok(None);
        }
        // A pipe in place of a file would block for ever.
        if !std::fs::metadata(&path)?.is_file() {
            return Err(Error::other("it is not a regular file"));
        }
        let file = std::fs::File::open(&path)?;
        // SAFETY: the map is read-only and private. A file that is cut off while it is mapped
        // would fault, as with every mapped checkpoint: its owner must replace it by renaming,
        // which is what the hub's cache and the safetensors library do.
        let map = unsafe { memmap2::Mmap::map(&file) }?;
        Ok(Some(Box::new(Mapped(map))))
    }
}

#[cfg(not(target_arch = "wasm32"))]
impl FileBytes for Mapped {
    fn n_bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, range: Range<u64>) -> io::Result<Cow<'_, [u8]>> {
        part(&self.0, range)
    }
}
