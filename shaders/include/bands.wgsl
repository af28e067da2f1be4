// Workgroups start in the order of their ids. Bands of BAND columns, each from top to bottom, let
// those that run together share their rows and columns in the cache.
override BAND: u32 = 8u;

// Column and row of the workgroup's tile.
fn banded(group: vec3<u32>, grid: vec3<u32>) -> vec2<u32> {
    let flat = group.y * grid.x + group.x;
    let band = flat / (BAND * grid.y);
    let width = min(BAND, grid.x - band * BAND);
    let i = flat % (BAND * grid.y);
    return vec2(band * BAND + i % width, i / width);
}
