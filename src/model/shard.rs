//! Experts on a device that has nothing else of the model: it computes them for the rows that the
//! primary device sends.

use std::collections::HashMap;

use crate::{
    Result,
    device::{Device, Plan, Readback, Recording},
    parallel::{ExpertLayout, Owners, Rows, Share, Worker},
    weights::Source,
};

use super::{
    Limits, ModelSpec, Precision,
    banks::{BankShape, names},
    experts::RoutedExperts,
    loader::Loader,
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
    /// Sums on their way.
    pending: Option<Readback>,
}

impl ExpertShard {
    /// Loads the experts of `share` from `source`, and no others, for steps up to `limits`.
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
        share: Share,
    ) -> Result<Self> {
        let limits = Limits { max_logits: 1, ..*limits };
        let buffers = Buffers::alloc(&mut device, spec, &limits, precision.activations)?;
        let layout = ExpertLayout::Share(share);
        let mut loader = Loader::new(source, &mut device, &|_| {});
        let mut layers = Vec::new();
        for (moe_index, (index, moe)) in spec.moe_layers().enumerate() {
            let (_, names) = names(|name| loader.contains(name), spec, index);
            let shape = BankShape::of(spec, moe, names, precision);
            let layer = RoutedExperts::load(&mut loader, &shape, moe.routing, &layout, moe_index)?;
            layers.push(layer);
        }
        let (spec, plans) = (spec.clone(), HashMap::new());
        Ok(Self { device, spec, layers, buffers, plans, pending: None })
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
        self.pending = Some(self.device.submit(plan, all, &[wanted])?);
        Ok(())
    }

    fn finish(&mut self) -> Result<Vec<f32>> {
        let Some(sums) = self.pending.take() else { return Ok(Vec::new()) };
        Ok(bytemuck::pod_collect_to_vec(&sums.wait_now()?))
    }

    fn read_expert(&mut self, layer: usize, place: usize) -> Result<Vec<u8>> {
        self.layers[layer].banks().read(&mut self.device, place)
    }

    fn write_expert(&mut self, layer: usize, place: usize, packed: &[u8]) -> Result<()> {
        self.layers[layer].banks().write(&mut self.device, place, packed);
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

    fn blocks(&self) -> bool {
        matches!(self.device, Device::Cpu(_))
    }

    fn describe(&self) -> String {
        self.device.describe()
    }
}
