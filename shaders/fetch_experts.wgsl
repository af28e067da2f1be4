// Copies the experts that must come from one bank to their slots in another: from the host's
// memory to the device's, by the device itself.

struct Params {
    n4: u32,           // 16-byte words of an expert
    from_first: u32,   // experts of the bank that is read
    from_n: u32,
    to_first: u32,     // slots of the bank that is written
    to_n: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> moves: array<u32>;           // [1 + slots, 2]
@group(0) @binding(2) var<storage, read> home: array<vec4<u32>>;      // [from_n, n4]
@group(0) @binding(3) var<storage, read_write> slots: array<vec4<u32>>;  // [to_n, n4]

const THREADS: u32 = 256u;

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    if (group.y >= moves[0]) {
        return;
    }
    // Out of these banks, the differences wrap around.
    let expert = moves[2u + 2u * group.y] - p.from_first;
    let slot = moves[3u + 2u * group.y] - p.to_first;
    if (expert >= p.from_n || slot >= p.to_n) {
        return;
    }
    let from_start = expert * p.n4;
    let to_start = slot * p.n4;
    let i = group.x * 4u * THREADS + lid;
    // Several loads in flight: the bus answers late.
    if (i + 3u * THREADS < p.n4) {
        let a = home[from_start + i];
        let b = home[from_start + i + THREADS];
        let c = home[from_start + i + 2u * THREADS];
        let d = home[from_start + i + 3u * THREADS];
        slots[to_start + i] = a;
        slots[to_start + i + THREADS] = b;
        slots[to_start + i + 2u * THREADS] = c;
        slots[to_start + i + 3u * THREADS] = d;
        return;
    }
    for (var at = i; at < min(i + 4u * THREADS, p.n4); at += THREADS) {
        slots[to_start + at] = home[from_start + at];
    }
}
