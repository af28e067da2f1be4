//! Experts on a device that has nothing else of the model: it computes them for the rows that the
//! primary device sends.

use std::collections::{HashMap, VecDeque};

use crate::{
    Result,
    device::{Device, Plan, Readback, Recording, Tensor},
    parallel::{CacheStats, CacheTally, ExpertLayout, Owners, Rows, Worker},
    weights::Source,
};

use super::{
    Limits, ModelSpec, Precision,
    banks::{BankShape, names},
    loader::Loader,
    offload::Home,
    routed_experts::RoutedExperts,
    scratch::Buffers,
};

/// The experts of one rank, with the memory to compute them.
#[derive(Debug)]
pub struct ExpertShard {
    device: Device,
    spec: ModelSpec,
    /// By layer that has experts.
    layers: Vec<RoutedExperts>,
    buffers: Buffers,
    /// By layer and number of rows.
    plans: HashMap<(usize, usize), Plan>,
    /// Sums on their way, and the cache's counters of a layer behind them.
    pending: VecDeque<Pending>,
    cache: CacheTally,
}

#[derive(Debug)]
struct Pending {
    readback: Readback,
    n_sums: usize,
    /// Among those that have slots.
    cached_layer: usize,
}

impl ExpertShard {
    /// Loads the experts of `layout` from `source`, and no others, for steps up to `limits`. A CPU
    /// needs no slots: it computes all where they are.
    ///
    /// # Errors
    /// [`crate::weights::WeightsError`] for missing or misshapen tensors,
    /// [`crate::device::DeviceError`] where they do not fit.
    pub fn load(
        mut device: Device,
        spec: &ModelSpec,
        source: &dyn Source,
        precision: Precision,
        limits: &Limits,
        layout: &ExpertLayout,
    ) -> Result<Self> {
        let limits = Limits { max_logits: 1, ..*limits };
        let buffers = Buffers::alloc(&mut device, spec, &limits, precision)?;
        let slots = layout.slots.filter(|_| matches!(device, Device::Gpu(_)));
        let layout = ExpertLayout { slots, ..layout.clone() };
        let mut loader = Loader::new(source, &mut device, &|_| {});
        let mut layers = Vec::new();
        for (moe_index, (index, moe)) in spec.moe_layers().enumerate() {
            let (_, names) = names(|name| loader.contains(name), spec, index);
            let shape = BankShape::of(spec, moe, names, precision);
            let layer = RoutedExperts::load(&mut loader, &shape, moe.routing, &layout, moe_index)?;
            layers.push(layer);
        }
        let cache = CacheTally::new(layers.iter().filter_map(|l| l.home()).map(Home::size));
        let (spec, plans) = (spec.clone(), HashMap::new());
        Ok(Self { device, spec, layers, buffers, plans, pending: VecDeque::new(), cache })
    }

    /// As [`super::Model::with_block_align`].
    #[must_use]
    pub fn with_block_align(mut self, on: bool) -> Self {
        self.layers.iter_mut().for_each(|layer| layer.set_block_align(on));
        self
    }
}

impl Worker for ExpertShard {
    fn submit(&mut self, layer: usize, rows: &Rows<'_>) -> Result<()> {
        // Few shapes, few plans.
        let n = rows.n.next_power_of_two().min(self.buffers.normed.rows());
        let moe = self.spec.moe_layers().nth(layer).map(|(_, moe)| moe.routing);
        let top_k = moe.map_or(1, |routing| routing.top_k);
        let (x, sums) = (
            self.buffers.rows(self.buffers.normed, n),
            self.buffers.rows(self.buffers.residual, n),
        );
        let routed = self.buffers.routed.iter().flatten().nth(layer);
        let (ids, weights) = routed.expect("buffers come from the same spec").rows(n, top_k);
        self.device.write_at(&x, 0, rows.x);
        let mut padded = rows.ids.to_vec();
        padded.resize(n * top_k, -1);
        self.device.write(&ids, &padded);
        self.device.write(&weights, rows.weights);
        if !self.plans.contains_key(&(layer, n)) {
            let mut rec = Recording::new(&self.device.caps());
            rec.clear(sums);
            self.layers[layer].record(&mut rec, &self.buffers, x, ids, weights, sums);
            self.plans.insert((layer, n), self.device.prepare(rec)?);
        }
        let plan = &self.plans[&(layer, n)];
        let all = 0..plan.recording().dispatches.len();
        let wanted = sums.reshape(&[rows.n, sums.cols()]);
        let counters = self.layers[layer].home().map(Home::counters);
        let reads: Vec<Tensor> = std::iter::once(wanted).chain(counters).collect();
        let readback = self.device.submit(plan, all, &reads)?;
        let cached_layer = self.layers[..layer].iter().filter(|l| l.home().is_some()).count();
        self.pending.push_back(Pending { readback, n_sums: wanted.len(), cached_layer });
        Ok(())
    }

    fn finish(&mut self, take: &mut dyn FnMut(&[f32])) -> Result<()> {
        let Some(Pending { readback, n_sums, cached_layer }) = self.pending.pop_front() else {
            return Ok(());
        };
        let cache = &mut self.cache;
        readback.view_now(|bytes| {
            let (sums, counters) = bytes.split_at(n_sums * size_of::<f32>());
            match bytemuck::try_cast_slice(sums) {
                Ok(sums) => take(sums),
                Err(_) => take(&bytemuck::pod_collect_to_vec(sums)),
            }
            if !counters.is_empty() {
                cache.read(cached_layer, &bytemuck::pod_collect_to_vec(counters));
            }
        })?;
        Ok(())
    }

    fn read_expert(&mut self, layer: usize, place: usize) -> Result<Vec<u8>> {
        self.layers[layer].read(&mut self.device, place)
    }

    fn write_expert(&mut self, layer: usize, place: usize, packed: &[u8]) -> Result<()> {
        self.layers[layer].write(&mut self.device, place, packed);
        // Whether it arrived is known now, not a step later.
        Ok(self.device.wait()?)
    }

    fn rearrange(
        &mut self,
        layer: usize,
        owners: (&Owners, &Owners),
        rank: usize,
        packed: &HashMap<usize, Vec<u8>>,
    ) -> Result<()> {
        self.layers[layer].rearrange(&mut self.device, owners, rank, packed);
        Ok(())
    }

    fn probe(&self) -> Result<()> {
        Ok(self.device.probe()?)
    }

    fn forget(&mut self) {
        self.pending.clear();
    }

    fn cache_stats(&self) -> Option<CacheStats> {
        self.cache.stats()
    }

    fn blocks(&self) -> bool {
        matches!(self.device, Device::Cpu(_))
    }

    fn describe(&self) -> String {
        self.device.describe()
    }
}
