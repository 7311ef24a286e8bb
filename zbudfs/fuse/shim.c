// SPDX-License-Identifier: MIT
/* The shim: stands between pyfuse3 and libfuse and adds what neither gives a Python daemon in the swap path.

       pyfuse3  --fuse_session_new-->  shim  --same call-->  libfuse

   It is loaded RTLD_GLOBAL before pyfuse3 is imported, so that pyfuse3's calls find these definitions first; each one
   calls the real function, which is the next one in the loader's order (RTLD_NEXT).

   1. `fallocate`: pyfuse3 has no handler for it. The request goes to a callback, which answers it with fuse_reply_err().
      Whatever happens it is never answered with ENOSYS: the kernel would stop sending fallocate for the whole connection.
   2. No `write_buf`: with it libfuse asks for FUSE_CAP_SPLICE_READ and reads requests through a pipe, for which the kernel
      allocates a page per page of data. Under memory pressure that allocation waits for swap, which is this daemon.
   3. One receive buffer for the whole session. libfuse would allocate 1 MiB for each of pyfuse3's tasks. One is enough:
      pyfuse3 receives and processes a request without giving way in between, and its handlers copy what they keep.
   4. A bound on the requests that the kernel keeps in flight, so that the memory for them can be set aside in advance.
   5. Python's object arenas from malloc (PyObject_SetArenaAllocator wants C functions), whose heap the daemon pins.

   libfuse 3.14 (Debian 12) exports fuse_session_new; from 3.17 on (Debian 13) headers turn it into
   fuse_session_new_versioned. Both are defined here; pyfuse3 calls the one it was built for. */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 312
#include <dlfcn.h>
#include <errno.h>
#include <fuse_lowlevel.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#undef fuse_session_new

enum {
    MAX_WRITE = 1 << 20,
    RECEIVE_BYTES = MAX_WRITE + (64 << 10),
    MAX_ARENAS = 1024 /* of 1 MiB each in CPython 3.11 */
};

struct libfuse_version;
typedef void fallocate_callback(fuse_req_t, fuse_ino_t, int mode, int64_t offset, int64_t length);

static struct fuse_lowlevel_ops shim_ops;
static void (*pyfuse3_init)(void *, struct fuse_conn_info *);
static fallocate_callback *on_fallocate;
static unsigned max_background = 12;
static int initialised;
static void *arenas[MAX_ARENAS];
static char receive_buffer[RECEIVE_BYTES] __attribute__((aligned(4096)));

static void *next(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) abort(); /* libfuse is linked to this object: it cannot be missing */
    return found;
}

/* ---- what Python sets ---------------------------------------------------------------------------------------- */

void zbudfs_set_fallocate(fallocate_callback *callback) { on_fallocate = callback; }
void zbudfs_set_max_background(unsigned requests) { max_background = requests; }
void zbudfs_reply(fuse_req_t req, int error) { fuse_reply_err(req, error); }
const char *zbudfs_libfuse_version(void) { return fuse_pkgversion(); }

/* ---- Python's object arenas ---------------------------------------------------------------------------------- */

void *zbudfs_arena_alloc(void *context, size_t size) {
    (void)context;
    for (int i = 0; i < MAX_ARENAS; i++)
        if (!arenas[i]) return arenas[i] = malloc(size);
    return NULL; /* Python raises MemoryError */
}

void zbudfs_arena_free(void *context, void *arena, size_t size) {
    (void)context;
    for (int i = 0; i < MAX_ARENAS; i++)
        if (arenas[i] == arena) {
            arenas[i] = NULL;
            free(arena);
            return;
        }
    munmap(arena, size); /* from before this allocator was set: Python's own came from mmap() */
}

/* ---- operations ---------------------------------------------------------------------------------------------- */

static void shim_init(void *userdata, struct fuse_conn_info *conn) {
    if (pyfuse3_init) pyfuse3_init(userdata, conn);
    if (conn->max_write > MAX_WRITE) conn->max_write = MAX_WRITE; /* libfuse reads at most max_write and a 4 KiB header */
    conn->max_background = max_background;
    conn->congestion_threshold = max_background;
    initialised = 1;
}

static void shim_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t offset, off_t length, struct fuse_file_info *file) {
    (void)file;
    if (on_fallocate) on_fallocate(req, ino, mode, offset, length);
    else fuse_reply_err(req, EOPNOTSUPP);
}

static const struct fuse_lowlevel_ops *amended(const struct fuse_lowlevel_ops *ops, size_t size) {
    memset(&shim_ops, 0, sizeof shim_ops);
    memcpy(&shim_ops, ops, size < sizeof shim_ops ? size : sizeof shim_ops);
    pyfuse3_init = shim_ops.init;
    shim_ops.init = shim_init;
    shim_ops.fallocate = shim_fallocate;
    shim_ops.write_buf = NULL;
    return &shim_ops;
}

/* ---- the calls taken over ------------------------------------------------------------------------------------ */

struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *ops, size_t size, void *userdata) {
    struct fuse_session *(*real)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *) = next("fuse_session_new");
    return real(args, amended(ops, size), sizeof shim_ops, userdata);
}

struct fuse_session *fuse_session_new_versioned(struct fuse_args *args, const struct fuse_lowlevel_ops *ops, size_t size,
                                                struct libfuse_version *version, void *userdata) {
    struct fuse_session *(*real)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, struct libfuse_version *, void *) =
        next("fuse_session_new_versioned");
    return real(args, amended(ops, size), sizeof shim_ops, version, userdata);
}

int fuse_session_receive_buf(struct fuse_session *session, struct fuse_buf *buf) {
    static int (*real)(struct fuse_session *, struct fuse_buf *);
    if (!real) real = next("fuse_session_receive_buf");
    /* Before FUSE_INIT libfuse may read more than MAX_WRITE: that one buffer it allocates itself. */
    if (initialised) buf->mem = receive_buffer;
    int got = real(session, buf);
    if (got <= 0 && buf->mem == receive_buffer) buf->mem = NULL; /* pyfuse3 frees what it finds there */
    return got == -EAGAIN ? -EINTR : got; /* the request was withdrawn before it was read: pyfuse3 knows only EINTR */
}

void fuse_session_process_buf(struct fuse_session *session, const struct fuse_buf *buf) {
    static void (*real)(struct fuse_session *, const struct fuse_buf *);
    if (!real) real = next("fuse_session_process_buf");
    real(session, buf);
    if (buf->mem != receive_buffer) free(buf->mem);
    ((struct fuse_buf *)buf)->mem = NULL;
}
