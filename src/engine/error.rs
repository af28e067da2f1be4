//! Why the engine cannot take a request.

/// A request that the engine cannot take, or a step that failed for one request.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// Nothing to continue.
    #[error("the prompt is empty; give at least one token")]
    EmptyPrompt,
    /// The prompt leaves no room for an answer.
    #[error(
        "the prompt has {tokens} tokens, but this model's context holds {limit}; shorten it \
         or raise --max-model-len if the model allows it"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Context length.
        limit: usize,
    },
    /// A token id outside the vocabulary.
    #[error("token id {id} is not in the vocabulary of {vocab_size}")]
    TokenOutOfRange {
        /// The id.
        id: u32,
        /// Vocabulary size.
        vocab_size: usize,
    },
    /// A sampling parameter that makes no sense.
    #[error("{name} is {value}, but must be {allowed}")]
    Sampling {
        /// The parameter.
        name: &'static str,
        /// What it was.
        value: String,
        /// What it may be.
        allowed: &'static str,
    },
    /// Too many requests wait.
    #[error("{waiting} requests are waiting, as many as the queue holds; try again later")]
    QueueFull {
        /// Requests in the queue.
        waiting: usize,
    },
    /// The model computed NaN or infinities.
    #[error(
        "the model's logits are not finite; if --weights f32 cures it, the activations overflow \
         f16, else the checkpoint or the driver is broken"
    )]
    NonFinite,
    /// A grammar, allowed tokens and bad words together leave no token.
    #[error(
        "the grammar, allowed tokens, bad words and minimum length of this request leave no token \
         to go on with; loosen one of them"
    )]
    Mask,
    /// The KV cache cannot hold even one sequence of this length.
    #[error(
        "the KV cache of {blocks} blocks of {block_size} tokens cannot hold a sequence of \
         {tokens} tokens; give it more memory or shorten the request"
    )]
    CacheTooSmall {
        /// Usable blocks.
        blocks: usize,
        /// Positions per block.
        block_size: usize,
        /// Length of the sequence.
        tokens: usize,
    },
}
