//! Global expert ids to the places that this device holds them at. Knows a table, not who made
//! it: the same kernel serves shards of experts and caches of them.

use crate::device::{Binding, Caps, Io, Kernel, Launch, Shader, Tensor, params};

/// `out[t, j]` = local id of expert `ids[t, j]` for token t, -1 where it is elsewhere. An expert
/// may have replicas; the one at `hash(t) % replicas` serves the token.
#[derive(Debug, Clone, Copy)]
pub struct MapExperts {
    /// Global ids; those out of range become -1. I32 `[n, top_k]`
    pub ids: Tensor,
    /// Number of replicas, then the local id of each, -1 elsewhere. I32 `[n_experts, cols]`
    pub map: Tensor,
    /// I32 `[n, top_k]`
    pub out: Tensor,
}

params! {
    /// Mirror of the WGSL `Params`.
    pub struct MapExpertsParams {
        n: u32,
        top_k: u32,
        n_experts: u32,
        cols: u32,
    }
}

impl Kernel for MapExperts {
    const NAME: &'static str = "map_experts";
    type Params = MapExpertsParams;

    fn launch(&self, _: &Caps) -> Launch<MapExpertsParams> {
        let Self { ids, map, out } = *self;
        assert_eq!(ids.len(), out.len(), "{ids} and {out} differ");
        Launch {
            shader: Shader::new(Self::NAME),
            params: MapExpertsParams {
                n: ids.len() as u32,
                top_k: ids.cols() as u32,
                n_experts: map.rows() as u32,
                cols: map.cols() as u32,
            },
            bindings: vec![Binding::read(ids), Binding::read(map), Binding::write(out)],
            grid: [ids.len().div_ceil(64) as u32, 1, 1],
        }
    }

    fn twin(p: &MapExpertsParams, io: &Io<'_>) {
        let (ids, map, mut out) = (io.read::<i32>(0), io.read::<i32>(1), io.write::<i32>(2));
        let rows = map.chunks(p.cols as usize).take(p.n_experts as usize);
        let rows: Vec<&[i32]> = rows.collect();
        for (i, (out, &id)) in out.iter_mut().zip(&*ids).take(p.n as usize).enumerate() {
            let row = usize::try_from(id).ok().and_then(|id| rows.get(id));
            let hash = (i as u32 / p.top_k).wrapping_mul(0x9E37_79B9);
            *out = match row {
                Some(row) if row[0] > 0 => row[1 + (hash % row[0] as u32) as usize],
                _ => -1,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{device::DType::I32, kernels::testing::check};

    #[test]
    fn parity() {
        for (n, top_k, n_experts, cols) in [(1, 1, 1, 2), (5, 3, 8, 4), (700, 8, 60, 2)] {
            check(0.0, |bench, rec| {
                let id = |i: usize| match i % 9 {
                    0 => u32::MAX,
                    1 => n_experts as u32,
                    _ => (i * 7 % n_experts) as u32,
                };
                let ids: Vec<u32> = (0..n * top_k).map(id).collect();
                let ids = bench.ints(&[n, top_k], I32, &ids);
                // Experts without replicas, with some elsewhere, with as many as there is room.
                let map: Vec<u32> = (0..n_experts * cols)
                    .map(|i| match (i / cols, i % cols) {
                        (expert, 0) => (expert % cols) as u32,
                        (expert, replica) if (expert + replica) % 3 == 0 => u32::MAX,
                        (expert, replica) => (expert * 10 + replica) as u32,
                    })
                    .collect();
                let map = bench.ints(&[n_experts, cols], I32, &map);
                let out = bench.ints(&[n, top_k], I32, &vec![7; n * top_k]);
                rec.push(MapExperts { ids, map, out });
            });
        }
    }
}
