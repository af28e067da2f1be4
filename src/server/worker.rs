//! The thread that owns the engine, and the handle through which everybody else reaches it.
//! Requests go in as [`Job`]s, tokens come out as [`Event`]s; dropping a [`Ticket`] cancels its
//! request at the next step. Knows no text and no HTTP.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use tokio::sync::{mpsc as tasks, oneshot};

use crate::{
    Error, Result,
    engine::{
        Engine, EngineError, EngineStats, FinishReason, Output, Request, RequestId, SamplingParams,
    },
    model::NewExperts,
    parallel::ParallelError,
};

use super::{
    ApiError,
    failure::{Cause, Death, attempt},
    job::{Ending, Event, Job},
    metrics::{Metrics, Phase, RequestTimes},
};

/// Makes the engine, at the start and again after the device was lost.
pub type Build = Box<dyn FnMut() -> Result<Engine> + Send>;

/// Attempts to load the model again, and engines in a row that may fail without having finished a
/// request, before the worker gives up.
const MAX_REBUILDS: u32 = 3;
/// Silence of a worker that will not speak again: drivers can hang where no time limit reaches.
const HUNG: Duration = Duration::from_secs(300);
/// How often an idle worker shows that it is alive.
const IDLE_TICK: Duration = Duration::from_millis(500);
/// Statistics are copied at most this often while the engine is busy.
const STATS_INTERVAL: Duration = Duration::from_millis(100);

enum Command {
    Submit(u64, Box<Job>),
    /// Ends one choice of a job, or all of them.
    End(u64, Option<usize>, Ending),
    /// Fails everything with this error, as at the end of a drain.
    FailAll(ApiError),
    /// Replaces and adds experts before the next step, and says how that went.
    Take(NewExperts, oneshot::Sender<Result<(), ApiError>>),
}

/// What the worker shows to everybody.
#[derive(Debug)]
struct Shared {
    stats: Mutex<EngineStats>,
    started: Instant,
    /// Milliseconds after `started` when the worker was last seen.
    heartbeat: AtomicU64,
    death: OnceLock<Death>,
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
            death: OnceLock::new(),
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
            taken: NewExperts::default(),
            fruitless: 0,
            published: Instant::now(),
            last: EngineStats::default(),
        };
        *lock(&shared.stats) = engine.stats();
        thread::spawn(move || worker.run(engine));
        Ok(Self { commands, shared })
    }

    /// Admits a job if the queue has room.
    pub(super) fn admit(&self) -> Result<Admission, ApiError> {
        if self.death().is_some() {
            return Err(ApiError::unavailable("the engine has stopped; the server is restarting"));
        }
        if self.is_rebuilding() {
            return Err(ApiError::unavailable("the device failed; the model is loading again"));
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

    /// Replaces and adds experts before the next step: all or none.
    pub(super) async fn take_experts(&self, new: NewExperts) -> Result<(), ApiError> {
        let (done, answer) = oneshot::channel();
        let _ = self.commands.send(Command::Take(new, done));
        let gone = |_| ApiError::unavailable("the engine has stopped; the server is restarting");
        answer.await.map_err(gone)?
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

    /// Why the worker has given up for good, if it has.
    pub fn death(&self) -> Option<Death> {
        let hangs = self.silence() > HUNG && !self.is_rebuilding();
        self.shared.death.get().copied().or(hangs.then_some(Death::DeviceLost))
    }

    /// Whether a token can be produced now: the engine exists and its thread was seen within
    /// `stall`.
    pub fn is_healthy(&self, stall: Duration) -> bool {
        self.death().is_none() && !self.is_rebuilding() && self.silence() < stall
    }

    /// Whether a token is produced within `limit`: this asks for one, and any request's counts.
    pub(super) async fn prove(&self, limit: Duration) -> bool {
        let before = self.stats().generated_tokens;
        let params = SamplingParams { max_tokens: Some(1), ..SamplingParams::greedy() };
        let _ticket = self.submit(Job {
            request: Request::new(vec![0], params),
            n: 1,
            first_choice: 0,
            arrived: Instant::now(),
            events: tasks::unbounded_channel().0,
            accepted: oneshot::channel().0,
            param: "prompt",
        });
        let produced = async {
            while self.stats().generated_tokens == before {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(limit, produced).await.is_ok()
    }

    fn is_rebuilding(&self) -> bool {
        self.shared.rebuilding.load(Ordering::Relaxed)
    }

    /// Time since the worker was last seen.
    fn silence(&self) -> Duration {
        let seen = Duration::from_millis(self.shared.heartbeat.load(Ordering::Relaxed));
        self.shared.started.elapsed().saturating_sub(seen)
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
    /// Experts that are not the checkpoint's: an engine that is made again gets them, too.
    taken: NewExperts,
    /// Engines in a row that failed without having finished a request.
    fruitless: u32,
    published: Instant,
    last: EngineStats,
}

impl Worker {
    /// Until the last handle is gone or the engine cannot be made again.
    fn run(&mut self, mut engine: Engine) {
        let death = loop {
            let Err(cause) = self.serve(&mut engine) else { return };
            self.shared.rebuilding.store(true, Ordering::Relaxed);
            self.metrics.device_failed(cause.label());
            self.fail_all(&cause.answer());
            self.fruitless += 1;
            if cause == Cause::Hang {
                // Giving its memory back would wait for the device.
                std::mem::forget(engine);
                break cause.death();
            }
            // The old device's memory must be free before the new one asks for as much.
            drop(engine);
            if self.fruitless > MAX_REBUILDS {
                break cause.death();
            }
            match self.rebuild() {
                Ok(new) => engine = new,
                Err(cause) => break cause.death(),
            }
            self.alive();
            self.shared.rebuilding.store(false, Ordering::Relaxed);
        };
        let _ = self.shared.death.set(death);
        self.fail_all(&ApiError::unavailable("the engine has stopped; the server is restarting"));
    }

    fn rebuild(&mut self) -> Result<Engine, Cause> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let (build, taken) = (&mut self.build, &self.taken);
            let again = || {
                let mut engine = build()?;
                if !taken.experts.is_empty() {
                    engine.take_experts(taken)?;
                }
                Ok(engine)
            };
            match attempt("loading the model again", again) {
                Err(cause) if attempts == MAX_REBUILDS => return Err(cause),
                Err(_) => thread::sleep(Duration::from_secs(u64::from(attempts))),
                engine => return engine,
            }
        }
    }

    /// Steps until the handles are gone, or the engine has failed.
    fn serve(&mut self, engine: &mut Engine) -> Result<(), Cause> {
        while self.take_commands(engine) {
            self.alive();
            if engine.is_busy() {
                let outputs = attempt("a step", || engine.step())?;
                self.deliver(engine, outputs);
            } else {
                attempt("a look at the idle device", || engine.probe())?;
            }
            if !engine.is_busy() || self.published.elapsed() > STATS_INTERVAL {
                self.publish(engine);
            }
        }
        Ok(())
    }

    fn alive(&self) {
        let now = self.shared.started.elapsed().as_millis() as u64;
        self.shared.heartbeat.store(now, Ordering::Relaxed);
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
            Command::Take(new, done) => {
                let taken = engine.take_experts(&new).map_err(|error| {
                    eprintln!("error: experts were not taken: {error}");
                    match error {
                        Error::Parallel(ParallelError::NewExperts { .. }) => {
                            ApiError::field("file", error.to_string())
                        }
                        _ => {
                            ApiError::unavailable("the device failed; the experts are the old ones")
                        }
                    }
                });
                if taken.is_ok() {
                    self.taken.merge(new);
                    // Who packs the next file looks there.
                    self.publish(engine);
                }
                let _ = done.send(taken);
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
                self.fruitless = 0;
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
