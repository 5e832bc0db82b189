//! What gateway and worker share of telemetry: OTLP set-up, W3C trace context, and JSON log lines.

#![forbid(unsafe_code)]

pub mod log;

pub mod trace;

use std::time::{Duration, SystemTime};

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracerProvider};
use tracing::Metadata;
use tracing_subscriber::filter::{FilterExt, FilterFn, LevelFilter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry};

/// The target of spans that are for traces only and never for the log.
pub const SPANS: &str = "isochrone::span";

/// How long the end of the process waits for the collector. A dead one must not hold up a shutdown.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// What names this process and where its telemetry goes.
#[derive(Debug)]
pub struct Settings<'a> {
    /// `service.name`.
    pub service: &'static str,
    /// `service.instance.id`, unique to the process.
    pub instance: &'a str,
    /// Attributes of the resource beyond those.
    pub attributes: Vec<KeyValue>,
    /// OTLP over gRPC, such as `http://127.0.0.1:4317`; without it no span is recorded.
    pub otlp: Option<&'a str>,
}

/// Ends telemetry in order when dropped: spans first, then the log.
#[derive(Debug)]
pub struct Guard {
    provider: Option<SdkTracerProvider>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(provider) = self.provider.take() {
            // A collector that is down loses its spans; that is its to report, not the process's exit status.
            let _ = provider.shutdown_with_timeout(FLUSH_TIMEOUT);
        }
    }
}

/// Installs the log and the exporter for the whole process. Must be called inside a tokio runtime that lives as long as
/// the process: the exporter's connection is driven by it.
///
/// # Errors
/// A collector address that is no URL. A collector that is down is no error: spans wait in a bounded queue and are then
/// dropped, never a request.
pub fn start(settings: &Settings<'_>, log: log::Log) -> Result<Guard, String> {
    let provider = settings.otlp.map(|endpoint| tracer_provider(settings, endpoint)).transpose()?;
    if let Some(provider) = &provider {
        // For the spans that are made after the fact (`trace::child`).
        opentelemetry::global::set_tracer_provider(provider.clone());
    }
    // Both filters state their most verbose level: without that, every span and event of every library below is made and
    // then thrown away, which costs more than the requests themselves.
    let ours = FilterFn::new(|metadata: &Metadata<'_>| metadata.is_span() && metadata.target() == SPANS);
    let spans = provider.as_ref().map(|provider| {
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("isochrone"))
            .with_location(false)
            .with_threads(false)
            .with_target(false)
            .with_tracked_inactivity(false)
            .with_filter(ours.with_max_level_hint(LevelFilter::INFO))
    });
    let levels = EnvFilter::try_from_env("ISOCHRONE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let level = levels.max_level_hint().unwrap_or(LevelFilter::TRACE);
    let events = tracing_subscriber::fmt::layer()
        .json()
        .flatten_event(true)
        .with_current_span(false)
        .with_span_list(false)
        .with_writer(log)
        .with_filter(
            levels.and(FilterFn::new(|metadata: &Metadata<'_>| metadata.is_event()).with_max_level_hint(level)),
        );
    Registry::default().with(spans).with(events).try_init().map_err(|error| error.to_string())?;
    Ok(Guard { provider })
}

fn tracer_provider(settings: &Settings<'_>, endpoint: &str) -> Result<SdkTracerProvider, String> {
    let exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .with_timeout(Duration::from_secs(5))
        .build()
        .map_err(|error| format!("the OTLP endpoint `{endpoint}`: {error}"))?;
    let batch = BatchConfigBuilder::default()
        .with_max_queue_size(8192)
        .with_max_export_batch_size(512)
        .with_scheduled_delay(Duration::from_millis(500))
        .build();
    let resource = Resource::builder()
        .with_service_name(settings.service)
        .with_attribute(KeyValue::new("service.instance.id", settings.instance.to_owned()))
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .with_attributes(settings.attributes.iter().cloned())
        .build();
    Ok(SdkTracerProvider::builder()
        // A span is made only for a request that is to be sampled, so the decision has already fallen.
        .with_sampler(Sampler::AlwaysOn)
        .with_resource(resource)
        .with_span_processor(BatchSpanProcessor::builder(exporter).with_batch_config(batch).build())
        .build())
}

/// The time of day as RFC 3339 in UTC with milliseconds, as every log line has it.
pub fn timestamp(at: SystemTime) -> String {
    let at = time::OffsetDateTime::from(at);
    let mut text = String::with_capacity(24);
    // Digit by digit: the general formatter takes longer than the rest of an access line.
    let mut push = |number: u32, digits: u32, after: &str| {
        let digit = |place: u32| char::from_digit(number / 10_u32.pow(place) % 10, 10);
        text.extend((0..digits).rev().filter_map(digit));
        text.push_str(after);
    };
    push(at.year().unsigned_abs(), 4, "-");
    push(u32::from(u8::from(at.month())), 2, "-");
    push(u32::from(at.day()), 2, "T");
    push(u32::from(at.hour()), 2, ":");
    push(u32::from(at.minute()), 2, ":");
    push(u32::from(at.second()), 2, ".");
    push(u32::from(at.millisecond()), 3, "Z");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_rfc_3339() {
        for (seconds, ms, expected) in [
            (0, 0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, 7, "2000-02-28T23:59:59.007Z"),
            (951_782_400, 70, "2000-02-29T00:00:00.070Z"),
            (4_102_444_799, 999, "2099-12-31T23:59:59.999Z"),
        ] {
            let at = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds) + Duration::from_millis(ms);
            assert_eq!(timestamp(at), expected);
        }
    }
}
