// Weights in f16: 8 in 16 bytes.
const CHUNK: u32 = 8u;
fn weight4(chunk: vec4<u32>, i: u32) -> vec4<f32> {
    return vec4(unpack2x16float(chunk[2u * i]), unpack2x16float(chunk[2u * i + 1u]));
}
fn weight_scale(row: u32, chunk: u32) -> f32 { return 1.0; }
fn scale_is_per_row() -> bool { return true; }
