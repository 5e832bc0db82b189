//! W3C Trace Context in and out of HTTP headers (<https://www.w3.org/TR/trace-context/>).

use std::time::SystemTime;

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator};
use opentelemetry::trace::{Span as _, TraceContextExt, Tracer};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// The headers of W3C Trace Context.
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// Vendors' part of it.
pub const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// The caller's span, if its headers name one. Malformed headers name none: they start a new trace, they never fail a
/// request.
pub fn parent(headers: &HeaderMap) -> Option<Context> {
    headers.contains_key(&TRACEPARENT).then(|| {
        let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(headers));
        parent.span().span_context().is_valid().then_some(parent)
    })?
}

/// Whether the caller records its span.
pub fn is_sampled(parent: &Context) -> bool {
    parent.span().span_context().is_sampled()
}

/// Makes `span` a child of the caller's.
pub fn adopt(span: &Span, parent: Context) {
    // Refused only once the span has begun to run, which callers of this do not do.
    let _ = span.set_parent(parent);
}

/// Writes the headers that make the receiver's span a child of `span`.
pub fn inject(span: &Span, headers: &mut HeaderMap) {
    TraceContextPropagator::new().inject_context(&span.context(), &mut HeadersMut(headers));
}

/// Adds a span that has already passed below `span`: a step that ran on another thread and was only timed there.
pub fn child(span: &Span, name: &'static str, began: SystemTime, ended: SystemTime, attributes: Vec<KeyValue>) {
    let tracer = opentelemetry::global::tracer("isochrone");
    let builder = tracer.span_builder(name).with_start_time(began).with_attributes(attributes);
    tracer.build_with_context(builder, &span.context()).end_with_timestamp(ended);
}

/// The trace's id as 32 hexadecimal digits, for log lines that lead to it.
pub fn trace_id(span: &Span) -> Option<String> {
    let context = span.context();
    let span = context.span();
    span.span_context().is_valid().then(|| span.span_context().trace_id().to_string())
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

struct HeadersMut<'a>(&'a mut HeaderMap);

impl Injector for HeadersMut<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(key), HeaderValue::try_from(value)) {
            self.0.insert(name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(traceparent: &str) -> HeaderMap {
        HeaderMap::from_iter([(TRACEPARENT, HeaderValue::from_str(traceparent).expect("a header value"))])
    }

    #[test]
    fn a_parent_is_read_with_its_decision() {
        let sampled = parent(&headers("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")).expect("a parent");
        assert!(is_sampled(&sampled));
        let unsampled = parent(&headers("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")).expect("a parent");
        assert!(!is_sampled(&unsampled));
    }

    #[test]
    fn malformed_parents_start_a_new_trace() {
        for bad in [
            "",
            "00",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01-extra-00",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-zzf7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ] {
            assert!(parent(&headers(bad)).is_none(), "{bad}");
        }
    }
}
