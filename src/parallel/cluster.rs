//! Experts on other hosts: the ranks of an MPI job. Rank 0 has the model, every other rank a share
//! of the experts, which it reads from its own copy of the checkpoint. One thread of rank 0 makes
//! all calls to MPI, so that a rank that never answers holds up nobody but that thread.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use mpi::{
    Threading,
    point_to_point::{Destination, MatchedReceiveVec, Message, Source, Status},
    topology::{Communicator, SimpleCommunicator},
};
use serde_json::{Value, json};

use crate::Result;

use super::{CacheSlots, CacheStats, Owners, ParallelError, Rows, Worker};

/// Tag of messages from rank 0.
const ASK: i32 = 1;
/// Tag of messages to it.
const ANSWER: i32 = 2;
/// How long rank 0 waits for its MPI thread when all is done.
const FAREWELL: Duration = Duration::from_secs(10);
/// How long an idle rank sleeps between looks at its messages, after as many looks without.
const IDLE: (u32, Duration) = (20_000, Duration::from_micros(200));

fn failed(cause: impl Into<String>) -> ParallelError {
    ParallelError::Cluster { cause: cause.into() }
}

/// The job that this process is rank 0 of.
#[derive(Debug)]
pub struct Cluster {
    calls: Mutex<mpsc::Sender<Call>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    n_ranks: usize,
    /// A rank did not answer; nothing can be asked any more.
    is_broken: AtomicBool,
}

#[derive(Debug)]
enum Call {
    Ask { rank: usize, message: Vec<u8>, answer: mpsc::Sender<Vec<u8>> },
    Finish,
}

static CLUSTER: OnceLock<Cluster> = OnceLock::new();

impl Cluster {
    /// Joins the job as rank 0; MPI is started once in a process.
    ///
    /// # Errors
    /// [`ParallelError::Cluster`] outside of a job, in another rank, and after a rank was lost.
    pub fn join() -> Result<&'static Self> {
        if CLUSTER.get().is_none() {
            let (calls, inbox) = mpsc::channel();
            let (started, size) = mpsc::channel();
            let thread = thread::spawn(move || primary(&inbox, &started));
            let no_thread = |_| failed("MPI did not start");
            let n_ranks = size.recv().map_err(no_thread)??;
            let (calls, thread) = (Mutex::new(calls), Mutex::new(Some(thread)));
            let is_broken = AtomicBool::new(false);
            let _ = CLUSTER.set(Self { calls, thread, n_ranks, is_broken });
        }
        let cluster = CLUSTER.get().ok_or_else(|| failed("MPI did not start"))?;
        match cluster.is_broken.load(Ordering::Relaxed) {
            true => Err(failed("a rank was lost; start the job again").into()),
            false => Ok(cluster),
        }
    }

    /// Ranks of the job, this one included.
    pub fn n_ranks(&self) -> usize {
        self.n_ranks
    }

    fn ask(&self, rank: usize, message: Vec<u8>) -> mpsc::Receiver<Vec<u8>> {
        let (answer, receiver) = mpsc::channel();
        let calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody answers if the thread is gone.
        let _ = calls.send(Call::Ask { rank, message, answer });
        receiver
    }
}

/// Ends the job: the other ranks leave, and MPI is shut down. For the end of a program that did
/// well; one that did not exits without, and takes the job with it.
pub fn finish() {
    let Some(cluster) = CLUSTER.get().filter(|c| !c.is_broken.load(Ordering::Relaxed)) else {
        return;
    };
    let _ = cluster.calls.lock().unwrap_or_else(PoisonError::into_inner).send(Call::Finish);
    let thread = cluster.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(thread) = thread else { return };
    let (done, wait) = mpsc::channel();
    thread::spawn(move || {
        let _ = thread.join();
        let _ = done.send(());
    });
    let _ = wait.recv_timeout(FAREWELL);
}

/// The thread of rank 0 that talks to the others.
fn primary(inbox: &mpsc::Receiver<Call>, started: &mpsc::Sender<Result<usize, ParallelError>>) {
    let Some((universe, _)) = mpi::initialize_with_threading(Threading::Funneled) else {
        let _ = started.send(Err(failed("MPI was started before")));
        return;
    };
    let world = universe.world();
    let size = match (world.rank(), world.size() as usize) {
        (0, 1) => Err(failed("there is one rank only; start with mpirun, and workers beside")),
        (0, size) => Ok(size),
        (rank, _) => Err(failed(format!("this is rank {rank}; ranks but 0 run `moewe worker`"))),
    };
    let is_primary = size.is_ok();
    let _ = started.send(size);
    if !is_primary {
        return;
    }
    let mut waiting: Vec<(usize, mpsc::Sender<Vec<u8>>)> = Vec::new();
    loop {
        let call = match waiting.is_empty() {
            true => Some(inbox.recv().unwrap_or(Call::Finish)),
            false => inbox.try_recv().ok(),
        };
        match call {
            Some(Call::Ask { rank, message, answer }) => {
                world.process_at_rank(rank as i32).send_with_tag(&message[..], ASK);
                waiting.push((rank, answer));
            }
            Some(Call::Finish) => break,
            None => thread::yield_now(),
        }
        waiting.retain(|(rank, answer)| match received(&world, *rank, ANSWER) {
            Some(bytes) => {
                // Whoever asked may have given up.
                let _ = answer.send(bytes);
                false
            }
            None => true,
        });
    }
    for rank in 1..world.size() {
        world.process_at_rank(rank).send_with_tag(&[0u8; 0][..], ASK);
    }
}

/// A message of a rank, if one is here.
fn received(world: &SimpleCommunicator, rank: usize, tag: i32) -> Option<Vec<u8>> {
    let found: Option<(Message, Status)> =
        world.process_at_rank(rank as i32).immediate_matched_probe_with_tag(tag);
    found.map(|message| message.matched_receive_vec::<u8>().0)
}

/// A header and raw bytes behind it.
fn message(header: &Value, parts: &[&[u8]]) -> Vec<u8> {
    let header = header.to_string();
    let mut bytes = (header.len() as u32).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    parts.iter().for_each(|part| bytes.extend(*part));
    bytes
}

fn parse(bytes: &[u8]) -> Option<(Value, &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (header, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    Some((serde_json::from_slice(header).ok()?, rest))
}

/// What a rank is to hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// By layer that has experts.
    pub owners: Vec<Owners>,
    /// Which rank.
    pub rank: usize,
    /// As in [`super::Share`].
    pub redundant: Option<usize>,
    /// As in [`super::ExpertLayout`].
    pub slots: Option<CacheSlots>,
    /// Rows of a step at most.
    pub max_tokens: usize,
    /// Packing of the experts, as [`crate::weights::WeightFormat`] writes it.
    pub weights: String,
    /// The same number for the same model.
    pub model: u64,
}

fn held(owners: &Owners) -> Value {
    (0..owners.n_ranks()).map(|rank| json!(owners.held(rank))).collect()
}

fn owners(held: &Value) -> Option<Owners> {
    let held: Vec<Vec<usize>> = serde_json::from_value(held.clone()).ok()?;
    let n_experts = held.iter().flatten().max().map_or(0, |last| last + 1);
    Owners::new(n_experts, held).ok()
}

impl Assignment {
    fn to_json(&self) -> Value {
        json!({
            "op": "load",
            "owners": self.owners.iter().map(held).collect::<Value>(),
            "rank": self.rank,
            "redundant": self.redundant,
            "slots": self.slots.map(|slots| json!([slots.n, slots.policy.to_string()])),
            "max_tokens": self.max_tokens,
            "weights": self.weights,
            "model": self.model,
        })
    }

    fn from_json(header: &Value) -> Option<Self> {
        let number = |key: &str| header.get(key).and_then(Value::as_u64);
        Some(Self {
            owners: header["owners"].as_array()?.iter().map(owners).collect::<Option<_>>()?,
            rank: number("rank")? as usize,
            redundant: number("redundant").map(|n| n as usize),
            slots: match &header["slots"] {
                Value::Null => None,
                slots => Some(CacheSlots {
                    n: slots[0].as_u64()? as usize,
                    policy: slots[1].as_str()?.parse().ok()?,
                }),
            },
            max_tokens: number("max_tokens")? as usize,
            weights: header["weights"].as_str()?.to_owned(),
            model: number("model")?,
        })
    }
}

/// Another rank, as rank 0 sees it.
#[derive(Debug)]
pub struct Remote {
    cluster: &'static Cluster,
    rank: usize,
    timeout: Duration,
    /// Answers on their way, in order.
    pending: VecDeque<mpsc::Receiver<Vec<u8>>>,
    /// As of the last answer.
    cache: Option<CacheStats>,
}

impl Remote {
    /// Tells a rank what to load; [`Remote::loaded`] waits for it. No answer may take longer than
    /// `timeout`, but for that first one.
    pub fn assign(cluster: &'static Cluster, assignment: &Assignment, timeout: Duration) -> Self {
        let rank = assignment.rank;
        let pending = [cluster.ask(rank, message(&assignment.to_json(), &[]))].into();
        Self { cluster, rank, timeout, pending, cache: None }
    }

    /// Waits until the rank has loaded its experts.
    ///
    /// # Errors
    /// What it says, or [`ParallelError::Cluster`].
    pub fn loaded(&mut self) -> Result<()> {
        let loading = self.timeout.max(Duration::from_secs(3600));
        self.answer(loading).map(drop)
    }

    fn ask(&mut self, header: &Value, parts: &[&[u8]]) -> Result<Vec<u8>> {
        self.pending.push_back(self.cluster.ask(self.rank, message(header, parts)));
        self.answer(self.timeout)
    }

    fn answer(&mut self, timeout: Duration) -> Result<Vec<u8>> {
        let Some(pending) = self.pending.pop_front() else { return Ok(Vec::new()) };
        let answer = pending.recv_timeout(timeout).map_err(|_| {
            self.cluster.is_broken.store(true, Ordering::Relaxed);
            failed(format!("it did not answer within {} s", timeout.as_secs()))
        })?;
        match answer.split_first() {
            Some((0, rest)) => Ok(rest.to_vec()),
            Some((_, words)) => Err(failed(String::from_utf8_lossy(words)).into()),
            None => Err(failed("it sent nothing").into()),
        }
    }
}

impl Worker for Remote {
    fn submit(&mut self, layer: usize, rows: &Rows<'_>) -> Result<()> {
        let header = json!({"op": "rows", "layer": layer, "n": rows.n, "top_k": rows.ids.len()});
        let parts: [&[u8]; 3] =
            [bytemuck::cast_slice(rows.ids), bytemuck::cast_slice(rows.weights), rows.x];
        self.pending.push_back(self.cluster.ask(self.rank, message(&header, &parts)));
        Ok(())
    }

    fn finish(&mut self, take: &mut dyn FnMut(&[f32])) -> Result<()> {
        let answer = self.answer(self.timeout)?;
        let (header, sums) = parse(&answer).ok_or_else(|| failed("sums were cut off"))?;
        self.cache = serde_json::from_value(header).unwrap_or_default();
        take(&bytemuck::pod_collect_to_vec::<u8, f32>(sums));
        Ok(())
    }

    fn cache_stats(&self) -> Option<CacheStats> {
        self.cache
    }

    fn read_expert(&mut self, layer: usize, place: usize) -> Result<Vec<u8>> {
        self.ask(&json!({"op": "read", "layer": layer, "place": place}), &[])
    }

    fn write_expert(&mut self, layer: usize, place: usize, packed: &[u8]) -> Result<()> {
        self.ask(&json!({"op": "write", "layer": layer, "place": place}), &[packed]).map(drop)
    }

    fn rearrange(
        &mut self,
        layer: usize,
        (old, new): (&Owners, &Owners),
        rank: usize,
        packed: &HashMap<usize, Vec<u8>>,
    ) -> Result<()> {
        let coming: Vec<usize> = new.changes(old, rank).into_iter().map(|(_, e)| e).collect();
        let parts: Vec<&[u8]> = coming.iter().map(|expert| &packed[expert][..]).collect();
        let header = json!({
            "op": "rearrange", "layer": layer, "rank": rank, "old": held(old), "new": held(new),
            "experts": coming,
        });
        self.ask(&header, &parts).map(drop)
    }

    fn forget(&mut self) {
        self.pending.clear();
    }

    /// A rank that dies takes the job with it, so only silence is left to know of.
    fn probe(&self) -> Result<()> {
        match self.cluster.is_broken.load(Ordering::Relaxed) {
            true => Err(failed("it did not answer").into()),
            false => Ok(()),
        }
    }

    fn describe(&self) -> String {
        format!("rank {} of the MPI job", self.rank)
    }
}

/// Works for rank 0 until that says goodbye. `load` makes what the rank computes with.
///
/// # Errors
/// [`ParallelError::Cluster`] outside of a job and in rank 0; those of `load`, which rank 0 hears
/// too.
pub fn serve_rank<W: Worker>(load: impl Fn(&Assignment) -> Result<W>) -> Result<()> {
    let started = mpi::initialize_with_threading(Threading::Single);
    let (universe, _) = started.ok_or_else(|| failed("MPI was started before"))?;
    let world = universe.world();
    if world.rank() == 0 {
        return Err(failed("rank 0 of the job runs the model; workers are the other ranks").into());
    }
    let mut worker: Option<W> = None;
    loop {
        let ask = wait_for(&world);
        if ask.is_empty() {
            return Ok(());
        }
        let answer = parse(&ask)
            .ok_or_else(|| failed("a message was not understood").into())
            .and_then(|(header, rest)| match header["op"] == "load" {
                true => {
                    let what = Assignment::from_json(&header);
                    let what = what.ok_or_else(|| failed("an assignment was not understood"))?;
                    // The old one's memory must be free before the new one asks for as much.
                    worker = None;
                    worker = Some(load(&what)?);
                    Ok(Vec::new())
                }
                false => {
                    let worker = worker.as_mut().ok_or_else(|| failed("nothing is loaded"))?;
                    act(worker, &header, rest)
                }
            });
        let bytes = match answer {
            Ok(bytes) => [&[0], &bytes[..]].concat(),
            Err(error) => [&[1], error.to_string().as_bytes()].concat(),
        };
        world.process_at_rank(0).send_with_tag(&bytes[..], ANSWER);
    }
}

/// The next message of rank 0; MPI's own waiting would keep a core busy for ever.
fn wait_for(world: &SimpleCommunicator) -> Vec<u8> {
    let mut looks = 0u32;
    loop {
        if let Some(bytes) = received(world, 0, ASK) {
            return bytes;
        }
        looks = looks.saturating_add(1);
        if looks > IDLE.0 { thread::sleep(IDLE.1) } else { thread::yield_now() }
    }
}

fn act(worker: &mut dyn Worker, header: &Value, rest: &[u8]) -> Result<Vec<u8>> {
    let number = |key: &str| header[key].as_u64().unwrap_or(0) as usize;
    let layer = number("layer");
    match header["op"].as_str() {
        Some("rows") => {
            let n = number("top_k");
            let parts = rest.split_at_checked(4 * n).and_then(|(ids, rest)| {
                let (weights, x) = rest.split_at_checked(4 * n)?;
                Some((ids, weights, x))
            });
            let (ids, weights, x) = parts.ok_or_else(|| failed("rows were cut off"))?;
            let ids: Vec<i32> = bytemuck::pod_collect_to_vec(ids);
            let weights: Vec<f32> = bytemuck::pod_collect_to_vec(weights);
            worker.submit(layer, &Rows { x, ids: &ids, weights: &weights, n: number("n") })?;
            let mut bytes = Vec::new();
            worker.finish(&mut |sums| bytes.extend(bytemuck::cast_slice::<f32, u8>(sums)))?;
            Ok(message(&json!(worker.cache_stats()), &[&bytes]))
        }
        Some("read") => worker.read_expert(layer, number("place")),
        Some("write") => worker.write_expert(layer, number("place"), rest).map(|()| Vec::new()),
        Some("rearrange") => {
            let moved = (owners(&header["old"]), owners(&header["new"]));
            let (Some(old), Some(new)) = moved else {
                return Err(failed("a placement was not understood").into());
            };
            let experts: Vec<usize> =
                serde_json::from_value(header["experts"].clone()).unwrap_or_default();
            let size = rest.len() / experts.len().max(1);
            let packed = experts.into_iter().zip(rest.chunks(size.max(1)).map(<[u8]>::to_vec));
            let packed: HashMap<usize, Vec<u8>> = packed.collect();
            worker.rearrange(layer, (&old, &new), number("rank"), &packed)?;
            Ok(Vec::new())
        }
        _ => Err(failed("an order was not understood").into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::CachePolicy;

    #[test]
    fn messages_are_read_back() {
        let header = json!({"op": "read"});
        let bytes = message(&header, &[&[1, 2], &[3]]);
        assert_eq!(parse(&bytes), Some((header, &[1u8, 2, 3][..])));
        assert_eq!(parse(&bytes[..6]), None);
        assert_eq!(parse(&[]), None);
        let owners = vec![Owners::linear(5, 2), Owners::round_robin(5, 2)];
        let (weights, model) = ("w8a16".to_owned(), u64::MAX);
        let (redundant, slots) = (Some(3), Some(CacheSlots { n: 4, policy: CachePolicy::Lfu }));
        let sent = Assignment { owners, rank: 1, redundant, slots, max_tokens: 9, weights, model };
        assert_eq!(Assignment::from_json(&sent.to_json()), Some(sent.clone()));
        let sent = Assignment { slots: None, ..sent };
        assert_eq!(Assignment::from_json(&sent.to_json()), Some(sent));
    }
}
