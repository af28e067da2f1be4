// Weights in f32: 4 in 16 bytes.
const CHUNK: u32 = 4u;
fn weight4(chunk: vec4<u32>, i: u32) -> vec4<f32> { return bitcast<vec4<f32>>(chunk); }
fn weight_scale(row: u32, chunk: u32) -> f32 { return 1.0; }
fn scale_is_per_row() -> bool { return true; }
