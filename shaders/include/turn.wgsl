// Pairs of a head's elements that rotary embedding turns (Su et al. 2021). Expects p.rotary_dim.
override INTERLEAVED: bool = false;  // pairs are (2i, 2i + 1), else (i, i + rotary_dim / 2)

// Where the angle of element e of a head is in a table row, and who its partner is.
struct Turn {
    pair: u32,
    partner: u32,
    sign: f32,  // of the partner's share
}

fn turn_of(e: u32) -> Turn {
    let n_pairs = p.rotary_dim / 2u;
    if (INTERLEAVED) {
        return Turn(e / 2u, e ^ 1u, select(1.0, -1.0, e % 2u == 0u));
    }
    let first = e < n_pairs;
    return Turn(select(e - n_pairs, e, first), select(e - n_pairs, e + n_pairs, first),
                select(1.0, -1.0, first));
}
