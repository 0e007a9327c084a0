/* Memory calls with arguments that make no sense: each must give the errno Linux gives, and leave
 * what was there before. */
#include "tap.h"
#include <sys/resource.h>

#define RW (PROT_READ | PROT_WRITE)
#define ANON (MAP_PRIVATE | MAP_ANONYMOUS)
#define TOP 0x7ffffffff000UL
#define NONCANONICAL ((void *)0x800000000000UL)
#define KERNEL ((void *)0xffff800000000000UL)

static int outcome(long result)
{
	return result == -1 ? errno : 0;
}
static int mapping(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
	void *p = (void *)syscall(SYS_mmap, addr, len, prot, flags, fd, offset);
	if (p == MAP_FAILED)
		return errno;
	munmap(p, len);
	return 0;
}
static int moving(void *old, size_t from, size_t to, int flags, void *target)
{
	return outcome(syscall(SYS_mremap, old, from, to, flags, target));
}

/* Eight pages of which the fifth is not mapped: "mmmm-mmm". */
static char *with_a_hole(void)
{
	char *m = mmap(NULL, 8 * PAGE, RW, ANON, -1, 0);
	if (m == MAP_FAILED || munmap(m + 4 * PAGE, PAGE))
		say("Bail out! no memory\n"), _exit(1);
	memset(m, 1, 4 * PAGE);
	memset(m + 5 * PAGE, 2, 3 * PAGE);
	return m;
}
static int as_it_was(const char *m)
{
	for (unsigned long at = 0; at < 8 * PAGE; at += PAGE)
		if (at != 4 * PAGE && m[at + 7] != (at < 4 * PAGE ? 1 : 2))
			return 0;
	return 1;
}

static void mmap_calls(int file, int read_only, int write_only, int pipe_end)
{
	is(mapping(NULL, 0, RW, ANON, -1, 0), EINVAL, "mmap of nothing");
	is(mapping(NULL, -1UL, RW, ANON, -1, 0), ENOMEM, "of everything");
	is(mapping(NULL, -PAGE, RW, ANON, -1, 0), ENOMEM, "of all but a page");
	is(mapping(NULL, 1UL << 47, RW, ANON, -1, 0), ENOMEM, "of the whole lower half");
	is(mapping(NULL, 1UL << 62, PROT_NONE, ANON | MAP_NORESERVE, -1, 0), ENOMEM, "of 4 EiB without reserve");
	is(mapping((void *)1, PAGE, RW, ANON | MAP_FIXED, -1, 0), EINVAL, "fixed at an odd address");
	is(mapping(NONCANONICAL, PAGE, RW, ANON | MAP_FIXED, -1, 0), ENOMEM, "fixed beyond the lower half");
	is(mapping(KERNEL, PAGE, RW, ANON | MAP_FIXED, -1, 0), ENOMEM, "fixed in the kernel's half");
	is(mapping((void *)-PAGE, PAGE, RW, ANON | MAP_FIXED, -1, 0), ENOMEM, "fixed in the last page");
	is(mapping((void *)TOP, 2 * PAGE, RW, ANON | MAP_FIXED, -1, 0), ENOMEM, "fixed across the end");
	is(mapping(KERNEL, PAGE, RW, ANON, -1, 0), 0, "an absurd hint is no error");
	is(mapping((void *)1, PAGE, RW, ANON, -1, 0), 0, "nor an odd one");
	is(mapping(NULL, PAGE, RW, MAP_ANONYMOUS, -1, 0), EINVAL, "neither shared nor private");
	is(mapping(NULL, PAGE, RW, 0, file, 0), EINVAL, "neither, of a file");
	is(mapping(NULL, PAGE, RW, MAP_PRIVATE, -1, 0), EBADF, "of no file");
	is(mapping(NULL, PAGE, RW, MAP_PRIVATE, 9999, 0), EBADF, "of a descriptor that is not open");
	is(mapping(NULL, 0, RW, MAP_PRIVATE, -1, 0), EBADF, "of no file and no length");
	is(mapping(NULL, 0, RW, MAP_PRIVATE, file, 0), EINVAL, "of a file and no length");
	is(mapping(NULL, PAGE, RW, MAP_PRIVATE, file, 1), EINVAL, "from an odd offset");
	is(mapping(NULL, PAGE, RW, ANON, -1, 1), EINVAL, "anonymous from an odd offset");
	is(mapping(NULL, 2 * PAGE, RW, MAP_PRIVATE, file, -PAGE), EOVERFLOW, "from an offset that overflows");
	is(mapping(NULL, PAGE, PROT_READ, MAP_PRIVATE, write_only, 0), EACCES, "of a file that is only written");
	is(mapping(NULL, PAGE, PROT_WRITE, MAP_SHARED, read_only, 0), EACCES, "shared and writable of one that is only read");
	is(mapping(NULL, PAGE, PROT_WRITE, MAP_PRIVATE, read_only, 0), 0, "private and writable of it");
	is(mapping(NULL, PAGE, PROT_READ, MAP_SHARED, read_only, 0), 0, "shared and read-only of it");
	is(mapping(NULL, PAGE, PROT_READ, MAP_PRIVATE, pipe_end, 0), ENODEV, "of a pipe");
	is(mapping(NULL, PAGE, 0x7ff0, ANON, -1, 0), 0, "protections without a meaning are ignored");
	is(mapping(NULL, PAGE, PROT_READ, MAP_PRIVATE | 0x8000000, file, 0), 0, "flags without a meaning are ignored");
	char *m = with_a_hole();
	is(mapping(m, PAGE, RW, ANON | MAP_FIXED_NOREPLACE, -1, 0), EEXIST, "MAP_FIXED_NOREPLACE over something");
	is(mapping(m + 3 * PAGE, 2 * PAGE, RW, ANON | MAP_FIXED_NOREPLACE, -1, 0), EEXIST, "over part of something");
	is(mapping(m + 4 * PAGE, PAGE, RW, ANON | MAP_FIXED_NOREPLACE, -1, 0), 0, "in a hole");
	ok(as_it_was(m), "and nothing has changed");
	munmap(m, 8 * PAGE);
}

static void munmap_calls(void)
{
	char *m = with_a_hole();
	is(outcome(munmap(m, 0)), EINVAL, "munmap of nothing");
	is(outcome(munmap(m + 1, PAGE)), EINVAL, "at an odd address");
	is(outcome(munmap(m, -1UL)), EINVAL, "of everything");
	is(outcome(munmap(KERNEL, PAGE)), EINVAL, "in the kernel's half");
	is(outcome(munmap((void *)-PAGE, PAGE)), EINVAL, "of the last page");
	is(outcome(munmap((void *)TOP, 2 * PAGE)), EINVAL, "across the end");
	is(outcome(munmap(m + 4 * PAGE, PAGE)), 0, "of a hole");
	ok(as_it_was(m), "and nothing has changed");
	is(outcome(munmap(m, 1)), 0, "of one byte");
	ok(mapping(m, PAGE, RW, ANON | MAP_FIXED_NOREPLACE, -1, 0) == 0, "takes the page");
	munmap(m, 8 * PAGE);
}

static void mprotect_calls(int read_only)
{
	char *m = with_a_hole();
	is(outcome(mprotect(m + 1, PAGE, RW)), EINVAL, "mprotect at an odd address");
	is(outcome(mprotect(m, 0, RW)), 0, "of nothing");
	is(outcome(mprotect(m, -1UL, RW)), ENOMEM, "of everything");
	is(outcome(mprotect(m, 1UL << 63, RW)), ENOMEM, "of half of everything");
	is(outcome(mprotect(KERNEL, PAGE, RW)), ENOMEM, "in the kernel's half");
	is(outcome(mprotect(m, PAGE, 0x100)), EINVAL, "to what does not exist");
	is(outcome(mprotect(m, PAGE, PROT_READ | PROT_GROWSUP | PROT_GROWSDOWN)), EINVAL, "growing both ways");
	is(outcome(mprotect(m, PAGE, PROT_READ | PROT_GROWSDOWN)), EINVAL, "growing what does not grow");
	is(outcome(mprotect(m + 4 * PAGE, PAGE, RW)), ENOMEM, "of a hole");
	is(outcome(mprotect(m + 4 * PAGE, 2 * PAGE, PROT_READ)), ENOMEM, "from a hole on");
	m[5 * PAGE] = 2;
	ok(as_it_was(m), "and nothing has changed");
	is(outcome(mprotect(m + 3 * PAGE, 3 * PAGE, PROT_READ)), ENOMEM, "across a hole");
	m[5 * PAGE] = 2;
	is(outcome(mprotect(m, 4 * PAGE, RW)), 0, "what was before it had changed");
	munmap(m, 8 * PAGE);
	char *f = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, read_only, 0);
	is(outcome(mprotect(f, PAGE, RW)), EACCES, "a shared view of a file only read stays so");
	is(outcome(mprotect(f, PAGE, PROT_NONE)), 0, "but can lose rights");
	is(outcome(mprotect(f, PAGE, PROT_READ)), 0, "and get them back");
	munmap(f, PAGE);
}

static void mremap_calls(void)
{
	char *m = with_a_hole();
	char *free_place = mmap(NULL, 32 * PAGE, PROT_NONE, ANON, -1, 0);
	munmap(free_place, 32 * PAGE);
	is(moving(m + 1, PAGE, PAGE, 0, NULL), EINVAL, "mremap at an odd address");
	is(moving(m, PAGE, 0, 0, NULL), EINVAL, "to nothing");
	is(moving(m, 0, PAGE, 0, NULL), EINVAL, "from nothing, private");
	is(moving(m, PAGE, 2 * PAGE, 0x40, NULL), EINVAL, "with a flag that does not exist");
	is(moving(m, PAGE, PAGE, MREMAP_FIXED, free_place), EINVAL, "MREMAP_FIXED alone");
	is(moving(m, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, free_place + 1), EINVAL, "to an odd address");
	is(moving(m, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, m + PAGE), EINVAL, "over itself, upwards");
	is(moving(m + PAGE, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, m), EINVAL, "over itself, downwards");
	is(moving(m, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, m), EINVAL, "onto itself");
	is(moving(m, PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, m - 2 * PAGE), EINVAL, "where the new size reaches the old place");
	is(moving(m, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, KERNEL), EINVAL, "into the kernel's half");
	is(moving(m, PAGE, -1UL, MREMAP_MAYMOVE, NULL), EINVAL, "to everything");
	is(moving(m, PAGE, 2 * PAGE, 0, NULL), ENOMEM, "growing without moving where there is no room");
	is(moving(m + 4 * PAGE, PAGE, 2 * PAGE, MREMAP_MAYMOVE, NULL), EFAULT, "of a hole");
	is(moving(m, 5 * PAGE, 6 * PAGE, MREMAP_MAYMOVE, NULL), EFAULT, "of more than the mapping");
	is(moving(m, 2 * PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL), EINVAL, "MREMAP_DONTUNMAP with another size");
	is(moving(m, PAGE, PAGE, MREMAP_DONTUNMAP, NULL), EINVAL, "MREMAP_DONTUNMAP without MREMAP_MAYMOVE");
	is(moving(m, PAGE, PAGE, 0, NULL), 0, "to the same");
	is(moving(KERNEL, PAGE, PAGE, 0, NULL), EFAULT, "of the kernel's half");
	ok(as_it_was(m), "and nothing has changed");
	munmap(m, 8 * PAGE);
}

static void madvise_calls(int read_only)
{
	char *m = with_a_hole();
	is(outcome(madvise(m + 1, PAGE, MADV_NORMAL)), EINVAL, "madvise at an odd address");
	is(outcome(madvise(m, 0, MADV_DONTNEED)), 0, "about nothing");
	is(outcome(madvise(m, -1UL, MADV_NORMAL)), EINVAL, "about everything");
	is(outcome(madvise(m, PAGE, -1)), EINVAL, "with advice -1");
	is(outcome(madvise(m, PAGE, 5)), EINVAL, "with advice 5");
	is(outcome(madvise(m, PAGE, 9999)), EINVAL, "with advice 9999");
	is(outcome(madvise(m, 0, 9999)), EINVAL, "even about nothing");
	static const int harmless[] = { MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL, MADV_WILLNEED, MADV_DONTFORK, MADV_DOFORK, MADV_DONTDUMP, MADV_DODUMP, MADV_WIPEONFORK, MADV_KEEPONFORK, MADV_COLD, MADV_PAGEOUT };
	for (unsigned i = 0; i < sizeof harmless / sizeof *harmless; i++)
		if (!ok(!outcome(madvise(m, 4 * PAGE, harmless[i])), "advice %d", harmless[i]))
			say("# %m\n");
	ok(as_it_was(m), "and nothing has changed");
	is(outcome(madvise(m + 3 * PAGE, 3 * PAGE, MADV_RANDOM)), ENOMEM, "across a hole");
	is(outcome(madvise(m + 4 * PAGE, PAGE, MADV_RANDOM)), ENOMEM, "about a hole");
	is(outcome(madvise(m + 3 * PAGE, 3 * PAGE, MADV_DONTNEED)), ENOMEM, "MADV_DONTNEED across a hole");
	ok(m[3 * PAGE] == 0 && m[5 * PAGE] == 0 && m[6 * PAGE] == 2, "did what it could");
	is(outcome(madvise(m, PAGE, MADV_FREE)), 0, "MADV_FREE");
	munmap(m, 8 * PAGE);
	char *f = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, read_only, 0);
	is(outcome(madvise(f, PAGE, MADV_WIPEONFORK)), EINVAL, "MADV_WIPEONFORK of a file");
	is(outcome(madvise(f, PAGE, MADV_FREE)), EINVAL, "MADV_FREE of a file");
	is(outcome(madvise(f, PAGE, MADV_DONTNEED)), 0, "MADV_DONTNEED of a file");
	is(outcome(madvise(f, PAGE, MADV_POPULATE_WRITE)), EINVAL, "MADV_POPULATE_WRITE where nothing may be written");
	is(outcome(madvise(f, PAGE, MADV_POPULATE_READ)), 0, "MADV_POPULATE_READ");
	munmap(f, PAGE);
}

static void other_calls(void)
{
	char *m = with_a_hole();
	unsigned char in[16];
	is(outcome(mincore(m + 1, PAGE, in)), EINVAL, "mincore at an odd address");
	is(outcome(mincore(m, 8 * PAGE, in)), ENOMEM, "over a hole");
	is(outcome(mincore(m, PAGE, (void *)8)), EFAULT, "into nowhere");
	is(outcome(mincore(m, -1UL, in)), ENOMEM, "of everything");
	is(outcome(mincore(m, 4 * PAGE, in)), 0, "of what is there");
	ok(in[0] & in[3] & 1, "is told");
	is(outcome(msync(m + 1, PAGE, MS_SYNC)), EINVAL, "msync at an odd address");
	is(outcome(msync(m, PAGE, MS_SYNC | MS_ASYNC)), EINVAL, "both now and later");
	is(outcome(msync(m, PAGE, 64)), EINVAL, "with a flag that does not exist");
	is(outcome(msync(m, 8 * PAGE, MS_SYNC)), ENOMEM, "over a hole");
	is(outcome(msync(m, PAGE, 0)), 0, "with none");
	is(outcome(msync(m, -1UL, MS_SYNC)), 0, "of everything, which wraps to nothing");
	is(outcome(msync(m, 0, MS_SYNC)), 0, "of nothing");
	is(outcome(mlock(m, 8 * PAGE)), ENOMEM, "mlock over a hole");
	is(outcome(munlock(m + 4 * PAGE, PAGE)), ENOMEM, "munlock of a hole");
	is(outcome(mlock(m, -1UL)), 0, "mlock of everything, which wraps to nothing");
	is(outcome(syscall(SYS_mlock2, m, PAGE, 2)), EINVAL, "mlock2 with a flag that does not exist");
	is(outcome(mlockall(0)), EINVAL, "mlockall of nothing");
	is(outcome(mlockall(64)), EINVAL, "mlockall with a flag that does not exist");
	is(outcome(munlock(m, PAGE)), 0, "munlock");
	ok(as_it_was(m), "and nothing has changed");
	munmap(m, 8 * PAGE);
	void *end = sbrk(0);
	is((long)syscall(SYS_brk, -1UL), (long)end, "brk to the end of everything stays");
	is((long)syscall(SYS_brk, 1), (long)end, "brk to nothing stays");
	is((long)syscall(SYS_brk, TOP), (long)end, "brk into the stack stays");
}

static void limits(void)
{
	struct rlimit old, now;
	getrlimit(RLIMIT_AS, &old);
	now = old;
	now.rlim_cur = 64UL << 20;
	is(outcome(setrlimit(RLIMIT_AS, &now)), 0, "RLIMIT_AS of 64 MiB");
	is(mapping(NULL, 128UL << 20, RW, ANON, -1, 0), ENOMEM, "refuses 128 MiB");
	is(mapping(NULL, 128UL << 20, PROT_NONE, ANON | MAP_NORESERVE, -1, 0), ENOMEM, "even without rights");
	char *m = mmap(NULL, PAGE, RW, ANON, -1, 0);
	ok(m != MAP_FAILED, "not a page");
	is(moving(m, PAGE, 128UL << 20, MREMAP_MAYMOVE, NULL), ENOMEM, "nor mremap");
	void *end = sbrk(0);
	is((long)syscall(SYS_brk, (char *)end + (128UL << 20)), (long)end, "nor brk");
	setrlimit(RLIMIT_AS, &old);
	getrlimit(RLIMIT_DATA, &old);
	now = old;
	now.rlim_cur = 1UL << 20;
	setrlimit(RLIMIT_DATA, &now);
	is((long)syscall(SYS_brk, (char *)end + (16UL << 20)), (long)end, "RLIMIT_DATA refuses brk");
	is(mapping(NULL, 16UL << 20, RW, ANON, -1, 0), ENOMEM, "and private writable memory");
	is(mapping(NULL, 16UL << 20, PROT_READ, ANON, -1, 0), 0, "not what is only read");
	setrlimit(RLIMIT_DATA, &old);
	munmap(m, PAGE);
}

int main(void)
{
	char name[] = "mm_errors.XXXXXX";
	int file = mkstemp(name);
	int ends[2];
	if (file < 0 || pipe(ends))
		return say("Bail out! no file: %m\n"), 1;
	if (ftruncate(file, 2 * PAGE))
		return 1;
	int read_only = open(name, O_RDONLY), write_only = open(name, O_WRONLY);
	unlink(name);
	mmap_calls(file, read_only, write_only, ends[0]);
	munmap_calls();
	mprotect_calls(read_only);
	mremap_calls();
	madvise_calls(read_only);
	other_calls();
	limits();
	return tap_end();
}
