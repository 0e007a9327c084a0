//! The guest's file tree: mounts, path walking, and the kinds of file system.

/// Mounts and path walking.
#[derive(Debug, Default)]
pub struct Vfs;
