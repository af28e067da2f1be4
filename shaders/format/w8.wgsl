// Symmetric int8 weights: 16 in 16 bytes, weight = q * scale of its output row or of its group of
// GROUP inputs (0: one scale for the row).
const CHUNK: u32 = 16u;
override GROUP: u32 = 0u;
// As bits, since GPUs convert integers at a fraction of their rate: with its sign bit flipped,
// which adds 128, q is the last byte of 1024 + 128 + q in f16, two at a time. The mask is no
// constant: of two constants compilers make two operations.
fn weight4(chunk: vec4<u32>, i: u32) -> vec4<f32> {
    let mask = 0x00ff00ffu + (p.n_chunks >> 31u);
    let even = unpack2x16float((chunk[i] & mask) ^ 0x64806480u);
    let odd = unpack2x16float(((chunk[i] >> 8u) & mask) ^ 0x64806480u);
    return vec4(even.x, odd.x, even.y, odd.y) - 1152.0;
}
fn weight_scale(row: u32, chunk: u32) -> f32 {
    if (GROUP == 0u) {
        return scales[row];
    }
    return scales[row * p.scales_per_row + chunk * CHUNK / max(GROUP, 1u)];
}
fn scale_is_per_row() -> bool { return GROUP == 0u; }
