//! How fast bytes get from the host to a device and back, by each way that there is.

use std::time::Instant;

use crate::{
    Result,
    device::{Allocate, DType, Device, Memory, Recording},
    kernels::Copy,
};

use super::{WARM_UP, median, median_seconds};

/// A way for bytes, and how long it takes.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct TransferRow {
    /// Which way.
    pub way: &'static str,
    /// How many bytes.
    pub bytes: u64,
    /// Median time from the call until they are there, or from one to the next where several are
    /// under way.
    pub seconds: f64,
}

/// Times every way for so many bytes, a multiple of 16.
///
/// # Errors
/// [`crate::device::DeviceError`] if the device fails, or has no such way.
pub fn transfers(device: &mut Device, bytes: u64) -> Result<Vec<TransferRow>> {
    let n = bytes as usize;
    let here = device.alloc("transfers", &[n], DType::U8)?;
    let host = device.alloc_in(Memory::Host, "transfers", &[n], DType::U8)?;
    let values = vec![1u8; n];
    let mut rows = Vec::new();
    let mut add = |way, seconds| rows.push(TransferRow { way, bytes, seconds });
    for (way, x, out) in
        [("kernel reads host memory", host, here), ("kernel writes host memory", here, host)]
    {
        let mut rec = Recording::new(&device.caps());
        rec.push(Copy { x, out });
        let plan = device.prepare(rec)?;
        add(way, median_seconds(device, &plan)?);
    }
    let written = |device: &mut Device| -> Result<()> {
        device.write(&here, &values);
        // What was written goes with the next submission.
        device.probe()?;
        Ok(device.wait()?)
    };
    add("write, wait", median_call(device, written)?);
    let read = |device: &mut Device| Ok(device.read_now::<u8>(&here).map(drop)?);
    add("read back", median_call(device, read)?);
    let trip = |device: &mut Device| {
        device.write(&here, &values);
        read(device)
    };
    add("write, read back", median_call(device, trip)?);
    device.free(here);
    device.free(host);
    Ok(rows)
}

/// Median seconds of a call, after a warm-up.
fn median_call(
    device: &mut Device,
    mut call: impl FnMut(&mut Device) -> Result<()>,
) -> Result<f64> {
    let start = Instant::now();
    while start.elapsed() < WARM_UP / 2 {
        call(device)?;
    }
    let mut time = || -> Result<f64> {
        let start = Instant::now();
        call(device)?;
        Ok(start.elapsed().as_secs_f64())
    };
    Ok(median((0..15).map(|_| time()).collect::<Result<_>>()?))
}
