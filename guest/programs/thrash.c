/* Processes that together have more memory than the machine, and look at every page of it again and
 * again. Each page says whose it is, which it is and how often it was written, and all of its words
 * follow from that, so a page that comes back late, old, torn, from elsewhere or not at all is seen.
 * Meanwhile the processes fork, write to what they share with their children, exit, and are replaced.
 *
 * usage: thrash PROCESSES KIB_EACH SECONDS */
#include "tap.h"

struct page {
	uint64_t words[PAGE / 8];
};

static uint64_t mix(uint64_t x)
{
	x ^= x >> 33;
	x *= 0xff51afd7ed558ccdULL;
	x ^= x >> 33;
	x *= 0xc4ceb9fe1a85ec53ULL;
	return x ^ x >> 33;
}

static uint64_t word(uint64_t seed, uint64_t index, uint64_t written, int n)
{
	return (seed ^ index << 20 ^ written << 44) + (uint64_t)n * 0x9e3779b97f4a7c15ULL;
}

static void fill(volatile struct page *p, uint64_t seed, uint64_t index, uint64_t written)
{
	for (int n = 0; n < (int)(PAGE / 8); n++)
		p->words[n] = word(seed, index, written, n);
}

/* The first word that is not as it must be, or -1. */
static int check(volatile struct page *p, uint64_t seed, uint64_t index, uint64_t written)
{
	for (int n = 0; n < (int)(PAGE / 8); n++)
		if (p->words[n] != word(seed, index, written, n))
			return n;
	return -1;
}

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

struct work {
	struct page *pages;
	uint32_t *written;
	uint64_t count, seed, random;
};

static uint64_t next(struct work *w)
{
	return w->random = mix(w->random + 0x9e3779b97f4a7c15ULL);
}

/* Every page, from a random one on with a random step; a third of them is written anew. */
static int pass(struct work *w, uint64_t count)
{
	uint64_t at = next(w) % w->count, step = next(w) % 4 ? 1 : next(w) % w->count | 1;
	while (w->count % step == 0 && step != 1)
		step += 2;
	for (uint64_t n = 0; n < count; n++, at = (at + step) % w->count) {
		int bad = check(&w->pages[at], w->seed, at, w->written[at]);
		if (bad >= 0) {
			dprintf(2, "page %lu of %lu, written %u times: word %d is %#lx, not %#lx\n", (long)at,
			    (long)w->count, w->written[at], bad, (long)w->pages[at].words[bad],
			    (long)word(w->seed, at, w->written[at], bad));
			return 1;
		}
		if (next(w) % 3 == 0)
			fill(&w->pages[at], w->seed, at, ++w->written[at]);
	}
	return 0;
}

/* A life: fill all, look at all several times, fork in between. Exit status 1: a mismatch; 2: a fork
 * that failed; 3: no memory. */
static int life(uint64_t kib, uint64_t seed, double until)
{
	struct work w = {.count = kib * 1024 / PAGE, .seed = mix(seed), .random = seed};
	w.pages = mmap(0, w.count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	w.written = mmap(0, w.count * 4, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (w.pages == MAP_FAILED || w.written == MAP_FAILED)
		return 3;
	for (uint64_t n = 0; n < w.count; n++)
		fill(&w.pages[n], w.seed, n, 0);
	int passes = 2 + next(&w) % 4;
	for (int n = 0; n < passes && (n == 0 || now() < until); n++) {
		pid_t child = fork();
		if (child < 0)
			return 2;
		if (child == 0) {
			/* It sees what its parent had, and what it writes its parent does not see. */
			w.random += 77;
			_exit(pass(&w, 1 + next(&w) % w.count));
		}
		int bad = pass(&w, w.count), status;
		if (waitpid(child, &status, 0) != child || status != 0 || bad)
			return bad ? 1 : WIFEXITED(status) && WEXITSTATUS(status) == 1 ? 1 : 4;
	}
	return 0;
}

int main(int argc, char **argv)
{
	int processes = argc > 1 ? atoi(argv[1]) : 4, lives = 0, refused = 0, bad = 0, odd = 0;
	long kib = argc > 2 ? atol(argv[2]) : 1024;
	double until = now() + (argc > 3 ? atof(argv[3]) : 2);
	int alive = 0;
	while (alive > 0 || now() < until) {
		if (alive < processes && now() < until) {
			pid_t child = fork();
			if (child == 0)
				_exit(life(kib, 1000003UL * (lives + 1), until));
			if (child > 0) {
				alive++, lives++;
				continue;
			}
			refused++;
		}
		int status;
		if (alive == 0 || wait(&status) < 0)
			break;
		alive--;
		int code = WIFEXITED(status) ? WEXITSTATUS(status) : 100 + WTERMSIG(status);
		bad += code == 1;
		refused += code == 2 || code == 3;
		odd += code > 3;
		if (code)
			dprintf(2, "a process ended with %d\n", code);
	}
	dprintf(2, "%d lives\n", lives);
	ok(lives >= processes, "every process has lived");
	is(bad, 0, "pages with the wrong content");
	is(refused, 0, "forks and mappings refused");
	is(odd, 0, "processes that ended otherwise");
	return tap_end();
}
