//! Layer 1, memory and dispatch. The only place that knows wgpu. It knows nothing of tokens,
//! sequences or models: it holds buffers and runs [`Recording`]s.

mod adapter;
mod caps;
mod cpu;
mod failure;
mod gpu;
mod pipelines;
mod plan;
mod recording;
mod shader;
mod tensor;
mod tuned;
#[cfg(not(target_arch = "wasm32"))]
mod upload;

use std::{ops::Range, sync::Arc};

pub use adapter::{AdapterInfo, DeviceChoice, adapters, all_devices};
pub use caps::{Caps, Tier};
pub use cpu::{Cpu, Io};
pub use failure::{Fault, Faults};
pub use gpu::Gpu;
pub use plan::{Plan, Readback, Timing, Timings};
pub(crate) use recording::params;
pub use recording::{Access, Binding, Dispatch, Kernel, Launch, Params, Recording, Shader, Twin};
pub use tensor::{BufferId, DType, Tensor};
pub use tuned::Tuned;

#[cfg(test)]
pub(crate) use shader::compose;

/// A failure of the adapter, its driver or its memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// No adapter fits the choice.
    #[error("no adapter matches `{wanted}`; `moewe adapters` lists them: {available}")]
    NoAdapter {
        /// What was asked for.
        wanted: String,
        /// What there is.
        available: String,
    },
    /// The adapter refused to open.
    #[error("adapter {adapter} does not open: {message}; try `--device cpu` or update its driver")]
    Open {
        /// Adapter name.
        adapter: String,
        /// The driver's words.
        message: String,
    },
    /// Allocation failed.
    #[error(
        "out of device memory{}; use a smaller model, --weights w8a16 or w4a16, or a shorter \
         --max-model-len",
        asked_for(*.bytes)
    )]
    OutOfMemory {
        /// Size asked for; 0 where the driver reported it late and nameless.
        bytes: u64,
    },
    /// The plan exceeds the memory.
    #[error(
        "the model does not fit: it needs {plan}; use a smaller model or --weights w8a16 or w4a16, \
         or lower --max-model-len or --max-num-batched-tokens"
    )]
    DoesNotFit {
        /// What is needed, by purpose.
        plan: String,
    },
    /// A single buffer is larger than the device can bind.
    #[error("{what} needs {bytes} bytes in one buffer, but this device binds at most {limit}")]
    TooLarge {
        /// What the buffer was for.
        what: String,
        /// Size asked for.
        bytes: u64,
        /// The device's limit.
        limit: u64,
    },
    /// A shader that cannot be composed or compiled: a bug of ours, or of the driver.
    #[error("shader {shader}: {message}")]
    Shader {
        /// The variant.
        shader: String,
        /// What is wrong with it.
        message: String,
    },
    /// The driver rejected a call: a bug of ours, or of the driver.
    #[error("the graphics driver rejected a command: {message}")]
    Rejected {
        /// The driver's words.
        message: String,
    },
    /// Kernels cannot read the host's memory.
    #[error(
        "{adapter} cannot compute from the host's memory, which a cache of experts needs; leave \
         out --expert-cache-memory"
    )]
    HostMemory {
        /// Adapter name.
        adapter: String,
    },
    /// The device is gone; everything on it is lost.
    #[error("the device was lost ({message}); start again, perhaps with a smaller batch")]
    Lost {
        /// The driver's words.
        message: String,
    },
    /// The device did not answer.
    #[error("the device did not finish within {seconds} s; it may hang")]
    Timeout {
        /// How long was waited.
        seconds: u64,
    },
}

fn asked_for(bytes: u64) -> String {
    if bytes == 0 { String::new() } else { format!(" while allocating {bytes} bytes") }
}

impl DeviceError {
    /// Whether there is too little memory, rather than something broken.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Self::OutOfMemory { .. } | Self::DoesNotFit { .. } | Self::TooLarge { .. })
    }

    /// Whether the device is of no use any more.
    pub fn is_loss(&self) -> bool {
        matches!(self, Self::Lost { .. } | Self::Timeout { .. })
    }
}

/// Something that holds tensors and runs recordings.
#[derive(Debug)]
pub enum Device {
    /// A wgpu adapter.
    Gpu(Box<Gpu>),
    /// The CPU, through the kernels' twins.
    Cpu(Cpu),
}

/// Whose memory a tensor is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// The device's own.
    Device,
    /// The host's, where the device's kernels reach it over the bus. It does not count as the
    /// device's.
    Host,
}

/// Where tensors come from: a device, or a [`Tally`] that only adds them up.
pub trait Allocate {
    /// Zeroed memory for a tensor; `what` names it in errors.
    ///
    /// # Errors
    /// [`DeviceError::TooLarge`], [`DeviceError::OutOfMemory`], and for the host's memory
    /// [`DeviceError::HostMemory`].
    fn alloc_in(
        &mut self,
        memory: Memory,
        what: &str,
        shape: &[usize],
        dtype: DType,
    ) -> Result<Tensor, DeviceError>;

    /// The same in the device's own memory.
    ///
    /// # Errors
    /// Those of [`Allocate::alloc_in`].
    fn alloc(&mut self, what: &str, shape: &[usize], dtype: DType) -> Result<Tensor, DeviceError> {
        self.alloc_in(Memory::Device, what, shape, dtype)
    }
}

/// Counts what a device would have to hold.
#[derive(Debug, Clone)]
pub struct Tally {
    /// The device's capabilities.
    pub caps: Caps,
    /// Bytes so far.
    pub bytes: u64,
    /// Bytes so far in the host's memory.
    pub host_bytes: u64,
}

impl Tally {
    /// Nothing yet, for a device with `caps`.
    pub fn new(caps: Caps) -> Self {
        Self { caps, bytes: 0, host_bytes: 0 }
    }
}

impl Allocate for Tally {
    fn alloc_in(
        &mut self,
        memory: Memory,
        what: &str,
        shape: &[usize],
        dtype: DType,
    ) -> Result<Tensor, DeviceError> {
        let bytes = self.caps.check_size(what, shape, dtype)?;
        let sum = match memory {
            Memory::Device => &mut self.bytes,
            Memory::Host => &mut self.host_bytes,
        };
        *sum = sum.saturating_add(bytes);
        Ok(Tensor::new(BufferId(u32::MAX), shape, dtype))
    }
}

impl Allocate for Device {
    fn alloc_in(
        &mut self,
        memory: Memory,
        what: &str,
        shape: &[usize],
        dtype: DType,
    ) -> Result<Tensor, DeviceError> {
        let bytes = self.caps().check_size(what, shape, dtype)?;
        let id = match self {
            Device::Gpu(gpu) => gpu.alloc(memory, what, bytes)?,
            Device::Cpu(cpu) => cpu.alloc(bytes)?,
        };
        Ok(Tensor::new(id, shape, dtype))
    }
}

impl Device {
    /// Opens the adapter that `choice` names; `auto` falls back to the CPU device.
    ///
    /// # Errors
    /// [`DeviceError::NoAdapter`] and [`DeviceError::Open`].
    pub async fn open(choice: &DeviceChoice) -> Result<Self, DeviceError> {
        Ok(match adapter::pick(choice).await? {
            Some(adapter) => Device::Gpu(Box::new(Gpu::open(adapter).await?)),
            None => Device::cpu(),
        })
    }

    /// Another logical device on the same adapter, with memory of its own. On a GPU both share a
    /// queue, on which the work of one follows that of the other at once: a GPU would serve two
    /// queues by slices of time, and let one that waits for the other wait for its slice, too.
    #[must_use]
    pub fn beside(&self) -> Self {
        match self {
            Device::Gpu(gpu) => Device::Gpu(Box::new(gpu.beside())),
            Device::Cpu(_) => Device::cpu(),
        }
    }

    /// The CPU device.
    pub fn cpu() -> Self {
        Device::Cpu(Cpu::default())
    }

    /// Capabilities that kernels choose variants from.
    pub fn caps(&self) -> Caps {
        match self {
            Device::Gpu(gpu) => gpu.caps().clone(),
            Device::Cpu(_) => cpu::caps(),
        }
    }

    /// Memory that the device may use, bytes, where the system tells.
    pub fn memory_bytes(&self) -> Option<u64> {
        match self {
            Device::Gpu(gpu) if !gpu.caps().software => gpu.memory_bytes(),
            _ => cpu::available_bytes(),
        }
    }

    /// Forgets what lies above `tier`, to run lower tiers on a higher adapter.
    pub fn shrink(&mut self, tier: Tier) {
        if let Device::Gpu(gpu) = self {
            gpu.shrink(tier);
        }
    }

    /// Lets the choices for `what` be these from now on: the second of a pair for sizes up to the
    /// first. The CPU device has no choices.
    pub fn tune(&mut self, what: &str, choices: Vec<(usize, usize)>) {
        if let Device::Gpu(gpu) = self {
            Arc::make_mut(&mut gpu.caps_mut().tuned).set(what, choices);
        }
    }

    /// Keeps the adapter's choices for later processes. Returns the file that has them, if there is
    /// a folder for such files.
    ///
    /// # Errors
    /// Those of writing the file.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn remember_tuned(&self) -> std::io::Result<Option<std::path::PathBuf>> {
        let Device::Gpu(gpu) = self else { return Ok(None) };
        let Some(path) = tuned::file::path(&gpu.device.adapter_info()) else { return Ok(None) };
        tuned::file::add(&path, &gpu.caps().tuned)?;
        Ok(Some(path))
    }

    /// Launches kernels as on an adapter that is, or is not, played by a CPU.
    #[cfg(test)]
    pub(crate) fn set_software(&mut self, software: bool) {
        if let Device::Gpu(gpu) = self {
            gpu.caps_mut().software = software;
        }
    }

    /// Binds at most `bytes` at once on a GPU, so that weights are split as larger ones would be.
    pub fn limit_bindings(&mut self, bytes: u64) {
        if let Device::Gpu(gpu) = self {
            gpu.limit_bindings(bytes);
        }
    }

    /// Adapter name, backend and tier in one line.
    pub fn describe(&self) -> String {
        match self {
            Device::Gpu(gpu) => gpu.describe(),
            Device::Cpu(_) => "cpu (the kernels' CPU twins; slow)".into(),
        }
    }

    /// Driver name and version; empty on the CPU.
    pub fn driver(&self) -> String {
        match self {
            Device::Gpu(gpu) => gpu.driver().into(),
            Device::Cpu(_) => String::new(),
        }
    }

    /// Gives a tensor's buffer back.
    pub fn free(&mut self, tensor: Tensor) {
        match self {
            Device::Gpu(gpu) => gpu.free(tensor.buffer),
            Device::Cpu(cpu) => cpu.free(tensor.buffer),
        }
    }

    /// Bytes of all live buffers.
    pub fn allocated_bytes(&self) -> u64 {
        match self {
            Device::Gpu(gpu) => gpu.allocated_bytes(),
            Device::Cpu(cpu) => cpu.allocated_bytes(),
        }
    }

    /// Most bytes that live buffers have taken at a time.
    pub fn peak_bytes(&self) -> u64 {
        match self {
            Device::Gpu(gpu) => gpu.peak_bytes(),
            Device::Cpu(cpu) => cpu.allocated_bytes(),
        }
    }

    /// Copies host values to the tensor's start. They must fit, and be whole 4-byte words.
    pub fn write<T: bytemuck::NoUninit>(&mut self, tensor: &Tensor, values: &[T]) {
        self.write_at(tensor, 0, bytemuck::cast_slice(values));
    }

    /// Copies bytes to byte `start` of the tensor; both in whole 4-byte words.
    pub fn write_at(&mut self, tensor: &Tensor, start: u64, bytes: &[u8]) {
        let end = start + bytes.len() as u64;
        assert!(end <= tensor.bytes().next_multiple_of(4), "{end} bytes do not fit {tensor}");
        let offset = tensor.offset + start;
        match self {
            Device::Gpu(gpu) => gpu.write(tensor.buffer, offset, bytes),
            Device::Cpu(cpu) => cpu.write(tensor.buffer, offset, bytes),
        }
    }

    /// Makes a recording ready to run any number of times.
    ///
    /// # Errors
    /// [`DeviceError::Shader`] or [`DeviceError::Rejected`] if a kernel does not compile.
    pub fn prepare(&mut self, rec: Recording) -> Result<Plan, DeviceError> {
        Ok(match self {
            Device::Gpu(gpu) => Plan::gpu(gpu, rec)?,
            Device::Cpu(_) => Plan::cpu(rec),
        })
    }

    /// Submits a plan. On a GPU this returns before the work is done.
    ///
    /// # Errors
    /// [`DeviceError::Lost`].
    pub fn run(&mut self, plan: &Plan) -> Result<(), DeviceError> {
        let all = 0..plan.recording().dispatches.len();
        self.submit(plan, all, &[]).map(drop)
    }

    /// Submits some dispatches of a plan, such as a segment between two cuts, and starts copying
    /// tensors to the host behind them, as [`Device::read_all`] does.
    ///
    /// # Errors
    /// [`DeviceError::Lost`].
    pub fn submit(
        &mut self,
        plan: &Plan,
        dispatches: Range<usize>,
        reads: &[Tensor],
    ) -> Result<Readback, DeviceError> {
        match self {
            Device::Gpu(gpu) => plan.submit(gpu, dispatches, reads),
            Device::Cpu(cpu) => {
                cpu.run(plan.recording(), dispatches);
                Ok(self.read_all(reads))
            }
        }
    }

    /// Submits a plan, timing each dispatch: by GPU timestamps where there are any, otherwise (and
    /// on the CPU device) by the host's clock, which waits for each.
    ///
    /// # Errors
    /// [`DeviceError::Lost`], [`DeviceError::Timeout`].
    pub fn run_profiled(&mut self, plan: &Plan) -> Result<Timings, DeviceError> {
        self.submit_profiled(plan, 0..plan.recording().dispatches.len())
    }

    /// [`Device::run_profiled`] for some dispatches of a plan.
    ///
    /// # Errors
    /// Those of [`Device::run_profiled`].
    pub fn submit_profiled(
        &mut self,
        plan: &Plan,
        dispatches: Range<usize>,
    ) -> Result<Timings, DeviceError> {
        match self {
            Device::Gpu(gpu) => plan.submit_profiled(gpu, dispatches),
            Device::Cpu(cpu) => {
                let times = cpu.run(plan.recording(), dispatches.clone());
                Ok(Timings::ready(plan.recording(), dispatches, times))
            }
        }
    }

    /// Whether the device still works, as far as its driver knows; cheap, waits for nothing.
    ///
    /// # Errors
    /// [`DeviceError::Lost`], or what else went wrong since the last call.
    pub fn probe(&self) -> Result<(), DeviceError> {
        match self {
            Device::Gpu(gpu) => gpu.probe(),
            Device::Cpu(_) => Ok(()),
        }
    }

    /// Makes this device fail, for tests of what depends on it.
    pub fn faults(&self) -> Faults {
        match self {
            Device::Gpu(gpu) => gpu.faults(),
            Device::Cpu(_) => Faults(None),
        }
    }

    /// Waits until all submitted work is done; not in browsers, where nothing may block.
    ///
    /// # Errors
    /// [`DeviceError::Lost`], [`DeviceError::Timeout`].
    pub fn wait(&mut self) -> Result<(), DeviceError> {
        match self {
            Device::Gpu(gpu) => plan::wait(&gpu.device, &gpu.failure(), None),
            Device::Cpu(_) => Ok(()),
        }
    }

    /// Starts copying a tensor to the host, after all work submitted so far.
    pub fn read(&mut self, tensor: &Tensor) -> Readback {
        self.read_all(std::slice::from_ref(tensor))
    }

    /// Starts copying tensors to the host in one go; their bytes (whole words) come one after the
    /// other.
    pub fn read_all(&mut self, tensors: &[Tensor]) -> Readback {
        match self {
            Device::Gpu(gpu) => Readback::gpu(gpu, tensors),
            Device::Cpu(cpu) => Readback::ready(tensors.iter().flat_map(|t| cpu.read(t)).collect()),
        }
    }

    /// Reads a tensor and waits for it; not in browsers, where nothing may block.
    ///
    /// # Errors
    /// [`DeviceError::Lost`], [`DeviceError::Timeout`].
    pub fn read_now<T: bytemuck::Pod>(&mut self, tensor: &Tensor) -> Result<Vec<T>, DeviceError> {
        Ok(bytemuck::pod_collect_to_vec(&self.read(tensor).wait_now()?))
    }
}
