//! What computes: loaded on its own thread, and never touched from another.

pub(crate) mod torch;

mod encoder;

pub(crate) mod processor;

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::tensor::Tensor;

/// The inputs of one request.
#[derive(Clone, Debug)]
pub(crate) enum Input {
    /// Token ids, one row for each text, none empty.
    Tokens(Vec<Vec<u32>>),
    /// Tensors in the order of the model's inputs. `rows` is the size along the first dimension, which they share where
    /// the model is batched, else 1.
    Tensors {
        /// The tensors.
        tensors: Vec<Tensor>,
        /// How many rows they are.
        rows: usize,
    },
}

impl Input {
    /// Rows that count against the largest batch.
    pub(crate) fn rows(&self) -> usize {
        match self {
            Input::Tokens(rows) => rows.len(),
            Input::Tensors { rows, .. } => *rows,
        }
    }

    /// What it costs to compute: tokens, else rows.
    pub(crate) fn cost(&self) -> usize {
        match self {
            Input::Tokens(rows) => rows.iter().map(Vec::len).sum(),
            Input::Tensors { rows, .. } => *rows,
        }
    }

    /// Equal for inputs that can be computed together.
    pub(crate) fn class(&self) -> u64 {
        match self {
            Input::Tokens(_) => 0,
            Input::Tensors { tensors, .. } => {
                let mut hasher = DefaultHasher::new();
                tensors.iter().for_each(|tensor| tensor.shape.get(1..).hash(&mut hasher));
                hasher.finish()
            }
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
