//! What an epoll looks at, as data.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Epoll, Event, Member};
use crate::linux::file::{Description, Ready};
use crate::linux::saved::error::{Damaged, require};
use crate::linux::saved::tables::DescriptionIx;
use crate::linux::sched::Sched;

/// A member of an epoll's set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedMember {
    fd: i32,
    of: DescriptionIx,
    events: u32,
    data: [u8; 8],
    spent: bool,
    /// Readiness and edge count when it was last looked at.
    seen: (u16, u64),
}

impl SavedMember {
    /// The description it is about.
    #[must_use]
    pub fn of(&self) -> DescriptionIx {
        self.of
    }
}

impl Epoll {
    pub(in crate::linux) fn empty(sched: &Arc<Sched>) -> Arc<Self> {
        Arc::new(Self::new(sched))
    }

    /// Its members, as far as `number` knows their descriptions: the others are about to go.
    pub(in crate::linux) fn saved_members(
        &self,
        number: impl Fn(&Arc<Description>) -> Option<DescriptionIx>,
    ) -> Vec<SavedMember> {
        let saved = |(m, d): (Member, Arc<Description>)| {
            Some(SavedMember {
                fd: m.fd,
                of: number(&d)?,
                events: m.event.events,
                data: m.event.data,
                spent: m.spent,
                seen: (m.seen.0.bits(), m.seen.1),
            })
        };
        self.open_members().into_iter().filter_map(saved).collect()
    }

    /// Gives it a member again. What was a pipe may be a regular file now, if it is a standard descriptor: it is
    /// always ready.
    pub(in crate::linux) fn restore_member(
        &self,
        saved: &SavedMember,
        of: &Arc<Description>,
    ) -> Result<(), Damaged> {
        if let Some(inner) = of.file.as_any().downcast_ref::<Self>() {
            let nested = inner.depth(self, 1);
            nested.map_err(|_| Damaged("epolls in a circle"))?;
        }
        let member = Member {
            fd: saved.fd,
            of: Arc::downgrade(of),
            event: Event {
                events: saved.events,
                data: saved.data,
            },
            spent: saved.spent,
            seen: (Ready::from_bits_truncate(saved.seen.0), saved.seen.1),
        };
        let mut members = self.members.lock();
        let twice = members
            .iter()
            .any(|m| m.fd == member.fd && m.of.ptr_eq(&member.of));
        require(!twice, "an epoll's member twice")?;
        members.push(member);
        Ok(())
    }
}
