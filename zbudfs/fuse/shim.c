// SPDX-License-Identifier: MIT
/* The shim: a layer between pyfuse3 and libfuse. It adds functions that a Python daemon in the swap path needs.

       pyfuse3  --fuse_session_new-->  shim  --same call-->  libfuse

   It is loaded RTLD_GLOBAL before pyfuse3 is imported, so that pyfuse3's calls find the shim's definitions first. Each of them
   calls the real function, which is the next one in the loader's order (RTLD_NEXT). The same object is the Python
   module zbudfs.fuse._shim, through which the daemon controls the shim.

    1. One served file. Its reads, writes, fallocates and fsyncs go straight to four Python functions, which mostly answer
       at once. There is no coroutine and no copy of written data (pyfuse3 makes both), and fallocate works, which pyfuse3 lacks.
       pyfuse3 serves all other files and operations (names, attributes, stats/), and these never wait.
    2. Bursts. pyfuse3 sleeps in trio before every request: two rounds of the scheduler and three system calls. After a
       request for the served file, the shim takes the waiting requests at once. If nothing else is runnable, it then waits for
       the next request itself, together with all events that trio waits for: for a millisecond, the first part of it awake.
       Number and time are bounded. Then trio runs, if it has work; without work it runs after some 20 ms. Before the shim
       waits, it makes pages ready that may be read next.
    3. No `write_buf`: with it libfuse asks for FUSE_CAP_SPLICE_READ and reads requests through a pipe, for which the
       kernel allocates a page per page of data. Under memory pressure that allocation waits for swap: this daemon.
    4. Request slots. libfuse would allocate a buffer for each request. The shim receives each request into a slot of memory that
       Python has reserved. A write that is answered later stays in its slot until then, without a copy.
    5. Reads first. A program waits for each page that it reads, but not for the pages that the kernel writes. So the shim
       receives all waiting requests before it processes the next write, and answers reads among them at once. A write stops to
       answer new reads (serve_reads): after each page if there were reads lately, else after every few pages. A write waits for 64
       requests or 5 ms at most. The new order is invisible, since both requests were in flight at the same time. Writes, discards
       and syncs keep their order.
    6. A bound on the requests that the kernel keeps in flight, so that the memory for them can be reserved in advance.
    7. Python's object arenas from malloc, whose heap the daemon pins, instead of from mmap().

    8. Resuming. The shim keeps the kernel's first request, FUSE_INIT. A later process with the same descriptor replays it to its
       own libfuse, which then knows the negotiated parameters. Its reply has no effect: the kernel returns ENOENT, and libfuse
       ignores that.

    9. Time. The shim enters each request for the served file in a histogram when it is answered, at once or later. The caller
       provides the memory (core/latency.py has the layout). The cost is two reads of the clock. The number by which Python knows
       a request is the address of its `struct work`.

    10. The number of the request that opens the served file. It stays the same when the kernel sends the request again, so that the
       open file is counted once.

   The shim never answers fallocate with ENOSYS: the kernel would not send it again on this connection.

   libfuse 3.14 (Debian 12) exports fuse_session_new. From 3.17 on (Debian 13) headers turn it into
   fuse_session_new_versioned. The shim defines both, and pyfuse3 calls the one for which it was built. All of this runs on the
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

#include "../core/latency.h"
#undef fuse_session_new

enum {
    MAX_WRITE = 256 << 10,
    RECEIVE_BYTES = MAX_WRITE + (8 << 10),
    MAX_INIT = 1016, /* bytes of the field in the status area (store/status_area.py) */
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
    LEAST_PATIENCE = 16, /* requests that come within the spin */
    MOST_PATIENCE = 4096,
    MAX_BURST_NS = 5000000,
    LONGEST_BURST_NS = 20000000, /* while the event loop has no work: its timers wait for that long */
    PAGES_AT_ONCE = 8, /* of a write between two looks for new reads: a look takes half a microsecond, a page some 8 */
    MIXED_WRITES = 64, /* writes after a read in which there is a look after each page */
    MAX_ARENAS = 1024, /* of 1 MiB each in CPython 3.11 */
    WORKS = 256,       /* requests in work without an allocation: far more than the kernel keeps in flight */
    ROWS = 6,
    SERVED = ROWS * ROW_WORDS,
    WAKEUPS,
    MOST_IN_WORK,
    METRIC_WORDS,
};
enum { READ, WRITE, FALLOCATE, FSYNC, NR_HANDLERS };
enum { MAX_ARGUMENTS = 4 };

struct libfuse_version;

/* The head of each request. */
struct header {
    uint32_t length, opcode;
    uint64_t unique, inode;
};

/* A request for the served file that is not answered yet. */
struct work {
    fuse_req_t req; /* while this struct is free: the next free one */
    long long since_ns;
    int which;
    PyObject *view; /* of a write that is answered later: the view of its data, and the buffer that holds them */
    char *buffer;
};

/* A request, most likely a write, that was received and is not processed yet. */
struct arrival {
    struct fuse_buf buf;
    long long since_ns;
};

/* The session of this process. pyfuse3 has one at a time, and libfuse's callbacks do not say which: entry points take it from
   `the_session`, all other functions have it as an argument. */
struct session {
    struct fuse_session *fuse;
    struct fuse_lowlevel_ops pyfuse3_ops, shim_ops;
    int initialised; /* FUSE_INIT has been answered */
    char init_request[MAX_INIT];
    size_t init_length;

    /* the served file */
    fuse_ino_t served_inode;
    uint64_t open_unique; /* the number of the last request to open it */
    PyObject *handlers[NR_HANDLERS];
    struct work works[WORKS], *free_works;
    unsigned in_work;
    unsigned long long own_metrics[METRIC_WORDS], *metrics; /* core/latency.py */
    Py_buffer metrics_buffer;

    /* the request that is being processed */
    char *in_process;      /* its buffer */
    long long received_ns; /* when it was received */
    int answered_by_shim;  /* it was for the served file, so that pyfuse3 has no coroutine to await */

    /* the memory into which requests are received */
    Py_buffer slots_buffer;
    size_t slot_bytes;
    char *free_slots[MAX_SLOTS];
    unsigned nr_slots, nr_free_slots;
    struct arrival arrivals[MAX_SLOTS]; /* a ring of requests that were put off */
    unsigned first_arrival, nr_arrivals;

    /* bursts */
    unsigned max_background, max_burst, max_spin_ns;
    unsigned mixed_writes; /* writes in which reads are likely to come */
    int in_burst; /* more requests may be received: pyfuse3 has no coroutine yet, and no request in the ring may give it one */
    long long put_off_until_ns; /* a request that is put off later, during a write, is the last one of the burst */
    int credit, patience; /* for waiting awake: see `wait_for_any` */
    PyObject *make_ready; /* called when the thread is idle; returns whether it did something */
    PyObject *reap; /* called when the kernel has completed reads of the backing file (store/aio.c) */
    int completions_fd; /* readable when it has */
    const volatile uint32_t *completions; /* head and tail of its ring, which differ when it has; NULL: use the descriptor */
    PyObject *runnable; /* the tasks of the event loop that can run and have not run yet */
    int event_loop_fd;
};
static struct session the_session = {
    .max_background = 12,
    .max_burst = 1,
    .completions_fd = -1,
    .event_loop_fd = -1,
    .patience = LEAST_PATIENCE,
    .metrics = the_session.own_metrics,
};

static void *next(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) abort(); /* impossible: this object is linked to libfuse */
    return found;
}

/* ---- buffers ------------------------------------------------------------------------------------------------- */

static int is_slot(const struct session *s, const char *buffer) {
    return s->nr_slots && buffer >= (char *)s->slots_buffer.buf
           && buffer < (char *)s->slots_buffer.buf + s->nr_slots * s->slot_bytes;
}

/* Free a buffer. */
static void give_buffer(struct session *s, char *buffer) {
    if (is_slot(s, buffer)) s->free_slots[s->nr_free_slots++] = buffer;
    else free(buffer);
}

/* Release the view of a buffer. The buffer will hold other data soon, so a callee that kept the view must not read it. */
static void let_go(PyObject *view) {
    PyObject *released = PyObject_CallMethod(view, "release", NULL);
    if (!released) PyErr_WriteUnraisable(view);
    Py_XDECREF(released);
    Py_DECREF(view);
}

/* ---- requests in work ---------------------------------------------------------------------------------------- */

static struct work *begin(struct session *s, int which, fuse_req_t req) {
    struct work *work = s->free_works; /* its `req` holds the next free one */
    if (work) s->free_works = (struct work *)work->req;
    else if (!(work = malloc(sizeof *work))) return NULL;
    *work = (struct work){.req = req, .since_ns = s->received_ns, .which = which};
    s->metrics[SERVED]++;
    if (++s->in_work > s->metrics[MOST_IN_WORK]) s->metrics[MOST_IN_WORK] = s->in_work;
    return work;
}

/* End the work on a request that is answered: enter its time, and free its memory. */
static void finish(struct session *s, struct work *work) {
    record(s->metrics + work->which * ROW_WORDS, (unsigned long long)(now_ns() - work->since_ns));
    s->in_work--;
    if (work->view) let_go(work->view);
    if (work->buffer) give_buffer(s, work->buffer);
    if (work < s->works || work >= s->works + WORKS) {
        free(work);
    } else {
        work->req = (fuse_req_t)s->free_works;
        s->free_works = work;
    }
}

/* ---- the served file ----------------------------------------------------------------------------------------- */

/* Call a handler with the request and `rest`, and take over the references in `rest`. A handler returns bytes to send, an int (0
   or an errno), or None if it will answer later. An exception is a bug: it goes to sys.unraisablehook, and the answer is EIO.
   Return the work if it is answered later, else NULL. */
static struct work *handle(struct session *s, int which, fuse_req_t req, size_t size, PyObject **rest, size_t count) {
    s->answered_by_shim = 1;
    struct work *work = begin(s, which, req);
    PyObject *result = NULL, *arguments[MAX_ARGUMENTS] = {work ? PyLong_FromVoidPtr(work) : NULL};
    int complete = s->handlers[which] != NULL && arguments[0];
    for (size_t i = 0; i < count; i++) {
        arguments[i + 1] = rest[i];
        complete = complete && rest[i];
    }
    if (complete) result = PyObject_Vectorcall(s->handlers[which], arguments, count + 1, NULL);
    for (size_t i = 0; i <= count; i++) Py_XDECREF(arguments[i]);
    int later = result == Py_None;
    if (!result) {
        if (PyErr_Occurred()) PyErr_WriteUnraisable(s->handlers[which]);
        fuse_reply_err(req, EIO);
    } else if (PyBytes_CheckExact(result)) {
        fuse_reply_buf(req, PyBytes_AS_STRING(result), (size_t)PyBytes_GET_SIZE(result));
    } else if (PyLong_CheckExact(result)) {
        long error = PyLong_AsLong(result);
        if (error) fuse_reply_err(req, (int)error);
        else if (which == WRITE) fuse_reply_write(req, size);
        else fuse_reply_err(req, 0);
    }
    Py_XDECREF(result);
    if (!work || later) return work;
    finish(s, work);
    return NULL;
}

static void shim_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset, struct fuse_file_info *file) {
    struct session *s = &the_session;
    if (ino != s->served_inode) {
        s->pyfuse3_ops.read(req, ino, size, offset, file);
        return;
    }
    PyObject *rest[] = {PyLong_FromLongLong(offset), PyLong_FromSize_t(size)};
    handle(s, READ, req, size, rest, 2);
}

static void shim_write(
    fuse_req_t req, fuse_ino_t ino, const char *data, size_t size, off_t offset, struct fuse_file_info *file) {
    struct session *s = &the_session;
    if (ino != s->served_inode) {
        s->pyfuse3_ops.write(req, ino, data, size, offset, file);
        return;
    }
    PyObject *view = PyMemoryView_FromMemory((char *)data, (Py_ssize_t)size, PyBUF_READ);
    PyObject *rest[] = {PyLong_FromLongLong(offset), view};
    Py_XINCREF(view);
    struct work *later = handle(s, WRITE, req, size, rest, 2);
    if (later) { /* the buffer holds the data until the request is answered */
        later->view = view;
        later->buffer = s->in_process;
        s->in_process = NULL;
    } else if (view) {
        let_go(view);
    }
}

static void shim_fallocate(
    fuse_req_t req, fuse_ino_t ino, int mode, off_t offset, off_t length, struct fuse_file_info *Py_UNUSED(file)) {
    struct session *s = &the_session;
    if (ino != s->served_inode) {
        s->answered_by_shim = 1;
        fuse_reply_err(req, EOPNOTSUPP);
        return;
    }
    PyObject *rest[] = {PyLong_FromLong(mode), PyLong_FromLongLong(offset), PyLong_FromLongLong(length)};
    handle(s, FALLOCATE, req, 0, rest, 3);
}

static void shim_fsync(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *file) {
    struct session *s = &the_session;
    if (ino != s->served_inode) {
        s->pyfuse3_ops.fsync(req, ino, datasync, file);
        return;
    }
    handle(s, FSYNC, req, 0, NULL, 0);
}

static void shim_init(void *userdata, struct fuse_conn_info *conn) {
    struct session *s = &the_session;
    if (s->pyfuse3_ops.init) s->pyfuse3_ops.init(userdata, conn);
    if (conn->max_write > MAX_WRITE) conn->max_write = MAX_WRITE; /* libfuse reads at most max_write and a 4 KiB header */
    conn->max_background = s->max_background;
    conn->congestion_threshold = s->max_background;
    s->initialised = 1;
}

/* ---- the functions of libfuse that the shim replaces ----------------------------------------------------------- */

static const struct fuse_lowlevel_ops *amended(struct session *s, const struct fuse_lowlevel_ops *ops, size_t size) {
    memset(&s->pyfuse3_ops, 0, sizeof s->pyfuse3_ops);
    memcpy(&s->pyfuse3_ops, ops, size < sizeof s->pyfuse3_ops ? size : sizeof s->pyfuse3_ops);
    s->shim_ops = s->pyfuse3_ops;
    s->shim_ops.init = shim_init;
    s->shim_ops.read = shim_read;
    s->shim_ops.write = shim_write;
    s->shim_ops.fallocate = shim_fallocate;
    s->shim_ops.fsync = shim_fsync;
    s->shim_ops.write_buf = NULL;
    s->initialised = 0;
    return &s->shim_ops;
}

struct fuse_session *fuse_session_new(
    struct fuse_args *args, const struct fuse_lowlevel_ops *ops, size_t size, void *userdata) {
    struct session *s = &the_session;
    struct fuse_session *(*real)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *) = next(
        "fuse_session_new");
    return s->fuse = real(args, amended(s, ops, size), sizeof s->shim_ops, userdata);
}

struct fuse_session *fuse_session_new_versioned(
    struct fuse_args *args, const struct fuse_lowlevel_ops *ops, size_t size, struct libfuse_version *version, void *userdata) {
    struct session *s = &the_session;
    struct fuse_session *(*real)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, struct libfuse_version *,
        void *) = next("fuse_session_new_versioned");
    return s->fuse = real(args, amended(s, ops, size), sizeof s->shim_ops, version, userdata);
}

static int receive(struct session *s, struct fuse_buf *buf) {
    static int (*real)(struct fuse_session *, struct fuse_buf *);
    if (!real) real = next("fuse_session_receive_buf");
    /* Before FUSE_INIT libfuse may read more than MAX_WRITE, so it allocates that one buffer itself. */
    char *slot = s->initialised && s->nr_free_slots ? s->free_slots[--s->nr_free_slots] : NULL;
    buf->mem = slot;
    int got = real(s->fuse, buf);
    if (!s->initialised && got > 8 && got <= MAX_INIT && ((unsigned *)buf->mem)[1] == OPCODE_INIT)
        memcpy(s->init_request, buf->mem, s->init_length = (size_t)got);
    if (got <= 0 && slot) {
        give_buffer(s, slot);
        buf->mem = NULL; /* pyfuse3 would free it */
    }
    return got;
}

/* Process a request that was received at `since_ns`. Free its buffer, unless it is kept until the request is answered. */
static void process(struct session *s, struct fuse_buf *buf, long long since_ns) {
    static void (*real)(struct fuse_session *, const struct fuse_buf *);
    if (!real) real = next("fuse_session_process_buf");
    char *outer = s->in_process; /* the buffer of a write, if this is a read within it */
    s->answered_by_shim = 0;
    s->received_ns = since_ns;
    s->in_process = buf->mem;
    const struct header *header = buf->mem;
    if (buf->size >= sizeof *header && header->inode == s->served_inode) {
        if (header->opcode == OPCODE_OPEN) s->open_unique = header->unique;
        if (header->opcode == OPCODE_READ) s->mixed_writes = MIXED_WRITES;
        if (header->opcode == OPCODE_WRITE && s->mixed_writes) s->mixed_writes--;
    }
    real(s->fuse, buf);
    if (s->in_process) give_buffer(s, s->in_process);
    buf->mem = NULL;
    s->in_process = outer;
}

int fuse_session_receive_buf(struct fuse_session *Py_UNUSED(session), struct fuse_buf *buf) {
    int got = receive(&the_session, buf);
    return got == -EAGAIN ? -EINTR : got; /* no request is left (a burst took it); pyfuse3 knows only EINTR */
}

/* Make one more page ready that may be read next. 1 if a page was made ready; a request may have come meanwhile. */
static int prepare(const struct session *s) {
    PyObject *result = s->make_ready ? PyObject_CallNoArgs(s->make_ready) : Py_NewRef(Py_False);
    int made = result ? PyObject_IsTrue(result) : -1;
    Py_XDECREF(result);
    if (made < 0) PyErr_WriteUnraisable(s->make_ready);
    return made > 0;
}

/* Return whether the kernel has completed a read of the backing file, as far as its ring is known. */
static int has_completions(const struct session *s) { return s->completions && s->completions[0] != s->completions[1]; }

/* Finish reads of the backing file that the kernel has completed. */
static void finish_reads(const struct session *s) {
    PyObject *result = PyObject_CallNoArgs(s->reap);
    if (!result) PyErr_WriteUnraisable(s->reap);
    Py_XDECREF(result);
}

/* Poll the descriptors without a sleep until one is ready, for `max_spin_ns` at most. Return the result of poll().
   Each turn offers the CPU to other programs. If a program runs on this CPU, the kernel leaves the end of its request to ksoftirqd
   here, and the program that waits for the page would wait for that. A program that keeps the CPU for longer has work to do.
   Then *crowded is set, and sleeping is better, since the scheduler prefers a program that has slept. */
static int spin(const struct session *s, struct pollfd *fds, nfds_t nr_fds, long long began, int *crowded) {
    const struct timespec none = {0};
    int ready;
    for (long long now = began, before = began; now - began < s->max_spin_ns; before = now) {
        if ((ready = ppoll(fds, nr_fds, &none, NULL))) return ready;
        sched_yield();
        now = now_ns();
        if ((*crowded = now - before > CROWDED_NS)) return 0;
    }
    return 0;
}

/* Wait a millisecond for any of the descriptors. Return the result of poll().
   Waking a sleeping core costs more than serving a page. So the first part of the wait is spent awake while that pays. A request
   that comes within it earns one credit; a wait without one costs two. If another program wanted the CPU, waits are asleep until
   `patience` requests have come soon. `patience` doubles each time, and falls by one with each request that comes while the
   thread is awake. A thread with real-time priority never waits awake: sched_yield() does not give its CPU to other programs. */
static int wait_for_any(struct session *s, struct pollfd *fds, nfds_t nr_fds) {
    const struct timespec moment = {.tv_nsec = LINGER_NS};
    int ready = 0, crowded = 0;
    long long began = now_ns();
    if (s->credit > 0 && s->max_spin_ns && sched_getscheduler(0) == SCHED_OTHER) ready = spin(s, fds, nr_fds, began, &crowded);
    if (ready && s->patience > LEAST_PATIENCE) s->patience--;
    if (!ready) ready = ppoll(fds, nr_fds, &moment, NULL);
    if (crowded) {
        s->credit = -s->patience;
        s->patience = s->patience < MOST_PATIENCE ? 2 * s->patience : MOST_PATIENCE;
    } else if (ready > 0 && now_ns() - began < s->max_spin_ns) {
        s->credit += s->credit < MAX_CREDIT;
    } else if (s->credit > 0) {
        s->credit = s->credit > 2 ? s->credit - 2 : 0;
    }
    return ready;
}

/* Return whether the event loop has a task that can run now. 1, too, if the event loop is not known. */
static int has_runnable(const struct session *s) {
    if (s->event_loop_fd < 0 || !s->runnable) return 1;
    Py_ssize_t waiting = PyObject_Size(s->runnable);
    if (waiting < 0) PyErr_WriteUnraisable(s->runnable);
    return waiting != 0;
}

/* Return whether no task of the event loop can run, and no descriptor of it is ready. Its timers are not known. A task whose
   descriptor was ready in the last turn is among those that can run. */
static int is_event_loop_idle(const struct session *s) {
    struct pollfd fd = {.fd = s->event_loop_fd, .events = POLLIN};
    return !has_runnable(s) && !poll(&fd, 1, 0);
}

/* Make a page ready, or wait a moment for the next request. 0 if the burst is over, since no request came or the event loop has
   work. */
static int linger(struct session *s) {
    if (has_runnable(s)) return 0;
    if (prepare(s)) return 1;
    struct pollfd fds[] = {
        {.fd = fuse_session_fd(s->fuse), .events = POLLIN},
        {.fd = s->event_loop_fd, .events = POLLIN},
        {.fd = s->completions_fd, .events = POLLIN},
    };
    nfds_t nr_fds = s->completions_fd >= 0 ? 3 : 2;
    int ready;
    Py_BEGIN_ALLOW_THREADS
    ready = wait_for_any(s, fds, nr_fds);
    Py_END_ALLOW_THREADS
    if (ready > 0 && fds[2].revents == POLLIN
        && nr_fds == 3) { /* the event loop watches this descriptor too, but will find nothing to do */
        finish_reads(s);
        return 1;
    }
    return ready > 0 && fds[0].revents == POLLIN;
}

/* Return the opcode of a request for the served file, 0 for any other request. */
static unsigned wanted(const struct session *s, const struct fuse_buf *buf) {
    const struct header *header = buf->mem;
    return is_slot(s, buf->mem) && buf->size >= sizeof *header && header->inode == s->served_inode ? header->opcode : 0;
}

/* Return whether a request must wait until the reads that came with it are answered. 0 if it leaves pyfuse3 a coroutine. */
static int gives_way(const struct session *s, const struct fuse_buf *buf) {
    unsigned opcode = wanted(s, buf);
    return opcode == OPCODE_WRITE || opcode == OPCODE_FSYNC || opcode == OPCODE_FALLOCATE;
}

static void put_off(struct session *s, const struct fuse_buf *buf, long long since_ns) {
    s->arrivals[(s->first_arrival + s->nr_arrivals++) % MAX_SLOTS] = (struct arrival){*buf, since_ns};
}

/* Answer the reads that have come during a write. The write has stored `pages` pages so far. The function puts other requests off;
   they stay in their slots. */
static unsigned serve_reads(struct session *s, unsigned long pages) {
    unsigned served = 0;
    if (has_completions(s)) finish_reads(s);
    if (!s->mixed_writes && pages % PAGES_AT_ONCE) return 0;
    while (s->in_burst && s->nr_free_slots && served < s->max_burst) {
        struct fuse_buf buf = {.mem = NULL};
        if (receive(s, &buf) <= 0) break;
        long long since_ns = now_ns();
        if (wanted(s, &buf) == OPCODE_READ) {
            process(s, &buf, since_ns);
            served++;
        } else {
            put_off(s, &buf, since_ns);
            s->in_burst = gives_way(s, &buf) && since_ns < s->put_off_until_ns;
        }
    }
    return served;
}

/* ---- bursts --------------------------------------------------------------------------------------------------

   pyfuse3 hands over one request. The burst goes on until no request is left and none comes, or its bounds are reached.

       received --- read, or for pyfuse3 --------> process
                \-- write, fsync, fallocate ----> ring of arrivals ---+
       nothing received ---------- process the oldest of the ring <----+
                        \-- the ring is empty --> linger: make a page ready, or wait a millisecond

   Each turn begins with some of the reads of the backing file that the kernel has completed. */
struct burst {
    struct fuse_buf buf; /* the request that was received last, at `since_ns` */
    long long since_ns, end_ns, last_ns;
    int got; /* result of receiving it: bytes, or an error less than 0 */
    unsigned received; /* number of requests */
    int more; /* within the bounds: more requests may be received */
};

static void process_oldest(struct session *s) {
    struct arrival arrival = s->arrivals[s->first_arrival++ % MAX_SLOTS];
    s->nr_arrivals--;
    process(s, &arrival.buf, arrival.since_ns);
}

/* One turn: process or put off the received request, else process the oldest of the ring, else linger. 0 if the burst is over. */
static int take_turn(struct session *s, struct burst *burst) {
    if (burst->got > 0 && gives_way(s, &burst->buf)) {
        put_off(s, &burst->buf, burst->since_ns);
    } else if (burst->got > 0) {
        process(s, &burst->buf, burst->since_ns);
        s->in_burst &= s->answered_by_shim;
    } else if (s->nr_arrivals) {
        process_oldest(s);
    } else if (!burst->more || !has_completions(s)) {
        return burst->got == -EAGAIN && burst->more && linger(s); /* the session loop will get any other error again */
    }
    return 1;
}

/* Set the bounds of time of a burst, from now on. */
static void bound(struct session *s, struct burst *burst, long long now) {
    burst->end_ns = now + MAX_BURST_NS < burst->last_ns ? now + MAX_BURST_NS : burst->last_ns;
    s->put_off_until_ns = burst->end_ns + MAX_BURST_NS;
}

/* Return whether the bounds allow another request. If no request is put off and the event loop is idle, the burst gets new bounds:
   a turn of the event loop takes longer than a request. */
static int is_within_bounds(struct session *s, struct burst *burst) {
    long long now = now_ns();
    if (burst->received < s->max_burst && now < burst->end_ns) return 1;
    if (s->nr_arrivals || now >= burst->last_ns || !is_event_loop_idle(s)) return 0;
    burst->received = 0;
    bound(s, burst, now);
    return 1;
}

/* Receive the next request if the bounds allow it, and a slot is free for it. */
static void receive_next(struct session *s, struct burst *burst) {
    burst->more = s->in_burst && !fuse_session_exited(s->fuse) && is_within_bounds(s, burst);
    burst->got = -EAGAIN;
    if (!burst->more || (s->nr_arrivals && !s->nr_free_slots)) return;
    burst->buf = (struct fuse_buf){.mem = NULL};
    burst->got = receive(s, &burst->buf);
    burst->since_ns = now_ns();
    burst->received += burst->got > 0;
}

/* Process a request, and all requests that wait already or come soon. No received request is left when this returns. */
void fuse_session_process_buf(struct fuse_session *Py_UNUSED(session), const struct fuse_buf *first) {
    struct session *s = &the_session;
    long long now = now_ns();
    struct burst burst = {
        .buf = *first, .since_ns = now, .last_ns = now + LONGEST_BURST_NS, .got = 1, .received = 1, .more = 1};
    ((struct fuse_buf *)first)->mem = NULL; /* pyfuse3 would free it */
    s->metrics[WAKEUPS]++;
    s->in_burst = 1;
    bound(s, &burst, now);
    for (;;) {
        if (has_completions(s)) finish_reads(s);
        if (!take_turn(s, &burst)) break;
        receive_next(s, &burst);
    }
    s->in_burst = 0;
}

/* ---- Python's object arenas, of the process ------------------------------------------------------------------- */

static void *arenas[MAX_ARENAS];

static void *arena_alloc(void *Py_UNUSED(context), size_t size) {
    for (int i = 0; i < MAX_ARENAS; i++)
        if (!arenas[i]) return arenas[i] = malloc(size);
    return NULL; /* Python raises MemoryError */
}

static void arena_free(void *Py_UNUSED(context), void *arena, size_t size) {
    for (int i = 0; i < MAX_ARENAS; i++)
        if (arenas[i] == arena) {
            arenas[i] = NULL;
            free(arena);
            return;
        }
    munmap(arena, size); /* it was made before this allocator was set: Python's own arenas come from mmap() */
}

/* ---- the Python module ----------------------------------------------------------------------------------------- */

static PyObject *py_serve_file(PyObject *Py_UNUSED(self), PyObject *args) {
    struct session *s = &the_session;
    unsigned long long inode;
    PyObject *functions[NR_HANDLERS];
    if (!PyArg_ParseTuple(args, "KOOOO", &inode, &functions[READ], &functions[WRITE], &functions[FALLOCATE], &functions[FSYNC]))
        return NULL;
    for (int i = 0; i < NR_HANDLERS; i++) {
        Py_INCREF(functions[i]);
        Py_XSETREF(s->handlers[i], functions[i]);
    }
    s->served_inode = inode;
    Py_RETURN_NONE;
}

static PyObject *py_set_limits(PyObject *Py_UNUSED(self), PyObject *args) {
    struct session *s = &the_session;
    if (!PyArg_ParseTuple(args, "III", &s->max_background, &s->max_burst, &s->max_spin_ns)) return NULL;
    Py_RETURN_NONE;
}

static PyObject *py_set_linger(PyObject *Py_UNUSED(self), PyObject *args) {
    struct session *s = &the_session;
    PyObject *tasks;
    if (!PyArg_ParseTuple(args, "iO", &s->event_loop_fd, &tasks)) return NULL;
    Py_INCREF(tasks);
    Py_XSETREF(s->runnable, tasks);
    Py_RETURN_NONE;
}

static PyObject *py_set_make_ready(PyObject *Py_UNUSED(self), PyObject *function) {
    struct session *s = &the_session;
    Py_INCREF(function);
    Py_XSETREF(s->make_ready, function);
    Py_RETURN_NONE;
}

static PyObject *py_set_completions(PyObject *Py_UNUSED(self), PyObject *args) {
    struct session *s = &the_session;
    int fd;
    unsigned long long ring;
    PyObject *function;
    if (!PyArg_ParseTuple(args, "iKO", &fd, &ring, &function)) return NULL;
    Py_INCREF(function);
    Py_XSETREF(s->reap, function);
    s->completions_fd = fd;
    s->completions = (const volatile uint32_t *)(uintptr_t)ring;
    Py_RETURN_NONE;
}

static PyObject *py_reply(PyObject *Py_UNUSED(self), PyObject *args) {
    struct session *s = &the_session;
    unsigned long long req;
    int error;
    Py_ssize_t written = -1;
    if (!PyArg_ParseTuple(args, "Ki|n", &req, &error, &written)) return NULL;
    struct work *work = (struct work *)(uintptr_t)req;
    int result = !error && written >= 0 ? fuse_reply_write(work->req, (size_t)written) : fuse_reply_err(work->req, error);
    finish(s, work);
    return PyLong_FromLong(-result);
}

static PyObject *py_reply_data(PyObject *Py_UNUSED(self), PyObject *args) {
    struct session *s = &the_session;
    unsigned long long req;
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "Ky*", &req, &data)) return NULL;
    struct work *work = (struct work *)(uintptr_t)req;
    int result = fuse_reply_buf(work->req, data.buf, (size_t)data.len);
    PyBuffer_Release(&data);
    finish(s, work);
    return PyLong_FromLong(-result);
}

static PyObject *py_first_request(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(unused)) {
    struct session *s = &the_session;
    return PyBytes_FromStringAndSize(s->init_request, (Py_ssize_t)s->init_length);
}

static PyObject *py_open_request(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(unused)) {
    struct session *s = &the_session;
    return PyLong_FromUnsignedLongLong(s->open_unique);
}

static PyObject *py_replay(PyObject *Py_UNUSED(self), PyObject *args) {
    struct session *s = &the_session;
    Py_buffer request;
    if (!PyArg_ParseTuple(args, "y*", &request)) return NULL;
    char *copy = s->fuse ? malloc((size_t)request.len) : NULL; /* process(s) frees it */
    if (copy) {
        struct fuse_buf buf = {.mem = memcpy(copy, request.buf, (size_t)request.len), .size = (size_t)request.len};
        process(s, &buf, now_ns());
    }
    PyBuffer_Release(&request);
    return PyBool_FromLong(s->initialised);
}

static PyObject *py_take_arenas_from_malloc(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(unused)) {
    PyObjectArenaAllocator allocator = {NULL, arena_alloc, arena_free};
    PyObject_SetArenaAllocator(&allocator);
    Py_RETURN_NONE;
}

static PyObject *py_libfuse_version(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(unused)) {
    return PyUnicode_FromString(fuse_pkgversion());
}

static PyObject *py_use_metrics(PyObject *Py_UNUSED(self), PyObject *args) {
    struct session *s = &the_session;
    Py_buffer buffer;
    if (!PyArg_ParseTuple(args, "w*", &buffer)) return NULL;
    if (buffer.len != sizeof s->own_metrics) {
        PyBuffer_Release(&buffer);
        PyErr_Format(PyExc_ValueError, "metrics have %d words", METRIC_WORDS);
        return NULL;
    }
    s->metrics = buffer.buf;
    if (s->metrics_buffer.obj) PyBuffer_Release(&s->metrics_buffer);
    s->metrics_buffer = buffer;
    Py_RETURN_NONE;
}

static PyObject *py_use_slots(PyObject *Py_UNUSED(self), PyObject *args) {
    struct session *s = &the_session;
    Py_buffer buffer;
    Py_ssize_t bytes;
    if (!PyArg_ParseTuple(args, "w*n", &buffer, &bytes)) return NULL;
    if (bytes < RECEIVE_BYTES || buffer.len % bytes || buffer.len / bytes > MAX_SLOTS || s->nr_free_slots != s->nr_slots) {
        PyBuffer_Release(&buffer);
        return PyErr_Format(PyExc_ValueError,
            "slots have at least %d bytes each, are no more than %d, and are set before any is used", RECEIVE_BYTES, MAX_SLOTS);
    }
    if (s->slots_buffer.obj) PyBuffer_Release(&s->slots_buffer);
    s->slots_buffer = buffer;
    s->slot_bytes = (size_t)bytes;
    s->nr_free_slots = s->nr_slots = (unsigned)(buffer.len / bytes);
    for (unsigned i = 0; i < s->nr_slots; i++) s->free_slots[i] = (char *)buffer.buf + i * s->slot_bytes;
    Py_RETURN_NONE;
}

static PyObject *py_in_work(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(unused)) {
    struct session *s = &the_session;
    return PyLong_FromUnsignedLong(s->in_work);
}

static PyObject *py_serve_reads(PyObject *Py_UNUSED(self), PyObject *pages) {
    struct session *s = &the_session;
    unsigned long stored = PyLong_AsUnsignedLong(pages);
    return PyErr_Occurred() ? NULL : PyLong_FromUnsignedLong(serve_reads(s, stored));
}

static PyMethodDef methods[] = {
    {"serve_file", py_serve_file, METH_VARARGS,
        "serve_file(inode, read, write, fallocate, fsync): the handlers of the served file"},
    {"set_limits", py_set_limits, METH_VARARGS,
        "set_limits(background, burst, spin_ns): requests in flight, taken without a sleep, and awake for so long"},
    {"set_linger", py_set_linger, METH_VARARGS,
        "set_linger(fd, tasks): wait for requests and fd while tasks is empty; -1: never"},
    {"set_make_ready", py_set_make_ready, METH_O,
        "set_make_ready(function): what is called when nothing is to be done; whether it did something"},
    {"set_completions", py_set_completions, METH_VARARGS,
        "set_completions(fd, ring, function): call function when fd is readable, or the ring is not empty"},
    {"reply", py_reply, METH_VARARGS, "reply(request, errno, written=-1) -> errno: answer a request; a write with its length"},
    {"reply_data", py_reply_data, METH_VARARGS, "reply_data(request, data) -> errno: answer a read"},
    {"first_request", py_first_request, METH_NOARGS, "first_request() -> bytes: FUSE_INIT as it came, empty if it has not"},
    {"open_request", py_open_request, METH_NOARGS,
        "open_request() -> int: the number of the last request to open the served file"},
    {"replay", py_replay, METH_VARARGS, "replay(request) -> bool: have libfuse process FUSE_INIT; whether it has"},
    {"take_arenas_from_malloc", py_take_arenas_from_malloc, METH_NOARGS, "Python's object arenas come from malloc from now on"},
    {"libfuse_version", py_libfuse_version, METH_NOARGS, "libfuse_version() -> str"},
    {"use_metrics", py_use_metrics, METH_VARARGS, "use_metrics(buffer): where to count from now on; see core/latency.py"},
    {"use_slots", py_use_slots, METH_VARARGS, "use_slots(buffer, slot_bytes): where requests are received from now on"},
    {"in_work", py_in_work, METH_NOARGS, "in_work() -> int: requests for the served file that are not answered yet"},
    {"serve_reads", py_serve_reads, METH_O,
        "serve_reads(pages) -> int: within a write, of which so many pages are stored: answer the reads that have come since"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_shim", "The libfuse shim; see shim.c.", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__shim(void);
PyMODINIT_FUNC PyInit__shim(void) {
    struct session *s = &the_session;
    if (!s->free_works)
        for (int i = WORKS; i--; s->free_works = &s->works[i]) s->works[i].req = (fuse_req_t)s->free_works;
    return PyModule_Create(&module);
}
