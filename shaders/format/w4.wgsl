// Symmetric int4 weights: 32 in 16 bytes, weight = q * scale of its group of GROUP inputs. Of eight
// columns the first four are the lower halves of a word's bytes, the others the upper halves.
const CHUNK: u32 = 32u;
override GROUP: u32 = 32u;
// Faster by bits than converted: with its sign bit flipped, which adds 8, q is the last bits of
// 2^23 + 8 + q.
fn weight4(chunk: vec4<u32>, i: u32) -> vec4<f32> {
    let q = vec4(chunk[i / 2u]) >> (vec4(0u, 8u, 16u, 24u) + i % 2u * 4u);
    return bitcast<vec4<f32>>((q & vec4(15u)) ^ vec4(0x4b000008u)) - 8388616.0;
}
fn weight_scale(row: u32, chunk: u32) -> f32 {
    return scales[row * p.scales_per_row + chunk * CHUNK / GROUP];
}
fn scale_is_per_row() -> bool { return false; }
