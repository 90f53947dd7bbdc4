//! What Grafana's classic JSON needs of a dashboard and its panels.

use serde_json::{Value, json};

/// Grafana's grid has so many columns.
const COLUMNS: u64 = 24;
/// Height of a panel.
const HEIGHT: u64 = 8;
/// Version of the JSON, which Grafana brings up to its own.
const SCHEMA: u64 = 36;

/// How numbers are shown, as Grafana names it.
#[derive(Clone, Copy)]
pub(super) enum Unit {
    Count,
    Cores,
    Bytes,
    BytesPerSecond,
    Seconds,
    /// Of a whole, 0 to 1.
    Share,
    PerSecond,
}

impl Unit {
    fn id(self) -> &'static str {
        match self {
            Unit::Count => "short",
            Unit::Cores => "none",
            Unit::Bytes => "bytes",
            Unit::BytesPerSecond => "Bps",
            Unit::Seconds => "s",
            Unit::Share => "percentunit",
            Unit::PerSecond => "ops",
        }
    }
}

/// One panel: a graph over time, or a number.
pub(super) struct Panel {
    title: &'static str,
    /// What it says, and what to make of it.
    about: &'static str,
    unit: Unit,
    /// Queries, each with how its series are called.
    queries: Vec<(&'static str, &'static str)>,
    kind: &'static str,
    width: u64,
}

impl Panel {
    /// A graph over time.
    pub(super) fn graph(
        title: &'static str,
        about: &'static str,
        unit: Unit,
        queries: &[(&'static str, &'static str)],
    ) -> Panel {
        Panel { title, about, unit, queries: queries.to_vec(), kind: "timeseries", width: COLUMNS / 3 }
    }

    /// A number.
    pub(super) fn number(
        title: &'static str,
        about: &'static str,
        unit: Unit,
        query: (&'static str, &'static str),
    ) -> Panel {
        Panel { title, about, unit, queries: vec![query], kind: "stat", width: COLUMNS / 6 }
    }

    /// `of` are the labels of what is shown.
    fn json(&self, id: usize, (x, y): (u64, u64), of: &str) -> Value {
        let targets = self.queries.iter().zip('A'..).map(|((query, legend), letter)| {
            json!({
                "datasource": datasource(),
                "editorMode": "code",
                "expr": query.replace("OF", of).replace("[I]", "[$__rate_interval]"),
                "instant": self.kind == "stat",
                "legendFormat": legend,
                "range": self.kind != "stat",
                "refId": letter.to_string(),
            })
        });
        let options = match self.kind {
            "stat" => json!({"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": "auto"}),
            _ => {
                json!({"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}})
            }
        };
        json!({
            "id": id,
            "title": self.title,
            "description": self.about,
            "type": self.kind,
            "datasource": datasource(),
            "gridPos": {"x": x, "y": y, "w": self.width, "h": HEIGHT},
            "fieldConfig": {"defaults": {"unit": self.unit.id(), "min": 0}, "overrides": []},
            "options": options,
            "targets": targets.collect::<Vec<_>>(),
        })
    }
}

fn datasource() -> Value {
    json!({"type": "prometheus", "uid": "${datasource}"})
}

/// A choice at the top of a dashboard, from the values of a label.
pub(super) struct Variable {
    pub(super) name: &'static str,
    /// As `label_values(SERIES, LABEL)` in Grafana.
    pub(super) values: &'static str,
}

impl Variable {
    fn json(&self) -> Value {
        json!({
            "name": self.name,
            "type": "query",
            "datasource": datasource(),
            "definition": self.values,
            "query": {"query": self.values, "refId": "values"},
            "includeAll": true,
            "multi": true,
            "allValue": ".*",
            "current": {"selected": true, "text": ["All"], "value": ["$__all"]},
            "refresh": 2,
            "sort": 1,
        })
    }
}

/// A dashboard of what has the labels `of`. Panels that do not fit beside the ones before them begin a new row.
pub(super) fn board(
    uid: &str,
    title: &str,
    about: &str,
    of: &str,
    variables: &[Variable],
    panels: &[Panel],
) -> Value {
    let (mut x, mut y) = (0, 0);
    let mut placed = Vec::new();
    for (panel, id) in panels.iter().zip(1..) {
        if x + panel.width > COLUMNS {
            (x, y) = (0, y + HEIGHT);
        }
        placed.push(panel.json(id, (x, y), of));
        x += panel.width;
    }
    let source =
        json!({"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"});
    let list: Vec<_> = std::iter::once(source).chain(variables.iter().map(Variable::json)).collect();
    json!({
        "uid": uid,
        "title": title,
        "description": about,
        "tags": ["shaper"],
        "schemaVersion": SCHEMA,
        "editable": true,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [{"title": "shaper", "type": "dashboards", "tags": ["shaper"], "keepTime": true, "asDropdown": true}],
        "templating": {"list": list},
        "annotations": {"list": []},
        "panels": placed,
    })
}
