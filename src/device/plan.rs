//! A recording made ready: pipelines, bind groups and one uniform block, built once per shape and
//! run every step in one pass and one submit. And the way results come back.

use std::{borrow::Cow, time::Duration};

use futures_channel::oneshot;

use super::{Caps, DeviceError, Gpu, Recording, Tensor, gpu::Failure};

/// How long the host waits for the device before it calls it hung.
const TIMEOUT: Duration = Duration::from_secs(120);

/// A prepared [`Recording`].
#[derive(Debug)]
pub struct Plan {
    rec: Recording,
    steps: Vec<Step>,
}

#[derive(Debug)]
struct Step {
    pipeline: wgpu::ComputePipeline,
    bind_group: wgpu::BindGroup,
    params_offset: u32,
}

impl Plan {
    pub(super) fn cpu(rec: Recording) -> Self {
        Self { rec, steps: Vec::new() }
    }

    pub(super) fn gpu(gpu: &mut Gpu, rec: Recording) -> Result<Self, DeviceError> {
        let alignment = gpu.device.limits().min_uniform_buffer_offset_alignment as usize;
        let largest = rec.dispatches.iter().map(|d| d.params.len()).max().unwrap_or(0);
        let stride = largest.max(1).next_multiple_of(alignment);
        let mut block = vec![0u8; stride * rec.dispatches.len().max(1)];
        for (d, slot) in rec.dispatches.iter().zip(block.chunks_mut(stride)) {
            slot[..d.params.len()].copy_from_slice(&d.params);
        }
        let uniforms = gpu.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("params"),
            size: block.len() as u64,
            usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        gpu.queue.write_buffer(&uniforms, 0, &block);
        let mut steps = Vec::with_capacity(rec.dispatches.len());
        for (i, d) in rec.dispatches.iter().enumerate() {
            debug_assert!(
                d.grid.iter().all(|&n| n <= gpu.caps().max_grid),
                "{} {:?}",
                d.label,
                d.grid
            );
            let pipeline = gpu.pipeline(d)?;
            let params_size = std::num::NonZeroU64::new(d.params.len() as u64);
            let buffer = |buffer, offset, size| {
                wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset, size })
            };
            let mut entries = vec![wgpu::BindGroupEntry {
                binding: 0,
                resource: buffer(&uniforms, 0, params_size),
            }];
            for (slot, b) in d.bindings.iter().enumerate() {
                let bytes = b.tensor.bytes().next_multiple_of(16).max(16);
                entries.push(wgpu::BindGroupEntry {
                    binding: slot as u32 + 1,
                    resource: buffer(
                        gpu.buffer(b.tensor.buffer),
                        b.tensor.offset,
                        std::num::NonZeroU64::new(bytes),
                    ),
                });
            }
            let bind_group = gpu.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(d.shader.stem),
                layout: &pipeline.layout,
                entries: &entries,
            });
            steps.push(Step {
                pipeline: pipeline.pipeline,
                bind_group,
                params_offset: (i * stride) as u32,
            });
        }
        gpu.check()?;
        Ok(Self { rec, steps })
    }

    /// The recording that this plan runs.
    pub fn recording(&self) -> &Recording {
        &self.rec
    }

    pub(super) fn submit(&self, gpu: &Gpu) -> Result<(), DeviceError> {
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        {
            let mut pass = encoder.begin_compute_pass(&Default::default());
            for (step, d) in self.steps.iter().zip(&self.rec.dispatches) {
                step.encode(&mut pass, d.grid);
            }
        }
        gpu.queue.submit([encoder.finish()]);
        gpu.check()
    }

    /// A pass per dispatch, with timestamps around it.
    pub(super) fn submit_profiled(&self, gpu: &Gpu) -> Result<Timings, DeviceError> {
        let Caps { timestamps: true, .. } = gpu.caps() else {
            return Ok(Timings::ready(&self.rec, self.submit_timed(gpu)?));
        };
        let n = self.steps.len();
        let mut timings = Timings::ready(&self.rec, Vec::new());
        timings.period = f64::from(gpu.queue.get_timestamp_period());
        // A query set holds at most 4096 queries.
        for part in (0..n).step_by(2048) {
            let part = part..(part + 2048).min(n);
            let count = 2 * part.len() as u32;
            let queries = gpu.device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("timestamps"),
                ty: wgpu::QueryType::Timestamp,
                count,
            });
            let resolved = gpu.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("timestamps"),
                size: u64::from(count) * 8,
                usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: false,
            });
            let mut encoder = gpu.device.create_command_encoder(&Default::default());
            for (i, at) in part.clone().enumerate() {
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                    label: None,
                    timestamp_writes: Some(wgpu::ComputePassTimestampWrites {
                        query_set: &queries,
                        beginning_of_pass_write_index: Some(2 * i as u32),
                        end_of_pass_write_index: Some(2 * i as u32 + 1),
                    }),
                });
                self.steps[at].encode(&mut pass, self.rec.dispatches[at].grid);
            }
            encoder.resolve_query_set(&queries, 0..count, &resolved, 0);
            gpu.queue.submit([encoder.finish()]);
            timings.ticks.push(Readback::copy(gpu, &[(&resolved, 0, resolved.size())]));
        }
        gpu.check()?;
        Ok(timings)
    }

    /// A submit and a wait per dispatch, timed by the host.
    fn submit_timed(&self, gpu: &Gpu) -> Result<Vec<Duration>, DeviceError> {
        let mut times = Vec::with_capacity(self.steps.len());
        for (step, d) in self.steps.iter().zip(&self.rec.dispatches) {
            let start = web_time::Instant::now();
            let mut encoder = gpu.device.create_command_encoder(&Default::default());
            step.encode(&mut encoder.begin_compute_pass(&Default::default()), d.grid);
            gpu.queue.submit([encoder.finish()]);
            wait(&gpu.device, &gpu.failure(), None)?;
            times.push(start.elapsed());
        }
        Ok(times)
    }
}

impl Step {
    fn encode(&self, pass: &mut wgpu::ComputePass<'_>, grid: [u32; 3]) {
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.bind_group, &[self.params_offset]);
        pass.dispatch_workgroups(grid[0], grid[1], grid[2]);
    }
}

/// Polls until a submission, or else all submitted work, is done.
pub(super) fn wait(
    device: &wgpu::Device,
    failure: &Failure,
    submission: Option<wgpu::SubmissionIndex>,
) -> Result<(), DeviceError> {
    let wait = wgpu::PollType::Wait { submission_index: submission, timeout: Some(TIMEOUT) };
    match device.poll(wait) {
        Err(wgpu::PollError::Timeout) => Err(DeviceError::Timeout { seconds: TIMEOUT.as_secs() }),
        _ => failure.check(),
    }
}

/// Time that one dispatch took: its label and duration.
pub type Timing = (Cow<'static, str>, Duration);

/// Times of a plan's dispatches, perhaps still on their way.
#[must_use]
#[derive(Debug)]
pub struct Timings {
    labels: Vec<Cow<'static, str>>,
    times: Vec<Duration>,
    /// Begin and end of each dispatch. U64 `[dispatches, 2]`, in parts
    ticks: Vec<Readback>,
    /// Nanoseconds of a tick.
    period: f64,
}

impl Timings {
    pub(super) fn ready(rec: &Recording, times: Vec<Duration>) -> Self {
        let labels = rec.dispatches.iter().map(|d| d.label.clone()).collect();
        Self { labels, times, ticks: Vec::new(), period: 1.0 }
    }

    /// The times, once the device is done.
    ///
    /// # Errors
    /// [`DeviceError::Lost`], [`DeviceError::Timeout`].
    pub async fn wait(self) -> Result<Vec<Timing>, DeviceError> {
        let mut times = self.times;
        for part in self.ticks {
            let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&part.wait().await?);
            let nanos = |t: &[u64]| (t[1].saturating_sub(t[0]) as f64 * self.period) as u64;
            times.extend(ticks.chunks(2).map(|t| Duration::from_nanos(nanos(t))));
        }
        Ok(self.labels.into_iter().zip(times).collect())
    }

    /// [`Timings::wait`], blocking; not in browsers.
    ///
    /// # Errors
    /// Those of [`Timings::wait`].
    pub fn wait_now(self) -> Result<Vec<Timing>, DeviceError> {
        pollster::block_on(self.wait())
    }
}

/// A copy to the host that is under way.
#[must_use]
#[derive(Debug)]
pub struct Readback(State);

#[derive(Debug)]
enum State {
    Ready(Vec<u8>),
    Mapping {
        device: wgpu::Device,
        failure: Failure,
        submission: wgpu::SubmissionIndex,
        staging: wgpu::Buffer,
        bytes: usize,
        mapped: oneshot::Receiver<Result<(), wgpu::BufferAsyncError>>,
    },
}

impl Readback {
    pub(super) fn ready(bytes: Vec<u8>) -> Self {
        Self(State::Ready(bytes))
    }

    pub(super) fn gpu(gpu: &Gpu, tensors: &[Tensor]) -> Self {
        let part = |t: &Tensor| (gpu.buffer(t.buffer), t.offset, t.bytes());
        Self::copy(gpu, &tensors.iter().map(part).collect::<Vec<_>>())
    }

    /// Buffers with the offset and number of bytes to copy, one after the other in whole words.
    fn copy(gpu: &Gpu, parts: &[(&wgpu::Buffer, u64, u64)]) -> Self {
        let size = parts.iter().map(|part| part.2.next_multiple_of(4)).sum();
        let staging = gpu.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("readback"),
            size,
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        let mut at = 0;
        for &(source, offset, bytes) in parts {
            let bytes = bytes.next_multiple_of(4);
            encoder.copy_buffer_to_buffer(source, offset, &staging, at, bytes);
            at += bytes;
        }
        let submission = gpu.queue.submit([encoder.finish()]);
        let (sender, mapped) = oneshot::channel();
        staging.map_async(wgpu::MapMode::Read, .., move |result| {
            // The receiver is gone if nobody waits any more.
            let _ = sender.send(result);
        });
        let bytes = if let [one] = parts { one.2 } else { size };
        Self(State::Mapping {
            device: gpu.device.clone(),
            failure: gpu.failure(),
            submission,
            staging,
            bytes: bytes as usize,
            mapped,
        })
    }

    /// The bytes, once they are here; work submitted later may go on. In browsers this waits
    /// without blocking, elsewhere it blocks.
    ///
    /// # Errors
    /// [`DeviceError::Lost`], [`DeviceError::Timeout`].
    pub async fn wait(self) -> Result<Vec<u8>, DeviceError> {
        let (device, failure, submission, staging, bytes, mapped) = match self.0 {
            State::Ready(bytes) => return Ok(bytes),
            State::Mapping { device, failure, submission, staging, bytes, mapped } => {
                (device, failure, submission, staging, bytes, mapped)
            }
        };
        // In browsers polling does nothing: they deliver by themselves.
        wait(&device, &failure, Some(submission))?;
        let lost = |message: String| DeviceError::Lost { message };
        match mapped.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                failure.check()?;
                return Err(lost(error.to_string()));
            }
            Err(_) => return Err(lost("a result was never delivered".into())),
        }
        failure.check()?;
        let view = staging.get_mapped_range(..).map_err(|e| lost(e.to_string()))?;
        Ok(view[..bytes].to_vec())
    }

    /// [`Readback::wait`], blocking; not in browsers.
    ///
    /// # Errors
    /// Those of [`Readback::wait`].
    pub fn wait_now(self) -> Result<Vec<u8>, DeviceError> {
        pollster::block_on(self.wait())
    }
}
