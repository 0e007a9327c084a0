/* File descriptors and files. */
#include "tap.h"
#include <dirent.h>
#include <sys/resource.h>

static char dir[PATH_MAX], name[PATH_MAX + 32];

static const char *in_dir(const char *leaf)
{
	snprintf(name, sizeof name, "%s/%s", dir, leaf);
	return name;
}
static int make(const char *leaf, const char *text)
{
	int fd = open(in_dir(leaf), O_RDWR | O_CREAT | O_TRUNC, 0644);
	if (fd >= 0 && write(fd, text, strlen(text)) < 0)
		return -1;
	return fd;
}

static void duplicates(void)
{
	char text[32] = "";
	int fd = make("a", "0123456789"), other = dup(fd);
	ok(fd >= 0 && other > fd, "dup gives a new one");
	is(lseek(fd, 3, SEEK_SET), 3, "lseek");
	is(read(other, text, 2), 2, "through the duplicate");
	ok(!memcmp(text, "34", 2), "reads from there: they share the offset");
	is(lseek(fd, 0, SEEK_CUR), 5, "which moved for both");
	int again = open(in_dir("a"), O_RDONLY);
	is(lseek(again, 0, SEEK_CUR), 0, "another open has its own");
	is(dup2(fd, 50), 50, "dup2");
	is(dup2(50, 50), 50, "dup2 onto itself");
	fails(dup3(50, 50, 0), EINVAL, "dup3 onto itself");
	fails(dup2(999, 51), EBADF, "dup2 of nothing");
	fails(dup(-1), EBADF, "dup of nothing");
	is(fcntl(fd, F_DUPFD, 60), 60, "F_DUPFD from a number up");
	is(fcntl(fd, F_DUPFD, 60), 61, "takes the next");
	is(fcntl(fd, F_DUPFD_CLOEXEC, 62), 62, "F_DUPFD_CLOEXEC");
	is(fcntl(62, F_GETFD), FD_CLOEXEC, "sets the flag");
	is(fcntl(61, F_GETFD), 0, "the plain one does not");
	is(close(fd), 0, "close");
	fails(close(fd), EBADF, "twice");
	is(read(other, text, 1), 1, "the duplicates live on");
	is(dup(other), fd, "the lowest free number comes next");
	pid_t pid = fork();
	if (pid == 0)
		_exit(lseek(other, 1, SEEK_SET) != 1);
	wait_for(pid);
	is(lseek(other, 0, SEEK_CUR), 1, "parent and child share an offset");
	for (int i = 50; i < 63; i++)
		close(i);
	close(fd);
	close(other);
	close(again);
}

static void offsets(void)
{
	char text[32] = "";
	struct stat st;
	int fd = make("b", "0123456789");
	is(pread(fd, text, 3, 4), 3, "pread");
	ok(!memcmp(text, "456", 3), "at its offset");
	is(pwrite(fd, "XY", 2, 0), 2, "pwrite");
	is(lseek(fd, 0, SEEK_CUR), 10, "neither moves the offset");
	is(lseek(fd, -4, SEEK_END), 6, "from the end");
	fails(lseek(fd, -1, SEEK_SET), EINVAL, "to before the beginning");
	fails(lseek(fd, 0, 77), EINVAL, "from nowhere");
	is(lseek(fd, 5000, SEEK_SET), 5000, "beyond the end");
	is(write(fd, "z", 1), 1, "a write there");
	fstat(fd, &st);
	is(st.st_size, 5001, "makes the file longer");
	is(pread(fd, text, 1, 3000), 1, "with a hole");
	is(text[0], 0, "of zeros");
	is(ftruncate(fd, 4), 0, "ftruncate");
	is(pread(fd, text, 10, 0), 4, "cuts it");
	is(read(fd, text, 10), 0, "beyond the end there is nothing");
	int log = open(in_dir("b"), O_WRONLY | O_APPEND);
	is(write(log, "A", 1) + write(fd, "", 0) + write(log, "B", 1), 2, "O_APPEND");
	is(pread(fd, text, 10, 0), 6, "always at the end");
	pid_t pid = fork();
	if (pid == 0)
		_exit(write(log, "C", 1) != 1);
	wait_for(pid);
	is(write(log, "D", 1), 1, "from two processes");
	is(pread(fd, text, 10, 0), 8, "nothing is lost");
	ok(!memcmp(text + 4, "ABCD", 4), "in order");
	fails(read(log, text, 1), EBADF, "write only cannot be read");
	int ro = open(in_dir("b"), O_RDONLY);
	fails(write(ro, "x", 1), EBADF, "read only cannot be written");
	fails(read(ro, (char *)0x10, 1), EFAULT, "read to nowhere");
	close(fd);
	close(log);
	close(ro);
}

static void over_exec(const char *self)
{
	int kept = make("c", "x"), gone = open(in_dir("c"), O_RDONLY | O_CLOEXEC);
	char a[16], b[16];
	snprintf(a, sizeof a, "%d", kept);
	snprintf(b, sizeof b, "%d", gone);
	is(fcntl(gone, F_GETFD), FD_CLOEXEC, "O_CLOEXEC is seen");
	pid_t pid = fork();
	if (pid == 0) {
		execl(self, self, "--probe", a, b, (char *)NULL);
		_exit(99);
	}
	is(exited_with(wait_for(pid)), 1, "exec keeps one and closes the other");
	close(kept);
	close(gone);
}

static void limits(void)
{
	struct rlimit old, few = {20, 20};
	int n = 0, fd, last = -1;
	getrlimit(RLIMIT_NOFILE, &old);
	few.rlim_max = old.rlim_max;
	is(setrlimit(RLIMIT_NOFILE, &few), 0, "a limit of 20 descriptors");
	while ((fd = dup(1)) >= 0 && n++ < 100)
		last = fd;
	ok(fd == -1 && errno == EMFILE && last == 19, "then EMFILE");
	for (; last > 2 && n-- > 0; last--)
		close(last);
	setrlimit(RLIMIT_NOFILE, &old);
}

static volatile int too_long;

static void on_too_long(int signal)
{
	(void)signal;
	too_long++;
}

/* A file may not become longer than the limit by any call, and what is longer already may be used. */
static void longest_file(void)
{
	struct rlimit old, small = {PAGE, PAGE};
	int fd = make("e", "0123456789"), longer = make("f", "0123456789");
	is(ftruncate(longer, 3 * PAGE), 0, "a long file");
	getrlimit(RLIMIT_FSIZE, &old);
	small.rlim_max = old.rlim_max;
	signal(SIGXFSZ, on_too_long);
	setrlimit(RLIMIT_FSIZE, &small);
	fails(ftruncate(fd, PAGE + 1), EFBIG, "ftruncate beyond RLIMIT_FSIZE");
	is(too_long, 1, "sends SIGXFSZ");
	fails(truncate(in_dir("e"), PAGE + 1), EFBIG, "truncate");
	fails(fallocate(fd, 0, PAGE - 1, 2), EFBIG, "fallocate");
	fails(pwrite(fd, "x", 1, PAGE), EFBIG, "pwrite");
	is(too_long, 4, "do too");
	is(ftruncate(fd, PAGE), 0, "up to it is fine");
	is(ftruncate(longer, 2 * PAGE), 0, "and so is making a longer one shorter");
	setrlimit(RLIMIT_FSIZE, &old);
	signal(SIGXFSZ, SIG_DFL);
	close(fd);
	close(longer);
	is(unlink(in_dir("e")) | unlink(in_dir("f")), 0, "both go");
}

static void names(void)
{
	struct stat st;
	char text[64];
	int fd = make("d", "content");
	fails(open(in_dir("d"), O_CREAT | O_EXCL | O_WRONLY, 0600), EEXIST, "O_EXCL");
	is(unlink(in_dir("d")), 0, "unlink of an open file");
	is(pread(fd, text, 7, 0), 7, "which lives on");
	fstat(fd, &st);
	is(st.st_nlink, 0, "without a name");
	fails(open(in_dir("d"), O_RDONLY), ENOENT, "for others it is gone");
	close(fd);
	is(mkdir(in_dir("sub"), 0755), 0, "mkdir");
	fails(mkdir(in_dir("sub"), 0755), EEXIST, "twice");
	fails(open(in_dir("sub"), O_WRONLY), EISDIR, "a folder cannot be written");
	close(make("sub/f", "12345"));
	fails(rmdir(in_dir("sub")), ENOTEMPTY, "rmdir of one that is not empty");
	fails(open(in_dir("sub/f/g"), O_RDONLY), ENOTDIR, "a file is no folder");
	fails(open(in_dir("sub/f"), O_RDONLY | O_DIRECTORY), ENOTDIR, "and O_DIRECTORY says so");
	is(symlink("f", in_dir("sub/link")), 0, "symlink");
	is(readlink(in_dir("sub/link"), text, sizeof text), 1, "readlink");
	is(stat(in_dir("sub/link"), &st), 0, "stat follows");
	ok(S_ISREG(st.st_mode) && st.st_size == 5, "to the file");
	is(lstat(in_dir("sub/link"), &st), 0, "lstat does not");
	ok(S_ISLNK(st.st_mode), "follow");
	fails(open(in_dir("sub/link"), O_RDONLY | O_NOFOLLOW), ELOOP, "nor does O_NOFOLLOW");
	is(symlink("round", in_dir("sub/round")), 0, "a link to itself");
	fails(open(in_dir("sub/round"), O_RDONLY), ELOOP, "ends in ELOOP");
	char old[PATH_MAX + 32];
	strcpy(old, in_dir("sub/f"));
	is(link(old, in_dir("sub/hard")), 0, "link");
	is(stat(old, &st) == 0 ? (long)st.st_nlink : -1, 2, "two names");
	is(rename(old, in_dir("sub/moved")), 0, "rename");
	fails(access(old, F_OK), ENOENT, "the old name is gone");
	is(access(in_dir("sub/moved"), R_OK | W_OK), 0, "the new one is there");
	is(chmod(in_dir("sub/moved"), 0640), 0, "chmod");
	is(stat(in_dir("sub/moved"), &st) == 0 ? st.st_mode & 07777 : 0, 0640, "is seen");
	struct timespec when[2] = {{1000000000, 0}, {1000000001, 5}};
	is(utimensat(AT_FDCWD, in_dir("sub/moved"), when, 0), 0, "utimensat");
	is(stat(name, &st) == 0 ? st.st_mtime : 0, 1000000001, "too");
	umask(027);
	close(open(in_dir("sub/masked"), O_CREAT | O_WRONLY, 0666));
	is(stat(name, &st) == 0 ? st.st_mode & 0777 : 0, 0640, "umask");
	umask(022);
	char cwd[PATH_MAX], *was = getcwd(NULL, 0);
	is(chdir(in_dir("sub")), 0, "chdir");
	ok(getcwd(cwd, sizeof cwd) && !strcmp(cwd, name), "getcwd");
	is(access("moved", F_OK), 0, "relative names");
	fails(getcwd(cwd, 3) ? 0 : -1, ERANGE, "getcwd into too little");
	int found = 0, others = 0;
	DIR *d = opendir(".");
	for (struct dirent *e; d && (e = readdir(d));) {
		const char *want[] = {".", "..", "moved", "hard", "link", "round", "masked"};
		int hit = 0;
		for (int i = 0; i < 7; i++)
			if (!strcmp(e->d_name, want[i]))
				hit = 1 << i;
		found |= hit;
		others += !hit;
	}
	ok(found == 127 && others == 0, "a folder lists what is in it");
	closedir(d);
	int at = open(".", O_RDONLY | O_DIRECTORY);
	fd = openat(at, "moved", O_RDONLY);
	ok(fd >= 0, "openat");
	close(fd);
	fails(openat(at, "none", O_RDONLY), ENOENT, "of nothing");
	const char *all[] = {"moved", "hard", "link", "round", "masked"};
	int bad = 0;
	for (int i = 0; i < 5; i++)
		bad += unlinkat(at, all[i], 0);
	is(bad, 0, "unlinkat");
	is(chdir(was), 0, "and back");
	is(rmdir(in_dir("sub")), 0, "rmdir");
	close(at);
	char longname[400];
	memset(longname, 'n', 399);
	longname[399] = 0;
	fails(open(in_dir(longname), O_RDONLY), ENAMETOOLONG, "too long a name");
	fails(open("", O_RDONLY), ENOENT, "an empty one");
	fails(open((char *)0x10, O_RDONLY), EFAULT, "one that is nowhere");
	fails(fstat(777, &st), EBADF, "fstat of nothing");
	free(was);
}

static void devices(void)
{
	char text[64];
	memset(text, 1, sizeof text);
	int fd = open("/dev/null", O_RDWR);
	is(write(fd, "x", 1), 1, "/dev/null swallows");
	is(read(fd, text, 1), 0, "and is empty");
	close(fd);
	fd = open("/dev/zero", O_RDONLY);
	is(read(fd, text, sizeof text), sizeof text, "/dev/zero");
	ok(text[0] == 0 && text[63] == 0, "gives zeros");
	close(fd);
	fd = open("/dev/full", O_RDWR);
	is(lseek(fd, -5, SEEK_SET), 0, "/dev/full has only one offset");
	is(lseek(fd, 5, SEEK_CUR), 0, "wherever one goes");
	close(fd);
	fd = open("/dev/urandom", O_RDONLY);
	is(read(fd, text, sizeof text), sizeof text, "/dev/urandom");
	int set = 0;
	for (unsigned i = 0; i < sizeof text; i++)
		set += text[i] != 0;
	ok(set > 40, "does not");
	close(fd);
}

/* What a descriptor's file says, read through the descriptor that it is about and through another one. */
static void info_of_itself(void)
{
	char text[200] = "", path[64];
	int fd = open("/dev/null", O_RDONLY), self = dup(fd);
	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", self);
	int first = open(path, O_RDONLY);
	is(dup2(first, self), self, "a descriptor for what is said of itself");
	close(first);
	ok(read(self, text, sizeof text - 1) > 0 && !strncmp(text, "pos:\t0\n", 7), "is read");
	lseek(self, 3, SEEK_SET);
	int other = open(path, O_RDONLY);
	memset(text, 0, sizeof text);
	ok(read(other, text, sizeof text - 1) > 0 && !strncmp(text, "pos:\t3\n", 7), "and says where it is");
	close(other);
	close(self);
	close(fd);
}

int main(int argc, char **argv)
{
	if (argc == 4 && !strcmp(argv[1], "--probe"))
		return (fcntl(atoi(argv[2]), F_GETFD) >= 0) + 2 * (fcntl(atoi(argv[3]), F_GETFD) >= 0);
	deadline(60);
	snprintf(dir, sizeof dir, "%s/fds-%d", argc > 1 ? argv[1] : "/tmp", getpid());
	if (mkdir(dir, 0755)) {
		say("Bail out! mkdir %s: errno %d\n", dir, errno);
		return 2;
	}
	duplicates();
	offsets();
	over_exec(argv[0]);
	limits();
	longest_file();
	names();
	devices();
	info_of_itself();
	is(unlink(in_dir("a")) | unlink(in_dir("b")) | unlink(in_dir("c")), 0, "cleaning up");
	is(rmdir(dir), 0, "leaves nothing");
	return tap_end();
}
