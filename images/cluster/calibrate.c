// How fast this machine is, for a comparison with its fellows. Two kernels, each bound by one latency, so that what else runs
// on the machine disturbs them little:
//
//   cpu     a chain of multiplications and additions, integer and floating, each waiting for the one before
//   memory  a walk over a random cycle through a buffer that no core's own cache holds, each line's address in the line before
//
// A figure is the least of many short repetitions, in nanoseconds of CPU time for one step: what others took of the CPU
// meanwhile is not in it. That is a figure of its own: the share of one CPU that the program got. It prints JSON.
//
// usage: calibrate             which machine this is, and its figures
//        calibrate identity    which machine this is: equal identities have comparable figures
#define _GNU_SOURCE
#include <err.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define REPETITIONS 30
#define CPU_STEPS 2000000  // about 4 ms
#define MEMORY_STEPS 50000 // about 6 ms
#define LINE 64
#define LINES (1 << 19) // 32 MiB

static volatile uint64_t sink; // what the compiler must not leave out ends here

static uint64_t ns(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static void cpu(void) {
    uint64_t integer = sink | 1;
    double floating = 1;
    for (int step = 0; step < CPU_STEPS; step++) {
        integer = integer * 6364136223846793005ull + 1442695040888963407ull; // Knuth's MMIX generator
        floating = floating * 0.999999 + (double)(integer >> 63);
    }
    sink = integer + (uint64_t)floating;
}

static uint32_t (*lines)[LINE / sizeof(uint32_t)]; // the first word of a line is the number of the next

static void make_cycle(void) {
    lines = mmap(NULL, (size_t)LINES * LINE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (lines == MAP_FAILED) err(1, "no memory");
    madvise(lines, (size_t)LINES * LINE, MADV_NOHUGEPAGE); // whether there are huge pages is chance
    for (uint32_t line = 0; line < LINES; line++) lines[line][0] = line;
    uint64_t random = 1;
    for (uint32_t line = LINES - 1; line > 0; line--) { // Sattolo's algorithm: one cycle through all
        random = random * 6364136223846793005ull + 1442695040888963407ull;
        uint32_t other = (random >> 33) % line, next = lines[line][0];
        lines[line][0] = lines[other][0];
        lines[other][0] = next;
    }
}

static void memory(void) {
    static uint32_t at;
    for (int step = 0; step < MEMORY_STEPS; step++) at = lines[at][0];
    sink += at;
}

static int order(const void *one, const void *other) {
    uint64_t a = *(const uint64_t *)one, b = *(const uint64_t *)other;
    return (a > b) - (a < b);
}

static void print_line(const char *name, const char *path, const char *key) {
    char line[512];
    FILE *file = fopen(path, "re");
    printf("\"%s\": \"", name);
    while (file && fgets(line, sizeof line, file)) {
        if (strncmp(line, key, strlen(key))) continue;
        char *value = *key ? strchr(line, ':') : line;
        for (value += *key && value ? strspn(value, ": \t") : 0; value && *value >= ' '; value++)
            if (*value != '"' && *value != '\\') putchar(*value);
        break;
    }
    if (file) fclose(file);
    printf("\"");
}

static void print_identity(void) {
    printf("\"program\": \"%s\", ", PROGRAM); // the hash of this source: other kernels, other figures
    print_line("boot", "/proc/sys/kernel/random/boot_id", "");
    printf(", ");
    print_line("model", "/proc/cpuinfo", "model name");
}

int main(int count, char **arguments) {
    static uint64_t times[2][REPETITIONS];
    if (count > 1) {
        if (strcmp(arguments[1], "identity")) errx(2, "usage: calibrate [identity]");
        printf("{");
        print_identity();
        printf("}\n");
        return 0;
    }
    make_cycle();
    uint64_t wall = ns(CLOCK_MONOTONIC), used = ns(CLOCK_THREAD_CPUTIME_ID);
    for (int repetition = 0; repetition < REPETITIONS; repetition++) {
        uint64_t start = ns(CLOCK_THREAD_CPUTIME_ID);
        cpu();
        uint64_t middle = ns(CLOCK_THREAD_CPUTIME_ID);
        memory();
        times[0][repetition] = middle - start;
        times[1][repetition] = ns(CLOCK_THREAD_CPUTIME_ID) - middle;
    }
    used = ns(CLOCK_THREAD_CPUTIME_ID) - used;
    wall = ns(CLOCK_MONOTONIC) - wall;
    for (int kernel = 0; kernel < 2; kernel++) qsort(times[kernel], REPETITIONS, sizeof times[kernel][0], order);
    printf("{");
    print_identity();
    printf(", \"cpu_ns\": %.4f, \"cpu_median_ns\": %.4f, \"memory_ns\": %.3f, \"memory_median_ns\": %.3f, \"share\": %.3f}\n",
           times[0][0] / (double)CPU_STEPS, times[0][REPETITIONS / 2] / (double)CPU_STEPS, times[1][0] / (double)MEMORY_STEPS,
           times[1][REPETITIONS / 2] / (double)MEMORY_STEPS, used / (double)wall);
    return 0;
}
