//! What the device can do at best, measured in the same run: copy bandwidth and the rate of a
//! large matrix product with the program's own kernel.

use crate::{
    Result,
    device::{Allocate, DType, Device, Recording},
    kernels::{Copy, Gemm, Matrix, Store},
    weights::WeightFormat,
};

use super::median_seconds;

/// Measured ceilings.
#[derive(Debug, Clone, Copy, serde::Serialize, serde::Deserialize)]
pub struct Ceilings {
    /// Bytes read and written per second by a copy.
    pub copy_bytes_per_s: f64,
    /// Floating-point operations per second of a large dense product, int8 weights.
    pub matmul_flops: f64,
}

/// Measures both; takes about two seconds. The better of two sizes counts: caches make small
/// copies fast, and address translation makes large ones slow.
///
/// # Errors
/// [`crate::device::DeviceError`] if the device fails.
pub fn measure(device: &mut Device) -> Result<Ceilings> {
    let caps = device.caps();
    let most = caps.max_binding_bytes.min(caps.max_buffer_bytes);
    let (sizes, edge): (&[u64], _) = match caps.software {
        true => (&[32 << 20], 512),
        false => (&[256 << 20, 1 << 30], 4096),
    };
    let mut copy_bytes_per_s = 0.0f64;
    for &bytes in sizes {
        copy_bytes_per_s = copy_bytes_per_s.max(copy_rate(device, bytes.min(most))?);
    }
    let weights = device.alloc("weights", &[1, edge, edge], DType::U8)?;
    let scales = device.alloc("scales", &[1, edge, 1], DType::F32)?;
    let x = device.alloc("x", &[edge, edge], DType::F16)?;
    let out = device.alloc("out", &[edge, edge], DType::F32)?;
    let format = WeightFormat::W8 { group: None };
    let weights = Matrix { weights, scales, format, rows: edge, cols: edge, n_experts: 1 };
    let noise: Vec<u8> = (0..edge * edge).map(|i| ((i * 2_654_435_761) >> 13) as u8).collect();
    device.write(&weights.weights, &noise);
    device.write(&scales, &vec![0.01f32; edge]);
    let values: Vec<half::f16> =
        (0..edge * edge).map(|i| half::f16::from_f32((i * 7 % 31) as f32 / 31.0 - 0.5)).collect();
    device.write(&x, &values);
    let mut rec = Recording::new(&caps);
    rec.push(Gemm { label: "ceiling", weights, bias: None, x, out, out_col: 0, store: Store::Set });
    let plan = device.prepare(rec)?;
    let seconds = median_seconds(device, &plan)?;
    for tensor in [weights.weights, scales, x, out] {
        device.free(tensor);
    }
    Ok(Ceilings { copy_bytes_per_s, matmul_flops: 2.0 * (edge as f64).powi(3) / seconds })
}

/// Bytes read and written per second by a copy of `bytes`.
fn copy_rate(device: &mut Device, bytes: u64) -> Result<f64> {
    let shape = [bytes as usize / 4];
    let (x, out) =
        (device.alloc("copy", &shape, DType::U32)?, device.alloc("copy", &shape, DType::U32)?);
    let mut rec = Recording::new(&device.caps());
    rec.push(Copy { x, out });
    let plan = device.prepare(rec)?;
    let seconds = median_seconds(device, &plan)?;
    device.free(x);
    device.free(out);
    Ok(2.0 * bytes as f64 / seconds)
}
