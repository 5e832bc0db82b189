//! What computes: loaded on its own thread, and never touched from another.

pub(crate) mod torch;

use crate::tensor::Tensor;

/// The inputs of one request.
#[derive(Clone, Debug)]
pub(crate) enum Input {
    /// Token ids, one row for each text.
    Tokens(Vec<Vec<u32>>),
    /// Tensors in the order of the model's inputs.
    Tensors(Vec<Tensor>),
}

impl Input {
    /// Rows that count against the largest batch.
    pub(crate) fn rows(&self) -> usize {
        match self {
            Input::Tokens(rows) => rows.len(),
            Input::Tensors(_) => 1,
        }
    }
}

/// Computes batches.
pub(crate) trait Runtime {
    /// Answers each request of a batch, in order.
    fn run(&mut self, batch: &[Input]) -> Vec<Result<Vec<Tensor>, Failed>>;
}

/// The model could not compute; the reason is for the log, not for clients: it may name paths.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Failed(pub String);
