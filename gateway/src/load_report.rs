//! Load reports: what a worker says of its load with every answer, in the header `endpoint-load-metrics`. The fields are
//! those of ORCA's `xds.data.orca.v3.OrcaLoadReport`, in the header's forms `TEXT key=value, …` and `JSON {…}`.
//!
//! Read are the named metrics `in_flight` and `queue_depth`. A report without the first is none.

use http::{HeaderMap, HeaderName};
use isochrone_core::live::Report;

const FIELD: HeaderName = HeaderName::from_static("endpoint-load-metrics");

/// The report in an answer's head, if there is one that can be read.
pub(crate) fn parse(headers: &HeaderMap) -> Option<Report> {
    let text = headers.get(FIELD)?.to_str().ok()?.trim();
    let (form, rest) = text.split_once(' ')?;
    let (in_flight, queued) = match form {
        "TEXT" => text_metrics(rest),
        "JSON" => json_metrics(rest)?,
        _ => return None,
    };
    Some(Report { in_flight: count(in_flight?)?, queued: queued.and_then(count).unwrap_or(0) })
}

fn text_metrics(text: &str) -> (Option<f64>, Option<f64>) {
    let value = |name: &str| {
        let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
        let found = pairs.map(|(key, value)| (key.trim(), value.trim())).find(|(key, _)| *key == name);
        found.and_then(|(_, value)| value.parse().ok())
    };
    (value("named_metrics.in_flight"), value("named_metrics.queue_depth"))
}

fn json_metrics(text: &str) -> Option<(Option<f64>, Option<f64>)> {
    #[derive(serde::Deserialize)]
    struct Metrics {
        #[serde(default)]
        named_metrics: Named,
    }
    #[derive(Default, serde::Deserialize)]
    struct Named {
        in_flight: Option<f64>,
        queue_depth: Option<f64>,
    }
    let metrics: Metrics = serde_json::from_str(text).ok()?;
    Some((metrics.named_metrics.in_flight, metrics.named_metrics.queue_depth))
}

/// Below a million: more is no count of requests.
fn count(value: f64) -> Option<u32> {
    (0.0..1e6).contains(&value).then_some(value as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_read_and_nonsense_is_none() {
        let rows = [
            ("TEXT named_metrics.in_flight=7, named_metrics.queue_depth=3", Some((7, 3))),
            ("TEXT application_utilization=0.5,named_metrics.in_flight=7", Some((7, 0))),
            (r#"JSON {"application_utilization":0.5,"named_metrics":{"in_flight":7,"queue_depth":3}}"#, Some((7, 3))),
            (r#"JSON {"cpu_utilization":0.5}"#, None),
            ("TEXT named_metrics.in_flight=-1", None),
            ("TEXT named_metrics.in_flight=NaN", None),
            ("TEXT named_metrics.in_flight=1e99", None),
            ("TEXT", None),
            ("BIN AAAA", None),
            ("JSON {", None),
        ];
        for (text, expected) in rows {
            let headers = HeaderMap::from_iter([(FIELD, text.parse().expect("a value"))]);
            let expected = expected.map(|(in_flight, queued)| Report { in_flight, queued });
            assert_eq!(parse(&headers), expected, "{text}");
        }
        assert_eq!(parse(&HeaderMap::new()), None);
    }
}
