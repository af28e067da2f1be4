//! Experts on their way from the host's memory to slots on the device, read by the device itself.

use std::ops::Range;

use crate::device::{Binding, Caps, Io, Kernel, Launch, Shader, Tensor, params};

use super::CacheExperts;

/// Copies what [`CacheExperts`] wants moved of one tensor that has a part for each expert.
#[derive(Debug, Clone)]
pub struct FetchExperts {
    /// Number of moves and 0, then expert and slot of each. U32 `[1 + slots, 2]`
    pub moves: Tensor,
    /// Moves at most.
    pub most_moves: usize,
    /// Experts whose parts `home` has.
    pub from: Range<usize>,
    /// Any type `[experts, ..]`; parts of whole 16-byte words.
    pub home: Tensor,
    /// Slots that `slots` has.
    pub to: Range<usize>,
    /// Parts of the same size. `[slots, ..]`
    pub slots: Tensor,
}

params! {
    /// Mirror of the WGSL `Params`.
    pub struct FetchExpertsParams {
        n4: u32,
        from_first: u32,
        from_n: u32,
        to_first: u32,
        to_n: u32,
    }
}

impl Kernel for FetchExperts {
    const NAME: &'static str = "fetch_experts";
    type Params = FetchExpertsParams;

    fn launch(&self, _: &Caps) -> Launch<FetchExpertsParams> {
        let Self { moves, most_moves, from, home, to, slots } = self.clone();
        let part = home.bytes() / from.len() as u64;
        assert_eq!(part, slots.bytes() / to.len() as u64, "{home} and {slots} have other experts");
        assert!(part.is_multiple_of(16), "{home} is no whole words");
        assert!(most_moves <= CacheExperts::MOST_EXPERTS, "{self:?}");
        let n4 = (part / 16) as u32;
        Launch {
            shader: Shader::new(Self::NAME),
            params: FetchExpertsParams {
                n4,
                from_first: from.start as u32,
                from_n: from.len() as u32,
                to_first: to.start as u32,
                to_n: to.len() as u32,
            },
            bindings: vec![Binding::read(moves), Binding::read(home), Binding::write(slots)],
            grid: [n4.div_ceil(4 * 256), most_moves as u32, 1],
        }
    }

    fn twin(p: &FetchExpertsParams, io: &Io<'_>) {
        let (moves, home, mut slots) = (io.read::<u32>(0), io.read::<u32>(1), io.write::<u32>(2));
        let n = p.n4 as usize * 4;
        let inside = |i: u32, first: u32, n: u32| i.checked_sub(first).filter(|&i| i < n);
        for one in moves[2..].chunks(2).take((moves[0]).min(io.grid[1]) as usize) {
            let from = inside(one[0], p.from_first, p.from_n);
            let to = inside(one[1], p.to_first, p.to_n);
            if let (Some(from), Some(to)) = (from, to) {
                slots[to as usize * n..][..n].copy_from_slice(&home[from as usize * n..][..n]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::DType::{F32, U32},
        kernels::testing::check,
    };

    #[test]
    fn parity() {
        // Banks of experts 10..14 and of slots 3..8, where moves may touch others.
        for words in [4, 1000, 4096, 9000] {
            for n_moves in [0, 1, 4] {
                check(0.0, |bench, rec| {
                    let moves = [n_moves, 0, 12, 3, 10, 7, 9, 4, 13, 8, 11, 5];
                    let moves = bench.ints(&[6, 2], U32, &moves);
                    let home = bench.normal(&[4, words], F32);
                    let slots = bench.normal(&[5, words], F32);
                    let (from, to, most_moves) = (10..14, 3..8, 5);
                    rec.push(FetchExperts { moves, most_moves, from, home, to, slots });
                });
            }
        }
    }
}
