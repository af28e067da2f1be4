//! What travels between a request's task and the engine's thread.

use std::time::Instant;

use tokio::sync::{mpsc, oneshot};

use crate::engine::{Output, Request};

use super::ApiError;

/// A request and where its tokens go.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) request: Request,
    /// Answers to the same prompt; events name them `first_choice..first_choice + n`.
    pub(super) n: usize,
    pub(super) first_choice: usize,
    pub(super) arrived: Instant,
    pub(super) events: mpsc::UnboundedSender<Event>,
    /// Hears whether the engine takes the request.
    pub(super) accepted: oneshot::Sender<Result<(), ApiError>>,
    /// The field that holds the prompt, for errors.
    pub(super) param: &'static str,
}

/// What a request hears from the engine.
#[derive(Debug)]
pub(super) enum Event {
    /// A token of choice `.0`, or its end.
    Output(usize, Output),
    /// The engine or this request failed.
    Failed(ApiError),
}

/// Why the server ends a request before the engine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// A stop string was found.
    Stop,
    /// The client is gone, too slow, or out of time.
    Abort,
}
