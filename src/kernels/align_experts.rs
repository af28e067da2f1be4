//! Entries (token, slot) sorted by expert and padded to whole blocks, so that one dispatch
//! multiplies all experts. Knows ids only: neither routing weights nor expert matrices.

use std::{borrow::Cow, ops::RangeInclusive};

use crate::device::{
    Allocate, Binding, Caps, DType, DeviceError, Io, Kernel, Launch, Recording, Shader, Tensor,
    params,
};

/// Entries that are left to one workgroup.
const FEW_ENTRIES: usize = 1024;
/// Bits of workgroup memory that tell which of the entries at hand an expert has.
const MEMBER_BITS: usize = 1 << 16;
/// Most experts that the shader's workgroup memory holds.
const MAX_EXPERTS: usize = 1024;
/// Most entries.
const MAX_ENTRIES: usize = 1 << 20;

/// Entries sorted by expert, as vLLM's `moe_align_block_size` gives them. An entry is an index
/// `token * top_k + slot`; the sentinel is the number of entries.
#[derive(Debug, Clone, Copy)]
pub struct Aligned {
    /// Entries by expert ascending and in their order within one expert, each expert's segment
    /// padded with the sentinel to whole blocks, and the tail filled with it. I32 `[max_pad]`
    pub sorted_token_ids: Tensor,
    /// Expert of each block, -1 past the last one. I32 `[max_blocks]`
    pub expert_ids: Tensor,
    /// Sum of the padded segments. U32 `[1]`
    pub num_tokens_post_pad: Tensor,
    /// Counts between the phases. U32 `[scratch_len]`
    pub scratch: Tensor,
}

/// Numbers that the sizes of an [`Aligned`] follow from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AlignShape {
    /// Tokens times slots.
    pub n_entries: usize,
    /// Experts, at most 1024.
    pub n_experts: usize,
    /// Rows of one block: a multiple of 8 up to 128.
    pub block_size: usize,
}

impl AlignShape {
    /// Length of `sorted_token_ids` that suffices for any ids.
    pub fn max_pad(&self) -> usize {
        let Self { n_entries, n_experts, block_size } = *self;
        let spread = (n_entries + n_experts * (block_size - 1)).next_multiple_of(block_size);
        // Fewer entries than experts: no more blocks than entries.
        if n_entries < n_experts { spread.min(n_entries * block_size) } else { spread }
    }

    /// Blocks in [`AlignShape::max_pad`]: length of `expert_ids`, and the grid of a product.
    pub fn max_blocks(&self) -> usize {
        self.max_pad() / self.block_size
    }

    /// Length of `scratch`.
    pub fn scratch_len(&self) -> usize {
        self.n_groups() * self.n_experts
    }

    /// Entries that a workgroup scatters at a time.
    fn chunk(&self) -> usize {
        (MEMBER_BITS / self.n_experts / 32 * 32).min(1024)
    }

    /// Entries of a workgroup.
    fn group_entries(&self) -> usize {
        match self.n_entries <= FEW_ENTRIES {
            true => self.n_entries.next_multiple_of(self.chunk()),
            false => self.chunk(),
        }
    }

    fn n_groups(&self) -> usize {
        self.n_entries.div_ceil(self.group_entries())
    }
}

impl Aligned {
    /// Memory for up to `n_tokens` tokens.
    ///
    /// # Errors
    /// [`DeviceError::TooLarge`], [`DeviceError::OutOfMemory`].
    pub fn alloc(
        device: &mut dyn Allocate,
        n_tokens: usize,
        top_k: usize,
        n_experts: usize,
        block_sizes: RangeInclusive<usize>,
    ) -> Result<Self, DeviceError> {
        let shape = |block_size| AlignShape { n_entries: n_tokens * top_k, n_experts, block_size };
        // Small blocks are many, large ones have more padding.
        let small = shape(*block_sizes.start());
        let large = block_sizes.step_by(8).map(shape).max_by_key(AlignShape::max_pad);
        let large = large.expect("block sizes from 8 to 128");
        let mut alloc = |what, n, dtype| device.alloc(what, &[n], dtype);
        Ok(Self {
            sorted_token_ids: alloc("sorted_token_ids", large.max_pad(), DType::I32)?,
            expert_ids: alloc("expert_ids", small.max_blocks(), DType::I32)?,
            num_tokens_post_pad: alloc("num_tokens_post_pad", 1, DType::U32)?,
            scratch: alloc("align_experts scratch", large.scratch_len(), DType::U32)?,
        })
    }

    /// The same memory for fewer entries (or larger blocks), so that blocks which cannot exist
    /// are neither cleared nor launched.
    pub fn reshape(&self, shape: AlignShape) -> Self {
        Self {
            sorted_token_ids: self.sorted_token_ids.reshape(&[shape.max_pad()]),
            expert_ids: self.expert_ids.reshape(&[shape.max_blocks()]),
            num_tokens_post_pad: self.num_tokens_post_pad,
            scratch: self.scratch.reshape(&[shape.scratch_len()]),
        }
    }
}

/// Records the alignment of `ids`, I32 `[n, top_k]`: one dispatch if the entries are few, else
/// two. Ids outside `0..n_experts` are skipped. Deterministic.
pub fn align_experts(
    rec: &mut Recording,
    ids: Tensor,
    n_experts: usize,
    block_size: usize,
    out: &Aligned,
) {
    let kernel = |phase| AlignExperts { ids, n_experts, block_size, out: *out, phase };
    if ids.len() <= FEW_ENTRIES {
        rec.push(kernel(AlignPhase::All));
    } else {
        rec.push(kernel(AlignPhase::Count));
        rec.push(kernel(AlignPhase::Scatter));
    }
}

/// Steps of the alignment that one dispatch takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AlignPhase {
    /// Clear the outputs; count the entries of each workgroup by expert.
    Count,
    /// Sum the counts; write entries to their places, and the expert of each block.
    Scatter,
    /// Both in one workgroup.
    All,
}

/// One dispatch of [`align_experts`].
#[derive(Debug, Clone, Copy)]
pub struct AlignExperts {
    /// I32 `[n, top_k]`
    pub ids: Tensor,
    /// Ids from here on are skipped; at most 1024.
    pub n_experts: usize,
    /// A multiple of 8 up to 128.
    pub block_size: usize,
    /// Results; they may be longer than needed, and are filled to their ends.
    pub out: Aligned,
    /// What to do.
    pub phase: AlignPhase,
}

params! {
    /// Mirror of the WGSL `Params`.
    pub struct AlignExpertsParams {
        n_entries: u32,
        n_experts: u32,
        block_size: u32,
        chunk: u32,
        group_entries: u32,
        n_groups: u32,
        n_sorted: u32,
        n_blocks: u32,
    }
}

impl Kernel for AlignExperts {
    const NAME: &'static str = "align_experts";
    type Params = AlignExpertsParams;

    fn label(&self) -> Cow<'static, str> {
        Cow::Owned(format!("{} {:?}", Self::NAME, self.phase).to_lowercase())
    }

    fn launch(&self, _: &Caps) -> Launch<AlignExpertsParams> {
        let Self { ids, n_experts, block_size, out, phase } = *self;
        let shape = AlignShape { n_entries: ids.len(), n_experts, block_size };
        assert!((1..=MAX_EXPERTS).contains(&n_experts), "{n_experts} experts");
        assert!((1..=MAX_ENTRIES).contains(&shape.n_entries), "{} entries", shape.n_entries);
        assert!(block_size.is_multiple_of(8) && (8..=128).contains(&block_size), "{block_size}");
        assert!(out.sorted_token_ids.len() >= shape.max_pad(), "{shape:?}");
        assert!(out.expert_ids.len() >= shape.max_blocks(), "{shape:?}");
        assert!(out.scratch.len() >= shape.scratch_len(), "{shape:?}");
        let n_groups = shape.n_groups() as u32;
        assert!(phase != AlignPhase::All || n_groups == 1, "{shape:?} is too much for a workgroup");
        let has = |step| phase == step || phase == AlignPhase::All;
        Launch {
            shader: Shader::new(Self::NAME)
                .set("COUNT", has(AlignPhase::Count))
                .set("SCATTER", has(AlignPhase::Scatter)),
            params: AlignExpertsParams {
                n_entries: shape.n_entries as u32,
                n_experts: n_experts as u32,
                block_size: block_size as u32,
                chunk: shape.chunk() as u32,
                group_entries: shape.group_entries() as u32,
                n_groups,
                n_sorted: out.sorted_token_ids.len() as u32,
                n_blocks: out.expert_ids.len() as u32,
            },
            bindings: vec![
                Binding::read(ids),
                Binding::write(out.sorted_token_ids),
                Binding::write(out.expert_ids),
                Binding::write(out.num_tokens_post_pad),
                Binding::write(out.scratch),
            ],
            grid: [n_groups, 1, 1],
        }
    }

    fn twin(p: &AlignExpertsParams, io: &Io<'_>) {
        let has = |step| io.shader.override_value(step) == Some(1);
        let (e, block) = (p.n_experts as usize, p.block_size as usize);
        let ids = io.read::<i32>(0);
        let ids = &ids[..p.n_entries as usize];
        let expert = |id: i32| usize::try_from(id).ok().filter(|&id| id < e);
        let (mut sorted, mut blocks) = (io.write::<i32>(1), io.write::<i32>(2));
        let (mut total, mut counts) = (io.write::<u32>(3), io.write::<u32>(4));
        if has("COUNT") {
            sorted[..p.n_sorted as usize].fill(p.n_entries as i32);
            blocks[..p.n_blocks as usize].fill(-1);
        }
        if !has("SCATTER") {
            let counts = &mut counts[..p.n_groups as usize * e];
            counts.fill(0);
            for (ids, counts) in ids.chunks(p.group_entries as usize).zip(counts.chunks_mut(e)) {
                ids.iter().filter_map(|&id| expert(id)).for_each(|id| counts[id] += 1);
            }
            return;
        }
        let mut next = vec![0; e];
        ids.iter().filter_map(|&id| expert(id)).for_each(|id| next[id] += 1);
        let mut start = 0;
        for next in &mut next {
            let n: u32 = std::mem::replace(next, start);
            start += n.next_multiple_of(p.block_size);
        }
        total[0] = start;
        for (i, &id) in ids.iter().enumerate() {
            let Some(id) = expert(id) else { continue };
            let at = next[id] as usize;
            next[id] += 1;
            sorted[at] = i as i32;
            if at.is_multiple_of(block) {
                blocks[at / block] = id as i32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{Bench, check};

    /// Makes ids out of random numbers in [0, 1), for tests of both kinds.
    type Draw = fn(u: f32, n_experts: usize) -> i32;

    const UNIFORM: Draw = |u, e| (u * e as f32) as i32;
    const ONE_EXPERT: Draw = |_, e| e as i32 - 1;
    const NO_EXPERT: Draw = |u, e| if u < 0.5 { -1 } else { e as i32 };
    /// A third skipped, of every kind; low ids more often.
    const MIXED: Draw = |u, e| match (u * 48.0) as i32 {
        0..8 => -1,
        8..12 => e as i32,
        12 => i32::MIN,
        13..16 => i32::MAX,
        _ => ((u * u * u) * e as f32) as i32,
    };

    fn record(bench: &mut Bench, rec: &mut Recording, n: [usize; 4], slack: usize, draw: Draw) {
        let [tokens, top_k, n_experts, block_size] = n;
        let shape = AlignShape { n_entries: tokens * top_k, n_experts, block_size };
        let ids: Vec<u32> =
            (0..shape.n_entries).map(|_| draw(bench.uniform(), n_experts) as u32).collect();
        let ids = bench.ints(&[tokens, top_k], DType::I32, &ids);
        let mut ints = |n, dtype| bench.ints(&[n], dtype, &vec![0xA5A5_A5A5; n]);
        let out = Aligned {
            sorted_token_ids: ints(shape.max_pad() + slack * block_size, DType::I32),
            expert_ids: ints(shape.max_blocks() + slack, DType::I32),
            num_tokens_post_pad: ints(1, DType::U32),
            scratch: ints(shape.scratch_len() + slack, DType::U32),
        };
        align_experts(rec, ids, n_experts, block_size, &out);
    }

    #[test]
    fn parity() {
        check(0.0, |bench, rec| {
            for n in [
                [1, 1, 32, 16],
                [3, 2, 160, 8],
                [64, 8, 256, 16],
                [256, 16, 257, 128],
                [1023, 1, 1024, 8],
                [341, 3, 60, 32],
                [2256, 2, 32, 32],
                [4096, 2, 1000, 8],
                [700, 8, 128, 48],
                [4096, 16, 256, 128],
            ] {
                record(bench, rec, n, 0, UNIFORM);
            }
        });
    }

    #[test]
    fn odd_distributions() {
        check(0.0, |bench, rec| {
            for n in [[3, 2, 160, 8], [256, 4, 33, 16], [1025, 3, 257, 32]] {
                for draw in [ONE_EXPERT, NO_EXPERT, MIXED] {
                    record(bench, rec, n, 5, draw);
                }
            }
        });
    }

    /// What a sort gives: per expert the indices of its entries, padded; and block experts.
    fn expected(ids: &[i32], n_experts: i32, block: usize) -> (Vec<i32>, Vec<i32>) {
        let (mut sorted, mut blocks) = (Vec::new(), Vec::new());
        let mut order: Vec<usize> =
            (0..ids.len()).filter(|&i| ids[i] >= 0 && ids[i] < n_experts).collect();
        order.sort_by_key(|&i| (ids[i], i));
        for of_one in order.chunk_by(|&a, &b| ids[a] == ids[b]) {
            for rows in of_one.chunks(block) {
                blocks.push(ids[rows[0]]);
                sorted.extend(rows.iter().map(|&i| i as i32));
                sorted.resize(blocks.len() * block, ids.len() as i32);
            }
        }
        (sorted, blocks)
    }

    /// The twin against [`expected`]; parity holds the shader to the twin.
    fn check_twin([n_tokens, top_k, e, block]: [usize; 4], ids: &[i32]) {
        let mut device = crate::device::Device::cpu();
        let tensor = device.alloc("ids", &[n_tokens, top_k], DType::I32).unwrap();
        device.write(&tensor, ids);
        // Memory for more tokens than there are, with what an earlier run may have left.
        let shape = AlignShape { n_entries: ids.len(), n_experts: e, block_size: block };
        let out = Aligned::alloc(&mut device, n_tokens + 7, top_k, e, block..=block)
            .unwrap()
            .reshape(shape);
        device.write(&out.expert_ids, &vec![7u32; shape.max_blocks()]);
        device.write(&out.sorted_token_ids, &vec![7u32; shape.max_pad()]);
        let mut rec = Recording::new(&device.caps());
        align_experts(&mut rec, tensor, e, block, &out);
        let plan = device.prepare(rec).unwrap();
        device.run(&plan).unwrap();
        let sorted: Vec<i32> = device.read_now(&out.sorted_token_ids).unwrap();
        let blocks: Vec<i32> = device.read_now(&out.expert_ids).unwrap();
        let total: Vec<u32> = device.read_now(&out.num_tokens_post_pad).unwrap();
        let (want_sorted, want_blocks) = expected(ids, e as i32, block);
        assert_eq!(total, [want_sorted.len() as u32]);
        let (head, tail) = sorted.split_at(want_sorted.len());
        assert_eq!(head, want_sorted);
        assert!(tail.iter().all(|&i| i as usize == ids.len()));
        let (head, tail) = blocks.split_at(want_blocks.len());
        assert_eq!(head, want_blocks);
        assert!(tail.iter().all(|&id| id == -1));
    }

    #[test]
    fn sorts_stably() {
        let mut state = 1u32;
        let mut uniform = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32
        };
        for n_tokens in [1, 3, 256, 2256, 4096] {
            for top_k in [1, 2, 16, 32] {
                for e in [32, 160, 256, 257] {
                    let draws = [UNIFORM, MIXED, ONE_EXPERT, NO_EXPERT];
                    for (block, draw) in [8, 16, 32, 128].into_iter().zip(draws) {
                        let n = n_tokens * top_k;
                        let ids: Vec<i32> = (0..n).map(|_| draw(uniform(), e)).collect();
                        check_twin([n_tokens, top_k, e, block], &ids);
                    }
                }
            }
        }
    }

    #[test]
    fn sizes_follow_vllm() {
        let shape =
            |n_entries, n_experts, block_size| AlignShape { n_entries, n_experts, block_size };
        assert_eq!(shape(8, 256, 16).max_pad(), 128);
        assert_eq!(shape(256, 256, 16).max_pad(), 4096);
        assert_eq!(shape(1001, 3, 8).max_pad(), 1024);
        assert_eq!(shape(1001, 3, 8).max_blocks(), 128);
    }
}
