//! `shaper adopt`: puts an existing cgroup under management.

use shaper_core::limits::{Limits, LimitsChange};

use super::absolute;
use crate::{args::Adopt, client::Client, error::Error, output};

pub(super) async fn adopt(client: &Client, args: &Adopt) -> Result<(), Error> {
    let Adopt { cgroup, id, limits } = args;
    let limits = Limits::default().with(&LimitsChange::from(*limits));
    let task = client.adopt(id, &absolute(cgroup)?, limits).await?;
    output::print(&format!("{}\n", task.task_id))
}
