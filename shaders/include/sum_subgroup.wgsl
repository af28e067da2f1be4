// Sums over threads of one subgroup; `lanes`, a power of two, must not exceed the smallest subgroup
// size.
fn sum4_lanes(value: vec4<f32>, lid: u32, lanes: u32) -> vec4<f32> {
    var sum = value;
    for (var step = lanes / 2u; step > 0u; step /= 2u) {
        sum += subgroupShuffleXor(sum, step);
    }
    return sum;
}

fn sum_lanes(value: f32, lid: u32, lanes: u32) -> f32 {
    var sum = value;
    for (var step = lanes / 2u; step > 0u; step /= 2u) {
        sum += subgroupShuffleXor(sum, step);
    }
    return sum;
}

// Whether threads can pass values to each other, and the value of the thread whose `step` bit
// differs.
const CAN_PASS: bool = true;
fn pass4(value: vec4<f32>, step: u32) -> vec4<f32> {
    return subgroupShuffleXor(value, step);
}
