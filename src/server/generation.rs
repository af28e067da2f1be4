//! A request on its way: tokens from the engine's thread become pieces of text, stop strings are
//! found, ends are counted. Dropping it cancels the request. Knows no protocol.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::http::StatusCode;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

use crate::{
    engine::{FinishReason, Output, Request, TokenLogprobs},
    text::TextStream,
};

use super::{
    ApiError, App,
    job::{Ending, Event, Job},
    sampling::Ask,
    worker::{Admission, Ticket, finish_name},
};

/// Token counts of a request.
#[derive(Debug, Clone, Default)]
pub(super) struct Usage {
    prompt: usize,
    completion: usize,
    cached: usize,
}

impl Usage {
    pub(super) fn json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        })
    }
}

/// What became certain with one token of one choice.
#[derive(Debug, Default)]
pub(super) struct Delta {
    pub(super) choice: usize,
    /// May be empty: an unfinished character or the possible start of a stop string.
    pub(super) text: String,
    pub(super) token: Option<u32>,
    pub(super) logprobs: Option<TokenLogprobs>,
    /// Of the prompt's tokens from the second on, with the first delta.
    pub(super) prompt_logprobs: Vec<TokenLogprobs>,
    pub(super) first: bool,
    pub(super) finish: Option<&'static str>,
    /// The stop string or token that ended the answer.
    pub(super) stop_reason: Value,
}

struct Choice {
    prompt: usize,
    /// None without a tokenizer.
    text: Option<TextStream>,
    started: bool,
    finished: bool,
}

/// All choices of all prompts of one request.
pub(super) struct Generation {
    pub(super) usage: Usage,
    choices: Vec<Choice>,
    /// One per prompt.
    tickets: Vec<Ticket>,
    /// Which prompts' cached tokens are counted already. `[prompts]`
    cached_counted: Vec<bool>,
    events: mpsc::UnboundedReceiver<Event>,
    deadline: Option<Instant>,
    include_stop: bool,
    stop_token_ids: Vec<u32>,
    _admission: Admission,
}

impl Generation {
    /// Submits every prompt for `ask.n` choices, and waits until the engine has taken them.
    ///
    /// # Errors
    /// Why the engine does not take one.
    // Not an `async fn`: a future that holds `ask` could not move between threads.
    pub(super) fn start(
        app: &App,
        ask: &Ask,
        prompts: &[Vec<u32>],
        arrived: Instant,
        admission: Admission,
        param: &'static str,
    ) -> impl Future<Output = Result<Self, ApiError>> + use<> {
        let (sender, events) = mpsc::unbounded_channel();
        let mut choices = Vec::new();
        let (mut tickets, mut answers) = (Vec::new(), Vec::new());
        for (i, prompt) in prompts.iter().enumerate() {
            let mut request = Request::new(prompt.clone(), ask.params.clone());
            request.priority = ask.priority;
            request.mask = ask.mask.as_ref().map(|mask| mask.fork());
            request.cache_salt = ask.cache_salt.as_deref().map(Arc::from);
            let first_choice = choices.len();
            choices.extend((0..ask.n).map(|_| {
                let tokenizer = app.tokenizer.clone();
                let stream = |t| TextStream::new(t, ask.stop.clone(), ask.include_stop);
                let text = tokenizer.map(|t| stream(t).keep(ask.kept_tokens.clone()));
                Choice { prompt: i, text, started: false, finished: false }
            }));
            let events = sender.clone();
            let (accepted, answer) = oneshot::channel();
            answers.push(answer);
            let job = Job { request, n: ask.n, first_choice, arrived, events, accepted, param };
            tickets.push(app.engine.submit(job));
        }
        let prompt = prompts.iter().map(Vec::len).sum();
        let generation = Self {
            usage: Usage { prompt, ..Usage::default() },
            choices,
            cached_counted: vec![false; tickets.len()],
            tickets,
            events,
            deadline: app.config.request_timeout.map(|limit| arrived + limit),
            include_stop: ask.include_stop,
            stop_token_ids: ask.params.stop_token_ids.clone(),
            _admission: admission,
        };
        async move {
            for answer in answers {
                answer.await.map_err(|_| ApiError::unavailable("the engine has stopped"))??;
            }
            Ok(generation)
        }
    }

    pub(super) fn n_choices(&self) -> usize {
        self.choices.len()
    }

    /// The next delta; none when all choices have ended.
    ///
    /// # Errors
    /// What became of the whole request; it is cancelled then.
    pub(super) async fn next(&mut self) -> Result<Option<Delta>, ApiError> {
        while self.choices.iter().any(|choice| !choice.finished) {
            let event = match self.deadline {
                None => self.events.recv().await,
                Some(deadline) => {
                    match tokio::time::timeout_at(deadline.into(), self.events.recv()).await {
                        Ok(event) => event,
                        Err(_) => return Err(out_of_time()),
                    }
                }
            };
            match event {
                Some(Event::Output(choice, output)) => {
                    if let Some(delta) = self.take(choice, output) {
                        return Ok(Some(delta));
                    }
                }
                Some(Event::Failed(error)) => return Err(error),
                None => return Err(ApiError::unavailable("the engine has stopped")),
            }
        }
        Ok(None)
    }

    fn take(&mut self, index: usize, output: Output) -> Option<Delta> {
        let choice = self.choices.get_mut(index)?;
        // Tokens that were under way when a stop string ended the choice.
        let (Some(token), false) = (output.token, choice.finished) else { return None };
        self.usage.completion += 1;
        if !std::mem::replace(&mut self.cached_counted[choice.prompt], true) {
            self.usage.cached += output.cached_prompt_tokens;
        }
        let mut delta = Delta {
            choice: index,
            token: Some(token),
            logprobs: output.logprobs,
            prompt_logprobs: output.prompt_logprobs,
            first: !std::mem::replace(&mut choice.started, true),
            finish: output.finished.map(finish_name),
            ..Delta::default()
        };
        // The token that ends an answer is no part of its text.
        let silent = output.finished == Some(FinishReason::Stop) && !self.include_stop;
        if let Some(text) = &mut choice.text {
            if !silent {
                let piece = text.push(token);
                delta.text = piece.text;
                if let Some(stop) = piece.stopped {
                    delta.finish = Some("stop");
                    delta.stop_reason = Value::String(stop);
                    self.tickets[choice.prompt].end(index, Ending::Stop);
                }
            }
            if delta.finish.is_some() {
                delta.text += &text.finish();
            }
        }
        if delta.finish == Some("stop") && self.stop_token_ids.contains(&token) {
            delta.stop_reason = json!(token);
        }
        choice.finished = delta.finish.is_some();
        Some(delta)
    }

    /// Waits until the request ends, or `limit` passes without a token.
    pub(super) async fn next_within(
        &mut self,
        limit: Duration,
    ) -> Option<Result<Option<Delta>, ApiError>> {
        tokio::time::timeout(limit, self.next()).await.ok()
    }
}

fn out_of_time() -> ApiError {
    ApiError::new(StatusCode::GATEWAY_TIMEOUT, "the request took longer than --request-timeout")
}
