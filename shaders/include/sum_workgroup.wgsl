// Sums over threads through workgroup memory; works everywhere.
var<workgroup> sum_partials: array<vec4<f32>, 256>;

// Sum of `value` over the aligned group of `lanes` threads that holds thread `lid`, in every thread
// of the group. All threads of the workgroup must call it together. Each adds up all parts: that
// takes two barriers, which cost more than a few loads.
fn sum4_lanes(value: vec4<f32>, lid: u32, lanes: u32) -> vec4<f32> {
    if (lanes == 1u) {
        return value;
    }
    sum_partials[lid] = value;
    workgroupBarrier();
    let first = lid / lanes * lanes;
    var sum = sum_partials[first];
    for (var i = 1u; i < lanes; i++) {
        sum += sum_partials[first + i];
    }
    workgroupBarrier();
    return sum;
}

fn sum_lanes(value: f32, lid: u32, lanes: u32) -> f32 {
    return sum4_lanes(vec4(value), lid, lanes).x;
}

// Passing every value through memory would take more barriers than summing it there.
const CAN_PASS: bool = false;
fn pass4(value: vec4<f32>, step: u32) -> vec4<f32> { return value; }
