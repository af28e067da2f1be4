// Symmetric int4 weights: 32 in 16 bytes, weight = q * scale of its group of GROUP inputs. Of eight
// columns the first four are the lower halves of a word's bytes, the others the upper halves.
const CHUNK: u32 = 32u;
override GROUP: u32 = 32u;
// As bits: with its sign bit flipped, which adds 8, q is the last bits of 1024 + 8 + q in f16, two
// at a time. The mask is no constant: of two constants compilers make two operations.
fn weight4(chunk: vec4<u32>, i: u32) -> vec4<f32> {
    let q = chunk[i / 2u] >> (i % 2u * 4u);
    let mask = 0x000f000fu + (p.n_chunks >> 31u);
    let even = unpack2x16float((q & mask) ^ 0x64086408u);
    let odd = unpack2x16float(((q >> 8u) & mask) ^ 0x64086408u);
    return vec4(even.x, odd.x, even.y, odd.y) - 1032.0;
}
fn weight_scale(row: u32, chunk: u32) -> f32 {
    return scales[row * p.scales_per_row + chunk * CHUNK / GROUP];
}
fn scale_is_per_row() -> bool { return false; }
