//! The ceiling: a model in a loop, without a server around it.

use std::io::Write;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::model;
use crate::runtime::{Input, torch};
use crate::text::Tokenizer;
use crate::{Bench, app};

/// Computes for a while and tells how fast that was.
///
/// # Errors
/// What is wrong with the model or the texts.
pub(crate) fn bench(settings: &Bench) -> Result<(), String> {
    let options = app::options(&settings.compute, 1)?;
    let found = model::versions(&settings.models, &settings.model)
        .map_err(|problems| problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))?
        .pop()
        .ok_or("the model has no version")?;
    let tokenizer = Tokenizer::of(&found)?.ok_or("only sentence encoders are measured")?;
    let texts =
        std::fs::read_to_string(&settings.texts).map_err(|error| format!("{}: {error}", settings.texts.display()))?;
    let rows: Vec<Vec<u32>> = texts.lines().map(|line| tokenizer.encode(line)).collect::<Result<_, _>>()?;
    if rows.is_empty() {
        return Err(format!("{}: there is no text in it", settings.texts.display()));
    }
    let mut runtime = torch::load(&found, options.threads, options.placed)?;
    let mut turn = rows.iter().cycle();
    let mut times: Vec<Duration> = Vec::new();
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(settings.seconds) {
        let batch = Input::Tokens(turn.by_ref().take(settings.batch.max(1)).cloned().collect());
        let since = Instant::now();
        for result in runtime.run(&[batch]) {
            result.map_err(|error| error.to_string())?;
        }
        times.push(since.elapsed());
    }
    let total: Duration = times.iter().sum();
    times.sort();
    let quantile = |share: f64| {
        let at = ((times.len() as f64 * share) as usize).min(times.len().saturating_sub(1));
        times.get(at).map_or(0.0, |time| time.as_secs_f64() * 1e3)
    };
    let per_second = (times.len() * settings.batch.max(1)) as f64 / total.as_secs_f64().max(1e-9);
    let (p50, p99) = (quantile(0.5), quantile(0.99));
    let precision = found.spec.precision.name();
    let line = if settings.json {
        json!({
            "batch": settings.batch, "rows_per_s": per_second, "forward_ms": { "p50": p50, "p99": p99 },
            "precision": precision,
        })
        .to_string()
    } else {
        format!(
            "{per_second:.1} texts/s in batches of {} ({precision}); a batch takes {p50:.2} ms, p99 {p99:.2} ms",
            settings.batch
        )
    };
    writeln!(std::io::stdout(), "{line}").map_err(|error| error.to_string())
}
