//! A template in a process that runs clones of it: opened once, with the machines that wait for a clone.
//!
//! The template's records, its image and the mapping of its pages are there once for all clones of the process. A machine whose clone
//! has ended, and that is as new, waits for the next clone: its virtual machine, virtual CPUs, threads, and the slot with the
//! template's pages are there.

use std::fs::File;
use std::sync::Arc;

use super::opened;
use crate::linux::stdio::Given;
use crate::locks::{Mutex, rank};
use crate::machine::restored::{Choice, Revived, lay_under, wanted};
use crate::machine::{Bare, HostSide, Observed, ProcessSignals, RunError, Wanted};
use crate::snapshot::guest::{MachineData, OpenError, open_guest};
use crate::snapshot::image::Image;
use crate::snapshot::read::ReadError;
use crate::snapshot::records::{Identity, Records};

/// Why a template cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum StockError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Machine(#[from] RunError),
}

impl From<ReadError> for StockError {
    fn from(error: ReadError) -> Self {
        Self::Open(error.into())
    }
}

/// A template, and machines for it.
pub(super) struct Stock {
    image: Arc<Image>,
    records: Records,
    data: MachineData,
    wanted: Wanted,
    /// Machines that wait at most.
    most: usize,
    free: Mutex<rank::FreeMachines, Vec<Bare>>,
}

impl Stock {
    /// Opens a template. `most` machines wait for clones at most.
    pub(super) fn open(template: File, cpus: Option<u8>, most: usize) -> Result<Self, StockError> {
        let snapshot = Arc::new(opened(template)?);
        let (data, records) = open_guest(&snapshot)?;
        let image = Image::read(&snapshot).map_err(|error| RunError::Image(error.into()))?;
        let choice = Choice {
            page_file_dir: crate::cli::run::page_file_dir(None),
            cpus: cpus.map(usize::from),
            ..Choice::default()
        };
        Ok(Self {
            wanted: wanted(&choice, &data, records.cpus()),
            image: Arc::new(image),
            records,
            data,
            most,
            free: Mutex::default(),
        })
    }

    /// Makes machines until as many wait as may.
    pub(super) fn fill(&self) -> Result<(), RunError> {
        while self.waiting() < self.most {
            let mut bare = Bare::new(&self.wanted)?;
            lay_under(&bare, &self.image)?;
            bare.staff().map_err(RunError::Thread)?;
            self.give_back(bare);
        }
        Ok(())
    }

    /// The machine that was frozen.
    pub(super) fn data(&self) -> &MachineData {
        &self.data
    }

    /// Machines that wait.
    pub(super) fn waiting(&self) -> usize {
        self.free.lock().len()
    }

    /// One that waits.
    pub(super) fn take(&self) -> Option<Bare> {
        self.free.lock().pop()
    }

    /// Nothing of a clone is in it: it waits, unless enough do.
    pub(super) fn give_back(&self, left: Bare) {
        let mut free = self.free.lock();
        if free.len() < self.most {
            free.push(left);
        } else {
            // Not with the lock: it takes a while.
            drop(free);
            drop(left);
        }
    }

    /// Makes a clone, in the machine that another one has left if there is one.
    pub(super) fn revive(
        &self,
        identity: Identity,
        stdio: Given,
        left: Option<Bare>,
    ) -> Result<(Revived, Observed), RunError> {
        let host = HostSide {
            stdio,
            signals: ProcessSignals::LeftAlone,
        };
        let bare = left.map_or_else(|| Bare::new(&self.wanted), Ok)?;
        let made = Revived::new(bare, &self.image, &self.records, identity, host);
        let revived = made.map_err(|unmade| {
            unmade
                .left
                .into_iter()
                .for_each(|left| self.give_back(left));
            unmade.why
        })?;
        let observed = Observed {
            machine: self.data.clone(),
            origin: Some(Arc::clone(self.image.snapshot())),
            ready: None,
            keeps_last: false,
        };
        Ok((revived, observed))
    }
}
