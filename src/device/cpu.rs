//! The CPU device: runs a recording with the kernels' twins. Slow, but it needs no driver, and a
//! wrong GPU result can be bisected against it to the first kernel that differs.

use std::{
    cell::{Ref, RefCell, RefMut},
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use bytemuck::Pod;
use half::f16;

use super::{Access, BufferId, Caps, DType, DeviceError, Dispatch, Recording, Shader, Tensor};

/// Memory of the CPU device. `u64` words keep every element type aligned.
type Words = Vec<u64>;

/// Executes recordings with twins.
#[derive(Debug, Default)]
pub struct Cpu {
    buffers: Vec<Option<Arc<Words>>>,
}

impl Cpu {
    pub(crate) fn alloc(&mut self, bytes: u64) -> Result<BufferId, DeviceError> {
        let too_large = || DeviceError::OutOfMemory { bytes };
        let words = usize::try_from(bytes.div_ceil(8)).map_err(|_| too_large())?;
        let mut buffer = Words::new();
        buffer.try_reserve_exact(words).map_err(|_| too_large())?;
        buffer.resize(words, 0);
        let id = self.buffers.iter().position(Option::is_none).unwrap_or(self.buffers.len());
        if id == self.buffers.len() {
            self.buffers.push(None);
        }
        self.buffers[id] = Some(Arc::new(buffer));
        Ok(BufferId(id as u32))
    }

    pub(crate) fn free(&mut self, id: BufferId) {
        self.buffers[id.0 as usize] = None;
    }

    pub(crate) fn allocated_bytes(&self) -> u64 {
        self.buffers.iter().flatten().map(|words| words.len() as u64 * 8).sum()
    }

    fn buffer(&mut self, id: BufferId) -> &mut Option<Arc<Words>> {
        &mut self.buffers[id.0 as usize]
    }

    pub(crate) fn write(&mut self, id: BufferId, offset: u64, data: &[u8]) {
        self.bytes(id, offset, data.len() as u64).copy_from_slice(data);
    }

    pub(crate) fn read(&mut self, tensor: &Tensor) -> Vec<u8> {
        let words = self.buffer(tensor.buffer).as_ref().expect("live buffer");
        let start = tensor.offset as usize;
        bytemuck::cast_slice::<u64, u8>(words)[start..start + tensor.bytes() as usize].to_vec()
    }

    /// Runs some dispatches; returns the time each one took.
    pub(crate) fn run(&mut self, rec: &Recording, range: Range<usize>) -> Vec<Duration> {
        if range.start == 0 {
            rec.clears.iter().for_each(|t| self.bytes(t.buffer, t.offset, t.bytes()).fill(0));
        }
        rec.dispatches[range].iter().map(|d| self.dispatch(d)).collect()
    }

    fn bytes(&mut self, id: BufferId, offset: u64, bytes: u64) -> &mut [u8] {
        let words = Arc::get_mut(self.buffer(id).as_mut().expect("live buffer"))
            .expect("no dispatch is running");
        &mut bytemuck::cast_slice_mut::<u64, u8>(words)[offset as usize..][..bytes as usize]
    }

    fn dispatch(&mut self, dispatch: &Dispatch) -> Duration {
        // Writers take their buffer out, readers share it: a buffer that is both read and written
        // by one dispatch is refused here as WebGPU refuses it.
        let mut slots: Vec<Option<Slot>> = dispatch.bindings.iter().map(|_| None).collect();
        for access in [Access::Read, Access::Write] {
            for (slot, b) in slots.iter_mut().zip(&dispatch.bindings) {
                if b.access != access {
                    continue;
                }
                let held = self.buffer(b.tensor.buffer);
                let words = match access {
                    Access::Read => Held::Shared(held.clone().expect("live buffer")),
                    Access::Write => Held::Owned(
                        Arc::try_unwrap(held.take().expect("written once per dispatch"))
                            .unwrap_or_else(|_| {
                                panic!("{} reads and writes {}", dispatch.label, b.tensor)
                            }),
                    ),
                };
                *slot = Some(Slot { tensor: b.tensor, words: RefCell::new(words) });
            }
        }
        let slots: Vec<Slot> = slots.into_iter().flatten().collect();
        let io = Io { shader: &dispatch.shader, grid: dispatch.grid, slots: &slots };
        let start = Instant::now();
        (dispatch.twin)(&dispatch.params, &io);
        let time = start.elapsed();
        for slot in slots {
            if let Held::Owned(words) = slot.words.into_inner() {
                *self.buffer(slot.tensor.buffer) = Some(Arc::new(words));
            }
        }
        time
    }
}

enum Held {
    Shared(Arc<Words>),
    Owned(Words),
}

struct Slot {
    tensor: Tensor,
    words: RefCell<Held>,
}

/// What a twin sees: the bindings of its dispatch, by position (0 is WGSL binding 1).
pub struct Io<'a> {
    /// The variant that the GPU would run; twins read slots and overrides from it.
    pub shader: &'a Shader,
    /// Workgroups that the GPU would run.
    pub grid: [u32; 3],
    slots: &'a [Slot],
}

impl Io<'_> {
    /// The tensor bound at `i`.
    pub fn tensor(&self, i: usize) -> &Tensor {
        &self.slots[i].tensor
    }

    fn range<T>(&self, i: usize) -> std::ops::Range<usize> {
        let tensor = self.tensor(i);
        let start = tensor.offset as usize / size_of::<T>();
        start..start + tensor.bytes() as usize / size_of::<T>()
    }

    /// Elements of binding `i`.
    pub fn read<T: Pod>(&self, i: usize) -> Ref<'_, [T]> {
        let range = self.range::<T>(i);
        Ref::map(self.slots[i].words.borrow(), |words| {
            let words: &Words = match words {
                Held::Shared(words) => words,
                Held::Owned(words) => words,
            };
            &bytemuck::cast_slice::<u64, T>(words)[range]
        })
    }

    /// Elements of binding `i`, to write.
    pub fn write<T: Pod>(&self, i: usize) -> RefMut<'_, [T]> {
        let range = self.range::<T>(i);
        RefMut::map(self.slots[i].words.borrow_mut(), |words| match words {
            Held::Shared(_) => panic!("binding {i} is declared read-only"),
            Held::Owned(words) => &mut bytemuck::cast_slice_mut::<u64, T>(words)[range],
        })
    }

    /// Floats of binding `i` (f32 or f16), widened.
    pub fn floats(&self, i: usize) -> Vec<f32> {
        match self.tensor(i).dtype {
            DType::F16 => self.read::<f16>(i).iter().map(|x| x.to_f32()).collect(),
            _ => self.read::<f32>(i).to_vec(),
        }
    }

    /// One float of binding `i` (f32 or f16). For sparse access; see [`Io::floats`] for bulk.
    pub fn float(&self, i: usize, index: usize) -> f32 {
        match self.tensor(i).dtype {
            DType::F16 => self.read::<f16>(i)[index].to_f32(),
            _ => self.read::<f32>(i)[index],
        }
    }

    /// Stores floats at `start` of binding `i` (f32, or f16 clamped to its finite range).
    pub fn store(&self, i: usize, start: usize, values: &[f32]) {
        match self.tensor(i).dtype {
            DType::F16 => {
                let mut out = self.write::<f16>(i);
                for (out, &x) in out[start..start + values.len()].iter_mut().zip(values) {
                    *out = f16::from_f32(x.clamp(-65504.0, 65504.0));
                }
            }
            _ => self.write::<f32>(i)[start..start + values.len()].copy_from_slice(values),
        }
    }
}

/// Capabilities that the CPU device reports: no limits but memory.
pub(crate) fn caps() -> Caps {
    Caps {
        max_binding_bytes: u64::MAX,
        max_buffer_bytes: u64::MAX,
        offset_alignment: 8,
        ordered_groups: true,
        software: true,
        twins: true,
        ..Caps::portable()
    }
}

/// Host memory that is not in use, bytes.
pub(crate) fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}
