// Global expert ids to those of this device: a table gives the places of an expert's replicas,
// and a hash of the token says which of them serves it.

struct Params {
    n: u32,          // tokens * top_k
    top_k: u32,
    n_experts: u32,
    cols: u32,       // 1 + most replicas
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> ids: array<i32>;         // [tokens, top_k]
@group(0) @binding(2) var<storage, read> map: array<i32>;         // [n_experts, cols]
@group(0) @binding(3) var<storage, read_write> out: array<i32>;   // [tokens, top_k]

const THREADS: u32 = 64u;

@compute @workgroup_size(THREADS)
fn main(@builtin(global_invocation_id) thread: vec3<u32>) {
    let i = thread.x;
    if (i >= p.n) {
        return;
    }
    let id = ids[i];
    var local = -1;
    if (id >= 0 && id < i32(p.n_experts)) {
        let row = u32(id) * p.cols;
        let replicas = u32(map[row]);
        if (replicas > 0u) {
            local = map[row + 1u + (i / p.top_k * 2654435769u) % replicas];
        }
    }
    out[i] = local;
}
