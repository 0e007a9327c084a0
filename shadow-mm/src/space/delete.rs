//! Tearing a space down.

use core::sync::atomic::Ordering::Relaxed;

use crate::addr::{Vpn, VpnRange};
use crate::backend::Platform;
use crate::flush::Flush;
use crate::manager::Manager;
use crate::shadow::{Cursor, SUPERVISOR_SLOT};
use crate::space::Space;
use crate::space::leave::Leaving;

impl<P: Platform> Manager<P> {
    /// Takes everything from a space: mappings, pages, tables, clone references, the root. A second call
    /// does nothing. Afterwards the space denies everything.
    ///
    /// No vCPU may use the root once this is called; the frames return with the flush.
    pub fn delete_space(&self, space: &Space<P>) -> Flush {
        let mut flush = space.no_flush();
        let mut state = space.state.lock();
        if !state.alive {
            return flush;
        }
        let vads = core::mem::take(&mut state.vads);
        self.forget_viewer(space.id(), &vads);
        let end = self.limits.user_end.vpn().get();
        if let Some(all) = Vpn::new(0).and_then(|zero| VpnRange::between(zero, end)) {
            self.zap_leaving(space, &mut state, (all, Leaving::Space), &mut flush);
        }
        state.alive = false;
        self.spaces.lock().remove(&space.id());
        let tables = core::mem::take(&mut state.tables);
        debug_assert_eq!(
            (state.resident, state.private),
            (0, 0),
            "pages survived the teardown"
        );
        debug_assert!(
            state.descriptors.iter().next().is_none(),
            "a clone descriptor survived"
        );
        let mut db = self.pfns.lock();
        db.commit.release(vads.charged());
        db.release_tables(tables);
        Cursor::new(&self.store, space.root()).unlink(&mut db, space.root(), SUPERVISOR_SLOT);
        db.drop_table_held(space.root());
        flush.whole_table(space.root());
        flush.hold(space.root());
        drop(db);
        drop(state);
        drop(vads);
        // Shared memory nobody has any more.
        self.pfns.lock().reap();
        self.spaces.lock().remove(&space.id());
        self.live_spaces.fetch_sub(1, Relaxed);
        flush.finish()
    }
}
