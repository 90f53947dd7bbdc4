//! `shaper ui`: the way to the broker's web page, for the caller alone.

use crate::{
    client::{Broker, Door},
    error::Error,
    output,
};

pub(super) async fn ui(broker: &Broker) -> Result<(), Error> {
    let Door { url, valid_seconds } = broker.open_ui().await?;
    // The address alone is on standard output, for other programs.
    output::remark(&format!("open this in a browser within {valid_seconds} s; it works once:"));
    output::print(&format!("{}\n", output::printable(&url)))
}
