/* Fills memory, freezes itself (/dev/vmm), and, as a clone, reads it all or stores to all of it:
   usage: frozen MEBIBYTES. The settings of the clone say which: MODE=read or MODE=write. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul

static unsigned long pages;
static unsigned char *memory;

static unsigned long word(unsigned long page, unsigned long salt) { return (page + 1) * 0x9e3779b97f4a7c15ul + salt; }

static void fill(unsigned long salt) {
    for (unsigned long page = 0; page < pages; page++)
        for (unsigned long at = 0; at < PAGE; at += 512) *(unsigned long *)(memory + page * PAGE + at) = word(page, salt + at);
}

static void check(unsigned long salt, const char *who) {
    for (unsigned long page = 0; page < pages; page++)
        for (unsigned long at = 0; at < PAGE; at += 512)
            if (*(unsigned long *)(memory + page * PAGE + at) != word(page, salt + at)) {
                printf("%s: page %lu is not what was stored\n", who, page);
                exit(1);
            }
}

int main(int argc, char **argv) {
    pages = (argc > 1 ? strtoul(argv[1], NULL, 10) : 16) << 8;
    memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return 2;
    fill(0);
    int vmm = open("/dev/vmm", O_RDWR);
    if (vmm < 0 || write(vmm, "freeze\n", 7) != 7) return 3;
    char said[512] = "";
    if (read(vmm, said, sizeof said - 1) <= 0) return 4;
    unsigned long salt = 0;
    if (sscanf(said, "clone %lu", &salt) == 1 && strstr(said, "MODE=write")) {
        check(0, "clone");
        fill(salt << 32);
        pid_t child = fork();
        if (child == 0) {
            check(salt << 32, "child");
            fill(salt << 40);
            check(salt << 40, "child");
            _exit(0);
        }
        int status = 1;
        if (child < 0 || waitpid(child, &status, 0) != child || status != 0) return 5;
        check(salt << 32, "clone");
        printf("written %lu\n", salt);
        return 0;
    }
    check(0, "all of it");
    puts(salt ? "read" : "original");
    fflush(stdout);
    if (salt) sleep(600);
    char byte;
    while (read(0, &byte, 1) > 0) {}
    check(0, "the original");
    return 0;
}
