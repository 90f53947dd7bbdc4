//! The external scaler that KEDA asks: how many nodes a group is to have, or what waits for them.

use std::{collections::BTreeMap, pin::Pin};

use shaper_proto::scale::keda::{
    GetMetricSpecResponse, GetMetricsRequest, GetMetricsResponse, IsActiveResponse, MetricSpec, MetricValue,
    ScaledObjectRef, external_scaler_server::ExternalScaler,
};
use tokio_stream::{Stream, StreamExt, wrappers::WatchStream};
use tonic::{Request, Response, Status};

use super::Wishes;
use crate::reactor::scale::Wish;

/// Its name, and the amount.
type Metric = (&'static str, fn(&Wish) -> f64);

/// What can be asked for.
const METRICS: [Metric; 4] = [
    ("nodes", |wish| f64::from(wish.target)),
    ("pending_tasks", |wish| wish.tasks as f64),
    ("pending_cpu_cores", |wish| wish.millicores as f64 / 1e3),
    ("pending_memory_bytes", |wish| wish.memory as f64),
];

/// The service.
pub struct Keda {
    wishes: Wishes,
}

/// What a ScaledObject asks for.
struct Asked {
    group: String,
    metric: usize,
    /// Of the metric, so much is one replica's.
    size: f64,
}

impl Asked {
    fn name(&self) -> String {
        format!("{}-{}", METRICS[self.metric].0, self.group)
    }
}

impl Keda {
    /// Answers from these wishes.
    pub fn new(wishes: Wishes) -> Keda {
        Keda { wishes }
    }

    fn asked(&self, object: &ScaledObjectRef) -> Result<Asked, Status> {
        let metadata = &object.scaler_metadata;
        let known = self.wishes.borrow();
        let group = metadata.get("group").filter(|group| known.contains_key(*group)).ok_or_else(|| {
            let names: Vec<_> = known.keys().map(String::as_str).collect();
            Status::invalid_argument(format!(
                "`group` in the trigger's metadata must be one of: {}",
                names.join(", ")
            ))
        })?;
        let metric = metadata.get("metric").map_or("nodes", String::as_str);
        let at = METRICS.iter().position(|(name, _)| *name == metric).ok_or_else(|| {
            let names: Vec<_> = METRICS.iter().map(|(name, _)| *name).collect();
            Status::invalid_argument(format!(
                "`metric` in the trigger's metadata must be one of: {}",
                names.join(", ")
            ))
        })?;
        let size = metadata.get("targetSize").map_or(Ok(1.0), |size| size.parse::<f64>());
        let size = size.ok().filter(|size| size.is_finite() && *size > 0.0).ok_or_else(|| {
            Status::invalid_argument("`targetSize` in the trigger's metadata must be a number above 0")
        })?;
        Ok(Asked { group: group.clone(), metric: at, size })
    }
}

fn active(wishes: &BTreeMap<String, Wish>, asked: &Asked) -> bool {
    wishes.get(&asked.group).is_some_and(|wish| METRICS[asked.metric].1(wish) > 0.0)
}

#[tonic::async_trait]
impl ExternalScaler for Keda {
    async fn is_active(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<IsActiveResponse>, Status> {
        let asked = self.asked(request.get_ref())?;
        Ok(Response::new(IsActiveResponse { result: active(&self.wishes.borrow(), &asked) }))
    }

    type StreamIsActiveStream = Pin<Box<dyn Stream<Item = Result<IsActiveResponse, Status>> + Send>>;

    async fn stream_is_active(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<Self::StreamIsActiveStream>, Status> {
        let asked = self.asked(request.get_ref())?;
        let mut before = None;
        // The first says how it is now; then, what changes.
        let changes = WatchStream::new(self.wishes.clone()).filter_map(move |wishes| {
            let now = active(&wishes, &asked);
            (before.replace(now) != Some(now)).then_some(Ok(IsActiveResponse { result: now }))
        });
        Ok(Response::new(Box::pin(changes)))
    }

    async fn get_metric_spec(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<GetMetricSpecResponse>, Status> {
        let asked = self.asked(request.get_ref())?;
        let spec = MetricSpec {
            metric_name: asked.name(),
            target_size: asked.size.ceil() as i64,
            target_size_float: asked.size,
        };
        Ok(Response::new(GetMetricSpecResponse { metric_specs: vec![spec] }))
    }

    async fn get_metrics(
        &self,
        request: Request<GetMetricsRequest>,
    ) -> Result<Response<GetMetricsResponse>, Status> {
        let object = request.into_inner().scaled_object_ref.unwrap_or_default();
        let asked = self.asked(&object)?;
        let wish = self.wishes.borrow().get(&asked.group).copied().unwrap_or_default();
        let value = METRICS[asked.metric].1(&wish);
        let value = MetricValue {
            metric_name: asked.name(),
            metric_value: value.ceil() as i64,
            metric_value_float: value,
        };
        Ok(Response::new(GetMetricsResponse { metric_values: vec![value] }))
    }
}
