//! What happens between a layer's router and the sum of its experts where they are not all on the
//! primary device: activations go to the owners of the chosen experts and partial sums come back.
//! Knows devices and ranks; what a rank computes with is behind [`Worker`].

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    ops::Add,
    sync::Arc,
    time::Duration,
};

use web_time::Instant;

use crate::{
    Error, Result,
    device::{Device, Readback, Tensor},
};

use super::{CacheStats, Owners, ParallelError};

/// A layer between its router and its experts, on the primary device.
#[derive(Debug, Clone, Copy)]
pub struct Handoff {
    /// Index among the layers that have experts.
    pub layer: usize,
    /// Input of the experts. F32 or F16 `[n, padded hidden]`
    pub x: Tensor,
    /// Chosen experts, -1 where a row is padding. I32 `[n, top_k]`
    pub ids: Tensor,
    /// Their weights. F32 `[n, top_k]`
    pub weights: Tensor,
    /// Where the sums of other devices' experts go. F32 `[n, padded hidden]`
    pub partial: Tensor,
}

/// Takes over between the router of a layer and the sum of its experts.
pub trait Exchange: fmt::Debug + Send {
    /// What the host must see of the layer.
    fn reads(&self, at: &Handoff) -> Vec<Tensor>;

    /// Has all chosen experts computed that are not on the primary device. `seen` brings what
    /// [`Exchange::reads`] asked for.
    ///
    /// # Errors
    /// [`crate::device::DeviceError`], [`ParallelError::Worker`].
    fn send(&mut self, at: &Handoff, seen: Readback) -> Result<()>;

    /// Puts the sums of the earliest layer that was sent and not received, which is `at`, into
    /// `at.partial`.
    ///
    /// # Errors
    /// [`crate::device::DeviceError`], [`ParallelError::Worker`].
    fn receive(&mut self, device: &mut Device, at: &Handoff) -> Result<()>;

    /// Packed weights of an expert that it keeps elsewhere than on the primary device.
    ///
    /// # Errors
    /// [`crate::device::DeviceError`], [`ParallelError::Worker`].
    fn read_expert(&mut self, layer: usize, expert: usize) -> Result<Option<Vec<u8>>>;

    /// Overwrites an expert wherever it keeps one elsewhere than on the primary device.
    ///
    /// # Errors
    /// [`crate::device::DeviceError`], [`ParallelError::Worker`].
    fn write_expert(&mut self, new: &PackedExpert) -> Result<()>;

    /// Moves experts of a layer from their old owners to new ones; `packed` has those that move,
    /// by number. The primary device's are moved by its owner.
    ///
    /// # Errors
    /// [`ParallelError::Worker`].
    fn rearrange(
        &mut self,
        layer: usize,
        new: &Owners,
        packed: &HashMap<usize, Vec<u8>>,
    ) -> Result<()>;

    /// Whether the devices elsewhere still work, as [`Device::probe`] says of one.
    ///
    /// # Errors
    /// [`ParallelError::Worker`].
    fn probe(&self) -> Result<()> {
        Ok(())
    }

    /// What it has done so far.
    fn stats(&self) -> ExchangeStats;

    /// Who owns which experts, by layer that has some, if they are on several devices.
    fn owners(&self) -> Option<Arc<Vec<Owners>>> {
        None
    }

    /// What caches of experts elsewhere have done, if there are any.
    fn cache_stats(&self) -> Option<CacheStats> {
        None
    }
}

/// One expert's weights as devices hold them, on their way to those.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedExpert {
    /// Index among the layers that have experts.
    pub layer: usize,
    /// Its number in the layer.
    pub expert: usize,
    /// In the format and order of the model's banks.
    pub bytes: Vec<u8>,
}

/// Traffic since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExchangeStats {
    /// Layers exchanged.
    pub rounds: u64,
    /// Other devices visited, over all rounds.
    pub visits: u64,
    /// Bytes of activations sent to other devices.
    pub bytes_sent: u64,
    /// Bytes of partial sums that came back.
    pub bytes_received: u64,
    /// Time that the host waited for devices.
    pub waited: Duration,
}

/// Rows that a worker computes.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// Input of the experts, in the primary's activation type. `[n, padded hidden]`
    pub x: &'a [u8],
    /// Local ids of the worker's experts, -1 where another device's is chosen. `[n, top_k]`
    pub ids: &'a [i32],
    /// `[n, top_k]`
    pub weights: &'a [f32],
    /// Number of rows.
    pub n: usize,
}

/// A rank other than the primary: holds experts and computes them for rows that are sent.
pub trait Worker: fmt::Debug + Send {
    /// Starts on rows of a layer.
    ///
    /// # Errors
    /// Those of its device, or of the way there.
    fn submit(&mut self, layer: usize, rows: &Rows<'_>) -> Result<()>;

    /// Hands over the weighted sums of the experts of the earliest rows that were submitted and
    /// not finished. `[n, padded hidden]`
    ///
    /// # Errors
    /// Those of its device, or of the way there.
    fn finish(&mut self, take: &mut dyn FnMut(&[f32])) -> Result<()>;

    /// Drops what was submitted and not finished.
    fn forget(&mut self);

    /// Packed weights of the expert at a place of a layer.
    ///
    /// # Errors
    /// Those of its device, or of the way there.
    fn read_expert(&mut self, layer: usize, place: usize) -> Result<Vec<u8>>;

    /// Overwrites the expert at a place of a layer, behind what was submitted before.
    ///
    /// # Errors
    /// Those of its device, or of the way there.
    fn write_expert(&mut self, layer: usize, place: usize, packed: &[u8]) -> Result<()>;

    /// Moves experts of a layer to where the new owners have them on this rank; `packed` has those
    /// that move, by number.
    ///
    /// # Errors
    /// Those of its device, or of the way there.
    fn rearrange(
        &mut self,
        layer: usize,
        owners: (&Owners, &Owners),
        rank: usize,
        packed: &HashMap<usize, Vec<u8>>,
    ) -> Result<()>;

    /// Whether it still works, as far as can be told without waiting.
    ///
    /// # Errors
    /// Those of its device, or of the way there.
    fn probe(&self) -> Result<()>;

    /// What its cache of experts has done, if it has one.
    fn cache_stats(&self) -> Option<CacheStats> {
        None
    }

    /// Whether [`Worker::submit`] only returns when all is computed; such workers go last.
    fn blocks(&self) -> bool {
        false
    }

    /// Name for people.
    fn describe(&self) -> String;
}

/// Experts spread over the primary device and workers; each is visited only where one of its
/// experts is chosen, and partial sums are added in the order of ranks.
#[derive(Debug)]
pub struct Sharded {
    /// Ranks from 1 on.
    workers: Vec<Box<dyn Worker>>,
    /// By layer that has experts.
    owners: Arc<Vec<Owners>>,
    stats: ExchangeStats,
    /// Layers whose sums are to be received, in order.
    sent: VecDeque<Vec<Visit>>,
    /// Rows of one rank, and sums of several; kept, for large memory made anew costs more than the
    /// copy. `[n, padded hidden]` both
    rows: Vec<u8>,
    sums: Vec<f32>,
}

/// Rows of one rank on their way.
#[derive(Debug, Default)]
struct Visit {
    rank: usize,
    /// Rows of the step. `[n]`
    tokens: Vec<usize>,
    /// `[n, top_k]`
    ids: Vec<i32>,
    /// `[n, top_k]`
    weights: Vec<f32>,
}

impl Sharded {
    /// Workers of ranks 1, 2, ..., and who owns which experts by layer that has some.
    pub fn new(workers: Vec<Box<dyn Worker>>, owners: Vec<Owners>) -> Self {
        let (owners, stats) = (Arc::new(owners), ExchangeStats::default());
        Self { workers, owners, stats, sent: VecDeque::new(), rows: Vec::new(), sums: Vec::new() }
    }

    /// What each rank gets of a layer; ranks that own no chosen expert are left out.
    fn visits(&self, layer: usize, top_k: usize, ids: &[i32], w: &[f32]) -> Vec<Visit> {
        let owners = &self.owners[layer];
        let mut visits: Vec<Visit> =
            (1..=self.workers.len()).map(|rank| Visit { rank, ..Visit::default() }).collect();
        for (token, chosen) in ids.chunks(top_k).enumerate() {
            for (j, place) in chosen.iter().map(|&id| owners.of(token, id)).enumerate() {
                let Some((rank, local)) = place.filter(|place| place.0 > 0) else { continue };
                let visit = &mut visits[rank - 1];
                if visit.tokens.last() != Some(&token) {
                    visit.tokens.push(token);
                    visit.ids.resize(visit.ids.len() + top_k, -1);
                    visit.weights.extend(&w[token * top_k..][..top_k]);
                }
                let row = visit.ids.len() - top_k;
                visit.ids[row + j] = local as i32;
            }
        }
        visits.retain(|visit| !visit.tokens.is_empty());
        visits
    }

    /// Sends ranks the rows of a layer that are theirs: `seen` is what [`Exchange::reads`] asked
    /// for. Returns who got which.
    fn visit(&mut self, at: &Handoff, seen: &[u8]) -> Result<Vec<Visit>> {
        let (x, rest) = seen.split_at(at.x.bytes().next_multiple_of(4) as usize);
        let (ids, weights) = rest.split_at(at.ids.bytes() as usize);
        let ids: Vec<i32> = bytemuck::pod_collect_to_vec(ids);
        let weights: Vec<f32> = bytemuck::pod_collect_to_vec(weights);
        let x = &x[..at.x.bytes() as usize];
        let visits = self.visits(at.layer, at.ids.cols(), &ids, &weights);
        for last in [false, true] {
            for visit in &visits {
                let worker = &mut self.workers[visit.rank - 1];
                if worker.blocks() == last {
                    let Visit { ids, weights, .. } = visit;
                    let x = visit.rows(x, at.x.rows(), &mut self.rows);
                    let rows = Rows { x, ids, weights, n: visit.tokens.len() };
                    worker
                        .submit(at.layer, &rows)
                        .map_err(|e| ParallelError::worker(visit.rank, e))?;
                    self.stats.bytes_sent += (x.len() + 8 * ids.len()) as u64;
                }
            }
        }
        Ok(visits)
    }

    /// Leaves nothing of a step that failed for the next one.
    fn forget(&mut self) {
        self.sent.clear();
        self.workers.iter_mut().for_each(|worker| worker.forget());
    }

    /// Waits for the sums of all visits, and puts the total into `at.partial`.
    fn add_up(&mut self, device: &mut Device, at: &Handoff, visits: &[Visit]) -> Result<()> {
        let Self { workers, stats, sums, .. } = self;
        let cols = at.partial.cols();
        // The rows of a single rank that has all of them need no adding up.
        let is_total = visits.len() == 1 && visits[0].tokens.len() == at.partial.rows();
        if !is_total {
            sums.clear();
            sums.resize(at.partial.len(), 0.0);
        }
        for visit in visits {
            let start = Instant::now();
            let mut n_received = 0;
            let mut take = |part: &[f32]| {
                n_received = part.len();
                if is_total {
                    return device.write(&at.partial, part);
                }
                for (&token, part) in visit.tokens.iter().zip(part.chunks(cols)) {
                    let sum = &mut sums[token * cols..][..cols];
                    sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
                }
            };
            let worker = &mut workers[visit.rank - 1];
            worker.finish(&mut take).map_err(|e| ParallelError::worker(visit.rank, e))?;
            stats.waited += start.elapsed();
            stats.bytes_received += 4 * n_received as u64;
        }
        if !is_total {
            device.write(&at.partial, sums);
        }
        Ok(())
    }
}

impl Visit {
    /// Its rows of all `n`, gathered in `rows` if they are not all of them.
    fn rows<'a>(&self, x: &'a [u8], n: usize, rows: &'a mut Vec<u8>) -> &'a [u8] {
        if self.tokens.len() == n {
            return x;
        }
        let row_bytes = x.len() / n;
        rows.clear();
        for &token in &self.tokens {
            rows.extend_from_slice(&x[token * row_bytes..][..row_bytes]);
        }
        rows
    }
}

impl Exchange for Sharded {
    fn reads(&self, at: &Handoff) -> Vec<Tensor> {
        vec![at.x, at.ids, at.weights]
    }

    fn send(&mut self, at: &Handoff, seen: Readback) -> Result<()> {
        let start = Instant::now();
        let sent = seen.view_now(|seen| (start.elapsed(), self.visit(at, seen)));
        let sent = sent.map_err(Error::from).and_then(|(waited, visits)| {
            self.stats.waited += waited;
            visits
        });
        let visits = sent.inspect_err(|_| self.forget())?;
        self.sent.push_back(visits);
        Ok(())
    }

    fn receive(&mut self, device: &mut Device, at: &Handoff) -> Result<()> {
        let visits = self.sent.pop_front().unwrap_or_default();
        self.stats.rounds += 1;
        self.stats.visits += visits.len() as u64;
        self.add_up(device, at, &visits).inspect_err(|_| self.forget())
    }

    fn read_expert(&mut self, layer: usize, expert: usize) -> Result<Option<Vec<u8>>> {
        let place = self.owners[layer].places(expert).find(|place| place.0 > 0);
        let Some((rank, place)) = place else { return Ok(None) };
        let read = self.workers[rank - 1].read_expert(layer, place);
        Ok(Some(read.map_err(|e| ParallelError::worker(rank, e))?))
    }

    fn write_expert(&mut self, new: &PackedExpert) -> Result<()> {
        for (rank, place) in self.owners[new.layer].places(new.expert).filter(|p| p.0 > 0) {
            let worker = &mut self.workers[rank - 1];
            let written = worker.write_expert(new.layer, place, &new.bytes);
            written.map_err(|e| ParallelError::worker(rank, e))?;
        }
        Ok(())
    }

    fn rearrange(
        &mut self,
        layer: usize,
        new: &Owners,
        packed: &HashMap<usize, Vec<u8>>,
    ) -> Result<()> {
        let owners = (&self.owners[layer], new);
        for (worker, rank) in self.workers.iter_mut().zip(1..) {
            let moved = worker.rearrange(layer, owners, rank, packed);
            moved.map_err(|e| ParallelError::worker(rank, e))?;
        }
        Arc::make_mut(&mut self.owners)[layer] = new.clone();
        Ok(())
    }

    fn probe(&self) -> Result<()> {
        for (worker, rank) in self.workers.iter().zip(1..) {
            worker.probe().map_err(|e| ParallelError::worker(rank, e))?;
        }
        Ok(())
    }

    fn stats(&self) -> ExchangeStats {
        self.stats
    }

    fn owners(&self) -> Option<Arc<Vec<Owners>>> {
        Some(self.owners.clone())
    }

    fn cache_stats(&self) -> Option<CacheStats> {
        self.workers.iter().filter_map(|worker| worker.cache_stats()).reduce(CacheStats::add)
    }
}
