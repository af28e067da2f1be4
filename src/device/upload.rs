//! Large writes: through mapped memory that is kept, several pieces of it under way. What
//! `Queue::write_buffer` makes anew for each write costs more than most copies.

use std::{
    collections::VecDeque,
    sync::mpsc::{Receiver, Sender, channel},
};

use super::{DeviceError, failure::Failure, plan};

/// Mapped memory that writes pass through.
#[derive(Debug)]
pub(super) struct Uploads {
    /// Mapped and ready to be filled.
    ready: Receiver<wgpu::Buffer>,
    give: Sender<wgpu::Buffer>,
    /// Submissions that copy out of the others, oldest first.
    under_way: VecDeque<wgpu::SubmissionIndex>,
}

impl Default for Uploads {
    fn default() -> Self {
        let (give, ready) = channel();
        Self { ready, give, under_way: VecDeque::new() }
    }
}

impl Uploads {
    /// Bytes from which writes go this way.
    pub(super) const LEAST: usize = 1 << 20;
    /// Bytes of a piece of mapped memory, and pieces.
    const PIECE: usize = 8 << 20;
    const PIECES: usize = 4;

    /// Copies whole words to byte `offset` of `target`, behind all work submitted so far and before
    /// what follows.
    ///
    /// # Errors
    /// [`DeviceError::Lost`], [`DeviceError::Timeout`], [`DeviceError::OutOfMemory`].
    pub(super) fn write(
        &mut self,
        (device, queue): (&wgpu::Device, &wgpu::Queue),
        failure: &Failure,
        target: &wgpu::Buffer,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), DeviceError> {
        for (i, bytes) in bytes.chunks(Self::PIECE).enumerate() {
            let staging = self.piece(device, failure)?;
            let Ok(mut view) = staging.get_mapped_range_mut(..bytes.len() as u64) else {
                failure.check(device)?;
                return Err(DeviceError::OutOfMemory { bytes: staging.size() });
            };
            view.copy_from_slice(bytes);
            drop(view);
            staging.unmap();
            let mut encoder = device.create_command_encoder(&Default::default());
            let at = offset + (i * Self::PIECE) as u64;
            encoder.copy_buffer_to_buffer(&staging, 0, target, at, bytes.len() as u64);
            self.under_way.push_back(queue.submit([encoder.finish()]));
            let (give, again) = (self.give.clone(), staging.clone());
            staging.map_async(wgpu::MapMode::Write, .., move |mapped| {
                if mapped.is_ok() {
                    // Nobody takes it if the device is closed.
                    let _ = give.send(again);
                }
            });
        }
        Ok(())
    }

    /// Memory to fill: ready, new, or what the oldest copy gives back.
    fn piece(
        &mut self,
        device: &wgpu::Device,
        failure: &Failure,
    ) -> Result<wgpu::Buffer, DeviceError> {
        while self.under_way.len() >= Self::PIECES {
            plan::wait(device, failure, self.under_way.pop_front())?;
        }
        Ok(self.ready.try_recv().unwrap_or_else(|_| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("upload"),
                size: Self::PIECE as u64,
                usage: wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: true,
            })
        }))
    }
}

#[cfg(test)]
mod tests {
    use crate::device::{Allocate, DType, Device, DeviceChoice};

    #[test]
    fn large_writes_arrive_in_order() {
        let mut device = pollster::block_on(Device::open(&DeviceChoice::Index(0))).unwrap();
        let n = (40 << 20) / 4 + 3;
        let tensor = device.alloc("test", &[n + 2], DType::U32).unwrap();
        // Over one another, several pieces each, with small writes between.
        for round in 0..3u32 {
            let values: Vec<u32> =
                (0..n as u32).map(|i| i.wrapping_mul(2_654_435_761) ^ round).collect();
            device.write_at(&tensor, 4, bytemuck::cast_slice(&values));
            device.write_at(&tensor, 8, bytemuck::bytes_of(&round));
            let read: Vec<u32> = device.read_now(&tensor).unwrap();
            assert_eq!((read[0], read[2], read[n + 1]), (0, round, 0));
            assert_eq!((read[1], &read[3..=n]), (values[0], &values[2..]));
        }
    }
}
