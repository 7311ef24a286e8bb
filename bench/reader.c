/* SPDX-License-Identifier: MIT */
/* Reads random pages of a file, one at a time, as a loop device does: with asynchronous direct I/O, which FUSE queues as
   background requests. The reader runs in real time, so that the load of the machine does not affect the measurement.

     reader FILE SIZE_BYTES SECONDS CPU     prints the times in microseconds and their number, as JSON */

#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, MOST = 1 << 22 };

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static int compare(const void *left, const void *right) {
    uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;
    return a < b ? -1 : a > b;
}

static int fail(const char *what) {
    perror(what);
    return 1;
}

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    uint64_t nr_pages = strtoull(argv[2], NULL, 10) / PAGE;
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET(atoi(argv[4]), &cpus);
    if (sched_setaffinity(0, sizeof cpus, &cpus)) return fail("sched_setaffinity");
    struct sched_param priority = {.sched_priority = 1};
    int in_real_time = !sched_setscheduler(0, SCHED_RR, &priority);
    int fd = open(argv[1], O_RDONLY | O_DIRECT);
    if (fd < 0) return fail(argv[1]);
    void *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    uint32_t *took = mmap(NULL, MOST * sizeof *took, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    aio_context_t context = 0;
    if (page == MAP_FAILED || took == MAP_FAILED || syscall(SYS_io_setup, 1, &context)) return fail("io_setup");
    uint64_t random = 88172645463325252u, end = now_ns() + (uint64_t)(atof(argv[3]) * 1e9);
    size_t reads = 0;
    while (reads < MOST && now_ns() < end) {
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        struct iocb block = {
            .aio_lio_opcode = IOCB_CMD_PREAD,
            .aio_fildes = (uint32_t)fd,
            .aio_buf = (uintptr_t)page,
            .aio_nbytes = PAGE,
            .aio_offset = (int64_t)(random % nr_pages * PAGE),
        };
        struct iocb *blocks[] = {&block};
        struct io_event event;
        uint64_t began = now_ns();
        if (syscall(SYS_io_submit, context, 1, blocks) != 1) return fail("io_submit");
        if (syscall(SYS_io_getevents, context, 1, 1, &event, NULL) != 1) return fail("io_getevents");
        if (event.res != PAGE) return fprintf(stderr, "read: %lld\n", (long long)event.res), 1;
        took[reads++] = (uint32_t)(now_ns() - began);
    }
    if (!reads) return 1;
    qsort(took, reads, sizeof *took, compare);
    printf("{\"p50_us\": %.3f, \"p99_us\": %.3f, \"max_us\": %.3f, \"reads\": %zu, \"in_real_time\": %d}\n",
        took[reads / 2] / 1e3, took[reads * 99 / 100] / 1e3, took[reads - 1] / 1e3, reads, in_real_time);
    return 0;
}
