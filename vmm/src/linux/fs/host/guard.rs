//! What of the host a guest may touch, decided on an open descriptor: by the kind of file and by
//! the kind of file system it is on.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, Stat as HostStat};
use rustix::io::Errno;

/// File systems that show the host's processes, devices or kernel (`linux/magic.h`).
const REFUSED: &[u64] = &[
    0x0000_9fa0, // proc
    0x6265_6572, // sysfs
    0x0000_1cd1, // devpts
    0x0027_e0eb, // cgroup
    0x6367_7270, // cgroup2
    0x6462_6720, // debugfs
    0x7472_6163, // tracefs
    0x7363_6673, // securityfs
    0xcafe_4a11, // bpf
    0xf97c_ff8c, // selinuxfs
    0x4341_5d53, // smackfs
    0x6165_676c, // pstore
    0xde5e_81e4, // efivarfs
    0x6265_6570, // configfs
    0x4249_4e4d, // binfmt_misc
    0x6e73_6673, // nsfs
    0x5049_4446, // pidfs
    0x534f_434b, // sockfs
    0x5049_5045, // pipefs
    0x0904_1934, // anon_inodefs
    0x1980_0202, // mqueue
    0x9584_58f6, // hugetlbfs
    0x6573_5543, // fusectl
    0xabba_1974, // xenfs
    0x0765_5821, // resctrl
    0x6264_6576, // bdev
    0x6c6f_6f70, // binderfs
    0x0000_9fa2, // usbdevfs
    0x6461_7861, // dax
    0x444d_4142, // dma-buf
    0x454d_444d, // devmem
    0x5345_434d, // secretmem
    0x0000_0187, // autofs
    0x6e66_7364, // nfsd
    0x6759_6969, // rpc_pipefs
];

/// The verdict on host files. Device file systems (`devtmpfs`) look like `tmpfs` to statfs(2): they
/// are known by their device numbers, read once from the host's mount table.
#[derive(Debug, Clone)]
pub(super) struct Guard {
    device_file_systems: Vec<u64>,
}

impl Guard {
    /// Reads the host's mount table.
    pub(super) fn new() -> Self {
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        Self {
            device_file_systems: device_file_systems(&table),
        }
    }

    /// Refuses what is on a file system that a guest must not see.
    pub(super) fn check_place(&self, fd: &OwnedFd, stat: &HostStat) -> Result<(), Errno> {
        let kind = rustix::fs::fstatfs(fd.as_fd())?.f_type as u64 & 0xffff_ffff;
        if REFUSED.contains(&kind) || self.device_file_systems.contains(&stat.st_dev) {
            return Err(Errno::ACCESS);
        }
        Ok(())
    }

    /// Refuses device nodes too: nothing but their name is ever seen.
    pub(super) fn check(&self, fd: &OwnedFd, stat: &HostStat) -> Result<(), Errno> {
        self.check_place(fd, stat)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::CharacterDevice | FileType::BlockDevice => Err(Errno::ACCESS),
            _ => Ok(()),
        }
    }
}

fn device_file_systems(mountinfo: &str) -> Vec<u64> {
    let device = |line: &str| {
        let (head, tail) = line.split_once(" - ")?;
        if tail.split(' ').next()? != "devtmpfs" {
            return None;
        }
        let (major, minor) = head.split(' ').nth(2)?.split_once(':')?;
        Some(rustix::fs::makedev(
            major.parse().ok()?,
            minor.parse().ok()?,
        ))
    };
    mountinfo.lines().filter_map(device).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_table_with_devtmpfs_gives_its_device() {
        let table = "21 1 0:5 / /dev rw shared:2 - devtmpfs udev rw,size=1\n22 1 8:1 / / rw - ext4 /dev/sda1 rw\n";
        assert_eq!(device_file_systems(table), vec![rustix::fs::makedev(0, 5)]);
    }

    #[test]
    fn proc_descriptor_is_refused() {
        let fd = OwnedFd::from(std::fs::File::open("/proc/self/status").unwrap());
        let stat = rustix::fs::fstat(&fd).unwrap();
        assert_eq!(Guard::new().check(&fd, &stat), Err(Errno::ACCESS));
    }
}
