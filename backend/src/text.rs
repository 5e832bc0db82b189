//! Texts to token ids, by the model's own tokenizer.

use tokenizers::utils::truncation::TruncationParams;

use crate::model::{Found, Kind};

/// Texts of more bytes than this together are tokenized off the thread that serves everyone.
pub(crate) const INLINE_BYTES_MAX: usize = 32 << 10;

/// A model's tokenizer, cutting at the model's longest text.
pub(crate) struct Tokenizer {
    inner: tokenizers::Tokenizer,
    vocabulary: u32,
    max_tokens: usize,
}

#[derive(serde::Deserialize)]
struct Config {
    vocab_size: u32,
}

impl Tokenizer {
    /// Loads the tokenizer of a model; `None` for one that takes no text.
    ///
    /// # Errors
    /// What is wrong with its file.
    pub(crate) fn of(found: &Found) -> Result<Option<Tokenizer>, String> {
        let (Kind::SentenceEncoder, Some(max_tokens)) = (found.spec.kind, found.spec.max_tokens) else {
            return Ok(None);
        };
        let mut inner = tokenizers::Tokenizer::from_file(found.directory.join("tokenizer.json"))
            .map_err(|error| format!("tokenizer.json: {error}"))?;
        // The file may carry settings of its training: a shorter cut, and padding to a fixed length.
        let truncation = TruncationParams { max_length: max_tokens, ..TruncationParams::default() };
        inner.with_truncation(Some(truncation)).map_err(|error| format!("tokenizer.json: {error}"))?;
        inner.with_padding(None);
        // The embedding table may be smaller than the tokenizer's vocabulary; an id beyond it would fail a whole batch.
        let config =
            std::fs::read(found.directory.join("config.json")).map_err(|error| format!("config.json: {error}"))?;
        let config: Config = serde_json::from_slice(&config).map_err(|error| format!("config.json: {error}"))?;
        let known = u32::try_from(inner.get_vocab_size(true)).map_err(|error| error.to_string())?;
        if known > config.vocab_size {
            return Err(format!("tokenizer.json knows {known} tokens, the model only {}", config.vocab_size));
        }
        let vocabulary = known.min(config.vocab_size);
        Ok(Some(Tokenizer { inner, vocabulary, max_tokens }))
    }

    /// The ids of a text, special tokens included; at least those.
    ///
    /// # Errors
    /// The tokenizer's own words.
    pub(crate) fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        let encoding = self.inner.encode_fast(text, true).map_err(|error| error.to_string())?;
        if encoding.is_empty() {
            return Err("the tokenizer gives no token at all".into());
        }
        Ok(encoding.get_ids().to_vec())
    }

    /// Takes ids that a client made itself.
    ///
    /// # Errors
    /// None, too many, or one that the model does not have.
    pub(crate) fn checked(&self, ids: Vec<u32>) -> Result<Vec<u32>, String> {
        if ids.is_empty() || ids.len() > self.max_tokens {
            return Err(format!("a row of token ids has 1 to {} of them", self.max_tokens));
        }
        match ids.iter().find(|&&id| id >= self.vocabulary) {
            Some(id) => Err(format!("there is no token {id}; the model has {}", self.vocabulary)),
            None => Ok(ids),
        }
    }
}
