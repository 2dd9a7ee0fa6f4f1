/* A filesystem that fails at the nth call that would change something below a folder.

Built by a test and loaded with LD_PRELOAD into every process of a command. The state is a file that all of them map, so
that calls are counted across processes:

    FAULT_STATE   the file, `struct state`
    FAULT_FOLDER  the folder; calls on files elsewhere are not counted

Covered are opening for writing, write, pwrite, writev, sendfile, copy_file_range, fsync, fdatasync,
ftruncate, fallocate, rename, renameat, renameat2, mkdir, link and symlink. Removing is left out: it works on a full
disk, and a program must be able to tidy up.
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

struct state {
    _Atomic int at;      /* the call that fails, counted from 1; 0: none */
    _Atomic int count;   /* calls so far */
    int error;           /* errno of the failure */
    int for_good;        /* calls that need space fail from there on, as on a full disk */
    _Atomic int failed;  /* failures so far */
    char name[100];      /* the function that failed first */
};

static struct state *state;
static char folder[PATH_MAX];

__attribute__((constructor)) static void begin(void) {
    const char *file = getenv("FAULT_STATE"), *below = getenv("FAULT_FOLDER");
    if (!file || !below || !realpath(below, folder)) return;
    int (*real_open)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    int fd = real_open(file, O_RDWR | O_CLOEXEC);
    if (fd < 0) return;
    void *map = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (map != MAP_FAILED) state = map;
}

static int below(const char *path) {
    size_t n = strlen(folder);
    return strncmp(path, folder, n) == 0 && (path[n] == '/' || path[n] == 0);
}

static int below_at(int dir, const char *path) {
    char full[2 * PATH_MAX], base[PATH_MAX];
    if (!state || !path) return 0;
    if (path[0] == '/') return below(path);
    if (dir == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return 0;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        ssize_t n = readlink(link, base, sizeof base - 1);
        if (n < 0) return 0;
        base[n] = 0;
    }
    snprintf(full, sizeof full, "%s/%s", base, path);
    return below(full);
}

static int below_fd(int fd) {
    char link[64], path[PATH_MAX];
    if (!state) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

/* Whether this call fails. `space`: it needs space, and so goes on failing on a full disk. */
static int fails(const char *name, int space) {
    int count = atomic_fetch_add(&state->count, 1) + 1, at = state->at;
    if (!at || count < at || (count > at && !(state->for_good && space))) return 0;
    if (count == at) snprintf(state->name, sizeof state->name, "%s", name);
    atomic_fetch_add(&state->failed, 1);
    errno = state->error;
    return 1;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        if (WRITES(flags) && below_at(AT_FDCWD, path) && fails(#name, 1)) return -1; \
        return real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int dir, const char *path, int flags, ...) { \
        REAL(name); \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        if (WRITES(flags) && below_at(dir, path) && fails(#name, 1)) return -1; \
        return real(dir, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(name); \
        if (strpbrk(mode, "wa+") && below_at(AT_FDCWD, path) && fails(#name, 1)) return NULL; \
        return real(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

#define ON_FD(type, name, parameters, arguments, fd) \
    type name parameters { REAL(name); if (below_fd(fd) && fails(#name, 1)) return -1; return real arguments; }
ON_FD(ssize_t, write, (int fd, const void *data, size_t n), (fd, data, n), fd)
ON_FD(ssize_t, pwrite, (int fd, const void *data, size_t n, off_t at), (fd, data, n, at), fd)
ON_FD(ssize_t, pwrite64, (int fd, const void *data, size_t n, off64_t at), (fd, data, n, at), fd)
ON_FD(ssize_t, writev, (int fd, const struct iovec *parts, int n), (fd, parts, n), fd)
ON_FD(ssize_t, sendfile, (int out, int in, off_t *at, size_t n), (out, in, at, n), out)
ON_FD(ssize_t, sendfile64, (int out, int in, off64_t *at, size_t n), (out, in, at, n), out)
ON_FD(ssize_t, copy_file_range, (int in, off64_t *from, int out, off64_t *to, size_t n, unsigned int flags),
      (in, from, out, to, n, flags), out)
ON_FD(int, fsync, (int fd), (fd), fd)
ON_FD(int, fdatasync, (int fd), (fd), fd)
ON_FD(int, ftruncate, (int fd, off_t n), (fd, n), fd)
ON_FD(int, ftruncate64, (int fd, off64_t n), (fd, n), fd)
ON_FD(int, posix_fallocate, (int fd, off_t at, off_t n), (fd, at, n), fd)

#define ON_PATH(name, parameters, arguments, dir, path, space) \
    int name parameters { REAL(name); if (below_at(dir, path) && fails(#name, space)) return -1; return real arguments; }
ON_PATH(mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path, 1)
ON_PATH(mkdirat, (int dir, const char *path, mode_t mode), (dir, path, mode), dir, path, 1)
ON_PATH(rename, (const char *from, const char *to), (from, to), AT_FDCWD, to, 0)
ON_PATH(renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), b, to, 0)
ON_PATH(renameat2, (int a, const char *from, int b, const char *to, unsigned int flags), (a, from, b, to, flags), b,
        to, 0)
ON_PATH(link, (const char *from, const char *to), (from, to), AT_FDCWD, to, 1)
ON_PATH(symlink, (const char *from, const char *to), (from, to), AT_FDCWD, to, 1)
