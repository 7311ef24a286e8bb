// SPDX-License-Identifier: MIT
/* The storm: a program that needs more memory than it gets, and checks each byte of its memory.

       storm CORPUS BYTES READS

   CORPUS is a file of pages of real process memory. Page n of the program is one of them, picked by a hash of n. A stamp of
   8 bytes, made from n, is at a place that depends on n. So no two pages are equal, and the program notices a page in the
   place of another page. In a memory cgroup smaller than BYTES, most pages are in swap.

       fill      writes every page, in order
       scan      compares every page, in order: the kernel reads ahead
       random    touches and compares READS pages, in random order, like a program that waits for its memory

   It prints one object of JSON. The exit status is 1 if a byte was wrong, and 2 if the program could not run. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PAGE ((size_t)4096)
#define MIB 1048576.0

static const unsigned char *corpus;
static uint64_t corpus_pages;

static uint64_t hash(uint64_t x) { /* the finalizer of splitmix64 */
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static void compose(unsigned char *page, uint64_t number) {
    uint64_t chosen = hash(number), stamp = hash(~number);
    memcpy(page, corpus + chosen % corpus_pages * PAGE, PAGE);
    memcpy(page + (chosen >> 32) % (PAGE / sizeof stamp) * sizeof stamp, &stamp, sizeof stamp);
}

static int wrong(const unsigned char *page, uint64_t number) {
    static unsigned char expected[4096];
    compose(expected, number);
    return memcmp(expected, page, PAGE) != 0;
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static int ascending(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Runs on each CPU once, as any program does over time. The kernel remembers the CPUs on which a program used its memory. For
   each page that it swaps out, it interrupts those of these CPUs that are busy. Without this function the set of CPUs depends
   on chance, and a fill takes 1.0 or 1.7 times as long. Returns 0, or -1 if the system refuses. */
static int on_each_cpu(void) {
    cpu_set_t allowed, one;
    if (sched_getaffinity(0, sizeof allowed, &allowed)) return -1;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &allowed)) {
            CPU_ZERO(&one);
            CPU_SET(cpu, &one);
            if (sched_setaffinity(0, sizeof one, &one)) return -1;
        }
    return sched_setaffinity(0, sizeof allowed, &allowed);
}

int main(int count, char **words) {
    struct stat file;
    if (count != 4) {
        fprintf(stderr, "usage: storm CORPUS BYTES READS\n");
        return 2;
    }
    int fd = open(words[1], O_RDONLY);
    if (fd < 0 || fstat(fd, &file) || (corpus_pages = file.st_size / PAGE) == 0) {
        perror(words[1]);
        return 2;
    }
    /* The mapping is shared: its memory is charged to the process that made the file, not to the cgroup of this program. */
    corpus = mmap(NULL, corpus_pages * PAGE, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
    uint64_t pages = strtoull(words[2], NULL, 10) / PAGE, reads = strtoull(words[3], NULL, 10), bad = 0;
    unsigned char *memory = mmap(
        NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    float *waited = calloc(reads + 1, sizeof *waited);
    if (corpus == MAP_FAILED || memory == MAP_FAILED || !waited || mlock(corpus, corpus_pages * PAGE) || !pages
        || on_each_cpu()) {
        perror("storm");
        return 2;
    }
    madvise(memory, pages * PAGE, MADV_NOHUGEPAGE); /* swap is about 4 KiB pages */

    double began = seconds();
    for (uint64_t number = 0; number < pages; number++) compose(memory + number * PAGE, number);
    double filled = seconds();
    for (uint64_t number = 0; number < pages; number++) bad += wrong(memory + number * PAGE, number);
    double scanned = seconds();
    for (uint64_t read = 0; read < reads; read++) {
        uint64_t number = hash(read ^ 0x5eed) % pages;
        double before = seconds();
        *(volatile unsigned char *)(memory + number * PAGE);
        waited[read] = (seconds() - before) * 1e6;
        bad += wrong(memory + number * PAGE, number);
    }
    double ended = seconds();

    qsort(waited, reads, sizeof *waited, ascending);
    printf("{\"fill_mib_s\": %.2f, \"scan_mib_s\": %.2f, \"random_s\": %.1f, \"random_p50_us\": %.2f, \"random_p99_us\": %.2f, "
           "\"pages\": %lu, \"bad\": %lu}\n",
        pages * PAGE / MIB / (filled - began), pages * PAGE / MIB / (scanned - filled), reads / (ended - scanned),
        waited[reads / 2], waited[reads * 99 / 100], (unsigned long)pages, (unsigned long)bad);
    return bad != 0;
}
