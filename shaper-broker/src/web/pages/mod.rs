//! The pages, one a file: each looks at the state and copies out what it shows, on the broker's thread; and writes it down,
//! elsewhere. What a look costs is bounded by [`SCAN`], by the number of nodes, and by what
//! is on those that are shown.

mod events;
mod nodes;
mod overview;
mod policies;
mod scale;
mod task;
mod tasks;

use axum::response::Response;
use http::StatusCode;
use shaper_core::{
    gpu::CardRequest,
    place::Needs,
    spec::{Capacity, Credentials, Demand},
    task::UnixNanos,
    units::{BitsPerSec, Iops},
};

pub(super) use self::{
    events::Events,
    nodes::{NodePage, Nodes},
    overview::Overview,
    policies::Policies,
    scale::Scale,
    task::TaskPage,
    tasks::Tasks,
};
use super::{Viewer, Wanted, assets, html::Html, markup};
use crate::{
    actor::View,
    reactor::{Phase, Refusal},
};

/// Tasks that are looked at for one page, most.
const SCAN: usize = 20_000;
/// Rows of a page.
const ROWS: usize = 50;

/// What the menu has, in its order.
const MENU: [(&str, &str); 6] = [
    ("/", "Overview"),
    ("/tasks", "Tasks"),
    ("/nodes", "Nodes"),
    ("/policies", "Policies"),
    ("/events", "Events"),
    ("/scale", "Scale-out"),
];

/// A page.
pub(super) trait Page: Sized {
    /// Under which item of the menu it is.
    const MENU: &'static str;
    /// Whether it has a chart.
    const HAS_CHART: bool = false;

    /// Its title.
    fn title(&self) -> String;
    /// Looks at the state. On the broker's thread: what is not shown is not copied.
    fn look(view: &View<'_>, viewer: &Viewer, wanted: &Wanted) -> Result<Self, Trouble>;
    /// Writes what does not change by itself, such as forms.
    fn still(&self, _html: &mut Html) {}
    /// Writes what does.
    fn show(&self, html: &mut Html, now: UnixNanos);
}

/// Why there is no page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// Nobody knows who asks.
    Stranger,
    /// The code does not work.
    Code,
    /// Not theirs to see.
    Denied,
    /// Another broker leads, if that is known: which.
    Standby(Option<String>),
    /// The broker does not answer in time.
    Busy,
    /// It ends.
    Ending,
    /// No such task, or not theirs.
    NoTask(String),
    /// No such node.
    NoNode(String),
    /// No such page.
    NoPage,
}

impl From<Refusal> for Trouble {
    fn from(refusal: Refusal) -> Trouble {
        match refusal {
            Refusal::NoSuchTask(id) => Trouble::NoTask(id.to_string()),
            Refusal::NoSuchNode(node) => Trouble::NoNode(node),
            _ => Trouble::Denied,
        }
    }
}

impl Trouble {
    fn told(&self) -> (StatusCode, &'static str, String) {
        match self {
            Trouble::Stranger => (
                StatusCode::UNAUTHORIZED,
                "Who are you?",
                "This page is for those who can ask the broker. Run `shaper ui`: it prints an address that opens the page, \
                 once. A session ends after twelve hours, and when the broker is started anew."
                    .to_owned(),
            ),
            Trouble::Code => (
                StatusCode::UNAUTHORIZED,
                "This address does not work any more",
                "It was used before, or is older than two minutes. Run `shaper ui` for another.".to_owned(),
            ),
            Trouble::Denied => (
                StatusCode::FORBIDDEN,
                "Not yours to see",
                "Your role may not ask this of the broker; docs/authorization.md says which may.".to_owned(),
            ),
            Trouble::Standby(leader) => (
                StatusCode::SERVICE_UNAVAILABLE,
                "This broker stands by",
                match leader {
                    Some(leader) => format!("The one that leads is at {leader}: run `shaper ui` for its page."),
                    None => "None leads yet. Load this page again in a moment.".to_owned(),
                },
            ),
            Trouble::Busy => (
                StatusCode::SERVICE_UNAVAILABLE,
                "The broker is busy",
                "It did not answer within five seconds. Load this page again in a moment.".to_owned(),
            ),
            Trouble::Ending => (
                StatusCode::SERVICE_UNAVAILABLE,
                "The broker is ending",
                "Once it is started again, run `shaper ui`.".to_owned(),
            ),
            Trouble::NoTask(name) => (
                StatusCode::NOT_FOUND,
                "No such task",
                format!("There is no task `{name}` of yours: it was never submitted, or is forgotten."),
            ),
            Trouble::NoNode(name) => (
                StatusCode::NOT_FOUND,
                "No such node",
                format!("No node `{name}` has ever connected to this broker."),
            ),
            Trouble::NoPage => {
                (StatusCode::NOT_FOUND, "No such page", "The menu has all that there are.".to_owned())
            }
        }
    }
}

/// A page that says what is the trouble.
pub(super) fn trouble(trouble: &Trouble, viewer: Option<&Viewer>) -> Response {
    let (status, title, text) = trouble.told();
    let mut html = Html::default();
    head(&mut html, title, false);
    html.raw("<body>");
    top(&mut html, "", viewer);
    html.raw("<main id=\"main\"><h1>").text(title).raw("</h1><p class=\"trouble\" role=\"alert\">");
    html.text(text).raw("</p></main></body></html>");
    markup(status, html)
}

/// All of a page.
pub(super) fn whole<P: Page>(page: &P, viewer: &Viewer, now: UnixNanos) -> Html {
    let mut html = Html::default();
    let title = page.title();
    head(&mut html, &title, P::HAS_CHART);
    html.raw("<body>");
    top(&mut html, P::MENU, Some(viewer));
    html.raw("<main id=\"main\"><h1>").text(&title).raw("</h1>");
    page.still(&mut html);
    html.raw("<div id=\"live\" data-live>");
    page.show(&mut html, now);
    html.raw("</div></main><footer><p>as ").text(&viewer.who).raw(" · <span id=\"state\" role=\"status\">");
    html.raw("loaded ").raw("<time>").text(super::html::Moment(now)).raw("</time></span></p></footer>");
    html.raw("</body></html>");
    html
}

fn head(html: &mut Html, title: &str, has_chart: bool) {
    html.raw("<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>").text(title);
    html.raw(" · shaper</title><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">");
    html.raw("<meta name=\"color-scheme\" content=\"light dark\">");
    html.raw("<link rel=\"icon\"").attribute("href", assets::address("icon.svg")).raw(">");
    let mut style = |name| {
        html.raw("<link rel=\"stylesheet\"").attribute("href", assets::address(name)).raw(">");
    };
    style("page.css");
    if has_chart {
        style("uplot.css");
        html.raw("<script defer").attribute("src", assets::address("uplot.js")).raw("></script>");
    }
    html.raw("<script defer").attribute("src", assets::address("page.js")).raw("></script></head>");
}

fn top(html: &mut Html, current: &str, viewer: Option<&Viewer>) {
    html.raw("<a class=\"skip\" href=\"#main\">Skip to the content</a><header><a class=\"brand\" href=\"/\">shaper</a>");
    if viewer.is_some() {
        html.raw("<nav aria-label=\"Pages\"><ul>");
        for (address, name) in MENU {
            html.raw("<li><a").attribute("href", address);
            if address == current {
                html.raw(" aria-current=\"page\"");
            }
            html.raw(">").raw(name).raw("</a></li>");
        }
        html.raw("</ul></nav>");
    }
    html.raw("</header>");
}

/// A place where there is nothing yet, and what would put something there.
fn empty(html: &mut Html, text: &'static str) {
    html.raw("<p class=\"empty\">").raw(text).raw("</p>");
}

/// A phase in one word, as filters and colours know it.
fn phase_name(phase: &Phase) -> &'static str {
    match phase {
        Phase::Pending { .. } | Phase::Nominated { .. } => "pending",
        Phase::Starting { .. } => "starting",
        Phase::Running { .. } => "running",
        Phase::Ended { .. } => "ended",
        Phase::Cancelled => "cancelled",
    }
}

fn phase(html: &mut Html, name: &'static str) {
    html.raw("<span class=\"phase ").raw(name).raw("\">").raw(name).raw("</span>");
}

/// What is asked for, in words.
fn needs(Needs { demand, gpus: CardRequest { count, model }, container: _ }: Needs<'_>) -> String {
    let Demand { cpu, memory, gpu_memory, network, storage_io } = demand;
    let mut words = vec![format!("{cpu} cores"), memory.to_string()];
    let of = if *count > 0 { "each GPU card" } else { "a GPU card" };
    words.extend((*count > 0).then(|| format!("{count} GPU cards to itself")));
    words.extend(gpu_memory.map(|memory| format!("{memory} of {of}")));
    words.extend((!model.is_empty()).then(|| format!("of a model `{model}`")));
    words.extend(network.map(|network| network.to_string()));
    words.extend(storage_io.map(|io| io.to_string()));
    words.join(", ")
}

/// What of a node is taken: a cell for each resource.
struct Taken {
    name: String,
    is_connected: bool,
    takes_work: bool,
    capacity: Capacity,
    reserved: Capacity,
    /// CPU in use on the whole node, as its agent measures it.
    cpu_permille: u32,
    /// Memory and network of its tasks, as they are measured; IO is not.
    memory: u64,
    network: BitsPerSec,
    tasks: usize,
}

const TAKEN: [&str; 6] = ["Node", "Tasks", "CPU", "Memory", "Network", "IO"];

impl Taken {
    fn of(view: &View<'_>, node: &crate::reactor::state::Node) -> Taken {
        let (mut memory, mut network) = (0, 0);
        for task in node.tasks.iter().filter_map(|id| view.state.tasks.get(id)) {
            if let Some(status) = &task.task.on_node {
                memory = u64::saturating_add(memory, status.usage.memory_bytes.unwrap_or(0));
                network = u64::saturating_add(network, status.usage.egress_now_bps);
            }
        }
        Taken {
            name: node.row.name.clone(),
            is_connected: node.session.is_some(),
            takes_work: node.takes_work(),
            capacity: node.row.capacity,
            reserved: node.reserved,
            cpu_permille: node.cpu_utilisation_permille,
            memory,
            network: BitsPerSec(network),
            tasks: node.tasks.len(),
        }
    }

    fn row(&self, html: &mut Html) {
        let Taken { capacity, reserved, .. } = self;
        html.raw("<tr>").cell("Node", |html| {
            html.link("nodes", &self.name);
            if !self.is_connected {
                html.raw(" <span class=\"phase lost\">lost</span>");
            } else if !self.takes_work {
                html.raw(" <span class=\"phase pending\">cordoned</span>");
            }
        });
        html.text_cell("Tasks", self.tasks);
        html.cell("CPU", |html| {
            let words = format!("{} of {} cores reserved", reserved.cpu, capacity.cpu);
            html.share("CPU reserved", reserved.cpu.0, capacity.cpu.0, words);
            let (percent, tenths) = (self.cpu_permille / 10, self.cpu_permille % 10);
            let words = format!("{percent}.{tenths} % in use");
            html.share("CPU in use", self.cpu_permille.into(), 1000, words);
        });
        html.cell("Memory", |html| {
            let words = format!("{} of {} reserved", reserved.memory, capacity.memory);
            html.share("memory reserved", reserved.memory.0, capacity.memory.0, words);
            let used = shaper_core::units::Bytes(self.memory);
            html.share("memory in use", self.memory, capacity.memory.0, format!("{used} in use by tasks"));
        });
        html.cell("Network", |html| {
            let reserved = reserved.network.unwrap_or(BitsPerSec(0));
            match capacity.network {
                Some(of) => {
                    html.share("network reserved", reserved.0, of.0, format!("{reserved} of {of} reserved"));
                    html.share(
                        "network in use",
                        self.network.0,
                        of.0,
                        format!("{} in use by tasks", self.network),
                    );
                }
                None => {
                    html.text(format_args!("{} in use by tasks; not divided", self.network));
                }
            }
        });
        html.cell("IO", |html| {
            let reserved = reserved.storage_io.unwrap_or(Iops(0));
            match capacity.storage_io {
                Some(of) => {
                    html.share("IO reserved", reserved.0, of.0, format!("{reserved} of {of} reserved"));
                }
                None => {
                    html.raw("not divided");
                }
            }
        });
        html.raw("</tr>");
    }
}

/// Whose something is, in words.
fn owner(of: &Credentials) -> String {
    format!("uid {}", of.uid)
}
