// Activations that feed a matrix product, rounded to int8 row by row (quantize_rows.wgsl):
// x = q * scale. A row has 16 columns a vec4, and one vec4 more that begins with the scale's bits.
requires packed_4x8_integer_dot_product;
alias act16 = vec4<u32>;
fn act_scale(tail: act16) -> f32 { return bitcast<f32>(tail.x); }
// sum + a . b. Added one by one, as adapters add to a sum in the same instruction.
fn act_dot(sum: i32, a: act16, b: act16) -> i32 {
    return sum + dot4I8Packed(a.x, b.x) + dot4I8Packed(a.y, b.y)
        + dot4I8Packed(a.z, b.z) + dot4I8Packed(a.w, b.w);
}
