//! The ranks of an MPI job: what rank 0 tells the others to load, and how they do.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::{
    Result,
    model::{ExpertShard, Limits, ModelSpec, Precision},
    parallel::{
        ExpertLayout, Owners, ParallelError, Share, Worker,
        cluster::{Assignment, Cluster, Remote, serve_rank},
    },
    weights::{Checkpoint, Directory, DummySource, Source, WeightFormat},
};

use super::{LlmOptions, LoadFormat, files};

/// The same number for the same model, so that ranks with another one are found out.
fn fingerprint(spec: &ModelSpec) -> u64 {
    let mut hasher = DefaultHasher::new();
    format!("{spec:?}").hash(&mut hasher);
    hasher.finish()
}

/// Has every other rank load its share, all at the same time.
pub(super) fn load(
    options: &LlmOptions,
    spec: &ModelSpec,
    limits: &Limits,
    layout: impl Fn(usize) -> ExpertLayout,
) -> Result<Vec<Box<dyn Worker>>> {
    let cluster = Cluster::join()?;
    let assign = |rank: usize| {
        let ExpertLayout { share, slots } = layout(rank);
        let Share { owners, rank, redundant } = share.expect("ranks of a job share experts");
        let assignment = Assignment {
            owners,
            rank,
            redundant,
            slots,
            max_tokens: limits.max_tokens,
            weights: options.precision().experts.to_string(),
            model: fingerprint(spec),
        };
        Remote::assign(cluster, &assignment, options.mpi.unwrap_or_default())
    };
    let remotes: Vec<Remote> = (1..cluster.n_ranks()).map(assign).collect();
    let loaded = |mut remote: Remote, rank: usize| -> Result<Box<dyn Worker>> {
        remote.loaded().map_err(|e| ParallelError::worker(rank, e))?;
        Ok(Box::new(remote))
    };
    remotes.into_iter().zip(1..).map(|(remote, rank)| loaded(remote, rank)).collect()
}

/// Holds the experts that rank 0 of the MPI job gives this rank, and computes them, until the job
/// ends. Of the options, those that name model, device and source of weights count, and whether
/// experts are computed in blocks.
///
/// # Errors
/// [`crate::Error`] for files and devices, and outside of an MPI job.
pub fn serve_experts(options: &LlmOptions) -> Result<()> {
    let dir = files::resolve(options)?;
    let directory = Directory(dir.clone());
    let spec = files::read_config(&directory, &dir)?.spec;
    serve_rank(|assignment| {
        let Assignment { owners, rank, redundant, slots, max_tokens, weights, model } =
            assignment.clone();
        let refused = |cause: &str| ParallelError::Cluster { cause: cause.to_owned() };
        // Numbers that rank 0 has given out beyond the checkpoint's are room for more.
        let room = owners.first().map_or(0, Owners::n_experts);
        let spec = spec.clone().with_spare_experts(room.saturating_sub(spec.n_experts()))?;
        if model != fingerprint(&spec) {
            return Err(refused("it has another model; give all ranks the same").into());
        }
        let device = pollster::block_on(options.open(&options.device))?;
        let one =
            Limits { max_tokens, max_sequences: 1, max_logits: 1, max_blocks: 1, max_penalized: 1 };
        let limits = one.fit(&spec, &device.caps());
        if limits.max_tokens < max_tokens {
            return Err(refused("its device is too small; lower --max-num-batched-tokens").into());
        }
        let source: Box<dyn Source> = match options.load_format {
            LoadFormat::Safetensors => Box::new(Checkpoint::from_files(&directory, &dir)?),
            LoadFormat::Dummy => Box::new(DummySource::new(options.engine.seed)),
        };
        let precision = Precision::of(weights.parse::<WeightFormat>()?);
        let share = Some(Share { owners, rank, redundant });
        let layout = ExpertLayout { share, slots };
        let shard = ExpertShard::load(device, &spec, &*source, precision, &limits, &layout)?;
        Ok(shard.with_block_align(options.moe_block_align))
    })
}
