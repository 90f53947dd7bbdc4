//! A provider of the Cluster Autoscaler's `externalgrpc` protocol, which the broker calls as the autoscaler would.

use std::time::Duration;

use shaper_core::{
    scale::{Observed, Order, OrderKind},
    spec::Capacity,
    units::{Bytes, Millicores},
};
use shaper_proto::scale::{
    externalgrpc::{
        self as wire, cloud_provider_client::CloudProviderClient, instance_status::InstanceState,
    },
    kubernetes,
};
use tonic::{
    Code, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use super::chain;

/// Messages of a provider are not larger.
const MAX_MESSAGE: usize = 4 << 20;
const CONNECT: Duration = Duration::from_secs(5);

/// One group of such a provider.
pub(super) struct ExternalGrpc {
    address: String,
    id: String,
    ca: Option<String>,
    identity: Option<(String, String)>,
    client: Option<CloudProviderClient<Channel>>,
}

impl ExternalGrpc {
    pub(super) fn new(
        address: &str,
        id: &str,
        ca: Option<&str>,
        identity: Option<&(String, String)>,
    ) -> ExternalGrpc {
        let (address, id) = (address.to_owned(), id.to_owned());
        ExternalGrpc { address, id, ca: ca.map(str::to_owned), identity: identity.cloned(), client: None }
    }

    /// A connection that is made when it is first needed, and again after it broke.
    async fn client(&mut self) -> Result<&mut CloudProviderClient<Channel>, String> {
        if self.client.is_none() {
            let mut endpoint = Endpoint::from_shared(self.address.clone()).map_err(|error| chain(&error))?;
            if let Some(ca) = &self.ca {
                let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(ca)?));
                if let Some((cert, key)) = &self.identity {
                    tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
                }
                endpoint = endpoint.tls_config(tls).map_err(|error| chain(&error))?;
            }
            let channel = endpoint.connect_timeout(CONNECT).connect_lazy();
            self.client = Some(CloudProviderClient::new(channel).max_decoding_message_size(MAX_MESSAGE));
        }
        self.client.as_mut().ok_or_else(|| "no connection".to_owned())
    }

    /// Carries out an order; the size that the provider works towards afterwards.
    pub(super) async fn carry_out(&mut self, order: &Order) -> Result<u32, String> {
        let id = self.id.clone();
        self.refresh().await?;
        let before = self.target().await?;
        let client = self.client().await?;
        match &order.kind {
            OrderKind::Grow { .. } => {
                if before < order.target {
                    let delta = difference(order.target - before)?;
                    let request = wire::NodeGroupIncreaseSizeRequest { delta, id };
                    client
                        .node_group_increase_size(request)
                        .await
                        .map_err(|it| said("NodeGroupIncreaseSize", &it))?;
                }
            }
            OrderKind::Withdraw { .. } => {
                if before > order.target {
                    let delta = -difference(before - order.target)?;
                    let request = wire::NodeGroupDecreaseTargetSizeRequest { delta, id };
                    let answer = client.node_group_decrease_target_size(request).await;
                    answer.map_err(|it| said("NodeGroupDecreaseTargetSize", &it))?;
                }
            }
            OrderKind::Remove { node } => self.remove(node, before <= order.target).await?,
        }
        self.target().await
    }

    /// Ends a node, once the provider has said that it is of this group. Of a group that is as small already, one that is not
    /// there was ended before, and the answer lost.
    async fn remove(&mut self, name: &str, is_small: bool) -> Result<(), String> {
        let id = self.id.clone();
        let instances = self.instances().await?;
        // A provider's id is PROVIDER://…/NAME, as Kubernetes has it.
        let is_it =
            |instance: &&wire::Instance| instance.id == name || instance.id.rsplit('/').next() == Some(name);
        let instance = instances.iter().find(is_it);
        if instance.is_none() && is_small {
            return Ok(());
        }
        let provider_id = instance.map(|instance| instance.id.clone()).unwrap_or_default();
        let node = wire::ExternalGrpcNode { provider_id, name: name.to_owned(), ..Default::default() };
        let client = self.client().await?;
        let request = wire::NodeGroupForNodeRequest { node: Some(node.clone()) };
        let of = client.node_group_for_node(request).await.map_err(|it| said("NodeGroupForNode", &it))?;
        let of = of.into_inner().node_group.map(|group| group.id).unwrap_or_default();
        if of != id {
            let whose = if of.is_empty() { "none".to_owned() } else { format!("`{of}`") };
            return Err(format!(
                "its provider says that {name} is of the group {whose}, and not of `{id}`: do names of nodes match `nodes`?"
            ));
        }
        let request = wire::NodeGroupDeleteNodesRequest { nodes: vec![node], id };
        client.node_group_delete_nodes(request).await.map_err(|it| said("NodeGroupDeleteNodes", &it))?;
        Ok(())
    }

    /// How the group is.
    pub(super) async fn observe(&mut self) -> Result<Observed, String> {
        self.refresh().await?;
        let target = self.target().await?;
        let errors = self.instances().await?.into_iter().filter_map(|instance| {
            let status =
                instance.status.filter(|it| it.instance_state() != InstanceState::InstanceDeleting)?;
            let error = status.error_info.filter(|error| !error.error_code.is_empty())?;
            Some(format!("{}: {} ({})", instance.id, error.error_message, error.error_code))
        });
        Ok(Observed { target, errors: errors.take(8).collect() })
    }

    /// What a new node has; `None`: this provider does not say that.
    pub(super) async fn template(&mut self) -> Result<Option<Capacity>, String> {
        let request = wire::NodeGroupTemplateNodeInfoRequest { id: self.id.clone() };
        match self.client().await?.node_group_template_node_info(request).await {
            Ok(answer) => node(&answer.into_inner().node_bytes).map(Some),
            Err(status) if status.code() == Code::Unimplemented => Ok(None),
            Err(status) => Err(said("NodeGroupTemplateNodeInfo", &status)),
        }
    }

    async fn refresh(&mut self) -> Result<(), String> {
        let answer = self.client().await?.refresh(wire::RefreshRequest {}).await;
        answer.map(|_| ()).map_err(|status| said("Refresh", &status))
    }

    async fn target(&mut self) -> Result<u32, String> {
        let request = wire::NodeGroupTargetSizeRequest { id: self.id.clone() };
        let answer = self.client().await?.node_group_target_size(request).await;
        let size = answer.map_err(|status| said("NodeGroupTargetSize", &status))?.into_inner().target_size;
        u32::try_from(size).map_err(|_| format!("its provider says that it works towards {size} nodes"))
    }

    async fn instances(&mut self) -> Result<Vec<wire::Instance>, String> {
        let request = wire::NodeGroupNodesRequest { id: self.id.clone() };
        let answer = self.client().await?.node_group_nodes(request).await;
        Ok(answer.map_err(|status| said("NodeGroupNodes", &status))?.into_inner().instances)
    }
}

fn read(path: &str) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("cannot read {path}: {error}"))
}

fn difference(nodes: u32) -> Result<i32, String> {
    i32::try_from(nodes).map_err(|_| format!("{nodes} nodes cannot be said in this protocol"))
}

fn said(call: &str, status: &Status) -> String {
    match status.message() {
        "" => format!("{call}: {:?}", status.code()),
        text => format!("{call}: {text} ({:?})", status.code()),
    }
}

/// What a Node of Kubernetes says that it has for tasks.
fn node(bytes: &[u8]) -> Result<Capacity, String> {
    let node = <kubernetes::Node as prost::Message>::decode(bytes);
    let status = node
        .map_err(|error| format!("its provider's template is no Node: {error}"))?
        .status
        .unwrap_or_default();
    let amount = |name: &str| {
        let quantity = status.allocatable.get(name).or_else(|| status.capacity.get(name));
        let text = quantity
            .map(|it| it.string.as_str())
            .ok_or_else(|| format!("its provider's template has no {name}"))?;
        thousandths(text)
            .ok_or_else(|| format!("its provider's template has {name}: {text}, which is no quantity"))
    };
    let cpu = Millicores(u64::try_from(amount("cpu")?).unwrap_or(u64::MAX));
    let memory = Bytes(u64::try_from(amount("memory")? / 1000).unwrap_or(u64::MAX));
    Ok(Capacity { cpu, memory, gpu_memory: None, network: None, storage_io: None })
}

/// A quantity of Kubernetes (k8s.io/apimachinery/pkg/api/resource), in thousandths: `1500m`, `0.5`, `32Gi`, `2e3`.
fn thousandths(text: &str) -> Option<u128> {
    let digits = text.find(|it: char| !it.is_ascii_digit() && it != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || whole.len() > 18 || fraction.len() > 9 {
        return None;
    }
    // What is behind the point, in thousand millionths.
    let parts = |text: &str| if text.is_empty() { Some(0) } else { text.parse::<u128>().ok() };
    let billionths = parts(whole)? * 1_000_000_000 + parts(fraction)? * 10u128.pow(9 - fraction.len() as u32);
    let factor: u128 = match suffix {
        "n" => return Some(billionths / 1_000_000_000_000_000),
        "u" => return Some(billionths / 1_000_000_000_000),
        "m" => return Some(billionths / 1_000_000_000),
        "" => 1,
        "k" => 1000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "P" => 1_000_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        "Pi" => 1 << 50,
        _ => {
            let exponent: u32 = suffix.strip_prefix(['e', 'E'])?.parse().ok().filter(|it| *it <= 18)?;
            10u128.pow(exponent)
        }
    };
    Some(billionths.checked_mul(factor)? / 1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_those_of_kubernetes() {
        for (text, expected) in [
            ("4", 4000),
            ("1500m", 1500),
            ("0.5", 500),
            (".25", 250),
            ("2e3", 2_000_000),
            ("1Ki", 1_024_000),
            ("32Gi", 32 * (1 << 30) * 1000),
            ("1.5G", 1_500_000_000_000),
            ("250000u", 250),
        ] {
            assert_eq!(thousandths(text), Some(expected), "{text}");
        }
        for text in ["", "m", "-1", "1x", "1 Gi", "1e", "1e99", "9999999999999999999", "."] {
            assert_eq!(thousandths(text), None, "{text}");
        }
    }
}
