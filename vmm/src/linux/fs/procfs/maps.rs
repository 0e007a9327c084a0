//! `/proc/PID/maps`.

use std::io::Write as _;

use rustix::io::Errno;
use shadow_mm::{Prot, Sharing, Vpn};

use super::super::Caller;
use crate::linux::process::Pid;

/// Lines that are shown at most.
const LINES_MAX: usize = 65_536;

/// The mappings of a process, one a line.
pub(super) fn maps(c: &Caller<'_>, pid: Pid) -> Result<Vec<u8>, Errno> {
    let Some(mm) = super::process::space(c, pid)? else {
        return Ok(Vec::new());
    };
    let layout = mm.layout.lock().clone();
    let mut out = Vec::new();
    let mut from = Vpn::new(0);
    for _ in 0..LINES_MAX {
        let Some(vad) = from.and_then(|from| c.k.memory.manager.query(&mm.space, from)) else {
            break;
        };
        let (start, end) = (vad.range.start().get() * 4096, vad.range.end() * 4096);
        let flag = |bit: Prot, letter: char| if vad.prot.contains(bit) { letter } else { '-' };
        let (r, w, x) = (
            flag(Prot::READ, 'r'),
            flag(Prot::WRITE, 'w'),
            flag(Prot::EXEC, 'x'),
        );
        let sharing = match vad.sharing() {
            Sharing::Private => 'p',
            Sharing::Shared => 's',
        };
        let (offset, dev, ino, name) = match vad.file() {
            Some((backing, offset)) => {
                let (dev, ino) = backing.0.identity();
                (offset, dev, ino, backing.0.path())
            }
            // Shared memory without a file; Linux shows the inode that is behind it there.
            None if vad.sharing() == Sharing::Shared => (0, 1, 0, b"/dev/zero (deleted)".to_vec()),
            None => (0, 0, 0, layout.area(start, end).as_bytes().to_vec()),
        };
        let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
        let mut line = format!(
            "{start:08x}-{end:08x} {r}{w}{x}{sharing} {offset:08x} {major:02x}:{minor:02x} {ino} "
        );
        if !name.is_empty() {
            line = format!("{line:<73}");
        }
        // Writing to a vector does not fail.
        let _ = out
            .write_all(line.as_bytes())
            .and_then(|()| out.write_all(&name));
        out.push(b'\n');
        from = Vpn::new(vad.range.end());
    }
    Ok(out)
}
