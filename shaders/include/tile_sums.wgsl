// What tiles without matrices share: a tile of 32 activation rows (tokens; 16 unless WIDE) times
// 128 weight rows by 64 threads, of which each keeps the sums of 16 tokens with four weight rows in
// registers. Such a tile has a type of four sums, `sum4`, a function `tile_product` that computes
// them, and `store_sum`, which hands them to `store`.
override WIDE: bool = true;

const THREADS: u32 = 64u;
const TILE_TOKENS: u32 = 32u;  // 16 unless WIDE
const TILE_ROWS: u32 = 128u;
const ROWS4: u32 = 32u;  // in vec4s

const NO_ROW: u32 = 0xffffffffu;

// A thread's sums of its four weight rows: s0..s3 with tokens tile_token.. + 4, s4..s7 with those
// 8 further on, and so on.
struct Sums {
    s0: sum4, s1: sum4, s2: sum4, s3: sum4,
    s4: sum4, s5: sum4, s6: sum4, s7: sum4,
    s8: sum4, s9: sum4, s10: sum4, s11: sum4,
    s12: sum4, s13: sum4, s14: sum4, s15: sum4,
}

// First of the tile's tokens whose sums thread `lid` keeps.
fn tile_token(lid: u32) -> u32 { return lid / ROWS4 * 4u; }

// First of the tile's four weight rows whose sums thread `lid` keeps.
fn tile_row(lid: u32) -> u32 { return lid % ROWS4 * 4u; }

// Multiplies, and passes the sums to `store`. All threads of the workgroup must call it together.
fn tile(first: u32, last: u32, lid: u32) {
    let s = tile_product(first, last, lid);
    let t = tile_token(lid);
    let r = tile_row(lid);
    store_sum(t, r, s.s0);
    store_sum(t + 1u, r, s.s1);
    store_sum(t + 2u, r, s.s2);
    store_sum(t + 3u, r, s.s3);
    store_sum(t + 8u, r, s.s4);
    store_sum(t + 9u, r, s.s5);
    store_sum(t + 10u, r, s.s6);
    store_sum(t + 11u, r, s.s7);
    if (WIDE) {
        store_sum(t + 16u, r, s.s8);
        store_sum(t + 17u, r, s.s9);
        store_sum(t + 18u, r, s.s10);
        store_sum(t + 19u, r, s.s11);
        store_sum(t + 24u, r, s.s12);
        store_sum(t + 25u, r, s.s13);
        store_sum(t + 26u, r, s.s14);
        store_sum(t + 27u, r, s.s15);
    }
}
