/* Threads of one process map, touch, protect, move, unmap, fork and end, all at once, and check every byte that is theirs. */
#include "tap.h"
#include <pthread.h>
#include <stdatomic.h>

#define PAGES 24UL

/* What went wrong, by when it was seen. */
enum when { FRESH, FORKED, READ_ONLY, MOVED, DROPPED, AT_END, WHENS };
static atomic_long wrong[WHENS], forks, maps, ended;
static int rounds;
static uint64_t seed;
/* One page that all threads use: sums must come out. */
static atomic_long *shared;

static uint64_t pattern(uint64_t id, unsigned long page) { return id * 0x9e3779b97f4a7c15 + page; }

static void fill(uint64_t *at, uint64_t id, unsigned long pages)
{
	for (unsigned long p = 0; p < pages; p++)
		at[p * PAGE / 8] = at[p * PAGE / 8 + 511] = pattern(id, p);
}

static long check(const uint64_t *at, uint64_t id, unsigned long pages)
{
	long bad = 0;
	for (unsigned long p = 0; p < pages; p++)
		bad += at[p * PAGE / 8] != pattern(id, p) || at[p * PAGE / 8 + 511] != pattern(id, p);
	return bad;
}

static void *map(unsigned long pages)
{
	void *at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (at == MAP_FAILED)
		_exit(77);
	atomic_fetch_add(&maps, 1);
	return at;
}

/* The child checks its copy, changes it, and checks it again; the parent's stays. */
static void fork_and_check(uint64_t *at, uint64_t id, unsigned long pages)
{
	pid_t pid = fork();
	if (pid < 0)
		return;
	if (pid == 0) {
		long bad = check(at, id, pages);
		fill(at, id + 1, pages);
		_exit(bad + check(at, id + 1, pages) != 0);
	}
	wrong[FORKED] += exited_with(wait_for(pid)) != 0;
	atomic_fetch_add(&forks, 1);
}

static void *nothing(void *argument)
{
	atomic_fetch_add(&ended, 1);
	atomic_fetch_add(shared, 1);
	return argument;
}

static void *storm(void *argument)
{
	uint64_t id = (uint64_t)(long)argument << 40, random = seed ^ id;
	for (int round = 0; round < rounds; round++) {
		unsigned long pages = 1 + random_next(&random) % PAGES;
		uint64_t *at = map(pages);
		for (unsigned long p = 0; p < pages; p++)
			wrong[FRESH] += at[p * PAGE / 8] != 0;
		fill(at, ++id, pages);
		switch (random_next(&random) % 5) {
		case 0:
			fork_and_check(at, id, pages);
			break;
		case 1: {
			mprotect(at, pages * PAGE, PROT_READ);
			wrong[READ_ONLY] += check(at, id, pages);
			mprotect(at, pages * PAGE, PROT_READ | PROT_WRITE);
			at[0] = at[511] = pattern(id, 0);
			break;
		}
		case 2: {
			uint64_t *moved = mremap(at, pages * PAGE, (pages + 8) * PAGE, MREMAP_MAYMOVE);
			if (moved == MAP_FAILED)
				_exit(78);
			wrong[MOVED] += moved[pages * PAGE / 8] != 0;
			munmap(moved + pages * PAGE / 8, 8 * PAGE);
			at = moved;
			break;
		}
		case 3: {
			pthread_t thread;
			if (!pthread_create(&thread, NULL, nothing, NULL))
				pthread_join(thread, NULL);
			break;
		}
		default:
			madvise(at, PAGE, MADV_DONTNEED);
			wrong[DROPPED] += at[0] != 0;
			at[0] = at[511] = pattern(id, 0);
		}
		wrong[AT_END] += check(at, id, pages);
		munmap(at, pages * PAGE);
		atomic_fetch_add(shared, 1);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	rounds = argc > 1 ? atoi(argv[1]) : 200;
	int count = argc > 2 ? atoi(argv[2]) : 8;
	seed = seed_from(argc > 3 ? argv[3] : NULL);
	pthread_t threads[64];
	count = count < 64 ? count : 64;
	shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	deadline(600);
	for (long n = 0; n < count; n++)
		pthread_create(&threads[n], NULL, storm, (void *)(n + 1));
	for (int n = 0; n < count; n++)
		pthread_join(threads[n], NULL);
	static const char *const names[] = {"a new page is zero", "the child's copy is right", "a protected page keeps its content",
		"what a mapping grew by is zero", "dropped content is gone", "every page holds what its thread wrote"};
	for (int n = 0; n < WHENS; n++)
		is(wrong[n], 0, names[n]);
	is(*shared, (long)count * rounds + ended, "every addition to a shared page arrived");
	ok(forks > 0 && maps >= (long)count * rounds, "threads forked and mapped");
	return tap_end();
}
