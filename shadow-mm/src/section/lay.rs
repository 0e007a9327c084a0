//! Making a section whose pages are a layer's until they are stored to: a template's shared memory in a clone.

use crate::backend::Platform;
use crate::manager::Manager;
use crate::proto::{Extents, FrozenPages, Section};
use crate::section::{Charge, NoSpace};

/// Why a section was not laid over a layer. Nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LayError {
    /// The section has pages already, is over a file, or is too short.
    #[error("the section cannot have these pages")]
    NotEmpty,
    /// The layer has not so many pages, or is none.
    #[error("there is no layer with these pages")]
    NoSuchPages,
    /// The section may not have so many pages.
    #[error("{pages} pages of a layer are too many")]
    NoSpace {
        /// How many.
        pages: u64,
    },
}

impl<P: Platform> Manager<P> {
    /// Has pages of a new, empty section over zeroes be pages of the layer that `image` is of, until they are stored
    /// to. They are charged as if they had been: to a file, all of them at once. Nothing is done for each page.
    ///
    /// # Errors
    /// See [`LayError`].
    pub fn lay_section(
        &self,
        section: &Section<P::Backing>,
        image: &Section<P::Backing>,
        extents: &Extents,
    ) -> Result<(), LayError> {
        let frozen = image.layer();
        let frozen = frozen.and_then(|layer| FrozenPages::new(layer, extents.clone()));
        let frozen = frozen.ok_or(LayError::NoSuchPages)?;
        let mut db = self.pfns.lock();
        db.reap();
        let state = db.sections.get(section.id());
        let empty = !state.file && state.extent() == 0;
        if !empty || extents.end() > state.page_count() {
            return Err(LayError::NotEmpty);
        }
        let pages = extents.pages();
        if state.charge == Charge::ByPage {
            let charged = db.charge_more(section.id(), pages);
            charged.map_err(|NoSpace| LayError::NoSpace { pages })?;
        }
        db.sections.get_mut(section.id()).frozen = Some(frozen);
        Ok(())
    }
}
