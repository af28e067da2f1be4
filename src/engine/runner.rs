//! Turns a batch into device work: writes the step's inputs, picks or makes the plan for its
//! shape, submits, and hands results back. Knows batches, not requests.

use std::{
    collections::{HashMap, hash_map::Entry},
    ops::Range,
};

use crate::{
    Result,
    device::{DType, Device, Plan, Readback, Recording, Tensor, Timing, Timings},
    kernels::Logprobs,
    model::{KvCache, Limits, Model, NewExperts, Scratch, StepShape},
    parallel::{Exchange, Handoff, Owners, PackedExpert, ParallelError},
};

use super::{
    Extras, Submission,
    batch::{Batch, Layout, Splits},
};

/// Plans kept; a shape beyond them takes the place of the one that was not used for longest.
const MAX_PLANS: usize = 256;

/// A model on its device, with the memory of a step.
#[derive(Debug)]
pub struct Runner {
    device: Device,
    model: Model,
    kv: KvCache,
    scratch: Scratch,
    limits: Limits,
    /// With the step that used it last.
    plans: HashMap<StepShape, (Plan, u64)>,
    n_steps: u64,
    last: Option<StepShape>,
    /// Block tables as the device has them. `[max_sequences][..]`
    tables: Vec<Vec<u32>>,
    profile: Option<Vec<Timings>>,
    /// Takes over where a plan is cut.
    exchange: Option<Box<dyn Exchange>>,
    /// Rows from which a step that it takes part in is split.
    least_split: usize,
}

impl Runner {
    /// Allocates what steps up to `limits` need beside weights and cache.
    ///
    /// # Errors
    /// [`crate::device::DeviceError`] where it does not fit.
    pub fn new(mut device: Device, model: Model, kv: KvCache, limits: Limits) -> Result<Self> {
        let limits = limits.fit(&model.spec, &device.caps());
        let scratch = Scratch::alloc(&mut device, &model.spec, &limits, model.precision)?;
        Ok(Self {
            device,
            model,
            kv,
            scratch,
            plans: HashMap::new(),
            n_steps: 0,
            last: None,
            tables: vec![Vec::new(); limits.max_sequences],
            limits,
            profile: None,
            exchange: None,
            least_split: usize::MAX,
        })
    }

    /// Sets who takes over at the experts of a model that was loaded in part.
    #[must_use]
    pub fn with_exchange(mut self, exchange: Box<dyn Exchange>) -> Self {
        self.exchange = Some(exchange);
        self
    }

    /// Splits steps of so many tokens and more in two, whose trips to other devices hide behind
    /// each other's work.
    #[must_use]
    pub fn with_dual_batches(mut self, least: usize) -> Self {
        self.least_split = least;
        self
    }

    /// Who takes over at the experts, if they are not all on the device.
    pub fn exchange(&self) -> Option<&dyn Exchange> {
        self.exchange.as_deref()
    }

    /// Replaces and adds experts behind the steps submitted so far: all of them, or none if that
    /// fails.
    ///
    /// # Errors
    /// [`crate::device::DeviceError`] if a device fails, [`ParallelError::Worker`], and
    /// [`ParallelError::NewExperts`] if the model has other experts than when they were packed.
    pub fn take_experts(&mut self, new: &NewExperts) -> Result<()> {
        let &NewExperts { n_before, n_after, .. } = new;
        if n_before != self.model.spec.n_present() {
            let cause = "others were added meanwhile; read the file again".to_owned();
            return Err(ParallelError::NewExperts { cause }.into());
        }
        let mut old = NewExperts { n_before: n_after, n_after: n_before, ..NewExperts::default() };
        for &PackedExpert { layer, expert, .. } in &new.experts {
            let bytes = self.read_expert(layer, expert)?;
            old.experts.push(PackedExpert { layer, expert, bytes });
        }
        for router in &new.routers {
            old.routers.extend(self.model.read_router(&mut self.device, router.layer)?);
        }
        self.write_experts(new).inspect_err(|_| {
            // If this fails too, the device is gone, and the weights with it.
            let _ = self.write_experts(&old);
        })?;
        if n_after != n_before {
            self.model.set_present(n_after);
            self.plans.clear();
        }
        Ok(())
    }

    fn write_experts(&mut self, new: &NewExperts) -> Result<()> {
        for expert in &new.experts {
            self.model.write_expert(&mut self.device, expert);
            if let Some(exchange) = &mut self.exchange {
                exchange.write_expert(expert)?;
            }
        }
        for router in &new.routers {
            self.model.write_router(&mut self.device, router);
        }
        Ok(self.device.wait()?)
    }

    /// Packed weights of an expert, from wherever it is.
    ///
    /// # Errors
    /// Those of [`Runner::take_experts`].
    pub fn read_expert(&mut self, layer: usize, expert: usize) -> Result<Vec<u8>> {
        if let Some(bytes) = self.model.read_expert(&mut self.device, layer, expert)? {
            return Ok(bytes);
        }
        let held = match &mut self.exchange {
            Some(exchange) => exchange.read_expert(layer, expert)?,
            None => None,
        };
        let cause = format!("no device has expert {expert} of mixture {layer}");
        held.ok_or_else(|| ParallelError::NewExperts { cause }.into())
    }

    /// Moves experts of a layer from their owners to new ones, behind the steps submitted so far.
    /// Returns how many were written to a place, and their bytes.
    ///
    /// # Errors
    /// Those of [`Runner::take_experts`].
    pub fn rearrange(&mut self, layer: usize, old: &Owners, new: &Owners) -> Result<(u64, u64)> {
        let (mut packed, mut moved) = (HashMap::new(), (0, 0));
        // All are read before the first place is overwritten.
        for (_, expert) in (0..new.n_ranks()).flat_map(|rank| new.changes(old, rank)) {
            if let Entry::Vacant(entry) = packed.entry(expert) {
                entry.insert(self.read_expert(layer, expert)?);
            }
            moved = (moved.0 + 1, moved.1 + packed[&expert].len() as u64);
        }
        self.model.rearrange(&mut self.device, layer, (old, new), &packed);
        if let Some(exchange) = &mut self.exchange {
            exchange.rearrange(layer, new, &packed)?;
        }
        Ok(moved)
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The cache.
    pub fn kv(&self) -> &KvCache {
        &self.kv
    }

    /// The largest step.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The device.
    pub fn device(&mut self) -> &mut Device {
        &mut self.device
    }

    /// Bytes of all buffers on the device.
    pub fn device_bytes(&self) -> u64 {
        self.device.allocated_bytes()
    }

    /// Times every dispatch from now on.
    pub fn start_profile(&mut self) {
        self.profile = Some(Vec::new());
    }

    /// Times nothing more.
    pub fn stop_profile(&mut self) {
        self.profile = None;
    }

    /// Dispatches timed since [`Runner::start_profile`].
    ///
    /// # Errors
    /// [`crate::device::DeviceError`] if the device fails.
    pub async fn take_profile(&mut self) -> Result<Vec<Timing>> {
        let mut all = Vec::new();
        for timings in self.profile.as_mut().map(std::mem::take).unwrap_or_default() {
            all.extend(timings.wait().await?);
        }
        Ok(all)
    }

    /// The plan that ran last, printable.
    pub fn last_recording(&self) -> Option<&Recording> {
        self.plans.get(&self.last?).map(|(plan, _)| plan.recording())
    }

    /// Runs a step. Returns the rows of logits that belong to each sequence, in batch order; with
    /// `sample`, a token is drawn from each row.
    ///
    /// # Errors
    /// [`crate::device::DeviceError`] if the device fails.
    pub fn run(&mut self, batch: &Batch<'_>, sample: bool) -> Result<Vec<Range<usize>>> {
        Ok(self.run_layout(batch, sample)?.rows)
    }

    fn run_layout(&mut self, batch: &Batch<'_>, sample: bool) -> Result<Layout> {
        let splits = self.exchange.is_some().then(|| Splits {
            least: self.least_split,
            alignment: self.device.caps().offset_alignment as usize,
        });
        let (shape, layout) = Layout::new(batch, &self.limits, self.kv.block_size, sample, splits);
        self.write(batch, &layout);
        if !self.plans.contains_key(&shape) {
            self.drop_oldest_plan();
            let mut rec = Recording::new(&self.device.caps());
            self.model.record(&mut rec, &shape, &self.scratch, &self.kv);
            let plan = self.device.prepare(rec)?;
            self.plans.insert(shape, (plan, 0));
        }
        self.n_steps += 1;
        let (plan, used) = self.plans.get_mut(&shape).expect("just made");
        *used = self.n_steps;
        let mut step = Step { plan, profile: &mut self.profile };
        match &mut self.exchange {
            Some(exchange) if !step.plan.recording().cuts.is_empty() => {
                let handoffs = self.scratch.handoffs(&self.model.spec, &shape);
                let n_parts = 1 + usize::from(shape.split.is_some());
                step.run_exchanging(&mut self.device, &mut **exchange, &handoffs, n_parts)?;
            }
            _ => step.run(&mut self.device)?,
        }
        self.last = Some(shape);
        Ok(layout)
    }

    fn drop_oldest_plan(&mut self) {
        if self.plans.len() >= MAX_PLANS {
            let oldest = self.plans.iter().min_by_key(|(_, (_, used))| *used);
            if let Some(shape) = oldest.map(|(shape, _)| *shape) {
                self.plans.remove(&shape);
            }
        }
    }

    /// Runs a step that samples, and starts bringing its results to the host: tokens, log
    /// probabilities if any row wants them, and the experts' counts if asked.
    ///
    /// # Errors
    /// [`crate::device::DeviceError`] if the device fails.
    pub fn submit(&mut self, batch: &Batch<'_>, extras: Extras) -> Result<Submission> {
        let profile = if extras.timed { self.profile.replace(Vec::new()) } else { None };
        let Layout { rows, logit_rows, .. } = self.run_layout(batch, true)?;
        let timings = match extras.timed {
            true => std::mem::replace(&mut self.profile, profile).unwrap_or_default(),
            false => Vec::new(),
        };
        let n = rows.iter().map(Range::len).sum();
        let with_logprobs = n > 0 && self.last.is_some_and(|shape| shape.logprobs);
        let mut tensors = Vec::new();
        if n > 0 {
            tensors.push(self.scratch.sampled.reshape(&[n]));
        }
        if with_logprobs {
            tensors.push(self.scratch.logprobs.reshape(&[n, Logprobs::COLS]));
            tensors.push(self.scratch.top_ids.reshape(&[n, Logprobs::MOST]));
        }
        let routed = match self.last {
            Some(shape) if extras.routed && n > 0 => self.routed_ids(shape.n_tokens()),
            _ => Vec::new(),
        };
        let top_k = routed.iter().map(Tensor::cols).collect();
        tensors.extend(routed);
        if extras.expert_counts {
            tensors.extend(self.counters());
        }
        let readback = (!tensors.is_empty()).then(|| self.device.read_all(&tensors));
        let n_tokens = self.last.map_or(0, |shape| shape.n_tokens());
        Ok(Submission { rows, logit_rows, n_tokens, top_k, timings, n, with_logprobs, readback })
    }

    /// The experts' counts, and behind them those of the layers that have slots for some experts.
    fn counters(&self) -> Vec<Tensor> {
        let caches = self.model.expert_caches().map(|(counters, _)| counters);
        self.scratch.expert_counts.into_iter().chain(caches).collect()
    }

    /// What the last step of `n` tokens chose in each layer that has experts. Each `[n, top_k]`
    fn routed_ids(&self, n: usize) -> Vec<Tensor> {
        let routed = self.scratch.routed(&self.model.spec, n);
        routed.into_iter().flatten().map(|(ids, _)| ids).collect()
    }

    /// Starts bringing the experts' counts to the host, without a step.
    pub fn expert_counts(&mut self) -> Option<Submission> {
        let counters = self.counters();
        let readback = (!counters.is_empty()).then(|| self.device.read_all(&counters));
        readback.map(|r| Submission { readback: Some(r), ..Submission::default() })
    }

    /// Logits of the last step's first `n` rows. `[n, vocabulary]`
    ///
    /// # Errors
    /// [`crate::device::DeviceError`] if the device fails.
    pub fn logits(&mut self, n: usize) -> Result<Vec<Vec<f32>>> {
        let logits = self.scratch.logits;
        let values = self.device.read_now::<f32>(&logits.reshape(&[n, logits.cols()]))?;
        let vocab_size = self.model.spec.vocab_size;
        Ok(values.chunks(logits.cols()).map(|row| row[..vocab_size].to_vec()).collect())
    }

    /// Expert ids and weights that the last step of `n` tokens chose, by layer; dense layers have
    /// none. Each `[n, top_k]`, in token rows as laid out.
    ///
    /// # Errors
    /// [`crate::device::DeviceError`] if the device fails.
    pub fn routed(&mut self, n: usize) -> Result<Vec<Option<Routed>>> {
        let tensors: Vec<Option<(Tensor, Tensor)>> = self.scratch.routed(&self.model.spec, n);
        let mut read = |(ids, weights): (Tensor, Tensor)| -> Result<Routed> {
            let ids_read = self.device.read_now(&ids)?;
            Ok(Routed {
                ids: ids_read,
                weights: self.device.read_now(&weights)?,
                top_k: ids.cols(),
            })
        };
        tensors.into_iter().map(|t| t.map(&mut read).transpose()).collect()
    }

    /// Fills the normalised input of the layers and the tokens' slots, to run layers alone.
    pub(crate) fn fill_random(&mut self, n: usize) {
        let tokens: Vec<[u32; 4]> = (0..n as u32).map(|i| [i, i, 0, 0]).collect();
        self.device.write(&self.scratch.inputs.tokens, &tokens);
        self.scratch.fill_normed(&mut self.device, n);
    }

    /// Records the mixtures of all layers for `n` tokens, without attention.
    pub(crate) fn record_experts(&self, rec: &mut Recording, n: usize) {
        self.model.record_experts(rec, &self.scratch, n);
    }

    /// Writes a row of token counts: which tokens the prompt has, how often each was generated.
    pub(super) fn fill_counts(&mut self, row: u32, prompt: &[u32], generated: &[u32]) {
        let counts = self.scratch.counts;
        let mut values = vec![0u32; counts.cols()];
        prompt.iter().for_each(|&id| values[id as usize] |= 1 << 31);
        generated.iter().for_each(|&id| values[id as usize] += 1);
        let start = u64::from(row) * counts.cols() as u64 * counts.dtype.bytes();
        self.device.write_at(&counts, start, bytemuck::cast_slice(&values));
    }

    fn write(&mut self, batch: &Batch<'_>, layout: &Layout) {
        let inputs = self.scratch.inputs;
        let device = &mut self.device;
        device.write(&inputs.ids, &layout.ids);
        device.write(&inputs.tokens, &layout.tokens);
        device.write(&inputs.tiles, &layout.tiles);
        device.write(&inputs.logit_rows, &layout.logit_rows);
        device.write(&inputs.sampling, &layout.sampling);
        device.write(&inputs.masks, &layout.masks);
        device.write_at(&inputs.biases, 0, bytemuck::cast_slice(&layout.biases));
        let row_bytes = inputs.block_tables.cols() as u64 * DType::U32.bytes();
        for (i, sequence) in batch.sequences.iter().enumerate() {
            // Most tables are those of the step before, perhaps with a block more.
            let known = &mut self.tables[i];
            let same = known.iter().zip(sequence.blocks).take_while(|(a, b)| a == b).count();
            if same < sequence.blocks.len() {
                known.truncate(same);
                known.extend(&sequence.blocks[same..]);
                let start = i as u64 * row_bytes + same as u64 * DType::U32.bytes();
                let bytes = bytemuck::cast_slice(&sequence.blocks[same..]);
                device.write_at(&inputs.block_tables, start, bytes);
            }
        }
    }
}

/// A plan that is run once, and where its timings go.
struct Step<'a> {
    plan: &'a Plan,
    profile: &'a mut Option<Vec<Timings>>,
}

impl Step<'_> {
    fn run(&mut self, device: &mut Device) -> Result<()> {
        let all = 0..self.plan.recording().dispatches.len();
        self.submit(device, all, &[]).map(drop)
    }

    fn submit(
        &mut self,
        device: &mut Device,
        dispatches: Range<usize>,
        reads: &[Tensor],
    ) -> Result<Readback> {
        let Some(samples) = &mut self.profile else {
            return Ok(device.submit(self.plan, dispatches, reads)?);
        };
        samples.push(device.submit_profiled(self.plan, dispatches)?);
        Ok(device.read_all(reads))
    }

    /// Segments in turn: up to a layer's router, its experts on this device, and so on to the
    /// rest of the step behind the last layer's experts. Of several parts of a step, one is on
    /// its way to other devices while the next one computes here.
    fn run_exchanging(
        &mut self,
        device: &mut Device,
        exchange: &mut dyn Exchange,
        handoffs: &[Handoff],
        n_parts: usize,
    ) -> Result<()> {
        let rec = self.plan.recording();
        debug_assert_eq!(rec.cuts.len(), 2 * handoffs.len(), "two cuts for each layer");
        for (i, at) in handoffs.iter().enumerate() {
            if let Some(before) = i.checked_sub(n_parts) {
                exchange.receive(device, &handoffs[before])?;
            }
            let seen = self.submit(device, rec.segment(2 * i), &exchange.reads(at))?;
            // This device computes its experts while the others are sent to.
            self.submit(device, rec.segment(2 * i + 1), &[]).map(drop)?;
            exchange.send(at, seen)?;
        }
        for at in &handoffs[handoffs.len() - n_parts.min(handoffs.len())..] {
            exchange.receive(device, at)?;
        }
        self.submit(device, rec.segment(2 * handoffs.len()), &[]).map(drop)
    }
}

/// Experts that one layer chose in a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Routed {
    /// `[n, top_k]`
    pub ids: Vec<i32>,
    /// `[n, top_k]`
    pub weights: Vec<f32>,
    /// Experts per token.
    pub top_k: usize,
}
