// SPDX-License-Identifier: MIT
/* The shim: stands between pyfuse3 and libfuse and adds what neither gives a Python daemon in the swap path.

       pyfuse3  --fuse_session_new-->  shim  --same call-->  libfuse

   It is loaded RTLD_GLOBAL before pyfuse3 is imported, so that pyfuse3's calls find these definitions first; each one
   calls the real function, which is the next one in the loader's order (RTLD_NEXT). The same object is the Python
   module zbudfs.fuse._shim, through which it is told what to do.

   1. One served file. Its reads, writes, fallocates and fsyncs go straight to four Python functions, which mostly answer
      at once: no coroutine, no copy of what is written (pyfuse3 makes both), and fallocate, which pyfuse3 has not.
      Everything else (names, attributes, stats/) is pyfuse3's, and never has to wait for anything.
   2. Bursts. pyfuse3 sleeps in trio before every request: two rounds of the scheduler and three system calls. After a
      request for the served file, those that are already waiting are taken at once; and if nothing else is to be done,
      the next one is waited for right here, together with everything that trio waits for, for a millisecond, the first part
      of it awake. All within bounds of number and time; then trio runs. Before it waits, pages are made ready that may be
      asked for next.
   3. No `write_buf`: with it libfuse asks for FUSE_CAP_SPLICE_READ and reads requests through a pipe, for which the
      kernel allocates a page per page of data. Under memory pressure that allocation waits for swap: this daemon.
   4. Buffers that are given. libfuse would allocate 1 MiB for each request; here each is received into one of a few slots of
      memory that Python has set aside. A write that is answered later stays where it is until then, without a copy.
   5. Reads first. Whoever reads a page waits for it, and who writes one does not: so all that has come is received before
      the next write is processed, and reads among it are answered at once; a large write stops every few pages for those that
      have come since (serve_reads). A write waits for 64 requests or 5 ms at most.
      Nobody can tell: both were in flight at the same time. Writes, discards and syncs keep their order.
   6. A bound on the requests that the kernel keeps in flight, so that the memory for them can be set aside in advance.
   7. Python's object arenas from malloc, whose heap the daemon pins, instead of from mmap().

   8. Resuming. The kernel's first request, FUSE_INIT, is kept; a later process with the same descriptor replays it to its
      own libfuse, which then knows what was agreed on (its reply goes nowhere: the kernel says ENOENT, libfuse ignores it).

   9. Time. Each request for the served file is entered in a histogram when it is answered, at once or later, in memory that
      is given (core/latency.py has the layout): two looks at the clock. What Python knows a request by is a `struct work`.

   10. The number of the request that opens the served file. It stays the same when the kernel sends the request again, so that the
      open file is counted once.

   Whatever happens, fallocate is never answered with ENOSYS: the kernel would not ask again on this connection.

   libfuse 3.14 (Debian 12) exports fuse_session_new; from 3.17 on (Debian 13) headers turn it into
   fuse_session_new_versioned. Both are defined here; pyfuse3 calls the one it was built for. All of this runs on the one
   thread that runs trio, with the GIL held. */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#define FUSE_USE_VERSION 312
#include <Python.h>
#include <dlfcn.h>
#include <errno.h>
#include <fuse_lowlevel.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#undef fuse_session_new

enum {
    MAX_WRITE = 1 << 20,
    RECEIVE_BYTES = MAX_WRITE + (64 << 10),
    MAX_INIT = 1016, /* as much as the board has room for (store/board.py) */
    OPCODE_OPEN = 14,
    OPCODE_READ = 15,
    OPCODE_WRITE = 16,
    OPCODE_FSYNC = 20,
    OPCODE_INIT = 26,
    OPCODE_FALLOCATE = 43,
    MAX_SLOTS = 64,
    LINGER_NS = 1000000,
    MAX_CREDIT = 16,
    CROWDED_NS = 100000,
    LEAST_PATIENCE = 16, /* requests that come soon */
    MOST_PATIENCE = 4096,
    MAX_BURST_NS = 5000000,
    MAX_ARENAS = 1024, /* of 1 MiB each in CPython 3.11 */
    WORKS = 256,       /* requests in work for which no memory is needed: far more than the kernel keeps in flight */
    BUCKETS = 32,
    SUM_NS = BUCKETS,
    MAX_NS,
    ROW_WORDS,
    ROWS = 6,
    SERVED = ROWS * ROW_WORDS,
    WAKEUPS,
    MOST_IN_WORK,
    METRIC_WORDS,
};
enum { READ, WRITE, FALLOCATE, FSYNC, NR_HANDLERS };
enum { MAX_ARGUMENTS = 4 };

struct libfuse_version;

/* How each request begins. */
struct header {
    uint32_t length, opcode;
    uint64_t unique, inode;
};

/* A request for the served file that is not answered yet. */
struct work {
    fuse_req_t req; /* the next free one, while it is free */
    long long since_ns;
    int which;
    PyObject *view; /* of what is to be written, if it was to be answered later, and where that is */
    char *buffer;
};

/* A request, most likely a write, that has been received and is still to be processed. */
struct arrival {
    struct fuse_buf buf;
    long long since_ns;
};

static struct fuse_lowlevel_ops pyfuse3_ops, shim_ops;
static fuse_ino_t served_inode;
static PyObject *handlers[NR_HANDLERS];
static unsigned max_background = 12, max_burst = 1, max_spin_ns;
static PyObject *make_ready; /* called when nothing is to be done; whether it did something */
static PyObject *reap; /* called when the kernel has completed reads of the backing file (store/aio.c) */
static int completions_fd = -1; /* readable then */
static const volatile uint32_t *completions; /* head and tail of the ring: they differ then; NULL: only the descriptor tells */
static PyObject *runnable; /* a container: empty if nobody but the kernel wants anything of this thread */
static int event_loop_fd = -1;
static unsigned long long own_metrics[METRIC_WORDS], *metrics = own_metrics;
static Py_buffer metrics_buffer;
static struct work works[WORKS], *free_works;
static unsigned in_work;
static long long received_ns; /* when the request that is being processed was received */
static int initialised;       /* FUSE_INIT has been answered */
static int answered_by_shim;  /* the request just processed was for the served file: pyfuse3 has no coroutine to await */
static struct fuse_session *the_session;
static char init_request[MAX_INIT];
static size_t init_length;
static uint64_t open_unique; /* the number of the last request to open the served file */
static void *arenas[MAX_ARENAS];
static Py_buffer slots_buffer;
static char *free_slots[MAX_SLOTS], *in_process; /* the buffer of the request that is being processed */
static unsigned nr_slots, nr_free_slots;
static size_t slot_bytes;
static struct arrival arrivals[MAX_SLOTS]; /* a ring */
static unsigned first_arrival, nr_arrivals;
static int in_burst; /* and no coroutine is left to pyfuse3 yet, nor anything in the ring that may leave one: more may be received */

static void *next(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) abort(); /* libfuse is linked to this object: it cannot be missing */
    return found;
}

static long long now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

/* ---- buffers ------------------------------------------------------------------------------------------------- */

static int is_slot(const char *buffer) {
    return nr_slots && buffer >= (char *)slots_buffer.buf && buffer < (char *)slots_buffer.buf + nr_slots * slot_bytes;
}

/* A buffer is needed no more. */
static void give_buffer(char *buffer) {
    if (is_slot(buffer)) free_slots[nr_free_slots++] = buffer;
    else free(buffer);
}

/* The views of a buffer that were given out are of something else soon: whoever kept one must not see that. */
static void let_go(PyObject *view) {
    PyObject *released = PyObject_CallMethod(view, "release", NULL);
    if (!released) PyErr_WriteUnraisable(view);
    Py_XDECREF(released);
    Py_DECREF(view);
}

/* ---- requests in work ---------------------------------------------------------------------------------------- */

static struct work *begin(int which, fuse_req_t req) {
    struct work *work = free_works; /* the next one stands in its place */
    if (work) free_works = (struct work *)work->req;
    else if (!(work = malloc(sizeof *work))) return NULL;
    *work = (struct work){.req = req, .since_ns = received_ns, .which = which};
    metrics[SERVED]++;
    if (++in_work > metrics[MOST_IN_WORK]) metrics[MOST_IN_WORK] = in_work;
    return work;
}

/* It is answered. */
static void finish(struct work *work) {
    unsigned long long ns = (unsigned long long)(now_ns() - work->since_ns), us = ns / 1000, *row = metrics + work->which * ROW_WORDS;
    unsigned bucket = us ? 64u - (unsigned)__builtin_clzll(us) : 0;
    row[bucket < BUCKETS ? bucket : BUCKETS - 1]++;
    row[SUM_NS] += ns;
    if (ns > row[MAX_NS]) row[MAX_NS] = ns;
    in_work--;
    if (work->view) let_go(work->view);
    if (work->buffer) give_buffer(work->buffer);
    if (work < works || work >= works + WORKS) {
        free(work);
    } else {
        work->req = (fuse_req_t)free_works;
        free_works = work;
    }
}

/* ---- the served file ----------------------------------------------------------------------------------------- */

/* Call a handler with the request and `rest`, taking over the references in there. A handler gives bytes to be sent, an int (0 or
   an errno), or None when it will answer later; what it raises is a bug, told to sys.unraisablehook and answered with EIO.
   Returns what is to be answered later. */
static struct work *handle(int which, fuse_req_t req, size_t size, PyObject **rest, size_t count) {
    answered_by_shim = 1;
    struct work *work = begin(which, req);
    PyObject *result = NULL, *arguments[MAX_ARGUMENTS] = {work ? PyLong_FromVoidPtr(work) : NULL};
    int complete = handlers[which] != NULL && arguments[0];
    for (size_t i = 0; i < count; i++) {
        arguments[i + 1] = rest[i];
        complete = complete && rest[i];
    }
    if (complete) result = PyObject_Vectorcall(handlers[which], arguments, count + 1, NULL);
    for (size_t i = 0; i <= count; i++) Py_XDECREF(arguments[i]);
    int later = result == Py_None;
    if (!result) {
        if (PyErr_Occurred()) PyErr_WriteUnraisable(handlers[which]);
        fuse_reply_err(req, EIO);
    } else if (PyBytes_CheckExact(result)) {
        fuse_reply_buf(req, PyBytes_AS_STRING(result), PyBytes_GET_SIZE(result));
    } else if (PyLong_CheckExact(result)) {
        long error = PyLong_AsLong(result);
        if (error) fuse_reply_err(req, (int)error);
        else if (which == WRITE) fuse_reply_write(req, size);
        else fuse_reply_err(req, 0);
    }
    Py_XDECREF(result);
    if (!work || later) return work;
    finish(work);
    return NULL;
}

static void shim_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset, struct fuse_file_info *file) {
    if (ino != served_inode) {
        pyfuse3_ops.read(req, ino, size, offset, file);
        return;
    }
    PyObject *rest[] = {PyLong_FromLongLong(offset), PyLong_FromSize_t(size)};
    handle(READ, req, size, rest, 2);
}

static void shim_write(fuse_req_t req, fuse_ino_t ino, const char *data, size_t size, off_t offset, struct fuse_file_info *file) {
    if (ino != served_inode) {
        pyfuse3_ops.write(req, ino, data, size, offset, file);
        return;
    }
    PyObject *view = PyMemoryView_FromMemory((char *)data, (Py_ssize_t)size, PyBUF_READ);
    PyObject *rest[] = {PyLong_FromLongLong(offset), view};
    Py_XINCREF(view);
    struct work *later = handle(WRITE, req, size, rest, 2);
    if (later) { /* it is all in the buffer until it is answered */
        later->view = view;
        later->buffer = in_process;
        in_process = NULL;
    } else if (view) {
        let_go(view);
    }
}

static void shim_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t offset, off_t length, struct fuse_file_info *file) {
    (void)file;
    if (ino != served_inode) {
        answered_by_shim = 1;
        fuse_reply_err(req, EOPNOTSUPP);
        return;
    }
    PyObject *rest[] = {PyLong_FromLong(mode), PyLong_FromLongLong(offset), PyLong_FromLongLong(length)};
    handle(FALLOCATE, req, 0, rest, 3);
}

static void shim_fsync(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *file) {
    if (ino != served_inode) {
        pyfuse3_ops.fsync(req, ino, datasync, file);
        return;
    }
    handle(FSYNC, req, 0, NULL, 0);
}

static void shim_init(void *userdata, struct fuse_conn_info *conn) {
    if (pyfuse3_ops.init) pyfuse3_ops.init(userdata, conn);
    if (conn->max_write > MAX_WRITE) conn->max_write = MAX_WRITE; /* libfuse reads at most max_write and a 4 KiB header */
    conn->max_background = max_background;
    conn->congestion_threshold = max_background;
    initialised = 1;
}

/* ---- the calls taken over ------------------------------------------------------------------------------------ */

static const struct fuse_lowlevel_ops *amended(const struct fuse_lowlevel_ops *ops, size_t size) {
    memset(&pyfuse3_ops, 0, sizeof pyfuse3_ops);
    memcpy(&pyfuse3_ops, ops, size < sizeof pyfuse3_ops ? size : sizeof pyfuse3_ops);
    shim_ops = pyfuse3_ops;
    shim_ops.init = shim_init;
    shim_ops.read = shim_read;
    shim_ops.write = shim_write;
    shim_ops.fallocate = shim_fallocate;
    shim_ops.fsync = shim_fsync;
    shim_ops.write_buf = NULL;
    initialised = 0;
    return &shim_ops;
}

struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *ops, size_t size, void *userdata) {
    struct fuse_session *(*real)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *) = next("fuse_session_new");
    return the_session = real(args, amended(ops, size), sizeof shim_ops, userdata);
}

struct fuse_session *fuse_session_new_versioned(struct fuse_args *args, const struct fuse_lowlevel_ops *ops, size_t size,
                                                struct libfuse_version *version, void *userdata) {
    struct fuse_session *(*real)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, struct libfuse_version *, void *) =
        next("fuse_session_new_versioned");
    return the_session = real(args, amended(ops, size), sizeof shim_ops, version, userdata);
}

static int receive(struct fuse_session *session, struct fuse_buf *buf) {
    static int (*real)(struct fuse_session *, struct fuse_buf *);
    if (!real) real = next("fuse_session_receive_buf");
    /* Before FUSE_INIT libfuse may read more than MAX_WRITE: that one buffer it allocates itself. */
    char *slot = initialised && nr_free_slots ? free_slots[--nr_free_slots] : NULL;
    buf->mem = slot;
    int got = real(session, buf);
    if (!initialised && got > 8 && got <= MAX_INIT && ((unsigned *)buf->mem)[1] == OPCODE_INIT)
        memcpy(init_request, buf->mem, init_length = (size_t)got);
    if (got <= 0 && slot) {
        give_buffer(slot);
        buf->mem = NULL; /* pyfuse3 frees what it finds there */
    }
    return got;
}

/* Process a request that was received at that time, and be done with its buffer, unless that is kept until it is answered. */
static void process(struct fuse_session *session, struct fuse_buf *buf, long long since_ns) {
    static void (*real)(struct fuse_session *, const struct fuse_buf *);
    if (!real) real = next("fuse_session_process_buf");
    char *outer = in_process; /* of a write, if this is a read within it */
    answered_by_shim = 0;
    received_ns = since_ns;
    in_process = buf->mem;
    const struct header *header = buf->mem;
    if (buf->size >= sizeof *header && header->opcode == OPCODE_OPEN && header->inode == served_inode) open_unique = header->unique;
    real(session, buf);
    if (in_process) give_buffer(in_process);
    buf->mem = NULL;
    in_process = outer;
}

int fuse_session_receive_buf(struct fuse_session *session, struct fuse_buf *buf) {
    int got = receive(session, buf);
    return got == -EAGAIN ? -EINTR : got; /* nothing there any more (a burst took it): pyfuse3 knows only EINTR */
}

/* Make one more page ready that may be asked for next. 1 if that was done, and a request may have come meanwhile. */
static int prepare(void) {
    PyObject *result = make_ready ? PyObject_CallNoArgs(make_ready) : Py_NewRef(Py_False);
    int made = result ? PyObject_IsTrue(result) : -1;
    Py_XDECREF(result);
    if (made < 0) PyErr_WriteUnraisable(make_ready);
    return made > 0;
}

/* Finish the reads of the backing file that the kernel has completed. */
static void finish_reads(void) {
    PyObject *result = PyObject_CallNoArgs(reap);
    if (!result) PyErr_WriteUnraisable(reap);
    Py_XDECREF(result);
}

/* Wait for one of them awake, for so long at most. What poll() says.
   The CPU is offered to others at each turn: if the program is on this one, the kernel leaves the end of its request to ksoftirqd
   here, and who waits for the page that was just read would wait for that. Who keeps it for longer than that takes is a program
   with work to do: then *crowded, and it is better to sleep, since who is woken is let in at once, and who was running is not. */
static int spin(struct pollfd *fds, nfds_t nr_fds, long long began, int *crowded) {
    const struct timespec none = {0};
    int ready;
    for (long long now = began, before = began; now - began < max_spin_ns; before = now) {
        if ((ready = ppoll(fds, nr_fds, &none, NULL))) return ready;
        sched_yield();
        now = now_ns();
        if ((*crowded = now - before > CROWDED_NS)) return 0;
    }
    return 0;
}

/* Wait a moment for the next request. 0 if something else happened, or is to be done, or nothing came.
   Waking a sleeping core costs more than serving a page. So the first part of the moment is spent awake, as long as that
   pays: each request that comes within it earns credit, each that does not costs twice as much. Whoever wanted the CPU ends that for
   some requests, for twice as many if that happens again before as many have come. Never while it has real-time priority, which
   gives nothing away. */
static int linger(struct fuse_session *session) {
    if (event_loop_fd < 0 || !runnable) return 0;
    Py_ssize_t waiting = PyObject_Size(runnable);
    if (waiting < 0) PyErr_WriteUnraisable(runnable);
    if (waiting) return 0;
    if (prepare()) return 1;
    struct pollfd fds[] = {
        {.fd = fuse_session_fd(session), .events = POLLIN},
        {.fd = event_loop_fd, .events = POLLIN},
        {.fd = completions_fd, .events = POLLIN},
    };
    nfds_t nr_fds = completions_fd >= 0 ? 3 : 2;
    static int credit, patience = LEAST_PATIENCE;
    const struct timespec moment = {.tv_nsec = LINGER_NS};
    int ready = 0, crowded = 0;
    Py_BEGIN_ALLOW_THREADS
    long long began = now_ns();
    if (credit > 0 && max_spin_ns && sched_getscheduler(0) == SCHED_OTHER) ready = spin(fds, nr_fds, began, &crowded);
    if (ready && patience > LEAST_PATIENCE) patience--;
    if (!ready) ready = ppoll(fds, nr_fds, &moment, NULL);
    if (crowded) {
        credit = -patience;
        patience = patience < MOST_PATIENCE ? 2 * patience : MOST_PATIENCE;
    } else if (ready > 0 && now_ns() - began < max_spin_ns) credit += credit < MAX_CREDIT;
    else if (credit > 0) credit = credit > 2 ? credit - 2 : 0;
    Py_END_ALLOW_THREADS
    if (ready > 0 && fds[2].revents == POLLIN && nr_fds == 3) { /* the event loop has seen it as well, and has nothing to do then */
        finish_reads();
        return 1;
    }
    return ready > 0 && fds[0].revents == POLLIN;
}

/* What of the served file is asked for, 0 if it is about anything else. */
static unsigned wanted(const struct fuse_buf *buf) {
    const struct header *header = buf->mem;
    return is_slot(buf->mem) && buf->size >= sizeof *header && header->inode == served_inode ? header->opcode : 0;
}

/* Whether this waits until the reads that have come as well are answered. Never for something that leaves pyfuse3 a coroutine. */
static int gives_way(const struct fuse_buf *buf) {
    unsigned opcode = wanted(buf);
    return opcode == OPCODE_WRITE || opcode == OPCODE_FSYNC || opcode == OPCODE_FALLOCATE;
}

static void put_off(const struct fuse_buf *buf, long long since_ns) {
    arrivals[(first_arrival + nr_arrivals++) % MAX_SLOTS] = (struct arrival){*buf, since_ns};
}

/* Within a write: answer the reads that have come meanwhile. What else has come is put off, all of it in slots. */
static unsigned serve_reads(void) {
    unsigned served = 0;
    while (in_burst && nr_free_slots && served < max_burst) {
        struct fuse_buf buf = {.mem = NULL};
        if (receive(the_session, &buf) <= 0) break;
        long long since_ns = now_ns();
        if (wanted(&buf) == OPCODE_READ) {
            process(the_session, &buf, since_ns);
            served++;
        } else {
            put_off(&buf, since_ns);
            in_burst = gives_way(&buf);
        }
    }
    return served;
}

/* Process a request that has come, and those that are there already or come soon. None is left when this returns. */
void fuse_session_process_buf(struct fuse_session *session, const struct fuse_buf *first) {
    struct fuse_buf buf = *first;
    long long since_ns = now_ns(), end = since_ns + MAX_BURST_NS;
    int got = 1, more = 1;
    ((struct fuse_buf *)first)->mem = NULL; /* pyfuse3 frees what it finds there */
    metrics[WAKEUPS]++;
    in_burst = 1;
    for (unsigned received = 1;;) {
        if (completions && completions[0] != completions[1]) finish_reads();
        if (got > 0 && gives_way(&buf)) {
            put_off(&buf, since_ns);
        } else if (got > 0) {
            process(session, &buf, since_ns);
            in_burst &= answered_by_shim;
        } else if (nr_arrivals) {
            struct arrival arrival = arrivals[first_arrival++ % MAX_SLOTS];
            nr_arrivals--;
            process(session, &arrival.buf, arrival.since_ns);
        } else if (got != -EAGAIN || !more || !linger(session)) {
            break; /* nothing, or an error that the session loop will see again */
        }
        more = in_burst && received < max_burst && now_ns() < end && !fuse_session_exited(session);
        got = -EAGAIN;
        if (!more || (nr_arrivals && !nr_free_slots)) continue;
        buf = (struct fuse_buf){.mem = NULL};
        got = receive(session, &buf);
        since_ns = now_ns();
        received += got > 0;
    }
    in_burst = 0;
}

/* ---- Python's object arenas ---------------------------------------------------------------------------------- */

static void *arena_alloc(void *context, size_t size) {
    (void)context;
    for (int i = 0; i < MAX_ARENAS; i++)
        if (!arenas[i]) return arenas[i] = malloc(size);
    return NULL; /* Python raises MemoryError */
}

static void arena_free(void *context, void *arena, size_t size) {
    (void)context;
    for (int i = 0; i < MAX_ARENAS; i++)
        if (arenas[i] == arena) {
            arenas[i] = NULL;
            free(arena);
            return;
        }
    munmap(arena, size); /* from before this allocator was set: Python's own came from mmap() */
}

/* ---- the Python module ----------------------------------------------------------------------------------------- */

static PyObject *py_serve_file(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long inode;
    PyObject *functions[NR_HANDLERS];
    if (!PyArg_ParseTuple(args, "KOOOO", &inode, &functions[READ], &functions[WRITE], &functions[FALLOCATE], &functions[FSYNC])) return NULL;
    for (int i = 0; i < NR_HANDLERS; i++) {
        Py_INCREF(functions[i]);
        Py_XSETREF(handlers[i], functions[i]);
    }
    served_inode = inode;
    Py_RETURN_NONE;
}

static PyObject *py_set_limits(PyObject *self, PyObject *args) {
    (void)self;
    if (!PyArg_ParseTuple(args, "III", &max_background, &max_burst, &max_spin_ns)) return NULL;
    Py_RETURN_NONE;
}

static PyObject *py_set_linger(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *tasks;
    if (!PyArg_ParseTuple(args, "iO", &event_loop_fd, &tasks)) return NULL;
    Py_INCREF(tasks);
    Py_XSETREF(runnable, tasks);
    Py_RETURN_NONE;
}

static PyObject *py_set_make_ready(PyObject *self, PyObject *function) {
    (void)self;
    Py_INCREF(function);
    Py_XSETREF(make_ready, function);
    Py_RETURN_NONE;
}

static PyObject *py_set_completions(PyObject *self, PyObject *args) {
    (void)self;
    int fd;
    unsigned long long ring;
    PyObject *function;
    if (!PyArg_ParseTuple(args, "iKO", &fd, &ring, &function)) return NULL;
    Py_INCREF(function);
    Py_XSETREF(reap, function);
    completions_fd = fd;
    completions = (const volatile uint32_t *)(uintptr_t)ring;
    Py_RETURN_NONE;
}

static PyObject *py_reply(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long req;
    int error;
    Py_ssize_t written = -1;
    if (!PyArg_ParseTuple(args, "Ki|n", &req, &error, &written)) return NULL;
    struct work *work = (struct work *)(uintptr_t)req;
    int result = !error && written >= 0 ? fuse_reply_write(work->req, (size_t)written) : fuse_reply_err(work->req, error);
    finish(work);
    return PyLong_FromLong(-result);
}

static PyObject *py_reply_data(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long req;
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "Ky*", &req, &data)) return NULL;
    struct work *work = (struct work *)(uintptr_t)req;
    int result = fuse_reply_buf(work->req, data.buf, (size_t)data.len);
    PyBuffer_Release(&data);
    finish(work);
    return PyLong_FromLong(-result);
}

static PyObject *py_first_request(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyBytes_FromStringAndSize(init_request, (Py_ssize_t)init_length);
}

static PyObject *py_open_request(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyLong_FromUnsignedLongLong(open_unique);
}

static PyObject *py_replay(PyObject *self, PyObject *args) {
    (void)self;
    Py_buffer request;
    if (!PyArg_ParseTuple(args, "y*", &request)) return NULL;
    char *copy = the_session ? malloc((size_t)request.len) : NULL; /* process() frees it */
    if (copy) {
        struct fuse_buf buf = {.mem = memcpy(copy, request.buf, (size_t)request.len), .size = (size_t)request.len};
        process(the_session, &buf, now_ns());
    }
    PyBuffer_Release(&request);
    return PyBool_FromLong(initialised);
}

static PyObject *py_take_arenas_from_malloc(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    PyObjectArenaAllocator allocator = {NULL, arena_alloc, arena_free};
    PyObject_SetArenaAllocator(&allocator);
    Py_RETURN_NONE;
}

static PyObject *py_libfuse_version(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyUnicode_FromString(fuse_pkgversion());
}

static PyObject *py_use_metrics(PyObject *self, PyObject *args) {
    (void)self;
    Py_buffer buffer;
    if (!PyArg_ParseTuple(args, "w*", &buffer)) return NULL;
    if (buffer.len != sizeof own_metrics) {
        PyBuffer_Release(&buffer);
        PyErr_Format(PyExc_ValueError, "metrics have %d words", METRIC_WORDS);
        return NULL;
    }
    metrics = buffer.buf;
    if (metrics_buffer.obj) PyBuffer_Release(&metrics_buffer);
    metrics_buffer = buffer;
    Py_RETURN_NONE;
}

static PyObject *py_use_slots(PyObject *self, PyObject *args) {
    (void)self;
    Py_buffer buffer;
    Py_ssize_t bytes;
    if (!PyArg_ParseTuple(args, "w*n", &buffer, &bytes)) return NULL;
    if (bytes < RECEIVE_BYTES || buffer.len % bytes || buffer.len / bytes > MAX_SLOTS || nr_free_slots != nr_slots) {
        PyBuffer_Release(&buffer);
        return PyErr_Format(PyExc_ValueError, "slots have at least %d bytes each, are no more than %d, and are set before any is used",
                            RECEIVE_BYTES, MAX_SLOTS);
    }
    if (slots_buffer.obj) PyBuffer_Release(&slots_buffer);
    slots_buffer = buffer;
    slot_bytes = (size_t)bytes;
    nr_free_slots = nr_slots = (unsigned)(buffer.len / bytes);
    for (unsigned i = 0; i < nr_slots; i++) free_slots[i] = (char *)buffer.buf + i * slot_bytes;
    Py_RETURN_NONE;
}

static PyObject *py_in_work(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyLong_FromUnsignedLong(in_work);
}

static PyObject *py_serve_reads(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyLong_FromUnsignedLong(serve_reads());
}

static PyMethodDef methods[] = {
    {"serve_file", py_serve_file, METH_VARARGS, "serve_file(inode, read, write, fallocate, fsync): the handlers of the served file"},
    {"set_limits", py_set_limits, METH_VARARGS, "set_limits(background, burst, spin_ns): requests in flight, taken without a sleep, and awake for so long"},
    {"set_linger", py_set_linger, METH_VARARGS, "set_linger(fd, tasks): wait for requests and fd while tasks is empty; -1: never"},
    {"set_make_ready", py_set_make_ready, METH_O, "set_make_ready(function): what is called when nothing is to be done; whether it did something"},
    {"set_completions", py_set_completions, METH_VARARGS, "set_completions(fd, ring, function): call function when fd is readable, or the ring is not empty"},
    {"reply", py_reply, METH_VARARGS, "reply(request, errno, written=-1) -> errno: answer a request; a write with its length"},
    {"reply_data", py_reply_data, METH_VARARGS, "reply_data(request, data) -> errno: answer a read"},
    {"first_request", py_first_request, METH_NOARGS, "first_request() -> bytes: FUSE_INIT as it came, empty if it has not"},
    {"open_request", py_open_request, METH_NOARGS, "open_request() -> int: the number of the last request to open the served file"},
    {"replay", py_replay, METH_VARARGS, "replay(request) -> bool: have libfuse process FUSE_INIT; whether it has"},
    {"take_arenas_from_malloc", py_take_arenas_from_malloc, METH_NOARGS, "Python's object arenas come from malloc from now on"},
    {"libfuse_version", py_libfuse_version, METH_NOARGS, "libfuse_version() -> str"},
    {"use_metrics", py_use_metrics, METH_VARARGS, "use_metrics(buffer): where to count from now on; see core/latency.py"},
    {"use_slots", py_use_slots, METH_VARARGS, "use_slots(buffer, slot_bytes): where requests are received from now on"},
    {"in_work", py_in_work, METH_NOARGS, "in_work() -> int: requests for the served file that are not answered yet"},
    {"serve_reads", py_serve_reads, METH_NOARGS, "serve_reads() -> int: within a write: answer the reads that have come since"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_shim", "The libfuse shim; see shim.c.", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__shim(void);
PyMODINIT_FUNC PyInit__shim(void) {
    if (!free_works)
        for (int i = WORKS; i--; free_works = &works[i]) works[i].req = (fuse_req_t)free_works;
    return PyModule_Create(&module);
}
