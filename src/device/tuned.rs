//! Choices that were measured on an adapter. They stay in a file of that adapter and driver, so
//! that later processes need not measure again.

use std::collections::BTreeMap;

/// By what was chosen: the best choice for sizes up to a number, in ascending order.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Tuned(BTreeMap<String, Vec<(usize, usize)>>);

impl Tuned {
    /// The choice for `size`: that of the next larger size which was measured, or of the largest.
    pub fn choice(&self, what: &str, size: usize) -> Option<usize> {
        let choices = self.0.get(what)?;
        let fitting = choices.iter().find(|(most, _)| size <= *most);
        fitting.or(choices.last()).map(|&(_, choice)| choice)
    }

    /// Sets the choices for `what`.
    pub(super) fn set(&mut self, what: &str, choices: Vec<(usize, usize)>) {
        self.0.insert(what.to_owned(), choices);
    }
}

/// What is known of an adapter.
pub(super) fn known(info: &wgpu::AdapterInfo) -> Tuned {
    #[cfg(not(target_arch = "wasm32"))]
    return file::path(info).map(|path| file::read(&path)).unwrap_or_default();
    #[cfg(target_arch = "wasm32")]
    {
        let _ = info;
        Tuned::default()
    }
}

#[cfg(not(target_arch = "wasm32"))]
pub(super) mod file {
    use std::{
        fs,
        io::Result,
        path::{Path, PathBuf},
    };

    use super::{super::pipelines::disk, Tuned};

    /// Where the choices for an adapter are kept.
    pub(in super::super) fn path(info: &wgpu::AdapterInfo) -> Option<PathBuf> {
        let key = (info.backend.to_str(), &info.name, &info.driver, &info.driver_info);
        Some(disk::folder()?.join(format!("tuned_{:016x}.json", disk::checksum(&key))))
    }

    /// What a file says; nothing if there is none or it is spoilt.
    pub(in super::super) fn read(path: &Path) -> Tuned {
        let read = || serde_json::from_slice(&fs::read(path).ok()?).ok();
        read().unwrap_or_default()
    }

    /// Adds choices to a file, beside those that other processes have put there.
    pub(in super::super) fn add(path: &Path, new: &Tuned) -> Result<()> {
        let mut all = read(path);
        all.0.extend(new.0.clone());
        disk::write(path, &serde_json::to_vec_pretty(&all)?)
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn choices_are_remembered_beside_others() {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("moewe/tuned.json");
            let tuned = |what: &str, choices: &[(usize, usize)]| {
                let mut tuned = Tuned::default();
                tuned.set(what, choices.to_vec());
                tuned
            };
            assert_eq!(read(&path), Tuned::default());
            add(&path, &tuned("a", &[(8, 1), (64, 16)])).unwrap();
            add(&path, &tuned("b", &[(4, 32)])).unwrap();
            add(&path, &tuned("a", &[(16, 1), (64, 16)])).unwrap();
            let all = read(&path);
            let of = |size| all.choice("a", size);
            assert_eq!([1, 16, 17, 64, 9999].map(of), [1, 1, 16, 16, 16].map(Some));
            assert_eq!((all.choice("b", 1), all.choice("c", 1)), (Some(32), None));
            for spoilt in ["", "{\"a\": [[1]]}", "[]", "{\"a\": [[-1, 2]]}"] {
                fs::write(&path, spoilt).unwrap();
                assert_eq!(read(&path), Tuned::default(), "{spoilt}");
            }
        }
    }
}
