//! Experts that stay in the host's memory and visit the device in turn: each layer has slots there,
//! and the router's result says which experts must come.

use std::collections::HashMap;

use web_time::Instant;

use crate::{
    Result,
    device::{CopyPart, Device, Readback, Tensor},
    parallel::{
        CacheOptions, CacheStats, Exchange, ExchangeStats, Handoff, Own, Owners, PackedExpert,
        ParallelError, SlotCache,
    },
    weights::Source,
};

use super::{
    Model, ModelSpec, Precision,
    banks::{BankShape, Banks, names},
};

/// All routed experts, packed, in the host's memory, and the slots that they are copied to.
#[derive(Debug)]
pub struct ExpertCache {
    /// By layer that has experts.
    layers: Vec<Layer>,
    stats: CacheStats,
    rounds: u64,
}

#[derive(Debug)]
struct Layer {
    /// Packed experts. U8 `[expert bytes]` each
    host: Vec<Tensor>,
    banks: Banks,
    slots: SlotCache,
    /// What the kernels look experts up in. I32 `[experts, 2]`
    map: Tensor,
    /// What was last written to it.
    written: Vec<i32>,
}

impl ExpertCache {
    /// Slots of each layer for a cache of so many bytes.
    ///
    /// # Errors
    /// [`ParallelError::CacheTooSmall`] unless every layer has a slot for each expert of a token.
    pub fn slots(spec: &ModelSpec, precision: Precision, bytes: u64) -> Result<usize> {
        let of_all: u64 = sizes(spec, precision).map(|(bytes, _)| bytes).sum();
        let most = spec.moe_layers().map(|(_, moe)| moe.routing.top_k).max().unwrap_or(0);
        let slots = bytes / of_all.max(1);
        if slots < most as u64 {
            return Err(ParallelError::CacheTooSmall { bytes, least: of_all * most as u64 }.into());
        }
        Ok((slots as usize).min(spec.n_experts()))
    }

    /// The host's memory that all experts take, bytes.
    pub fn host_bytes(spec: &ModelSpec, precision: Precision) -> u64 {
        sizes(spec, precision).map(|(bytes, n_experts)| bytes * n_experts as u64).sum()
    }

    /// Packs all experts of `source` into the host's memory, for a model whose layers have slots;
    /// `progress` hears of bytes packed.
    ///
    /// # Errors
    /// [`crate::weights::WeightsError`] for missing or misshapen tensors,
    /// [`crate::device::DeviceError`] where the host's memory is full.
    pub fn load(
        model: &Model,
        source: &dyn Source,
        device: &mut Device,
        options: CacheOptions,
        progress: &dyn Fn(u64),
    ) -> Result<Self> {
        let (spec, mut layers) = (&model.spec, Vec::new());
        for ((index, moe), experts) in spec.moe_layers().zip(model.routed_experts()) {
            let (_, names) = names(|name| source.contains(name), spec, index);
            let shape = BankShape::of(spec, moe, names, model.precision);
            let n_experts = moe.routing.n_experts;
            let mut host = Vec::with_capacity(n_experts);
            for expert in 0..n_experts {
                let bytes = shape.pack(source, expert)?;
                host.push(device.keep_on_host("expert", &bytes)?);
                progress(bytes.len() as u64);
            }
            let (banks, (n_slots, map)) = (experts.banks().clone(), experts.places());
            let slots = SlotCache::new(n_experts, n_slots, options.policy);
            let map = map.expect("layers with slots have a map");
            layers.push(Layer { host, banks, slots, map, written: Vec::new() });
        }
        let stats = CacheStats {
            slots: layers.iter().map(|l| l.slots.n_slots() as u64).sum(),
            experts: layers.iter().map(|l| l.host.len() as u64).sum(),
            ..CacheStats::default()
        };
        Ok(Self { layers, stats, rounds: 0 })
    }
}

/// Bytes of a packed expert and number of them, by layer that has some.
fn sizes(spec: &ModelSpec, precision: Precision) -> impl Iterator<Item = (u64, usize)> {
    spec.moe_layers().map(move |(index, moe)| {
        let shape = BankShape::of(spec, moe, names(|_| false, spec, index).1, precision);
        (shape.expert_bytes(), moe.routing.n_experts)
    })
}

impl Layer {
    /// Brings `wanted` into slots and says so in the map; returns how many moved.
    fn bring(&mut self, device: &mut Device, wanted: &[usize]) -> usize {
        let moves = self.slots.take(wanted);
        let mut copies = Vec::new();
        for &(expert, slot) in &moves {
            let (from, mut from_byte) = (self.host[expert], 0);
            for to in self.banks.parts(slot) {
                copies.push(CopyPart { from, from_byte, to });
                from_byte += to.bytes();
            }
            debug_assert_eq!(from_byte, from.bytes());
        }
        if !copies.is_empty() {
            device.copy(&copies);
        }
        let map = self.slots.map(wanted);
        if map != self.written {
            device.write(&self.map, &map);
            self.written = map;
        }
        moves.len()
    }
}

impl Exchange for ExpertCache {
    fn reads(&self, at: &Handoff) -> Vec<Tensor> {
        vec![at.ids]
    }

    fn run(
        &mut self,
        device: &mut Device,
        at: &Handoff,
        seen: Readback,
        own: &mut Own<'_>,
    ) -> Result<()> {
        let ids: Vec<i32> = bytemuck::pod_collect_to_vec(&seen.wait_now()?);
        let start = Instant::now();
        let layer = &mut self.layers[at.layer];
        let expert_bytes = layer.host.first().map_or(0, Tensor::bytes);
        let turns = layer.slots.turns(&ids);
        let mut moved = 0;
        for wanted in &turns {
            let n = layer.bring(device, wanted);
            own(device)?;
            moved += n as u64;
            self.stats.hits += (wanted.len() - n) as u64;
        }
        if turns.is_empty() {
            // Rows of padding only.
            own(device)?;
        }
        self.stats.misses += moved;
        self.stats.bytes_moved += moved * expert_bytes;
        self.stats.extra_turns += turns.len().saturating_sub(1) as u64;
        if moved > 0 {
            self.stats.stalls += 1;
            self.stats.stalled += start.elapsed();
        }
        self.rounds += 1;
        Ok(())
    }

    fn read_expert(
        &mut self,
        device: &mut Device,
        layer: usize,
        expert: usize,
    ) -> Result<Option<Vec<u8>>> {
        Ok(Some(device.read_now(&self.layers[layer].host[expert])?))
    }

    fn write_expert(&mut self, device: &mut Device, new: &PackedExpert) -> Result<()> {
        let layer = &mut self.layers[new.layer];
        let kept = device.keep_on_host("expert", &new.bytes)?;
        device.free(std::mem::replace(&mut layer.host[new.expert], kept));
        if let Some(slot) = layer.slots.slot(new.expert) {
            layer.banks.write(device, slot, &new.bytes);
        }
        Ok(())
    }

    fn rearrange(&mut self, _: usize, _: &Owners, _: &HashMap<usize, Vec<u8>>) -> Result<()> {
        Ok(()) // All experts are at home in the host's memory.
    }

    fn stats(&self) -> ExchangeStats {
        ExchangeStats { rounds: self.rounds, ..ExchangeStats::default() }
    }

    fn cache_stats(&self) -> Option<CacheStats> {
        Some(self.stats)
    }
}
