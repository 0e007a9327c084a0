/* What the benchmark of clones (tests/benches/clones.rs) forks: MIB of memory, written before it is frozen.
 *
 * clone_bench MIB          freezes itself; then says the time stamp counter at its first instruction (8 bytes), and does what
 *                          it reads: n(othing), t(en pages stored to), T(housand pages stored to), w (1 % stored to), W (all
 *                          stored to), r (all read). Each is answered by its nanoseconds (8 bytes); c(ounter) by the time
 *                          stamp counter.
 * clone_bench MIB native N forks N times instead, and prints the mean from fork() to the child's first instruction, in
 *                          nanoseconds, and the means of w, W and r in a child of its own each. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#define PAGE 4096

static volatile unsigned char *memory;
static size_t pages;

static uint64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void store(size_t every) {
  for (size_t i = 0; i < pages; i += every) memory[i * PAGE]++;
}

static void store_to(size_t wanted) { store(pages < wanted ? 1 : pages / wanted); }

static uint64_t run(char what) {
  uint64_t from = now();
  unsigned sum = 0;
  switch (what) {
  case 'n': break;
  case 't': store_to(10); break;
  case 'T': store_to(1000); break;
  case 'w': store(100); break;
  case 'W': store(1); break;
  case 'r': for (size_t i = 0; i < pages; i++) sum += memory[i * PAGE]; break;
  default: exit(2);
  }
  if (sum == 1) exit(3);
  return now() - from;
}

static uint64_t in_child(char what) {
  int p[2];
  uint64_t answer = 0;
  if (pipe(p)) exit(4);
  uint64_t from = now();
  pid_t child = fork();
  if (child == 0) {
    answer = what ? run(what) : now() - from;
    _exit(write(p[1], &answer, 8) != 8);
  }
  if (child < 0 || read(p[0], &answer, 8) != 8) exit(5);
  waitpid(child, NULL, 0);
  close(p[0]), close(p[1]);
  return answer;
}

static int native(int rounds) {
  const char what[] = {0, 'w', 'W', 'r'};
  for (int w = 0; w < 4; w++) {
    uint64_t sum = 0;
    for (int i = 0; i < rounds; i++) sum += in_child(what[w]);
    printf("%llu ", (unsigned long long)(sum / (unsigned)rounds));
  }
  printf("\n");
  return 0;
}

int main(int argc, char **argv) {
  if (argc < 2) return 1;
  size_t bytes = (size_t)atoi(argv[1]) << 20;
  pages = bytes / PAGE;
  memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return 1;
  madvise((void *)memory, bytes, MADV_NOHUGEPAGE);
  for (size_t i = 0; i < bytes; i += 64) memory[i] = (unsigned char)(i >> 12) | 1;
  if (argc > 3 && !strcmp(argv[2], "native")) return native(atoi(argv[3]));
  int vmm = open("/dev/vmm", O_WRONLY);
  if (vmm < 0) return 1;
  long wrote = write(vmm, "freeze", 6);
  uint64_t first = __rdtsc();
  if (wrote != 6 || write(1, &first, 8) != 8) return 1;
  char what;
  while (read(0, &what, 1) == 1) {
    uint64_t took = what == 'c' ? __rdtsc() : run(what);
    if (write(1, &took, 8) != 8) return 1;
  }
  return 0;
}
