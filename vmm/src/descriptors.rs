//! The limit on the descriptors of this process (`ulimit -n`): raised as far as it may be, and named when it was too low.
//!
//! A machine takes a dozen descriptors or two, a guest one for each file of the host that it has open, and the usual limit is
//! 1,024 for a process, of which the hard one is a multiple.

use std::io;
use std::sync::Once;

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::machine::verbs::chain;

/// Has this process have as many as it may.
pub(crate) fn raise_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let most = Rlimit {
        current: maximum,
        maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, most) {
        tracing::info!(%error, "the limit on descriptors stays");
    }
}

/// What is to be done about an error that says there were too few, if `text` is of one and does not say so yet.
pub(crate) fn advice(text: &str) -> Option<String> {
    // As the standard library and rustix print them. KVM's errors, and those of another process, are texts only.
    let few =
        [Errno::MFILE, Errno::NFILE].map(|errno| format!("os error {}", errno.raw_os_error()));
    let is_one = few.iter().any(|few| text.contains(few));
    (is_one && !text.contains(HOW)).then(|| match getrlimit(Resource::Nofile).current {
        Some(limit) => format!("; vmm may have {limit}: {HOW}"),
        None => format!("; {HOW}"),
    })
}

/// Says once on standard error that a guest got an error because this process has too few: the guest does not know why.
pub(crate) fn tell_of_too_few() {
    static TOLD: Once = Once::new();
    TOLD.call_once(|| {
        let few = chain(&io::Error::from(Errno::MFILE));
        tracing::warn!("files of the host cannot be opened for a guest: {few}");
    });
}

const HOW: &str = "raise the limit with ulimit -n";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_few_descriptors_are_said_with_what_to_do_once() {
        for errno in [libc::EMFILE, libc::ENFILE] {
            let error = io::Error::from_raw_os_error(errno);
            let text = chain(&error);
            assert!(text.starts_with(&error.to_string()), "{text}");
            assert_eq!(text.matches("ulimit -n").count(), 1, "{text}");
            let again = chain(&io::Error::other(text.clone()));
            assert_eq!(again, text);
        }
        let other = io::Error::from_raw_os_error(libc::EACCES);
        assert_eq!(chain(&other), other.to_string());
    }
}
