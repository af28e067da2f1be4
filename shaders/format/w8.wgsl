// Symmetric int8 weights: 16 in 16 bytes, weight = q * scale of its output row or of its group of
// GROUP inputs (0: one scale for the row).
const CHUNK: u32 = 16u;
override GROUP: u32 = 0u;
// As bits of 2^23 + 128 + q, since GPUs convert integers at a fraction of their rate.
fn weight4(chunk: vec4<u32>, i: u32) -> vec4<f32> {
    let q = chunk[i] ^ 0x80808080u;
    let bytes = vec4(q, q >> 8u, q >> 16u, q >> 24u) & vec4(0xffu);
    return bitcast<vec4<f32>>(bytes | vec4(0x4b000000u)) - vec4(8388736.0);
}
fn weight_scale(row: u32, chunk: u32) -> f32 {
    if (GROUP == 0u) {
        return scales[row];
    }
    return scales[row * p.scales_per_row + chunk * CHUNK / max(GROUP, 1u)];
}
fn scale_is_per_row() -> bool { return GROUP == 0u; }
