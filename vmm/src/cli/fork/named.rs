//! The files that `--stdin`, `--stdout` and `--stderr` of `vmm fork` name.
//!
//! A name with `%i` is a file for each copy. Without it all copies have one file: each reads it from its beginning, and all
//! write to one description of it, so that no copy writes over what another has written. `-` is this command's own.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use super::{ForkArgs, ForkError, numbered};

/// What was named for descriptors 0 to 2.
pub(super) struct Named<'a> {
    /// Opened for each copy.
    each: [Option<&'a str>; 3],
    /// The same for all copies.
    common: [Option<File>; 3],
}

impl<'a> Named<'a> {
    /// Opens, and empties, what all copies write to.
    pub(super) fn new(args: &'a ForkArgs) -> Result<Self, ForkError> {
        let mut named = Self {
            each: [&args.stdin, &args.stdout, &args.stderr].map(Option::as_deref),
            common: [None, None, None],
        };
        if named.each[0].take_if(|name| *name == "-").is_some() {
            named.common[0] = Some(own("-", rustix::stdio::stdin())?);
        }
        let one = |name: &mut &str| *name == "-" || !name.contains("%i");
        for n in [1, 2] {
            match named.each[n].take_if(one) {
                None | Some("-") => {}
                Some(name) if n == 2 && args.stdout == args.stderr => {
                    let stdout = named.common[1].as_ref();
                    named.common[2] = stdout.map(|file| own(name, file)).transpose()?;
                }
                Some(name) => named.common[n] = Some(create(name)?),
            }
        }
        Ok(named)
    }

    /// What all copies have as descriptor `n`.
    pub(super) fn common(&self, n: usize) -> Option<&File> {
        self.common[n].as_ref()
    }

    /// The files of one copy, but for those that all have.
    pub(super) fn of(&self, number: u32) -> Result<[Option<File>; 3], ForkError> {
        let [stdin, stdout, stderr] = self
            .each
            .map(|name| name.map(|name| numbered(name, number)));
        let output = stdout.as_deref().map(create).transpose()?;
        let error = match (&output, stderr) {
            (Some(output), Some(name)) if stdout.as_ref() == Some(&name) => {
                Some(own(&name, output)?)
            }
            (_, name) => name.as_deref().map(create).transpose()?,
        };
        Ok([stdin.as_deref().map(open).transpose()?, output, error])
    }
}

fn file(name: &str, opened: io::Result<File>) -> Result<File, ForkError> {
    opened.map_err(|source| ForkError::File {
        path: name.into(),
        source,
    })
}

fn open(name: &str) -> Result<File, ForkError> {
    let opened = File::open(name).and_then(|file| match file.metadata()?.is_dir() {
        true => Err(io::ErrorKind::IsADirectory.into()),
        false => Ok(file),
    });
    file(name, opened)
}

fn create(name: &str) -> Result<File, ForkError> {
    file(name, File::create(name))
}

/// A descriptor more of a description.
fn own(name: &str, fd: impl AsFd) -> Result<File, ForkError> {
    let copy = rustix::io::fcntl_dupfd_cloexec(fd, 3);
    file(name, copy.map(File::from).map_err(io::Error::from))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::path::Path;

    use super::super::testing::args;
    use super::*;

    fn in_dir(dir: &Path, name: &str) -> String {
        dir.join(name).display().to_string()
    }

    #[test]
    fn copies_with_one_output_do_not_write_over_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = in_dir(dir.path(), "out");
        std::fs::write(&path, "what was there before").unwrap();
        for words in [
            &["--stdout", &path][..],
            &["--stdout", &path, "--stderr", &path],
        ] {
            let args = args(words);
            let named = Named::new(&args).unwrap();
            for (number, text) in [(1, "one "), (2, "two ")] {
                let own = named.of(number).unwrap();
                assert!(own.iter().all(Option::is_none), "{own:?}");
                for n in [1, 2] {
                    if let Some(mut file) = named.common(n) {
                        file.write_all(text.as_bytes()).unwrap();
                    }
                }
            }
            let expected = ["one ", "two "].map(|text| text.repeat(words.len() / 2));
            assert_eq!(std::fs::read_to_string(&path).unwrap(), expected.concat());
        }
    }

    #[test]
    fn name_with_a_number_is_a_file_for_each_copy() {
        let dir = tempfile::tempdir().unwrap();
        let path = in_dir(dir.path(), "%i");
        let args = args(&["--stdout", &path, "--stderr", &path]);
        let named = Named::new(&args).unwrap();
        for number in [1, 2] {
            let [stdin, output, error] = named.of(number).unwrap();
            assert!(stdin.is_none());
            output.unwrap().write_all(b"output, ").unwrap();
            error.unwrap().write_all(b"error").unwrap();
            let path = in_dir(dir.path(), &number.to_string());
            assert_eq!(std::fs::read_to_string(path).unwrap(), "output, error");
        }
    }

    #[test]
    fn each_copy_reads_its_input_from_the_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let path = in_dir(dir.path(), "in");
        std::fs::write(&path, "request").unwrap();
        let args = args(&["--stdin", &path]);
        let named = Named::new(&args).unwrap();
        for number in [1, 2] {
            let mut text = String::new();
            let [stdin, ..] = named.of(number).unwrap();
            stdin.unwrap().read_to_string(&mut text).unwrap();
            assert_eq!(text, "request");
        }
    }

    #[test]
    fn dash_is_the_commands_own() {
        let args = args(&["--stdin", "-", "--stdout", "-", "--stderr", "-"]);
        let named = Named::new(&args).unwrap();
        let common = [0, 1, 2].map(|n| named.common(n).is_some());
        assert_eq!(common, [true, false, false]);
        assert!(named.of(1).unwrap().iter().all(Option::is_none));
    }

    #[test]
    fn directory_is_no_input() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().display().to_string();
        let args = args(&["--stdin", &path]);
        let refused = Named::new(&args).unwrap().of(1).unwrap_err();
        let text = crate::machine::verbs::chain(&refused);
        assert_eq!(text, format!("{path}: is a directory"));
    }
}
