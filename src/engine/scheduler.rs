//! Which sequences compute how many tokens in the next step (vLLM v1/core/sched/scheduler.py):
//! no prefill or decode phases, each sequence just has tokens left to compute. When blocks run
//! out, the last sequence in order starts over later.

use std::collections::VecDeque;

use crate::model::Limits;

use super::{BlockPool, EngineError, Policy, RequestId, sequence::Sequence};

/// Queues and the cache's blocks.
#[derive(Debug)]
pub(super) struct Scheduler {
    limits: Limits,
    pub(super) pool: BlockPool,
    policy: Policy,
    /// In order.
    waiting: VecDeque<Sequence>,
    /// Sequences that hold blocks, in order.
    pub(super) running: Vec<Sequence>,
    free_penalty_rows: Vec<u32>,
    pub(super) preemptions: u64,
    /// Prompt tokens looked for among cached prefixes, and found.
    pub(super) prefix_queries: u64,
    pub(super) prefix_hits: u64,
}

/// What is left of a step.
struct Budget {
    tokens: usize,
    rows: usize,
}

impl Budget {
    /// Takes what `sequence` may compute in this step.
    fn spend(&mut self, sequence: &mut Sequence, n: usize) {
        sequence.n_scheduled = n;
        self.tokens -= n;
        self.rows -= sequence.n_rows(n);
    }
}

impl Scheduler {
    pub(super) fn new(limits: Limits, pool: BlockPool, policy: Policy) -> Self {
        Self {
            limits,
            pool,
            policy,
            waiting: VecDeque::new(),
            running: Vec::new(),
            free_penalty_rows: (0..limits.max_penalized as u32).rev().collect(),
            preemptions: 0,
            prefix_queries: 0,
            prefix_hits: 0,
        }
    }

    pub(super) fn check_fits(&self, tokens: usize) -> Result<(), EngineError> {
        let (blocks, block_size) = (self.pool.usable(), self.pool.block_size);
        if tokens.div_ceil(block_size) > blocks {
            return Err(EngineError::CacheTooSmall { blocks, block_size, tokens });
        }
        Ok(())
    }

    /// Queues a sequence behind those that go before it.
    pub(super) fn push(&mut self, sequence: Sequence) {
        let key = self.order(&sequence);
        let at = self.waiting.partition_point(|s| self.order(s) < key);
        self.waiting.insert(at, sequence);
    }

    fn order(&self, sequence: &Sequence) -> (i32, RequestId) {
        let priority = if self.policy == Policy::Priority { sequence.priority } else { 0 };
        (priority, sequence.id)
    }

    pub(super) fn n_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Positions in owned blocks that hold nothing yet; shared blocks are always full.
    pub(super) fn positions_empty(&self) -> usize {
        let size = self.pool.block_size;
        self.running.iter().map(|s| s.blocks.len() * size - s.n_computed).sum()
    }

    pub(super) fn is_busy(&self) -> bool {
        !self.waiting.is_empty() || !self.running.is_empty()
    }

    /// A request wherever it is.
    pub(super) fn get(&mut self, id: RequestId) -> Option<&mut Sequence> {
        self.running.iter_mut().chain(&mut self.waiting).find(|s| s.id == id)
    }

    /// Removes a request wherever it is.
    pub(super) fn remove(&mut self, id: RequestId) {
        self.waiting.retain(|s| s.id != id);
        if let Some(index) = self.running.iter().position(|s| s.id == id) {
            let mut sequence = self.running.remove(index);
            self.release(&mut sequence);
        }
    }

    /// Removes a request whose keys and values must not be found by others.
    pub(super) fn remove_spoilt(&mut self, id: RequestId) {
        if let Some(sequence) = self.running.iter().find(|s| s.id == id) {
            sequence.blocks.iter().for_each(|&block| self.pool.forget(block));
        }
        self.remove(id);
    }

    fn release(&mut self, sequence: &mut Sequence) {
        sequence.publish(&mut self.pool);
        self.pool.release(&mut sequence.blocks);
        self.free_penalty_rows.extend(sequence.penalty_row.take());
    }

    /// Sets `n_scheduled` of the running sequences within the limits of a step. Says whether there
    /// is anything to do.
    pub(super) fn schedule(&mut self) -> bool {
        let mut budget = Budget { tokens: self.limits.max_tokens, rows: self.limits.max_logits };
        self.running.iter_mut().for_each(|s| s.n_scheduled = 0);
        let (mut index, mut preempted) = (0, false);
        while index < self.running.len() && budget.tokens > 0 && budget.rows > 0 {
            let n = self.running[index].n_next(budget.tokens, budget.rows);
            if self.grow(index, n) {
                let sequence = &mut self.running[index];
                budget.spend(sequence, n);
                sequence.publish_with(&mut self.pool, sequence.n_computed + n);
                index += 1;
            } else {
                // The last in order gives way, perhaps this one itself.
                self.preempt();
                preempted = true;
            }
        }
        while !preempted && self.running.len() < self.limits.max_sequences {
            if budget.tokens == 0 || budget.rows == 0 || !self.admit(&mut budget) {
                break;
            }
        }
        self.running.iter().any(|s| s.n_scheduled > 0)
    }

    /// Makes all that is cached unfindable: what will be computed differs from it from now on.
    /// Running requests, whose blocks mix both, share no more of them.
    pub(super) fn forget_prefixes(&mut self) {
        self.pool.forget_all();
        self.running.iter_mut().for_each(Sequence::keep_private);
    }

    fn grow(&mut self, index: usize, n: usize) -> bool {
        let sequence = &mut self.running[index];
        let end = sequence.n_computed + n;
        self.pool.grow(&mut sequence.blocks, end)
    }

    fn preempt(&mut self) {
        let mut sequence = self.running.pop().expect("a running sequence lacks blocks");
        self.release(&mut sequence);
        sequence.start_over();
        self.preemptions += 1;
        self.push(sequence);
    }

    /// Starts the first waiting sequence if all its tokens find blocks.
    fn admit(&mut self, budget: &mut Budget) -> bool {
        let Some(mut sequence) = self.waiting.pop_front() else { return false };
        let penalizes = sequence.params.penalizes();
        let row = if penalizes { self.free_penalty_rows.pop() } else { None };
        let is_new = sequence.n_cached.is_none();
        if row.is_some() == penalizes && sequence.start(&mut self.pool) {
            if is_new {
                self.prefix_queries += sequence.prompt().len() as u64;
                self.prefix_hits += sequence.n_cached.unwrap_or(0) as u64;
            }
            sequence.penalty_row = row;
            sequence.penalty_row_to_fill = row;
            let n = sequence.n_next(budget.tokens, budget.rows);
            budget.spend(&mut sequence, n);
            sequence.publish_with(&mut self.pool, sequence.n_computed + n);
            let key = self.order(&sequence);
            let at = self.running.partition_point(|s| self.order(s) < key);
            self.running.insert(at, sequence);
            return true;
        }
        self.free_penalty_rows.extend(row);
        self.waiting.push_front(sequence);
        false
    }
}

#[cfg(test)]
mod tests;
