//! The first line of a script, read as Linux's `load_script` does.

/// Bytes of a file's start that are looked at (`BINPRM_BUF_SIZE`); the line must end within them.
pub const HEAD: usize = 256;

/// Interpreters that may follow each other before `ELOOP`.
pub const MAX_DEPTH: usize = 5;

/// What a `#!` line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shebang {
    /// Path of the interpreter.
    pub interpreter: Vec<u8>,
    /// The rest of the line, as one argument.
    pub argument: Option<Vec<u8>>,
}

/// A `#!` line that cannot be used (`ENOEXEC`): empty, or its path does not end within [`HEAD`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadLine;

/// Reads the line in `head`, the file's first bytes; `None` if it is no script.
///
/// # Errors
/// See [`BadLine`].
pub fn parse(head: &[u8]) -> Result<Option<Shebang>, BadLine> {
    let Some(line) = head.strip_prefix(b"#!") else {
        return Ok(None);
    };
    // What follows a short file is zero in Linux's buffer; the last byte of the buffer is not used.
    let mut line = line[..line.len().min(HEAD - 2)].to_vec();
    line.resize(HEAD - 2, 0);
    let line = match line.iter().position(|&b| b == b'\n' || b == 0) {
        Some(end) => &line[..end],
        None => {
            let path = trim_start(&line);
            // Without a blank after it the path itself may be cut.
            if path.is_empty() || !path.iter().copied().any(blank) {
                return Err(BadLine);
            }
            &line[..HEAD - 3]
        }
    };
    let line = trim_end(trim_start(line));
    let path_end = line.iter().position(|&b| blank(b)).unwrap_or(line.len());
    let (path, rest) = line.split_at(path_end);
    if path.is_empty() {
        return Err(BadLine);
    }
    let rest = trim_start(rest);
    Ok(Some(Shebang {
        interpreter: path.to_vec(),
        argument: (!rest.is_empty()).then(|| rest.to_vec()),
    }))
}

fn blank(byte: u8) -> bool {
    byte == b' ' || byte == b'\t'
}

fn trim_start(line: &[u8]) -> &[u8] {
    &line[line.iter().position(|&b| !blank(b)).unwrap_or(line.len())..]
}

fn trim_end(line: &[u8]) -> &[u8] {
    &line[..line.iter().rposition(|&b| !blank(b)).map_or(0, |at| at + 1)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(path: &str, argument: Option<&str>) -> Result<Option<Shebang>, BadLine> {
        Ok(Some(Shebang {
            interpreter: path.as_bytes().to_vec(),
            argument: argument.map(|a| a.as_bytes().to_vec()),
        }))
    }

    #[test]
    fn other_file_is_no_script() {
        assert_eq!(parse(b"\x7fELF"), Ok(None));
        assert_eq!(parse(b""), Ok(None));
        assert_eq!(parse(b"#"), Ok(None));
    }

    #[test]
    fn blanks_around_path_are_dropped() {
        assert_eq!(parse(b"#! \t/bin/sh \t\necho"), line("/bin/sh", None));
    }

    #[test]
    fn rest_of_line_is_one_argument() {
        assert_eq!(
            parse(b"#!/usr/bin/env -S a  b \nx"),
            line("/usr/bin/env", Some("-S a  b"))
        );
    }

    #[test]
    fn file_without_newline_is_complete() {
        assert_eq!(parse(b"#!/bin/sh"), line("/bin/sh", None));
    }

    #[test]
    fn empty_line_is_refused() {
        assert_eq!(parse(b"#!"), Err(BadLine));
        assert_eq!(parse(b"#!  \n/bin/sh"), Err(BadLine));
    }

    #[test]
    fn cut_path_is_refused_cut_argument_kept() {
        let mut long = b"#!/".to_vec();
        long.resize(400, b'a');
        assert_eq!(parse(&long), Err(BadLine));
        let mut argument = b"#!/bin/sh ".to_vec();
        argument.resize(400, b'a');
        let shebang = parse(&argument).unwrap().unwrap();
        assert_eq!(shebang.interpreter, b"/bin/sh");
        assert_eq!(shebang.argument.unwrap().len(), 255 - 10);
    }
}
