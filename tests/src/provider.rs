//! A provider of nodes that speaks the Cluster Autoscaler's `externalgrpc` protocol, over a socket. What it is asked for, the
//! test does: it starts and stops real agents.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Receiver, Sender},
    },
    thread,
};

use shaper_proto::scale::externalgrpc::{
    self as wire,
    cloud_provider_server::{CloudProvider, CloudProviderServer},
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Server};

use crate::time::PATIENCE;

/// What a provider is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// So many nodes more.
    Start(u32),
    /// One less: this.
    End(String),
    /// So many that have not come are not wanted any more.
    Withdraw(u32),
}

/// How it behaves.
#[derive(Clone, Debug, Default)]
pub struct Manner {
    /// It refuses to enlarge the group, with these words.
    pub refuses: Option<String>,
    /// It does what it is asked, and does not answer.
    pub hangs: bool,
}

#[derive(Debug)]
struct Group {
    target: i32,
    nodes: BTreeSet<String>,
    manner: Manner,
}

#[derive(Clone)]
struct Service {
    group: Arc<Mutex<Group>>,
    wishes: Sender<Wish>,
}

/// The provider of one group, `pool`; its server lasts as long as the process.
pub struct Provider {
    address: SocketAddr,
    service: Service,
    wishes: Receiver<Wish>,
}

impl Provider {
    /// A provider of a group in which these nodes are.
    pub fn start(nodes: &[&str]) -> Provider {
        let (wish, wishes) = mpsc::channel();
        let (told, address) = mpsc::channel();
        let nodes: BTreeSet<_> = nodes.iter().map(|&node| node.to_owned()).collect();
        let group = Group { target: nodes.len() as i32, nodes, manner: Manner::default() };
        let service = Service { group: Arc::new(Mutex::new(group)), wishes: wish };
        let server = CloudProviderServer::new(service.clone());
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime can be made").block_on(async {
                let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback can be listened on");
                // The other end waits for it.
                let _ = told.send(listener.local_addr().expect("it has an address"));
                let served = Server::builder().add_service(server);
                served.serve_with_incoming(TcpListenerStream::new(listener)).await.expect("it serves");
            });
        });
        let address = address.recv().expect("the server starts");
        Provider { address, service, wishes }
    }

    /// A document for `--scale`: the group, with these fields beside.
    pub fn document(&self, fields: &str) -> String {
        format!(
            "settle_seconds: 0.5\ngroups:\n- name: workers\n  nodes: n*\n  cooldown_seconds: 1\n  {fields}\n  provider: \
             {{externalgrpc: {{address: \"http://{}\", group: pool}}}}\n",
            self.address
        )
    }

    /// What it is asked next.
    #[track_caller]
    pub fn wish(&self) -> Wish {
        self.wishes.recv_timeout(PATIENCE).expect("the provider is asked for something")
    }

    /// What it was asked and nobody has looked at.
    pub fn unheard(&self) -> Vec<Wish> {
        self.wishes.try_iter().collect()
    }

    /// A node that it started is there.
    pub fn started(&self, node: &str) {
        self.service.group().nodes.insert(node.to_owned());
    }

    /// How it behaves from here on.
    pub fn behave(&self, manner: Manner) {
        self.service.group().manner = manner;
    }

    /// What it works towards.
    pub fn target(&self) -> i32 {
        self.service.group().target
    }
}

impl Service {
    fn group(&self) -> std::sync::MutexGuard<'_, Group> {
        self.group.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, wish: Wish) {
        // The test may be over.
        let _ = self.wishes.send(wish);
    }

    fn of_pool(&self, id: &str) -> Result<(), Status> {
        if id == "pool" { Ok(()) } else { Err(Status::not_found(format!("there is no group {id}"))) }
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl CloudProvider for Service {
    async fn node_group_for_node(
        &self,
        request: Request<wire::NodeGroupForNodeRequest>,
    ) -> Answer<wire::NodeGroupForNodeResponse> {
        let name = request.into_inner().node.unwrap_or_default().name;
        let id = if self.group().nodes.contains(&name) { "pool".to_owned() } else { String::new() };
        let group = wire::NodeGroup { id };
        Ok(Response::new(wire::NodeGroupForNodeResponse { node_group: Some(group) }))
    }

    async fn refresh(&self, _: Request<wire::RefreshRequest>) -> Answer<wire::RefreshResponse> {
        Ok(Response::new(wire::RefreshResponse {}))
    }

    async fn node_group_target_size(
        &self,
        request: Request<wire::NodeGroupTargetSizeRequest>,
    ) -> Answer<wire::NodeGroupTargetSizeResponse> {
        self.of_pool(&request.into_inner().id)?;
        Ok(Response::new(wire::NodeGroupTargetSizeResponse { target_size: self.group().target }))
    }

    async fn node_group_increase_size(
        &self,
        request: Request<wire::NodeGroupIncreaseSizeRequest>,
    ) -> Answer<wire::NodeGroupIncreaseSizeResponse> {
        let wire::NodeGroupIncreaseSizeRequest { delta, id } = request.into_inner();
        self.of_pool(&id)?;
        let manner = self.group().manner.clone();
        if let Some(words) = manner.refuses {
            return Err(Status::resource_exhausted(words));
        }
        let delta = u32::try_from(delta).map_err(|_| Status::invalid_argument("delta"))?;
        self.group().target += delta as i32;
        self.tell(Wish::Start(delta));
        if manner.hangs {
            std::future::pending::<()>().await;
        }
        Ok(Response::new(wire::NodeGroupIncreaseSizeResponse {}))
    }

    async fn node_group_delete_nodes(
        &self,
        request: Request<wire::NodeGroupDeleteNodesRequest>,
    ) -> Answer<wire::NodeGroupDeleteNodesResponse> {
        for node in request.into_inner().nodes {
            if !self.group().nodes.remove(&node.name) {
                return Err(Status::not_found(node.name));
            }
            self.group().target -= 1;
            self.tell(Wish::End(node.name));
        }
        Ok(Response::new(wire::NodeGroupDeleteNodesResponse {}))
    }

    async fn node_group_decrease_target_size(
        &self,
        request: Request<wire::NodeGroupDecreaseTargetSizeRequest>,
    ) -> Answer<wire::NodeGroupDecreaseTargetSizeResponse> {
        let delta = request.into_inner().delta;
        let less = u32::try_from(-delta).map_err(|_| Status::invalid_argument("delta must be negative"))?;
        self.group().target += delta;
        self.tell(Wish::Withdraw(less));
        Ok(Response::new(wire::NodeGroupDecreaseTargetSizeResponse {}))
    }

    async fn node_group_nodes(
        &self,
        _: Request<wire::NodeGroupNodesRequest>,
    ) -> Answer<wire::NodeGroupNodesResponse> {
        let instance = |node: &String| wire::Instance { id: format!("test:///{node}"), status: None };
        let instances = self.group().nodes.iter().map(instance).collect();
        Ok(Response::new(wire::NodeGroupNodesResponse { instances }))
    }

    async fn node_group_template_node_info(
        &self,
        _: Request<wire::NodeGroupTemplateNodeInfoRequest>,
    ) -> Answer<wire::NodeGroupTemplateNodeInfoResponse> {
        Err(Status::unimplemented("the test says what a node has"))
    }
}
