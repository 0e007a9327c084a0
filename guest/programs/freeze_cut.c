/* A guest that is to be frozen while it runs. Every thread of every process stores to all of its pages, over and over, and
 * looks before each store whether the page has what it left there. What is made of a freeze goes on from one moment: a page,
 * a register or what is in a pipe that is from another one shows at once.
 *
 * freeze_cut PAGES: so many pages for each thread. It goes on until its input has something or ends; then each thread does
 * two rounds more, and it prints `ok`, or how much was wrong. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096
#define WORDS (PAGE / 8)
#define CHILDREN 2
/* Of each process, in the memory that they share. */
#define SLICE 25
#define ACCOUNTS 64
#define SUM 1000000

/* Of this process. */
static atomic_int stopping;
static atomic_long wrong;
static unsigned long pages;
static pthread_mutex_t bank = PTHREAD_MUTEX_INITIALIZER;
static int64_t accounts[ACCOUNTS][WORDS] __attribute__((aligned(PAGE)));
/* Seen by all processes: some pages for each. In the first, one more than it counts itself is wrong; and so is it in a file. */
static uint64_t *shared;
static int ledger;
static uint64_t own, entries;
static int process;

static void *map(size_t bytes, int flags, int fd) {
  void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
  if (at == MAP_FAILED) perror("mmap"), exit(1);
  return at;
}

static void expect(uint64_t found, uint64_t expected) {
  if (found != expected) wrong++;
}

/* One round over pages that have `round - 1`, but where `file` says that a page is still the file's. */
static void round_of(uint64_t *part, unsigned long count, uint64_t round, int file) {
  for (unsigned long p = 0; p < count; p++) {
    uint64_t *first = part + p * WORDS, *last = first + WORDS - 1;
    expect(*first, round - 1);
    expect(*last, file && round == 1 ? 0 : round - 1);
    *first = round;
    *last = round;
  }
}

/* Anonymous memory, memory that forks do not inherit, memory that processes share, and a file in memory, as far as it was
 * stored to. */
static void *sweep(void *kind) {
  unsigned long count = *(char *)kind == 's' ? SLICE - 1 : pages;
  size_t bytes = count * PAGE;
  uint64_t *part, *rest = NULL;
  int file = *(char *)kind == 'f';
  if (file) {
    int fd = memfd_create("file", 0);
    if (fd < 0 || ftruncate(fd, 2 * (off_t)bytes)) perror("memfd"), exit(1);
    uint64_t mark = 77;
    for (unsigned long p = 0; p < pages; p++)
      if (pwrite(fd, &mark, 8, (off_t)(bytes + p * PAGE)) != 8) exit(1);
    part = map(2 * bytes, MAP_PRIVATE, fd);
    rest = part + pages * WORDS;
    close(fd);
  } else if (*(char *)kind == 's') {
    part = shared + (process * SLICE + 1) * WORDS;
  } else {
    part = map(bytes, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    if (*(char *)kind == 'd') madvise(part, bytes, MADV_DONTFORK);
  }
  uint64_t round = 0;
  for (int more = 2; more > 0; more -= stopping) {
    round_of(part, count, ++round, file);
    for (unsigned long p = 0; rest && p < pages; p += 17) expect(rest[p * WORDS], 77);
  }
  return NULL;
}

/* What is in the accounts together never changes. */
static void *trade(void *unused) {
  uint64_t seed = 88172645463325252u + (uintptr_t)&unused;
  for (int more = 2; more > 0; more -= stopping)
    for (int n = 0; n < 400; n++) {
      seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
      pthread_mutex_lock(&bank);
      int64_t amount = (int64_t)(seed % 1000);
      accounts[seed / 1000 % ACCOUNTS][seed / 64000 % WORDS] -= amount;
      accounts[seed / 100000000 % ACCOUNTS][3] += amount;
      expect(shared[process * SLICE * WORDS], own);
      own++;
      shared[process * SLICE * WORDS]++;
      if (n == 0) {
        int64_t sum = 0;
        uint64_t entry;
        if (pread(ledger, &entry, 8, process * PAGE) != 8) wrong++;
        expect(entry, entries++);
        if (pwrite(ledger, &entries, 8, process * PAGE) != 8) wrong++;
        for (int a = 0; a < ACCOUNTS * WORDS; a++) sum += accounts[a / WORDS][a % WORDS];
        expect((uint64_t)sum, SUM);
      }
      pthread_mutex_unlock(&bank);
    }
  return NULL;
}

static void transfer(ssize_t done, const char *what) {
  if (done != 8) perror(what), _exit(1);
}

/* The parent's end: numbers that rise by two, and each answer is one more. The last says that it is the last. */
static void *ask(void *pipe_ends) {
  int *ends = pipe_ends;
  for (uint64_t n = 2;; n += 2) {
    uint64_t last = (uint64_t)stopping << 63, said = n | last, answer;
    transfer(write(ends[1], &said, 8), "write");
    transfer(read(ends[0], &answer, 8), "read");
    expect(answer, n + 1);
    if (last) return NULL;
  }
}

static void answer(int from, int to) {
  for (uint64_t n = 2; !stopping; n += 2) {
    uint64_t heard, said = n + 1;
    transfer(read(from, &heard, 8), "read");
    expect(heard & ~(1ul << 63), n);
    transfer(write(to, &said, 8), "write");
    stopping = heard >> 63;
  }
}

/* With a small stack: all of it is promised memory. */
static void start(pthread_t *thread, void *(*body)(void *), void *with) {
  pthread_attr_t small;
  pthread_attr_init(&small);
  pthread_attr_setstacksize(&small, 128 * 1024);
  if (pthread_create(thread, &small, body, with)) perror("thread"), exit(1);
}

/* Starts the threads of a process, waits in `until`, and gives back how much was wrong. */
static long run(void (*until)(int *), int *ends) {
  static char kinds[] = "adfs";
  pthread_t threads[6];
  accounts[0][0] = SUM;
  for (int k = 0; k < 4; k++) start(&threads[k], sweep, &kinds[k]);
  for (int k = 4; k < 6; k++) start(&threads[k], trade, NULL);
  until(ends);
  for (int k = 0; k < 6; k++) pthread_join(threads[k], NULL);
  return wrong;
}

static void until_told(int *ends) { answer(ends[0], ends[1]); }

static void until_input(int *ends) {
  pthread_t askers[CHILDREN];
  char byte;
  for (int c = 0; c < CHILDREN; c++) start(&askers[c], ask, ends + 2 * c);
  usleep(100000);
  if (write(1, "READY\n", 6) != 6 || read(0, &byte, 1) < 0) exit(1);
  stopping = 1;
  for (int c = 0; c < CHILDREN; c++) pthread_join(askers[c], NULL);
}

int main(int argc, char **argv) {
  int ends[2 * CHILDREN];
  pid_t children[CHILDREN];
  pages = argc > 1 ? strtoul(argv[1], NULL, 0) : 64;
  shared = map((CHILDREN + 1) * SLICE * PAGE, MAP_SHARED | MAP_ANONYMOUS, -1);
  ledger = memfd_create("ledger", 0);
  if (ledger < 0 || ftruncate(ledger, (CHILDREN + 1) * PAGE)) perror("memfd"), exit(1);
  for (int c = 0; c < CHILDREN; c++) {
    int down[2], up[2];
    if (pipe(down) || pipe(up)) return 1;
    children[c] = fork();
    if (children[c] == 0) {
      // Who waits for somebody that has ended sees the end.
      close(down[1]), close(up[0]);
      for (int e = 0; e < 2 * c; e++) close(ends[e]);
      process = c + 1;
      _exit(run(until_told, (int[]){down[0], up[1]}) != 0);
    }
    close(down[0]), close(up[1]);
    ends[2 * c] = up[0], ends[2 * c + 1] = down[1];
  }
  long bad = run(until_input, ends);
  for (int c = 0; c < CHILDREN; c++) {
    int status;
    if (waitpid(children[c], &status, 0) != children[c] || status != 0) bad++;
  }
  if (bad) printf("wrong: %ld\n", bad);
  else puts("ok");
  return bad != 0;
}
