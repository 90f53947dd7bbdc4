//! Nodes by when they changed last.

/// Nodes in the order of their last change, the latest first: what has changed since a moment is found without
/// looking at the others.
#[derive(Clone, Debug, Default)]
pub(super) struct Recent {
    now: u64,
    latest: Option<u32>,
    links: Vec<Link>,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    changed: u64,
    /// That which changed next after it.
    later: Option<u32>,
    earlier: Option<u32>,
}

impl Recent {
    /// Counts changes.
    pub(super) fn now(&self) -> u64 {
        self.now
    }

    /// When a node changed last; 0: never.
    pub(super) fn changed(&self, node: usize) -> u64 {
        self.links.get(node).map_or(0, |link| link.changed)
    }

    /// A node that has changed.
    pub(super) fn touch(&mut self, node: usize) {
        self.grow(node + 1);
        if self.latest != Some(node as u32) {
            let Link { later, earlier, .. } = self.links[node];
            self.link(later, earlier);
            self.link(Some(node as u32), self.latest);
            self.latest = Some(node as u32);
            self.links[node].later = None;
        }
        self.now += 1;
        self.links[node].changed = self.now;
    }

    /// Nodes that are new have changed.
    pub(super) fn grow(&mut self, nodes: usize) {
        for node in self.links.len()..nodes {
            self.link_first(node as u32);
        }
    }

    fn link_first(&mut self, node: u32) {
        self.now += 1;
        self.links.push(Link { changed: self.now, later: None, earlier: self.latest });
        if let Some(before) = self.latest {
            self.links[before as usize].later = Some(node);
        }
        self.latest = Some(node);
    }

    /// Puts two beside each other.
    fn link(&mut self, later: Option<u32>, earlier: Option<u32>) {
        if let Some(later) = later {
            self.links[later as usize].earlier = earlier;
        }
        if let Some(earlier) = earlier {
            self.links[earlier as usize].later = later;
        }
    }

    /// Those that changed after a moment, each once.
    pub(super) fn since(&self, moment: u64) -> impl Iterator<Item = usize> {
        let link = move |node: u32| {
            let link = self.links[node as usize];
            (link.changed > moment).then_some((node, link.earlier))
        };
        let next = move |(_, earlier): &(u32, Option<u32>)| earlier.and_then(link);
        std::iter::successors(self.latest.and_then(link), next).map(|(node, _)| node as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::Recent;

    #[test]
    fn what_changed_since_is_told_once_and_the_latest_first() {
        let mut recent = Recent::default();
        recent.grow(4);
        assert_eq!(recent.since(0).collect::<Vec<_>>(), [3, 2, 1, 0]);
        let moment = recent.now();
        assert_eq!(recent.since(moment).count(), 0);
        for node in [1, 3, 1, 0, 0, 6, 1] {
            recent.touch(node);
        }
        assert_eq!(recent.since(moment).collect::<Vec<_>>(), [1, 6, 5, 4, 0, 3]);
        let moment = recent.now();
        recent.touch(2);
        recent.touch(1);
        recent.touch(1);
        assert_eq!(recent.since(moment).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(recent.since(0).count(), 7);
    }
}
