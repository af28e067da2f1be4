//! Further devices that hold a share of the experts: opened, given their share, and tied to the
//! primary one.

use crate::{
    Result,
    device::{Device, DeviceChoice},
    model::{ExpertShard, Limits, ModelSpec, cache_slots},
    parallel::{
        CacheOptions, CacheSlots, EplbOptions, Exchange, ExpertLayout, Owners, ParallelError,
        Placement, Rank, Rebalancer, Sharded, Share, Worker,
    },
    weights::Source,
};

use super::{
    LlmOptions,
    measure::{self, Candidate},
};

/// How experts are spread over devices.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ExpertPlacement {
    /// Consecutive ones on each device.
    #[default]
    Linear,
    /// Dealt out in turn.
    RoundRobin,
    /// As measured: devices that make others wait get none.
    Balanced,
    /// As JSON says, see [`Placement::from_json`].
    Json(String),
}

/// Ranks of the MPI job, this one included.
#[cfg(feature = "mpi")]
fn remote_ranks(choices: &[DeviceChoice]) -> Result<usize> {
    let cause = "each rank has one device; leave out --devices".to_owned();
    match choices.is_empty() {
        true => Ok(crate::parallel::cluster::Cluster::join()?.n_ranks()),
        false => Err(ParallelError::Cluster { cause }.into()),
    }
}

#[cfg(not(feature = "mpi"))]
fn remote_ranks(_: &[DeviceChoice]) -> Result<usize> {
    let cause = "this moewe was built without it; build with --features mpi".to_owned();
    Err(ParallelError::Cluster { cause }.into())
}

/// Opens the devices; one that is named again is opened once.
async fn open_all(
    options: &LlmOptions,
    primary: &Device,
    choices: &[DeviceChoice],
) -> Result<Vec<Device>> {
    let mut devices: Vec<Device> = Vec::new();
    for choice in choices {
        let known = devices.iter().zip(choices).find(|(_, known)| *known == choice);
        let known = known.map(|(device, _)| device);
        devices.push(match known.or((*choice == options.device).then_some(primary)) {
            Some(device) => device.beside(),
            None => options.open(choice).await?,
        });
    }
    Ok(devices)
}

impl ExpertPlacement {
    /// Owners by layer that has experts.
    fn owners(&self, spec: &ModelSpec, n_ranks: usize) -> Result<Vec<Owners>, ParallelError> {
        let layers = spec.moe_layers().map(|(_, moe)| moe.routing.n_experts);
        Ok(match self {
            Self::Linear => layers.map(|n| Owners::linear(n, n_ranks)).collect(),
            // For devices that are not measured.
            Self::Balanced => layers.map(|n| Owners::linear(n, n_ranks)).collect(),
            Self::RoundRobin => layers.map(|n| Owners::round_robin(n, n_ranks)).collect(),
            Self::Json(text) => {
                let (n_layers, n_experts) = (layers.count(), spec.n_experts());
                let n_spare = n_experts - spec.n_present();
                let placed = Placement::from_json(text, n_layers, n_experts, n_spare, n_ranks)?;
                placed.layers().to_vec()
            }
        })
    }
}

/// Devices beside the primary one, and what each of them gets.
#[derive(Debug, Default)]
pub(super) struct Spread {
    /// Ranks from 1 on.
    devices: Vec<Device>,
    /// By layer that has experts; none if the primary device is alone.
    owners: Vec<Owners>,
    /// The ranks are those of an MPI job.
    is_remote: bool,
    /// What was measured of them.
    ranks: Option<Vec<Rank>>,
    /// The same in words, devices that were left out among them.
    measured: Vec<String>,
    eplb: Option<EplbOptions>,
    /// Devices have slots for some experts, and the host's memory all of them.
    slots: Option<CacheSlots>,
}

impl Spread {
    /// Opens the devices of ranks 1, 2, ..., and sizes each one's cache of experts.
    pub(super) async fn open(
        options: &LlmOptions,
        primary: &Device,
        spec: &ModelSpec,
        limits: &Limits,
    ) -> Result<Self> {
        if spec.n_experts() == 0 {
            return Ok(Self::default());
        }
        let slots = |cache: CacheOptions| -> Result<CacheSlots> {
            let n = cache_slots(spec, options.precision(), cache.bytes)?;
            Ok(CacheSlots { n, policy: cache.policy })
        };
        let slots = options.expert_cache.map(slots).transpose()?;
        Ok(Self { slots, ..Self::ranks(options, primary, spec, limits, slots).await? })
    }

    async fn ranks(
        options: &LlmOptions,
        primary: &Device,
        spec: &ModelSpec,
        limits: &Limits,
        cache: Option<CacheSlots>,
    ) -> Result<Self> {
        let choices = &options.expert_devices;
        if options.mpi.is_some() {
            let owners = options.expert_placement.owners(spec, remote_ranks(choices)?)?;
            return Ok(Self { owners, is_remote: true, eplb: options.eplb, ..Self::default() });
        }
        if choices.is_empty() {
            return Ok(Self::default());
        }
        if options.expert_placement == ExpertPlacement::Balanced {
            return Self::measured(options, primary, spec, limits, cache).await;
        }
        let devices = open_all(options, primary, choices).await?;
        let owners = options.expert_placement.owners(spec, 1 + devices.len())?;
        Ok(Self { devices, owners, eplb: options.eplb, ..Self::default() })
    }

    /// Only those devices that a measurement gives experts to.
    async fn measured(
        options: &LlmOptions,
        primary: &Device,
        spec: &ModelSpec,
        limits: &Limits,
        cache: Option<CacheSlots>,
    ) -> Result<Self> {
        let candidates = measure::candidates(options, spec, limits, cache).await?;
        let ranks: Vec<Rank> = candidates.iter().map(|c| c.rank).collect();
        let placement = measure::choose(spec, &ranks, options.max_num_seqs.max(1))?;
        let used: Vec<usize> =
            (0..ranks.len()).filter(|&r| r == 0 || placement.slots(r) > 0).collect();
        let restrict = |layer: &Owners| {
            let held = used.iter().map(|&rank| layer.held(rank).to_vec()).collect();
            Owners::new(layer.n_experts(), held)
        };
        let owners = placement.layers().iter().map(restrict).collect::<Result<Vec<_>, _>>()?;
        let say = |(rank, c): (usize, &Candidate)| {
            let (n, of) = (placement.slots(rank), spec.n_experts());
            format!(
                "{}: {:.0} rows of experts/s, {:.0} us a visit; {n} of {of} experts",
                c.name,
                c.rank.speed,
                c.rank.visit_s * 1e6
            )
        };
        let measured = candidates.iter().enumerate().map(say).collect();
        let choices: Vec<DeviceChoice> =
            used[1..].iter().map(|&rank| candidates[rank].choice.clone()).collect();
        let devices = open_all(options, primary, &choices).await?;
        let is_alone = devices.is_empty();
        Ok(Self {
            devices,
            owners: if is_alone { Vec::new() } else { owners },
            ranks: Some(used.iter().map(|&rank| ranks[rank]).collect()),
            measured,
            eplb: options.eplb,
            ..Self::default()
        })
    }

    /// What was measured, a line for each device; empty if nothing was.
    pub(super) fn measurements(&self) -> &[String] {
        &self.measured
    }

    /// What the primary device holds.
    pub(super) fn layout(&self) -> ExpertLayout {
        self.layout_of(0)
    }

    fn layout_of(&self, rank: usize) -> ExpertLayout {
        let share = (!self.owners.is_empty()).then(|| self.share(rank));
        ExpertLayout { share, slots: self.slots }
    }

    fn share(&self, rank: usize) -> Share {
        let redundant = self.eplb.map(|eplb| eplb.redundant);
        Share { owners: self.owners.clone(), rank, redundant }
    }

    /// Who moves experts between the devices, if anybody does.
    pub(super) fn balancer(&self) -> Option<Rebalancer> {
        let (eplb, n_ranks) = (self.eplb?, self.owners.first()?.n_ranks());
        let alike = Rank { slots: 0, speed: 1.0, visit_s: 0.0 };
        let rank = |rank: usize| {
            let known = self.ranks.as_ref().and_then(|ranks| ranks.get(rank).copied());
            Rank { slots: self.share(rank).places(0), ..known.unwrap_or(alike) }
        };
        let placement = Placement::new(self.owners.clone());
        Some(Rebalancer::new(eplb, (0..n_ranks).map(rank).collect(), placement))
    }

    /// The limits that every device can keep.
    pub(super) fn fit(&self, limits: Limits, spec: &ModelSpec) -> Limits {
        self.devices.iter().fold(limits, |limits, device| limits.fit(spec, &device.caps()))
    }

    /// One line for each device.
    pub(super) fn describe(&self) -> Vec<String> {
        self.devices.iter().map(Device::describe).collect()
    }

    /// Loads each device's experts, and those alone.
    pub(super) fn load(
        &mut self,
        options: &LlmOptions,
        spec: &ModelSpec,
        source: &dyn Source,
        limits: &Limits,
    ) -> Result<Option<Box<dyn Exchange>>> {
        if self.owners.is_empty() {
            return Ok(None);
        }
        if self.is_remote {
            #[cfg(feature = "mpi")]
            {
                let workers =
                    super::remote::load(options, spec, limits, |rank| self.layout_of(rank))?;
                return Ok(Some(Box::new(Sharded::new(workers, self.owners.clone()))));
            }
        }
        let precision = options.precision();
        let devices = std::mem::take(&mut self.devices).into_iter().enumerate();
        let load = |(i, device): (usize, Device)| -> Result<Box<dyn Worker>> {
            let rank = i + 1;
            let layout = self.layout_of(rank);
            let shard = ExpertShard::load(device, spec, source, precision, limits, &layout)
                .map_err(|e| ParallelError::worker(rank, e))?;
            Ok(Box::new(shard.with_block_align(options.moe_block_align)))
        };
        let workers = devices.map(load).collect::<Result<_>>()?;
        Ok(Some(Box::new(Sharded::new(workers, self.owners.clone()))))
    }
}
