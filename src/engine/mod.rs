//! Layer 4, who runs when: sequences share each step's token budget and the blocks of the KV
//! cache. Single-threaded; it does no I/O, reads no clock and spawns nothing.

mod batch;
mod blocks;
mod config;
mod error;
mod request;
mod runner;
mod sampling;
mod scheduler;
mod sequence;
mod stats;
mod submission;

use std::{
    ops::{Add, Range},
    sync::Arc,
};

use crate::{
    Result,
    kernels::CacheExperts,
    model::{KvCache, Model, NewExperts},
    parallel::{CacheTally, Exchange, Rebalancer},
};

pub use batch::{Batch, BatchSequence, LogitRows};
pub use blocks::{BlockPool, PrefixId};
pub use config::{EngineConfig, Policy};
pub use error::EngineError;
pub use request::{FinishReason, Output, Request, RequestId, TokenLogprobs, TokenMask};
pub use runner::{Routed, Runner};
pub use sampling::SamplingParams;
pub use stats::{EngineStats, ExpertStats, LayerStats};
pub use submission::{Extras, StepResults, Submission};

use scheduler::Scheduler;
use sequence::Sequence;

/// Runs requests to their end, many at a time.
#[derive(Debug)]
pub struct Engine {
    runner: Runner,
    scheduler: Scheduler,
    config: EngineConfig,
    /// Tokens that end a text.
    eos: Arc<[u32]>,
    next_id: u64,
    /// The step whose results are still to be read.
    in_flight: Option<InFlight>,
    counters: Counters,
    experts: Arc<ExpertStats>,
    /// The experts' counts as last read.
    last_counts: Vec<u32>,
    cache: CacheTally,
    balancer: Option<Rebalancer>,
    kv_block_bytes: u64,
    /// Of the banks: allocated and used.
    expert_bytes: (u64, u64),
}

/// A submitted step, and whose its rows of logits are.
#[derive(Debug)]
struct InFlight {
    submission: Submission,
    sequences: Vec<Sampled>,
}

#[derive(Debug)]
struct Sampled {
    id: RequestId,
    rows: Range<usize>,
    /// Whether the last row sampled a token.
    samples: bool,
}

#[derive(Debug, Default)]
struct Counters {
    steps: u64,
    prompt_tokens: u64,
    generated_tokens: u64,
    non_finite: u64,
    routing_ms: Option<f64>,
    fetch_ms: Option<f64>,
}

impl Engine {
    /// An engine without requests.
    pub fn new(runner: Runner, config: EngineConfig) -> Self {
        let limits = *runner.limits();
        let kv = runner.kv();
        let blocks = BlockPool::new(kv.n_blocks, kv.block_size, config.prefix_caching);
        let Model { spec, precision, .. } = runner.model();
        Self {
            scheduler: Scheduler::new(limits, blocks, config.policy),
            config,
            eos: spec.eos_token_ids.clone().into(),
            next_id: 0,
            in_flight: None,
            counters: Counters::default(),
            experts: Arc::new(ExpertStats::new(spec)),
            last_counts: Vec::new(),
            cache: CacheTally::new(runner.model().expert_caches().map(|(_, size)| size)),
            balancer: None,
            kv_block_bytes: KvCache::block_bytes(spec, kv.block_size, precision.activations),
            expert_bytes: runner.model().expert_bytes(),
            runner,
        }
    }

    /// Moves experts between devices as their work asks for.
    #[must_use]
    pub fn with_balancer(mut self, balancer: Rebalancer) -> Self {
        self.balancer = Some(balancer);
        self
    }

    /// Longest prompt and answer together, tokens.
    pub fn max_model_len(&self) -> usize {
        let kv = self.runner.kv();
        let cache = self.runner.limits().max_blocks * kv.block_size;
        self.runner.model().n_positions().min(cache)
    }

    /// Device, model and memory below the engine.
    pub fn runner(&mut self) -> &mut Runner {
        &mut self.runner
    }

    /// Replaces and adds experts between two steps, all or none; see
    /// [`crate::model::pack_experts`]. Requests that run go on with them; what was cached of
    /// prompts is found no more.
    ///
    /// # Errors
    /// Those of [`Runner::take_experts`].
    pub fn take_experts(&mut self, new: &NewExperts) -> Result<()> {
        self.runner.take_experts(new)?;
        Arc::make_mut(&mut self.experts).n_present = new.n_after;
        self.expert_bytes = self.runner.model().expert_bytes();
        self.scheduler.forget_prefixes();
        Ok(())
    }

    /// Drops all requests and gives back what runs them.
    pub fn into_runner(self) -> Runner {
        self.runner
    }

    /// Queues a request.
    ///
    /// # Errors
    /// [`EngineError`] if it can never run, or [`EngineError::QueueFull`].
    pub fn add(&mut self, request: Request) -> Result<RequestId> {
        Ok(self.add_n(&request, 1)?[0])
    }

    /// Queues a request for `n` answers, each with its own id and a seed of its own; they share
    /// the prompt's cache blocks. All are queued or none.
    ///
    /// # Errors
    /// Those of [`Engine::add`].
    pub fn add_n(&mut self, request: &Request, n: usize) -> Result<Vec<RequestId>> {
        let room = self.check(request)?;
        if n == 0 {
            let (name, value) = ("n", "0".to_owned());
            return Err(EngineError::Sampling { name, value, allowed: "at least 1" }.into());
        }
        let waiting = self.scheduler.n_waiting();
        if n > self.config.max_queue.saturating_sub(waiting) {
            return Err(EngineError::QueueFull { waiting }.into());
        }
        let ids: Vec<RequestId> = (0..n as u64).map(|i| RequestId(self.next_id + i)).collect();
        self.next_id += n as u64;
        for (i, &id) in ids.iter().enumerate() {
            // Splitmix: neighbouring requests get unrelated seeds.
            let derived = (self.config.seed ^ id.0).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            let given = request.params.seed.map(|seed| seed.wrapping_add(i as u64));
            let seed = given.unwrap_or(derived.rotate_left(31));
            self.scheduler.push(Sequence::new(id, request, seed, room));
        }
        Ok(ids)
    }

    /// How many tokens the context leaves for the answer.
    fn check(&self, request: &Request) -> Result<usize, EngineError> {
        let Request { prompt, params, .. } = request;
        let vocab_size = self.runner.model().spec.vocab_size;
        params.validate(vocab_size, &self.eos)?;
        if prompt.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        let limit = self.max_model_len();
        if prompt.len() >= limit {
            return Err(EngineError::PromptTooLong { tokens: prompt.len(), limit });
        }
        if let Some(&id) = prompt.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(EngineError::TokenOutOfRange { id, vocab_size });
        }
        let room = limit - prompt.len();
        let longest = prompt.len() + params.max_tokens.unwrap_or(room).min(room);
        self.scheduler.check_fits(longest)?;
        Ok(room)
    }

    /// Whether steps can be expected to work, as far as the driver knows; cheap enough to ask while
    /// there is nothing to do.
    ///
    /// # Errors
    /// [`crate::device::DeviceError`] if the device has failed, [`crate::parallel::ParallelError`]
    /// if another one that has experts has.
    pub fn probe(&mut self) -> Result<()> {
        self.runner.device().probe()?;
        self.runner.exchange().map_or(Ok(()), |exchange| exchange.probe())
    }

    /// What the engine has counted about itself.
    pub fn stats(&self) -> EngineStats {
        let (scheduler, counters) = (&self.scheduler, &self.counters);
        let elsewhere = self.runner.exchange().and_then(Exchange::cache_stats);
        EngineStats {
            running: scheduler.running.len(),
            waiting: scheduler.n_waiting(),
            kv_blocks_total: scheduler.pool.usable(),
            kv_blocks_used: scheduler.pool.usable() - scheduler.pool.n_free(),
            block_size: scheduler.pool.block_size,
            kv_positions_empty: scheduler.positions_empty(),
            kv_block_bytes: self.kv_block_bytes,
            expert_bytes: self.expert_bytes.0,
            expert_bytes_used: self.expert_bytes.1,
            device_bytes: self.runner.device_bytes(),
            prefix_queries: scheduler.prefix_queries,
            prefix_hits: scheduler.prefix_hits,
            preemptions: scheduler.preemptions,
            steps: counters.steps,
            prompt_tokens: counters.prompt_tokens,
            generated_tokens: counters.generated_tokens,
            non_finite: counters.non_finite,
            routing_ms: counters.routing_ms,
            experts: self.experts.clone(),
            owners: self.runner.exchange().and_then(Exchange::owners),
            exchange: self.runner.exchange().map(Exchange::stats),
            eplb: self.balancer.as_ref().map(Rebalancer::stats),
            expert_cache: [self.cache.stats(), elsewhere].into_iter().flatten().reduce(Add::add),
            fetch_ms: counters.fetch_ms,
        }
    }

    /// Drops a request and frees its blocks; nothing more is heard of it.
    pub fn cancel(&mut self, id: RequestId) {
        self.scheduler.remove(id);
    }

    /// Whether any request is unfinished.
    pub fn is_busy(&self) -> bool {
        self.scheduler.is_busy()
    }

    /// One step: chooses tokens within the budget, submits them, and returns what the oldest
    /// submitted step sampled. Overlapping, the next step is already under way when it returns.
    ///
    /// # Errors
    /// [`crate::device::DeviceError`] if the device fails; all requests are then lost.
    pub fn step(&mut self) -> Result<Vec<Output>> {
        pollster::block_on(self.step_async())
    }

    /// [`Engine::step`] where nothing may block, as in browsers.
    ///
    /// # Errors
    /// Those of [`Engine::step`].
    pub async fn step_async(&mut self) -> Result<Vec<Output>> {
        let Some(step) = self.begin()? else { return Ok(Vec::new()) };
        let results = step.submission.wait().await?;
        let outputs = self.commit(step.sequences, &results);
        if let Some(counts) = self.last_counts_due() {
            let results = counts.wait().await?;
            self.count_experts(&results);
        }
        Ok(outputs)
    }

    /// The oldest submitted step; overlapping, after the next one is under way too.
    fn begin(&mut self) -> Result<Option<InFlight>> {
        let oldest = match self.in_flight.take() {
            Some(step) => step,
            None => match self.submit()? {
                Some(step) => step,
                None => return Ok(None),
            },
        };
        if self.config.overlap && !self.scheduler.running.iter().any(Sequence::needs_host) {
            self.in_flight = self.submit()?;
        }
        Ok(Some(oldest))
    }

    /// Moves the experts of at most one layer, so that no step waits for long.
    fn balance(&mut self) -> Result<()> {
        let Some(balancer) = &mut self.balancer else { return Ok(()) };
        balancer.look(self.counters.steps, &self.experts.tokens)?;
        if let Some((layer, new)) = balancer.next_move() {
            let (n, bytes) = self.runner.rearrange(layer, balancer.owners(layer), &new)?;
            balancer.moved(layer, new, n, bytes);
            self.expert_bytes = self.runner.model().expert_bytes();
        }
        Ok(())
    }

    fn submit(&mut self) -> Result<Option<InFlight>> {
        self.balance()?;
        if !self.scheduler.schedule() {
            return Ok(None);
        }
        let vocab_size = self.runner.model().spec.vocab_size;
        let mut sequences = Vec::new();
        for sequence in self.scheduler.running.iter_mut().filter(|s| s.n_scheduled > 0) {
            if let Some(row) = sequence.penalty_row_to_fill.take() {
                self.runner.fill_counts(row, sequence.prompt(), sequence.generated());
            }
            let (id, samples) = (sequence.id, sequence.samples());
            sequences.push(Sampled { id, rows: 0..0, samples });
        }
        let due = |interval: u64| interval > 0 && self.counters.steps.is_multiple_of(interval);
        let extras = Extras {
            expert_counts: due(self.config.expert_stats_interval),
            timed: due(self.config.routing_timing_interval),
            routed: self.config.routed_experts,
        };
        let running = self.scheduler.running.iter_mut().filter(|s| s.n_scheduled > 0);
        let batch = Batch { sequences: running.map(|s| s.batch(&self.eos, vocab_size)).collect() };
        let submission = self.runner.submit(&batch, extras)?;
        let running = self.scheduler.running.iter_mut().filter(|s| s.n_scheduled > 0);
        for ((sequence, sampled), rows) in running.zip(&mut sequences).zip(&submission.rows) {
            sampled.rows = rows.clone();
            sequence.submitted(sampled.samples.then(|| rows.end - 1));
        }
        self.counters.steps += 1;
        Ok(Some(InFlight { submission, sequences }))
    }

    /// The experts' counts on their way, once nothing else would bring them.
    fn last_counts_due(&mut self) -> Option<Submission> {
        let due = !self.is_busy() && self.config.expert_stats_interval > 0;
        if due { self.runner.expert_counts() } else { None }
    }

    fn count_experts(&mut self, results: &StepResults) {
        let counts = &results.expert_counts;
        if counts.is_empty() {
            return;
        }
        let model = self.runner.model();
        let of_caches = model.expert_caches().count() * CacheExperts::COUNTERS;
        let (counts, caches) = counts.split_at(counts.len() - of_caches);
        Arc::make_mut(&mut self.experts).add(&model.spec, &self.last_counts, counts);
        self.last_counts = counts.to_vec();
        for (layer, counters) in caches.chunks(CacheExperts::COUNTERS).enumerate() {
            self.cache.read(layer, counters);
        }
    }

    fn commit(&mut self, sequences: Vec<Sampled>, results: &StepResults) -> Vec<Output> {
        self.count_experts(results);
        if let Some(time) = results.routing_time {
            self.counters.routing_ms = Some(time.as_secs_f64() * 1e3);
        }
        if let Some(time) = results.fetch_time {
            self.counters.fetch_ms = Some(time.as_secs_f64() * 1e3);
        }
        let mut outputs = Vec::new();
        for Sampled { id, rows, samples } in sequences {
            // Requests that ended or were cancelled meanwhile are gone.
            let Some(sequence) = self.scheduler.get(id) else { continue };
            let scored = if samples { rows.start..rows.end - 1 } else { rows.clone() };
            if let Some(n) = sequence.params.prompt_logprobs {
                sequence.prompt_logprobs.extend(scored.map(|row| results.logprobs(row, n)));
            }
            if !samples {
                continue;
            }
            let row = rows.end - 1;
            let token = results.tokens[row];
            let finished = match token {
                Some(token) => sequence.append(token, &self.eos),
                None => Some(FinishReason::NonFinite),
            };
            self.counters.generated_tokens += u64::from(token.is_some());
            if sequence.is_first_token() {
                self.counters.prompt_tokens += sequence.prompt().len() as u64;
            }
            let failed = matches!(finished, Some(FinishReason::NonFinite | FinishReason::Mask));
            outputs.push(Output {
                request: id,
                token: token.filter(|_| !failed),
                logprobs: sequence.params.logprobs.map(|n| results.logprobs(row, n)),
                prompt_logprobs: std::mem::take(&mut sequence.prompt_logprobs),
                experts: results.routed.get(row).cloned().unwrap_or_default(),
                finished,
                cached_prompt_tokens: sequence.n_cached.unwrap_or(0),
            });
        }
        for output in outputs.iter().filter(|o| o.finished.is_some()) {
            if output.finished == Some(FinishReason::NonFinite) {
                self.counters.non_finite += 1;
                self.scheduler.remove_spoilt(output.request);
            } else {
                self.scheduler.remove(output.request);
            }
        }
        if !self.is_busy() {
            // Only tokens after the ends of texts are under way.
            self.in_flight = None;
        }
        outputs
    }
}

#[cfg(test)]
mod tests;
