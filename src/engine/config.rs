//! Choices and limits of an engine beside those of a step ([`crate::model::Limits`]).

/// Who runs first when not all can.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// First come, first served.
    #[default]
    Fcfs,
    /// Lowest [`super::Request::priority`] first, then first come.
    Priority,
}

/// How an engine schedules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineConfig {
    /// Derives the seeds of requests that bring none.
    pub seed: u64,
    /// Requests that may wait; more are refused with [`super::EngineError::QueueFull`].
    pub max_queue: usize,
    /// Order of waiting requests.
    pub policy: Policy,
    /// Share cache blocks among requests with the same beginning.
    pub prefix_caching: bool,
    /// Submit a step before the host has read the tokens of the one before.
    pub overlap: bool,
    /// Steps from one reading of the experts' counts to the next, beside the one at the end of all
    /// work; 0 never reads them.
    pub expert_stats_interval: u64,
    /// Steps from one timing of the router to the next; 0 never times it. A timed step waits for
    /// the device between its kernels.
    pub routing_timing_interval: u64,
    /// Report with each token which experts computed it.
    pub routed_experts: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            max_queue: 1024,
            policy: Policy::Fcfs,
            prefix_caching: true,
            overlap: true,
            expert_stats_interval: 16,
            routing_timing_interval: 0,
            routed_experts: false,
        }
    }
}
