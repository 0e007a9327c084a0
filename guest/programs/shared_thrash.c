/* Shared memory and a mapped file that are larger than the machine: what any process stores, all find, however often
 * the pages leave memory in between. The arguments are a folder, processes, KiB of each kind, and rounds. */
#include "tap.h"
#include <stdatomic.h>

struct page {
	_Atomic uint64_t turn;
	uint64_t words[PAGE / 8 - 1];
};

static int processes;
static long pages, rounds;

static uint64_t word(long page, uint64_t turn, int n) { return turn * 0x9e3779b97f4a7c15 + page * 1000003 + n; }

static void fill(struct page *p, long page, uint64_t turn)
{
	for (int n = 0; n < 511; n++)
		p->words[n] = word(page, turn, n);
	atomic_store(&p->turn, turn);
}

/* Words that are not what the page's last writer stored. */
static long wrong(struct page *p, long page)
{
	long bad = 0;
	uint64_t turn = atomic_load(&p->turn);
	for (int n = 0; n < 511; n++)
		bad += p->words[n] != word(page, turn, n);
	return bad;
}

static struct page *area;
static long *faulty;

/* In each round a page is stored to by another process; all look at all of them between two rounds. */
static void work(int me, int in, int out)
{
	char token;
	for (uint64_t round = 1; round <= (uint64_t)rounds; round++) {
		for (long page = 0; page < pages; page++)
			if ((page + (long)round) % processes == me)
				fill(&area[page], page, round);
		/* Everybody has stored before anybody looks. */
		if (write(out, "", 1) != 1 || read(in, &token, 1) != 1)
			_exit(1);
		for (long page = me; page < pages; page += 1 + me % 3) {
			__atomic_fetch_add(faulty, wrong(&area[page], page), __ATOMIC_RELAXED);
			__atomic_fetch_add(faulty, area[page].turn != round, __ATOMIC_RELAXED);
		}
		if (write(out, "", 1) != 1 || read(in, &token, 1) != 1)
			_exit(1);
	}
	_exit(0);
}

static void together(const char *name)
{
	int down[64][2], up[2], failed = 0;
	pid_t pids[64];
	if (pipe(up) != 0) {
		ok(0, "a pipe");
		return;
	}
	*faulty = 0;
	for (int n = 0; n < processes; n++) {
		failed += pipe(down[n]) != 0;
		pids[n] = fork();
		if (pids[n] == 0)
			work(n, down[n][0], up[1]);
	}
	for (long step = 0; step < 2 * rounds; step++) {
		char token;
		for (int n = 0; n < processes; n++)
			failed += read(up[0], &token, 1) != 1;
		for (int n = 0; n < processes; n++)
			failed += write(down[n][1], "", 1) != 1;
	}
	for (int n = 0; n < processes; n++) {
		failed += wait_for(pids[n]) != 0;
		close(down[n][0]);
		close(down[n][1]);
	}
	close(up[0]);
	close(up[1]);
	is(failed, 0, "all processes ended well");
	is(*faulty, 0, name);
}

int main(int argc, char **argv)
{
	char path[PATH_MAX];
	if (argc < 5)
		return 2;
	deadline(200);
	processes = atoi(argv[2]);
	pages = atol(argv[3]) / 4;
	rounds = atol(argv[4]);
	faulty = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	area = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (!ok(area != MAP_FAILED && faulty != MAP_FAILED, "shared memory"))
		return tap_end();
	together("what was stored to shared memory is there");
	munmap(area, pages * PAGE);

	snprintf(path, sizeof path, "%s/vmm-test-thrash", argv[1]);
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	is(ftruncate(fd, pages * PAGE), 0, "a file");
	area = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (!ok(area != MAP_FAILED, "mapped"))
		return tap_end();
	together("what was stored to a mapped file is there");
	is(msync(area, pages * PAGE, MS_SYNC), 0, "msync");
	struct page *copy = malloc(PAGE);
	long bad = 0;
	for (long page = 0; page < pages; page++)
		bad += pread(fd, copy, PAGE, page * PAGE) != (ssize_t)PAGE || wrong(copy, page) || copy->turn != (uint64_t)rounds;
	is(bad, 0, "and in the file");
	munmap(area, pages * PAGE);
	close(fd);
	unlink(path);
	return tap_end();
}
