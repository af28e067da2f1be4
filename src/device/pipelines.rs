//! Compiled shader variants: made in parallel, kept for the process and, where the driver allows,
//! on disk for the next one.

use std::collections::HashMap;

use super::{Access, DeviceError, Dispatch, Shader, failure::Failure, shader};

/// A compiled shader variant.
#[derive(Debug, Clone)]
pub(super) struct Pipeline {
    pub(super) pipeline: wgpu::ComputePipeline,
    pub(super) layout: wgpu::BindGroupLayout,
}

/// All variants that a device has compiled.
#[derive(Debug)]
pub(super) struct Pipelines {
    made: HashMap<Shader, Pipeline>,
    #[cfg(not(target_arch = "wasm32"))]
    disk: Option<disk::Disk>,
}

impl Pipelines {
    /// None yet, but for what an earlier process has left on disk.
    pub(super) fn open(device: &wgpu::Device, info: &wgpu::AdapterInfo) -> Self {
        #[cfg(target_arch = "wasm32")]
        let _ = (device, info);
        Self {
            made: HashMap::new(),
            #[cfg(not(target_arch = "wasm32"))]
            disk: disk::folder().and_then(|folder| disk::Disk::open(&folder, device, info)),
        }
    }

    /// Compiles what `dispatches` need and is not there yet.
    pub(super) fn prepare(
        &mut self,
        device: &wgpu::Device,
        failure: &Failure,
        dispatches: &[Dispatch],
    ) -> Result<(), DeviceError> {
        let mut missing: Vec<&Dispatch> = Vec::new();
        for d in dispatches {
            let known = missing.iter().any(|m| m.shader == d.shader);
            if !known && !self.made.contains_key(&d.shader) {
                missing.push(d);
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let compile = |d: &&Dispatch| self.compile(device, d);
        #[cfg(not(target_arch = "wasm32"))]
        let made: Vec<_> = {
            use rayon::prelude::*;
            missing.par_iter().map(compile).collect()
        };
        #[cfg(target_arch = "wasm32")]
        let made: Vec<_> = missing.iter().map(compile).collect();
        if let Err(error) = failure.check(device) {
            // Once more one by one, to tell which it was.
            for d in &missing {
                self.compile(device, d)?;
                failure.check(device).map_err(|error| match error {
                    DeviceError::Rejected { message } => {
                        DeviceError::Shader { shader: d.shader.to_string(), message }
                    }
                    other => other,
                })?;
            }
            return Err(error);
        }
        for (d, pipeline) in missing.into_iter().zip(made) {
            self.made.insert(d.shader.clone(), pipeline?);
        }
        #[cfg(not(target_arch = "wasm32"))]
        if let Some(disk) = &mut self.disk {
            disk.save();
        }
        Ok(())
    }

    /// A variant that [`Pipelines::prepare`] has seen.
    pub(super) fn get(&self, shader: &Shader) -> &Pipeline {
        &self.made[shader]
    }

    fn compile(&self, device: &wgpu::Device, dispatch: &Dispatch) -> Result<Pipeline, DeviceError> {
        let shader = &dispatch.shader;
        let source = shader::compose(shader)?;
        let desc = wgpu::ShaderModuleDescriptor {
            label: Some(shader.stem),
            source: wgpu::ShaderSource::Wgsl(source.into()),
        };
        let checks = wgpu::ShaderRuntimeChecks::unchecked();
        // SAFETY: the sources are compiled into this program, index only what their kernel binds
        // (parity tests run them with sentinels around every output) and have bounded loops.
        let module = unsafe { device.create_shader_module_trusted(desc, checks) };
        let entry = |binding, ty, dynamic| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty,
                has_dynamic_offset: dynamic,
                min_binding_size: None,
            },
            count: None,
        };
        let mut entries = vec![entry(0, wgpu::BufferBindingType::Uniform, true)];
        for (i, b) in dispatch.bindings.iter().enumerate() {
            let read_only = b.access == Access::Read;
            entries.push(entry(
                i as u32 + 1,
                wgpu::BufferBindingType::Storage { read_only },
                false,
            ));
        }
        let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some(shader.stem),
            entries: &entries,
        });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(shader.stem),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let constants: Vec<(&str, f64)> =
            shader.overrides.iter().map(|&(name, value)| (name, f64::from(value))).collect();
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(shader.stem),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: None,
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &constants,
                // Kernels write workgroup memory before they read it.
                zero_initialize_workgroup_memory: false,
            },
            #[cfg(not(target_arch = "wasm32"))]
            cache: self.disk.as_ref().map(disk::Disk::cache),
            #[cfg(target_arch = "wasm32")]
            cache: None,
        });
        Ok(Pipeline { pipeline, layout })
    }
}

#[cfg(not(target_arch = "wasm32"))]
pub(super) mod disk {
    //! The driver's compiled code in a file of its own for each adapter and driver. Whatever is
    //! wrong with the file, the program runs as without it.

    use std::{
        env, fs,
        hash::{DefaultHasher, Hash, Hasher},
        path::{Path, PathBuf},
    };

    /// A driver's cache and its file: a checksum, then what the driver gave.
    #[derive(Debug)]
    pub(super) struct Disk {
        cache: wgpu::PipelineCache,
        path: PathBuf,
        /// Checksum of the file.
        saved: u64,
    }

    /// Where programs keep what they can make again.
    pub(in super::super) fn folder() -> Option<PathBuf> {
        let dir = |name| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let caches = dir("XDG_CACHE_HOME").or_else(|| Some(dir("HOME")?.join(".cache")))?;
        Some(caches.join("moewe"))
    }

    pub(in super::super) fn checksum(data: &(impl Hash + ?Sized)) -> u64 {
        let mut hasher = DefaultHasher::new();
        data.hash(&mut hasher);
        hasher.finish()
    }

    /// Renamed when whole, so that others never read half a file.
    pub(in super::super) fn write(path: &Path, data: &[u8]) -> std::io::Result<()> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let part = path.with_extension(format!("{}.part", std::process::id()));
        fs::write(&part, data)?;
        fs::rename(&part, path)
    }

    /// What a file holds, if it is whole.
    fn content(path: &Path) -> Option<Vec<u8>> {
        let mut bytes = fs::read(path).ok()?;
        let data = bytes.split_off(bytes.len().min(8));
        (bytes == checksum(&data[..]).to_le_bytes()).then_some(data)
    }

    impl Disk {
        pub(super) fn open(
            folder: &Path,
            device: &wgpu::Device,
            info: &wgpu::AdapterInfo,
        ) -> Option<Self> {
            if !device.features().contains(wgpu::Features::PIPELINE_CACHE) {
                return None;
            }
            let driver = checksum(&(&info.name, &info.driver, &info.driver_info));
            let name = wgpu::util::pipeline_cache_key(info)?;
            let path = folder.join(format!("{name}_{driver:016x}"));
            let data = content(&path);
            let saved = data.as_deref().map_or(0, checksum);
            let desc = wgpu::PipelineCacheDescriptor {
                label: Some("pipelines"),
                data: data.as_deref(),
                fallback: true,
            };
            // SAFETY: the data came from `get_data` of the same adapter and driver, which the
            // file's name and wgpu's header tell, and is unchanged by the checksum.
            let cache = unsafe { device.create_pipeline_cache(&desc) };
            Some(Self { cache, path, saved })
        }

        pub(super) fn cache(&self) -> &wgpu::PipelineCache {
            &self.cache
        }

        /// Writes what is new; a file that cannot be written is done without.
        pub(super) fn save(&mut self) {
            let Some(data) = self.cache.get_data() else { return };
            let sum = checksum(&data[..]);
            let whole = || [&sum.to_le_bytes()[..], &data].concat();
            if sum != self.saved && write(&self.path, &whole()).is_ok() {
                self.saved = sum;
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use crate::device::{Device, DeviceChoice};

        #[test]
        fn what_is_saved_is_found_again_and_what_is_spoilt_is_not() {
            let device = pollster::block_on(Device::open(&DeviceChoice::Index(0))).unwrap();
            let Device::Gpu(gpu) = device else { unreachable!("asked for a GPU") };
            let info = gpu.device.adapter_info();
            let folder = tempfile::tempdir().unwrap();
            let open = || Disk::open(folder.path(), &gpu.device, &info);
            // Not every driver has a cache.
            let Some(mut disk) = open() else { return };
            assert_eq!(disk.saved, 0);
            disk.save();
            let (path, saved) = (disk.path.clone(), disk.saved);
            assert_ne!(saved, 0);
            assert_eq!(open().unwrap().saved, saved);
            let whole = fs::read(&path).unwrap();
            for spoilt in [&whole[..whole.len() - 1], &whole[..4], b"", &[7; 400]] {
                fs::write(&path, spoilt).unwrap();
                let mut disk = open().unwrap();
                assert_eq!(disk.saved, 0);
                disk.save();
                assert!(content(&path).is_some());
            }
        }
    }
}
