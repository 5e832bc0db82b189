//! `/metrics`, in the Prometheus text format.

use std::fmt::Write as _;
use std::sync::Arc;

use axum::extract::State as Shared;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};

use crate::app::State;
use crate::repository::Loaded;
use crate::statistics::Counts;

pub(crate) async fn metrics(Shared(state): Shared<Arc<State>>) -> Response {
    let models = state.repository.models();
    let counted: Vec<(&Loaded, Counts)> = models
        .values()
        .flat_map(|versions| versions.values())
        .map(|loaded| (&**loaded, loaded.runner.statistics().snapshot()))
        .collect();
    let mut text = String::new();
    let mut family = |name: &str, kind: &str, help: &str, value: &dyn Fn(&Loaded, &Counts) -> f64| {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (loaded, counts) in &counted {
            let (model, version) = (&loaded.found.name, &loaded.found.version);
            let _ = writeln!(text, "{name}{{model=\"{model}\",version=\"{version}\"}} {}", value(loaded, counts));
        }
    };
    family("isochrone_backend_requests_total", "counter", "Requests that a model answered or failed.", &|_, counts| {
        (counts.success.count + counts.fail.count) as f64
    });
    family("isochrone_backend_failures_total", "counter", "Requests refused or failed by a model.", &|_, counts| {
        counts.fail.count as f64
    });
    family("isochrone_backend_rows_total", "counter", "Rows that were answered.", &|_, counts| counts.rows as f64);
    family("isochrone_backend_batches_total", "counter", "Batches that were computed.", &|_, counts| {
        counts.busy().count as f64
    });
    family("isochrone_backend_queue_seconds_total", "counter", "Time that requests waited.", &|_, counts| {
        counts.queue.time.as_secs_f64()
    });
    family(
        "isochrone_backend_execute_seconds_total",
        "counter",
        "Time that requests were at the model.",
        &|_, counts| counts.execute.time.as_secs_f64(),
    );
    family("isochrone_backend_busy_seconds_total", "counter", "Time that instances computed.", &|_, counts| {
        counts.busy().time.as_secs_f64()
    });
    let help = "Time computed for nobody: the client had left or its deadline passed meanwhile.";
    family("isochrone_backend_wasted_compute_seconds_total", "counter", help, &|_, counts| counts.wasted.as_secs_f64());
    family("isochrone_backend_waiting", "gauge", "Requests that wait or are computed.", &|loaded, _| {
        loaded.runner.load().0 as f64
    });
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}
