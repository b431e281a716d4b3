// Two kernels to compare places with: `kernel cpu CORE` and `kernel memory CORE` print the nanoseconds of one run.
// `kernel serve` reads such lines and runs each in a process of its own, forked from this one.
#define _GNU_SOURCE
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define STEPS 40000000
#define WORDS (8u << 20) // 64 MiB, more than a last-level cache's share
#define PASSES 8

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ull + time.tv_nsec;
}

// A chain of multiplications, each of which needs the last one's result: the core's clock and nothing else.
static uint64_t compute(long steps) {
    uint64_t value = 1;
    for (long step = 0; step < steps; step++) value = value * 6364136223846793005u + 1442695040888963407u;
    return value;
}

// Passes over an array: what comes from memory, and how fast.
static uint64_t stream(uint64_t *words, int passes) {
    uint64_t sum = 0;
    for (int pass = 0; pass < passes; pass++)
        for (size_t at = 0; at < WORDS; at++) sum += words[at] += pass;
    return sum;
}

static int run(const char *kernel, int core) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(core, &one);
    if (sched_setaffinity(0, sizeof one, &one)) return perror("sched_setaffinity"), 1;
    volatile uint64_t result;
    uint64_t start, end;
    if (strcmp(kernel, "cpu") == 0) {
        result = compute(STEPS / 4); // the core's clock has settled
        start = now(), result = compute(STEPS), end = now();
    } else {
        uint64_t *words = malloc(WORDS * sizeof *words);
        if (!words) return perror("malloc"), 1;
        memset(words, 1, WORDS * sizeof *words);
        result = stream(words, 1);
        start = now(), result = stream(words, PASSES), end = now();
    }
    (void)result;
    printf("%llu\n", (unsigned long long)(end - start));
    return fflush(stdout);
}

int main(int count, char **words) {
    char kernel[16];
    int core;
    if (count == 3) return run(words[1], atoi(words[2]));
    while (scanf("%15s %d", kernel, &core) == 2) {
        pid_t child = fork();
        if (child == 0) _exit(run(kernel, core));
        waitpid(child, NULL, 0);
    }
    return 0;
}
