// SPDX-License-Identifier: MIT
/* The histograms of core/latency.py, for the C code that enters durations. */
#ifndef ZBUDFS_LATENCY_H
#define ZBUDFS_LATENCY_H

#include <time.h>

/* A row: the counts of the buckets, then the sum and the longest duration, in nanoseconds. */
enum {
    BUCKETS = 32,
    SUM_NS = BUCKETS,
    MAX_NS,
    ROW_WORDS,
};

static inline long long now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

/* Enter a duration in a row, as `Latencies.record` does. */
static inline void record(unsigned long long *row, unsigned long long ns) {
    unsigned long long us = ns / 1000;
    unsigned bucket = us ? 64u - (unsigned)__builtin_clzll(us) : 0;
    row[bucket < BUCKETS ? bucket : BUCKETS - 1]++;
    row[SUM_NS] += ns;
    if (ns > row[MAX_NS]) row[MAX_NS] = ns;
}

#endif
