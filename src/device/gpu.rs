//! A wgpu device: buffers and pipelines.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[cfg(not(target_arch = "wasm32"))]
use super::upload::Uploads;
use super::{
    BufferId, Caps, DeviceError, Dispatch, Memory, Shader, Tier, adapter,
    failure::{Failure, Faults},
    pipelines::{Pipeline, Pipelines},
    plan::StagingPool,
};

/// An opened adapter with its buffers and compiled pipelines.
#[derive(Debug)]
pub struct Gpu {
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    buffers: Vec<Option<wgpu::Buffer>>,
    pipelines: Arc<Mutex<Pipelines>>,
    caps: Caps,
    info: adapter::AdapterInfo,
    memory_bytes: Option<u64>,
    /// Bytes of all live buffers but those on the host, and the most at a time.
    bytes: u64,
    peak_bytes: u64,
    failure: Failure,
    pub(super) staging: StagingPool,
    #[cfg(not(target_arch = "wasm32"))]
    uploads: Uploads,
}

const FEATURES: wgpu::Features = wgpu::Features::SHADER_F16
    .union(wgpu::Features::SUBGROUP)
    .union(wgpu::Features::TIMESTAMP_QUERY)
    .union(wgpu::Features::PIPELINE_CACHE)
    .union(wgpu::Features::MAPPABLE_PRIMARY_BUFFERS);

pub(super) fn caps_of(adapter: &wgpu::Adapter) -> Caps {
    let (features, limits, info) = (adapter.features(), adapter.limits(), adapter.get_info());
    let coop = features.contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX);
    let edge = |n: u32| {
        use wgpu::CooperativeScalarType::{F16, F32};
        adapter.cooperative_matrix_properties().iter().any(|p| {
            (p.m_size, p.n_size, p.k_size) == (n, n, n) && (p.ab_type, p.cr_type) == (F16, F32)
        })
    };
    Caps {
        f16: features.contains(wgpu::Features::SHADER_F16),
        subgroups: features
            .contains(wgpu::Features::SUBGROUP)
            .then_some((info.subgroup_min_size, info.subgroup_max_size)),
        coop_matrix: [16, 8].into_iter().find(|&n| coop && edge(n)),
        // Bindings are addressed in whole vec4s.
        max_binding_bytes: limits.max_storage_buffer_binding_size & !15,
        max_buffer_bytes: limits.max_buffer_size & !15,
        max_workgroup_bytes: limits.max_compute_workgroup_storage_size,
        max_invocations: limits.max_compute_invocations_per_workgroup,
        max_grid: limits.max_compute_workgroups_per_dimension,
        offset_alignment: limits.min_storage_buffer_offset_alignment,
        timestamps: features.contains(wgpu::Features::TIMESTAMP_QUERY),
        ordered_groups: matches!(info.backend, wgpu::Backend::Vulkan | wgpu::Backend::Dx12),
        software: info.device_type == wgpu::DeviceType::Cpu,
        twins: false,
        tuned: Arc::new(super::tuned::known(&info)),
    }
}

/// Size of the largest device-local heap; only Vulkan tells.
#[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
fn heap_bytes(adapter: &wgpu::Adapter) -> Option<u64> {
    // SAFETY: the handles are only used to ask for properties while the adapter is alive.
    let properties = unsafe {
        let adapter = adapter.as_hal::<wgpu::hal::api::Vulkan>()?;
        let instance = adapter.shared_instance().raw_instance();
        instance.get_physical_device_memory_properties(adapter.raw_physical_device())
    };
    let heaps = &properties.memory_heaps[..properties.memory_heap_count as usize];
    // Bit 0 of the flags is DEVICE_LOCAL.
    heaps.iter().filter(|h| h.flags.as_raw() & 1 != 0).map(|h| h.size).max()
}

#[cfg(any(target_arch = "wasm32", target_vendor = "apple"))]
fn heap_bytes(_: &wgpu::Adapter) -> Option<u64> {
    None
}

impl Gpu {
    pub(super) async fn open(adapter: wgpu::Adapter) -> Result<Self, DeviceError> {
        let info = adapter::describe(&adapter);
        let caps = info.caps.clone();
        let memory_bytes = heap_bytes(&adapter);
        let mut features = adapter.features() & FEATURES;
        if caps.coop_matrix.is_some() {
            features |= wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
        }
        let (device, queue) = adapter
            .request_device(&wgpu::DeviceDescriptor {
                label: Some("moewe"),
                required_features: features,
                required_limits: adapter.limits(),
                // SAFETY: cooperative matrices are the only experimental feature asked for; our
                // shaders keep to the rules that wgpu documents for them.
                experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
                memory_hints: wgpu::MemoryHints::MemoryUsage,
                trace: wgpu::Trace::Off,
            })
            .await
            .map_err(|e| DeviceError::Open {
                adapter: info.name.clone(),
                message: e.to_string(),
            })?;
        let failure = Failure::default();
        let sink = failure.clone();
        device.on_uncaptured_error(Arc::new(move |error| {
            sink.set(match error {
                wgpu::Error::OutOfMemory { .. } => DeviceError::OutOfMemory { bytes: 0 },
                other => DeviceError::Rejected { message: other.to_string() },
            });
        }));
        let sink = failure.clone();
        device.set_device_lost_callback(move |reason, message| {
            sink.set(DeviceError::Lost { message: format!("{reason:?}: {message}") });
        });
        let pipelines = Arc::new(Mutex::new(Pipelines::open(&device, &adapter.get_info())));
        let buffers = Vec::new();
        let (bytes, peak_bytes, staging) = (0, 0, StagingPool::default());
        Ok(Self {
            device,
            queue,
            buffers,
            pipelines,
            caps,
            info,
            memory_bytes,
            bytes,
            peak_bytes,
            failure,
            staging,
            #[cfg(not(target_arch = "wasm32"))]
            uploads: Uploads::default(),
        })
    }

    /// See [`super::Device::beside`].
    pub(super) fn beside(&self) -> Self {
        Self {
            device: self.device.clone(),
            queue: self.queue.clone(),
            buffers: Vec::new(),
            pipelines: self.pipelines.clone(),
            caps: self.caps.clone(),
            info: self.info.clone(),
            memory_bytes: self.memory_bytes,
            bytes: 0,
            peak_bytes: 0,
            failure: self.failure(),
            staging: self.staging.clone(),
            #[cfg(not(target_arch = "wasm32"))]
            uploads: Uploads::default(),
        }
    }

    pub(super) fn caps(&self) -> &Caps {
        &self.caps
    }

    pub(super) fn caps_mut(&mut self) -> &mut Caps {
        &mut self.caps
    }

    pub(super) fn shrink(&mut self, tier: Tier) {
        self.caps = self.caps.shrink(tier);
    }

    pub(super) fn limit_bindings(&mut self, bytes: u64) {
        self.caps.max_binding_bytes = self.caps.max_binding_bytes.min(bytes);
    }

    /// Size of the largest memory heap on the card.
    pub(super) fn memory_bytes(&self) -> Option<u64> {
        self.memory_bytes
    }

    pub(super) fn describe(&self) -> String {
        format!("{} ({}, {} tier)", self.info.name, self.info.backend, self.caps.tier())
    }

    /// Driver name and version.
    pub(super) fn driver(&self) -> &str {
        &self.info.driver
    }

    pub(super) fn check(&self) -> Result<(), DeviceError> {
        self.failure.check(&self.device)
    }

    pub(super) fn failure(&self) -> Failure {
        self.failure.clone()
    }

    pub(super) fn faults(&self) -> Faults {
        Faults(Some((self.device.clone(), self.failure())))
    }

    /// Asks the driver with an empty submission, and does not wait for it.
    pub(super) fn probe(&self) -> Result<(), DeviceError> {
        self.queue.submit([]);
        // What goes wrong is reported through callbacks, which polling runs.
        let _ = self.device.poll(wgpu::PollType::Poll);
        self.check()
    }

    /// A buffer that kernels can bind.
    pub(super) fn alloc(
        &mut self,
        memory: Memory,
        what: &str,
        bytes: u64,
    ) -> Result<BufferId, DeviceError> {
        // What the host only writes, wgpu's allocator puts into the card's own memory where the
        // host reaches all of that; what the host can read stays with the host.
        let map = match memory {
            Memory::Device => wgpu::BufferUsages::empty(),
            Memory::Host => wgpu::BufferUsages::MAP_READ,
        };
        let features = self.device.features();
        if memory == Memory::Host && !features.contains(wgpu::Features::MAPPABLE_PRIMARY_BUFFERS) {
            return Err(DeviceError::HostMemory { adapter: self.info.name.clone() });
        }
        let buffer = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(what),
            size: bytes,
            usage: map
                | wgpu::BufferUsages::STORAGE
                | wgpu::BufferUsages::COPY_DST
                | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        });
        self.check().map_err(|error| match error {
            DeviceError::OutOfMemory { .. } => DeviceError::OutOfMemory { bytes },
            other => other,
        })?;
        if memory == Memory::Device {
            self.bytes += bytes;
            self.peak_bytes = self.peak_bytes.max(self.bytes);
        }
        Ok(self.hold(buffer))
    }

    fn hold(&mut self, buffer: wgpu::Buffer) -> BufferId {
        let id = self.buffers.iter().position(Option::is_none).unwrap_or(self.buffers.len());
        if id == self.buffers.len() {
            self.buffers.push(None);
        }
        self.buffers[id] = Some(buffer);
        BufferId(id as u32)
    }

    pub(super) fn free(&mut self, id: BufferId) {
        if let Some(buffer) = self.buffers[id.0 as usize].take() {
            if !buffer.usage().contains(wgpu::BufferUsages::MAP_READ) {
                self.bytes -= buffer.size();
            }
            buffer.destroy();
        }
    }

    pub(super) fn allocated_bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn peak_bytes(&self) -> u64 {
        self.peak_bytes
    }

    pub(super) fn buffer(&self, id: BufferId) -> &wgpu::Buffer {
        self.buffers[id.0 as usize].as_ref().expect("live buffer")
    }

    pub(super) fn write(&mut self, id: BufferId, offset: u64, bytes: &[u8]) {
        let buffer = self.buffers[id.0 as usize].as_ref().expect("live buffer");
        #[cfg(not(target_arch = "wasm32"))]
        if bytes.len() >= Uploads::LEAST {
            let on = (&self.device, &self.queue);
            // What fails is reported by the next check, as with small writes.
            if let Err(error) = self.uploads.write(on, &self.failure, buffer, offset, bytes) {
                self.failure.set(error);
            }
            return;
        }
        self.queue.write_buffer(buffer, offset, bytes);
    }

    /// Compiles what `dispatches` need and is not there yet.
    pub(super) fn compile(&mut self, dispatches: &[Dispatch]) -> Result<(), DeviceError> {
        self.pipelines().prepare(&self.device, &self.failure, dispatches)
    }

    /// The compiled form of a shader that [`Gpu::compile`] has seen.
    pub(super) fn pipeline(&self, shader: &Shader) -> Pipeline {
        self.pipelines().get(shader).clone()
    }

    fn pipelines(&self) -> MutexGuard<'_, Pipelines> {
        self.pipelines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
