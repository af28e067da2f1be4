// Symmetric int8 weights: 16 in 16 bytes, weight = q * scale of its output row or of its group of
// GROUP inputs (0: one scale for the row).
const CHUNK: u32 = 16u;
override GROUP: u32 = 0u;
// As bits, since GPUs convert integers at a fraction of their rate: with its sign bit flipped,
// which adds 128, q is the last byte of 2^23 + 128 + q, and the one before that in 2^15 + 128 + q.
fn weight4(chunk: vec4<u32>, i: u32) -> vec4<f32> {
    let q = chunk[i];
    let high = q >> 16u;
    let bits = (vec4(q, q, high, high) & vec4(0xffu, 0xff00u, 0xffu, 0xff00u))
        ^ vec4(0x4b000080u, 0x47008000u, 0x4b000080u, 0x47008000u);
    return bitcast<vec4<f32>>(bits) - vec4(8388736.0, 32896.0, 8388736.0, 32896.0);
}
fn weight_scale(row: u32, chunk: u32) -> f32 {
    if (GROUP == 0u) {
        return scales[row];
    }
    return scales[row * p.scales_per_row + chunk * CHUNK / max(GROUP, 1u)];
}
fn scale_is_per_row() -> bool { return GROUP == 0u; }

// Four weights plus OFFSET, of columns 0, 2, 1, 3: by fewer operations than weight4, since two at
// a time are the last bits of 1024 + 128 + q in f16. Of a constant mask compilers make an operation
// of its own.
const OFFSET: f32 = 1152.0;
fn shifted4(chunk: vec4<u32>, i: u32) -> vec4<f32> {
    let mask = 0x00ff00ffu + (p.n_chunks >> 31u);
    let even = unpack2x16float((chunk[i] & mask) ^ 0x64806480u);
    let odd = unpack2x16float(((chunk[i] >> 8u) & mask) ^ 0x64806480u);
    return vec4(even, odd);
}
