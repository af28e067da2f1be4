//! The thread that owns the engine, and the handle through which everybody else reaches it.
//! Requests go in as [`Job`]s, tokens come out as [`Event`]s; dropping a [`Ticket`] cancels its
//! request at the next step. Knows no text and no HTTP.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use tokio::sync::{mpsc as tasks, oneshot};

use crate::{
    Result,
    engine::{Engine, EngineError, EngineStats, FinishReason, Output, Request, RequestId},
};

use super::{
    ApiError,
    metrics::{Metrics, Phase, RequestTimes},
};

/// Makes the engine, at the start and again after the device was lost.
pub type Build = Box<dyn FnMut() -> Result<Engine> + Send>;

/// Engines in a row that may fail before the worker gives up.
const MAX_REBUILDS: u32 = 3;
/// How often an idle worker shows that it is alive.
const IDLE_TICK: Duration = Duration::from_millis(500);
/// Statistics are copied at most this often while the engine is busy.
const STATS_INTERVAL: Duration = Duration::from_millis(100);

/// A request and where its tokens go.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) request: Request,
    /// Answers to the same prompt; events name them `first_choice..first_choice + n`.
    pub(super) n: usize,
    pub(super) first_choice: usize,
    pub(super) arrived: Instant,
    pub(super) events: tasks::UnboundedSender<Event>,
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

enum Command {
    Submit(u64, Box<Job>),
    /// Ends one choice of a job, or all of them.
    End(u64, Option<usize>, Ending),
    /// Fails everything with this error, as at the end of a drain.
    FailAll(ApiError),
}

/// What the worker shows to everybody.
#[derive(Debug)]
struct Shared {
    stats: Mutex<EngineStats>,
    started: Instant,
    /// Milliseconds after `started` when the worker was last seen.
    heartbeat: AtomicU64,
    dead: AtomicBool,
    /// The engine is being made again.
    rebuilding: AtomicBool,
    /// Jobs that exist, waiting to be parsed or running.
    jobs: AtomicUsize,
    max_jobs: usize,
    next_job: AtomicU64,
}

/// Reaches the engine's thread; cheap to clone.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
}

impl EngineHandle {
    /// Starts the worker and waits until `build` has made the first engine.
    ///
    /// # Errors
    /// Those of `build`.
    pub fn start(mut build: Build, metrics: Arc<Metrics>, max_jobs: usize) -> Result<Self> {
        let shared = Arc::new(Shared {
            stats: Mutex::default(),
            started: Instant::now(),
            heartbeat: AtomicU64::new(0),
            dead: AtomicBool::new(false),
            rebuilding: AtomicBool::new(false),
            jobs: AtomicUsize::new(0),
            max_jobs,
            next_job: AtomicU64::new(0),
        });
        let engine = build()?;
        let (commands, inbox) = mpsc::channel();
        let mut worker = Worker {
            shared: shared.clone(),
            metrics,
            inbox,
            build,
            live: HashMap::new(),
            published: Instant::now(),
            last: EngineStats::default(),
        };
        *lock(&shared.stats) = engine.stats();
        thread::spawn(move || worker.run(engine));
        Ok(Self { commands, shared })
    }

    /// Admits a job if the queue has room.
    pub(super) fn admit(&self) -> Result<Admission, ApiError> {
        if self.shared.dead.load(Ordering::Relaxed) {
            return Err(ApiError::unavailable("the engine has stopped; the server is restarting"));
        }
        if self.shared.rebuilding.load(Ordering::Relaxed) {
            return Err(ApiError::unavailable("the device was lost; the model is loading again"));
        }
        let jobs = self.shared.jobs.fetch_add(1, Ordering::Relaxed);
        let admission = Admission(self.clone());
        if jobs >= self.shared.max_jobs {
            return Err(ApiError::unavailable("too many requests are waiting; try again later"));
        }
        Ok(admission)
    }

    /// Sends a job on its way.
    pub(super) fn submit(&self, job: Job) -> Ticket {
        let id = self.shared.next_job.fetch_add(1, Ordering::Relaxed);
        let _ = self.commands.send(Command::Submit(id, Box::new(job)));
        Ticket { handle: self.clone(), id }
    }

    /// Fails all requests.
    pub(super) fn fail_all(&self, error: ApiError) {
        let _ = self.commands.send(Command::FailAll(error));
    }

    /// The engine's numbers, at most a fraction of a second old.
    pub fn stats(&self) -> EngineStats {
        lock(&self.shared.stats).clone()
    }

    /// Requests that are admitted and not yet answered.
    pub fn n_open(&self) -> usize {
        self.shared.jobs.load(Ordering::Relaxed)
    }

    /// Whether the worker has given up for good.
    pub fn is_dead(&self) -> bool {
        self.shared.dead.load(Ordering::Relaxed)
    }

    /// Whether a token can be produced now: the engine exists and its thread was seen within
    /// `stall`.
    pub fn is_healthy(&self, stall: Duration) -> bool {
        let seen = Duration::from_millis(self.shared.heartbeat.load(Ordering::Relaxed));
        let silent = self.shared.started.elapsed().saturating_sub(seen);
        !self.is_dead() && !self.shared.rebuilding.load(Ordering::Relaxed) && silent < stall
    }
}

/// A place among the open requests, given back on drop.
#[derive(Debug)]
pub(super) struct Admission(EngineHandle);

impl Drop for Admission {
    fn drop(&mut self) {
        self.0.shared.jobs.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A submitted job; dropping it cancels what is unfinished.
#[derive(Debug)]
pub(super) struct Ticket {
    handle: EngineHandle,
    id: u64,
}

impl Ticket {
    /// Ends one choice.
    pub(super) fn end(&self, choice: usize, ending: Ending) {
        let _ = self.handle.commands.send(Command::End(self.id, Some(choice), ending));
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let _ = self.handle.commands.send(Command::End(self.id, None, Ending::Abort));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One choice of a job inside the engine.
struct Live {
    job: u64,
    choice: usize,
    priority: i32,
    events: tasks::UnboundedSender<Event>,
    times: RequestTimes,
}

struct Worker {
    shared: Arc<Shared>,
    metrics: Arc<Metrics>,
    inbox: mpsc::Receiver<Command>,
    build: Build,
    live: HashMap<RequestId, Live>,
    published: Instant,
    last: EngineStats,
}

impl Worker {
    /// Until the last handle is gone or the engine cannot be made again.
    fn run(&mut self, mut engine: Engine) {
        while self.serve(&mut engine) {
            let gone = ApiError::unavailable("the device failed; the model is loading again");
            self.fail_all(&gone);
            self.shared.rebuilding.store(true, Ordering::Relaxed);
            // The old device's memory must be free before the new one asks for as much.
            drop(engine);
            match self.rebuild() {
                Some(new) => engine = new,
                None => break,
            }
            self.shared.rebuilding.store(false, Ordering::Relaxed);
        }
        self.shared.dead.store(true, Ordering::Relaxed);
        self.fail_all(&ApiError::unavailable("the engine has stopped"));
    }

    fn rebuild(&mut self) -> Option<Engine> {
        for attempt in 1..=MAX_REBUILDS {
            match catch_unwind(AssertUnwindSafe(|| (self.build)())) {
                Ok(Ok(engine)) => return Some(engine),
                Ok(Err(error)) => eprintln!("error: the model cannot be loaded again: {error}"),
                Err(_) => eprintln!("error: loading the model again panicked"),
            }
            thread::sleep(Duration::from_secs(u64::from(attempt)));
        }
        None
    }

    /// Steps until the handles are gone (false) or the engine has failed (true).
    fn serve(&mut self, engine: &mut Engine) -> bool {
        loop {
            if !self.take_commands(engine) {
                return false;
            }
            let alive = self.shared.started.elapsed().as_millis() as u64;
            self.shared.heartbeat.store(alive, Ordering::Relaxed);
            if engine.is_busy() {
                let step = catch_unwind(AssertUnwindSafe(|| engine.step()));
                match step {
                    Ok(Ok(outputs)) => self.deliver(engine, outputs),
                    Ok(Err(error)) => {
                        eprintln!("error: a step failed: {error}");
                        return true;
                    }
                    Err(_) => {
                        eprintln!("error: a step panicked");
                        return true;
                    }
                }
            }
            if !engine.is_busy() || self.published.elapsed() > STATS_INTERVAL {
                self.publish(engine);
            }
        }
    }

    /// Handles what has arrived; waits for something if the engine has nothing to do. False when
    /// nobody can send any more.
    fn take_commands(&mut self, engine: &mut Engine) -> bool {
        if !engine.is_busy() {
            match self.inbox.recv_timeout(IDLE_TICK) {
                Ok(command) => self.handle(engine, command),
                Err(mpsc::RecvTimeoutError::Timeout) => return true,
                Err(mpsc::RecvTimeoutError::Disconnected) => return false,
            }
        }
        while let Ok(command) = self.inbox.try_recv() {
            self.handle(engine, command);
        }
        true
    }

    fn handle(&mut self, engine: &mut Engine, command: Command) {
        match command {
            Command::Submit(id, job) => self.submit(engine, id, *job),
            Command::End(job, choice, ending) => {
                let ends = |live: &Live| live.job == job && choice.is_none_or(|c| c == live.choice);
                let ids: Vec<_> =
                    self.live.iter().filter(|(_, l)| ends(l)).map(|(&id, _)| id).collect();
                for id in ids {
                    engine.cancel(id);
                    if let Some(live) = self.live.remove(&id) {
                        let reason = if ending == Ending::Stop { "stop" } else { "abort" };
                        self.metrics.finished(&live.times, reason);
                    }
                }
            }
            Command::FailAll(error) => {
                for &id in self.live.keys() {
                    engine.cancel(id);
                }
                self.fail_all(&error);
            }
        }
    }

    fn submit(&mut self, engine: &mut Engine, id: u64, job: Job) {
        let mut times =
            RequestTimes::new(job.arrived, job.request.prompt.len(), job.request.params.max_tokens);
        let (n, param) = (job.n, job.param);
        times.n = n;
        match engine.add_n(&job.request, n) {
            Ok(requests) => {
                let _ = job.accepted.send(Ok(()));
                for (i, request) in requests.into_iter().enumerate() {
                    let (choice, events) = (job.first_choice + i, job.events.clone());
                    let times = times.clone();
                    let priority = job.request.priority;
                    self.live.insert(request, Live { job: id, choice, priority, events, times });
                }
            }
            Err(error) => {
                let _ = job.accepted.send(Err(ApiError::of_prompt(&error, param)));
            }
        }
    }

    /// Sends outputs to their requests and notes the times.
    fn deliver(&mut self, engine: &Engine, outputs: Vec<Output>) {
        let now = Instant::now();
        self.note_started(engine, now);
        for output in outputs {
            let finished = output.finished;
            let Some(live) = self.live.get_mut(&output.request) else { continue };
            if output.token.is_some() {
                self.metrics.token(&mut live.times, now);
            }
            let id = output.request;
            let _ = match finished {
                Some(FinishReason::NonFinite) => live.events.send(failed(EngineError::NonFinite)),
                Some(FinishReason::Mask) => live.events.send(failed(EngineError::Mask)),
                _ => live.events.send(Event::Output(live.choice, output)),
            };
            if let (Some(reason), Some(live)) =
                (finished, finished.and_then(|_| self.live.remove(&id)))
            {
                self.metrics.finished(&live.times, finish_name(reason));
            }
        }
    }

    /// Lowest priority first, then first come: all but the last `waiting` have left the queue.
    fn note_started(&mut self, engine: &Engine, now: Instant) {
        let stats = engine.stats();
        self.metrics.step(&self.last, &stats);
        let fresh = self.live.iter().filter(|(_, live)| live.times.phase == Phase::Queued);
        let mut queued: Vec<_> = fresh.map(|(&id, live)| (live.priority, id)).collect();
        queued.sort_unstable();
        let n_started = queued.len().saturating_sub(stats.waiting);
        for (_, id) in &queued[..n_started] {
            if let Some(live) = self.live.get_mut(id) {
                live.times.start(now);
            }
        }
        self.last = stats;
    }

    fn publish(&mut self, engine: &Engine) {
        self.published = Instant::now();
        *lock(&self.shared.stats) = engine.stats();
    }

    fn fail_all(&mut self, error: &ApiError) {
        for (_, live) in self.live.drain() {
            self.metrics.finished(&live.times, "error");
            let _ = live.events.send(Event::Failed(error.clone()));
        }
        *lock(&self.shared.stats) = EngineStats { running: 0, waiting: 0, ..self.last.clone() };
    }
}

fn failed(error: EngineError) -> Event {
    Event::Failed(ApiError::of_prompt(&error.into(), "prompt"))
}

/// OpenAI's and vLLM's word for the end of an answer.
pub(super) fn finish_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::NonFinite | FinishReason::Mask => "error",
    }
}
