//! What a run found: counts, latencies from the intended start, and who was served where.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

/// Latencies are told apart to three digits, up to ten minutes.
const LATENCY_MAX_US: u64 = 600_000_000;

/// One request's result.
#[derive(Debug)]
pub struct Sample {
    /// From the intended start to the last byte.
    pub latency: Duration,
    /// The client's country, if it was played.
    pub country: Option<&'static str>,
    /// The status and the gateway's word on region and attempts, or why there was no answer.
    pub result: Result<Served, String>,
}

/// An answer, as far as it is counted.
#[derive(Debug)]
pub struct Served {
    /// HTTP status.
    pub status: u16,
    /// `isochrone-region`.
    pub region: String,
    /// `isochrone-attempts`.
    pub attempts: u32,
}

/// The whole run.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Requests that were meant to be sent.
    pub intended: usize,
    /// Requests that ended, well or not.
    pub ended: usize,
    /// From the first intended start to the last end, in seconds.
    pub seconds: f64,
    /// Ends a second.
    pub per_second: f64,
    /// Answers outside 2xx and broken connections.
    pub errors: usize,
    /// Each kind of error, counted.
    pub error_kinds: BTreeMap<String, usize>,
    /// Requests that took the gateway more than one attempt.
    pub retried: usize,
    /// Latency in milliseconds by percentile, of all requests, errors included.
    pub latency_ms: BTreeMap<String, f64>,
    /// Share of each region in the answers that name one.
    pub regions: BTreeMap<String, f64>,
    /// For each client country, how many answers each region gave.
    pub countries: BTreeMap<String, BTreeMap<String, usize>>,
}

impl Report {
    /// Sums up.
    ///
    /// # Errors
    /// None in practice: the histogram's bounds are constants.
    pub fn of(intended: usize, elapsed: Duration, samples: &[Sample]) -> Result<Report, hdrhistogram::CreationError> {
        let mut latencies = Histogram::<u64>::new_with_bounds(1, LATENCY_MAX_US, 3)?;
        let mut report = Report { intended, ended: samples.len(), seconds: elapsed.as_secs_f64(), ..Report::default() };
        let mut served_by: BTreeMap<String, usize> = BTreeMap::new();
        for sample in samples {
            latencies.saturating_record(u64::try_from(sample.latency.as_micros()).unwrap_or(LATENCY_MAX_US).max(1));
            let error = match &sample.result {
                Ok(served) if (200..300).contains(&served.status) => None,
                Ok(served) => Some(format!("status {}", served.status)),
                Err(error) => Some(error.clone()),
            };
            if let Some(error) = error {
                report.errors += 1;
                *report.error_kinds.entry(error).or_default() += 1;
            }
            if let Ok(served) = &sample.result {
                report.retried += usize::from(served.attempts > 1);
                if !served.region.is_empty() {
                    *served_by.entry(served.region.clone()).or_default() += 1;
                    if let Some(country) = sample.country {
                        let regions = report.countries.entry(country.into()).or_default();
                        *regions.entry(served.region.clone()).or_default() += 1;
                    }
                }
            }
        }
        report.per_second = report.ended as f64 / report.seconds.max(1e-9);
        let percentile = |p: f64| latencies.value_at_percentile(p) as f64 / 1000.0;
        report.latency_ms = [("p50", 50.0), ("p90", 90.0), ("p99", 99.0), ("p99.9", 99.9), ("max", 100.0)]
            .map(|(name, p)| (name.to_owned(), percentile(p)))
            .into();
        let total: usize = served_by.values().sum();
        report.regions = served_by.into_iter().map(|(region, count)| (region, count as f64 / total as f64)).collect();
        Ok(report)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { intended, ended, seconds, per_second, errors, retried, .. } = self;
        writeln!(
            f,
            "{ended} of {intended} requests in {seconds:.1} s: {per_second:.1}/s, {errors} errors, {retried} retried"
        )?;
        write!(f, "latency from the intended start, ms:")?;
        for name in ["p50", "p90", "p99", "p99.9", "max"] {
            write!(f, "  {name} {:.1}", self.latency_ms.get(name).copied().unwrap_or_default())?;
        }
        writeln!(f)?;
        for (region, share) in &self.regions {
            let from = |(country, regions): (&String, &BTreeMap<String, usize>)| {
                regions.get(region).map(|count| format!("{country} {count}"))
            };
            let countries: Vec<String> = self.countries.iter().filter_map(from).collect();
            writeln!(f, "  {:5.1} %  {region}  {}", share * 100.0, countries.join(", "))?;
        }
        for (error, count) in &self.error_kinds {
            writeln!(f, "  error: {count} x {error}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn served(status: u16, region: &str, attempts: u32) -> Result<Served, String> {
        Ok(Served { status, region: region.into(), attempts })
    }

    #[test]
    fn a_report_counts_errors_regions_and_percentiles() {
        let sample = |ms, result| Sample { latency: Duration::from_millis(ms), country: Some("DE"), result };
        let samples = [
            sample(1, served(200, "eu-west", 1)),
            sample(2, served(200, "eu-west", 2)),
            sample(3, served(200, "us-east", 1)),
            sample(4, served(503, "", 0)),
            sample(900, Err("broken".into())),
        ];
        let report = Report::of(6, Duration::from_secs(1), &samples).expect("bounds");
        assert_eq!((report.ended, report.errors, report.retried), (5, 2, 1));
        assert_eq!(report.error_kinds["status 503"], 1);
        assert!((report.regions["eu-west"] - 2.0 / 3.0).abs() < 1e-9);
        assert_eq!(report.countries["DE"]["us-east"], 1);
        assert!((report.latency_ms["p50"] - 3.0).abs() < 0.01 && report.latency_ms["max"] >= 899.0);
        assert!(report.to_string().contains("error: 1 x broken"));
    }
}
