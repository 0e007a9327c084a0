//! Making a section whose pages are a layer's until they are stored to, or in an image until they are wanted: a template's
//! shared memory in a clone, and a snapshot's in a guest that is made of it.

use crate::backend::Platform;
use crate::manager::Manager;
use crate::proto::{Below, Extents, FrozenPages, Section};
use crate::section::{Charge, NoSpace};

/// Why a section was not laid over a layer. Nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LayError {
    /// The section has pages already, is over a file, is too short, or had pages of another image.
    #[error("the section cannot have these pages")]
    NotEmpty,
    /// The layer or image has not so many pages, or is none.
    #[error("there is no layer or image with these pages")]
    NoSuchPages,
    /// The section may not have so many pages.
    #[error("{pages} pages are too many")]
    NoSpace {
        /// How many.
        pages: u64,
    },
}

impl<P: Platform> Manager<P> {
    /// Has pages of a new, empty section over zeroes be pages of `image`: if that is of a layer, until they are stored to; else
    /// until somebody wants them, who has them read. They are charged as if they had been: to a file, all of them at once.
    /// Nothing is done for each page.
    ///
    /// # Errors
    /// See [`LayError`].
    pub fn lay_section(
        &self,
        section: &Section<P::Backing>,
        image: &Section<P::Backing>,
        extents: &Extents,
    ) -> Result<(), LayError> {
        let mut db = self.pfns.lock();
        db.reap();
        let below = match (image.layer(), db.sections.get(image.id())) {
            (Some(layer), _) => Some((Below::Layer(layer), layer.count.into())),
            (None, state) if state.file => Some((Below::Image(image.id()), state.page_count())),
            (None, _) => None,
        };
        let frozen = below.and_then(|below| FrozenPages::new(below, extents.clone()));
        let frozen = frozen.ok_or(LayError::NoSuchPages)?;
        let state = db.sections.get(section.id());
        let empty = !state.file && state.extent() == 0;
        if !empty || extents.end() > state.page_count() {
            return Err(LayError::NotEmpty);
        }
        let read = image.layer().is_none();
        if read && section.image().is_some_and(|kept| kept != image) {
            return Err(LayError::NotEmpty);
        }
        let pages = extents.pages();
        if state.charge == Charge::ByPage {
            let charged = db.charge_more(section.id(), pages);
            charged.map_err(|NoSpace| LayError::NoSpace { pages })?;
        }
        if read {
            let kept = section.keep_image(image);
            debug_assert!(kept, "{section:?} has pages of one image");
        }
        db.sections.get_mut(section.id()).frozen = Some(frozen);
        Ok(())
    }
}
