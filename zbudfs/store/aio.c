// SPDX-License-Identifier: MIT
/* Linux AIO reads of a file opened with O_DIRECT, into slots of memory that the queue owns.

       Queue(nr_slots) --submit(fd, runs)--> kernel --completion, eventfd--> reap() -> [(slot, result), ...]

   A slot is 4096 bytes. A run is a number of neighbouring blocks of the file, with one slot for each. It is one request to the
   kernel, and the number of its first slot identifies it.

   The slots are private memory of this process. If the process dies while a read is in flight, the kernel keeps the pages of the
   slots until the disk has answered. No other process ever has them, so the data cannot reach a frame of the shared pool.

   The constructor allocates all memory. A submission asks the kernel not to wait (RWF_NOWAIT). A read that would have to wait
   for a lock, for metadata of the file system or for a place in the queue of the disk ends with EAGAIN. The caller then reads
   the blocks in another way. */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>
#include <errno.h>
#include <linux/aio_abi.h>
#include <stdint.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum {
    PAGE_SHIFT = 12,
    PAGE_SIZE = 1 << PAGE_SHIFT,
    MOST_SLOTS = 256,
    READ_NOWAIT = 0x8, /* RWF_NOWAIT */
    AT_ONCE = 6, /* runs that one call of reap() takes while more have ended */
};

typedef struct {
    PyObject_HEAD
    aio_context_t context;
    int event_fd;
    unsigned nr_slots;
    char *slots;
} Queue;

/* The head of the ring that the kernel maps into the process: aio_context_t is its address. The layout is a part of the
   kernel's interface; libaio uses it in the same way. */
struct ring {
    uint32_t id, nr, head, tail, magic, compat_features, incompat_features, header_length;
};

static PyObject *refused(int error) {
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static void tear_down(Queue *queue) {
    if (queue->context) syscall(SYS_io_destroy, queue->context); /* it waits for the reads in flight */
    queue->context = 0;
    if (queue->slots) munmap(queue->slots, (size_t)queue->nr_slots << PAGE_SHIFT);
    queue->slots = NULL;
    if (queue->event_fd >= 0) close(queue->event_fd);
    queue->event_fd = -1;
}

static PyObject *queue_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"nr_slots", NULL};
    unsigned nr_slots;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "I", names, &nr_slots)) return NULL;
    if (!nr_slots || nr_slots > MOST_SLOTS) return PyErr_Format(PyExc_ValueError, "a queue has 1 to %d slots", MOST_SLOTS);
    Queue *queue = (Queue *)type->tp_alloc(type, 0);
    if (!queue) return NULL;
    queue->event_fd = -1;
    queue->nr_slots = nr_slots;
    char *slots = mmap(
        NULL, (size_t)nr_slots << PAGE_SHIFT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (slots == MAP_FAILED) goto failed;
    queue->slots = slots;
    queue->event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (queue->event_fd < 0 || syscall(SYS_io_setup, nr_slots, &queue->context)) goto failed;
    return (PyObject *)queue;
failed:;
    int error = errno;
    Py_DECREF(queue);
    return refused(error);
}

static void queue_dealloc(Queue *queue) {
    tear_down(queue);
    Py_TYPE(queue)->tp_free((PyObject *)queue);
}

/* Return the memory of a slot. It is valid as long as the queue exists. */
static PyObject *queue_slot(Queue *queue, PyObject *number) {
    unsigned long slot = PyLong_AsUnsignedLong(number);
    if (PyErr_Occurred()) return NULL;
    if (slot >= queue->nr_slots || !queue->slots) return PyErr_Format(PyExc_IndexError, "there is no slot %lu", slot);
    return PyMemoryView_FromMemory(queue->slots + (slot << PAGE_SHIFT), PAGE_SIZE, PyBUF_WRITE);
}

/* Return the request to read `count` neighbouring blocks from `offset` on. */
static struct iocb request_for(
    const Queue *queue, int fd, unsigned long long offset, unsigned long first_slot, struct iovec *vectors, Py_ssize_t count) {
    return (struct iocb){
        .aio_data = first_slot,
        .aio_lio_opcode = IOCB_CMD_PREADV,
        .aio_rw_flags = READ_NOWAIT,
        .aio_fildes = (uint32_t)fd,
        .aio_buf = (uint64_t)(uintptr_t)vectors,
        .aio_nbytes = (uint64_t)count,
        .aio_offset = (int64_t)offset,
        .aio_flags = IOCB_FLAG_RESFD,
        .aio_resfd = (uint32_t)queue->event_fd,
    };
}

/* Fill in the request for one run (offset, slots), whose vectors begin at `vectors`. Return the number of its blocks, or -1. */
static Py_ssize_t describe(Queue *queue, int fd, PyObject *run, struct iocb *request, struct iovec *vectors, Py_ssize_t room) {
    unsigned long long offset;
    PyObject *slots;
    if (!PyTuple_Check(run) || !PyArg_ParseTuple(run, "KO!", &offset, &PyList_Type, &slots)) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "a run is a tuple (offset, [slot, ...])");
        return -1;
    }
    Py_ssize_t count = PyList_GET_SIZE(slots);
    if (!count || count > room) {
        PyErr_SetString(PyExc_ValueError, "a run has at least one slot, and all of them have no more than the queue");
        return -1;
    }
    unsigned long first = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        unsigned long slot = PyLong_AsUnsignedLong(PyList_GET_ITEM(slots, i));
        if (PyErr_Occurred()) return -1;
        if (slot >= queue->nr_slots) {
            PyErr_Format(PyExc_IndexError, "there is no slot %lu", slot);
            return -1;
        }
        if (!i) first = slot;
        vectors[i] = (struct iovec){queue->slots + (slot << PAGE_SHIFT), PAGE_SIZE};
    }
    *request = request_for(queue, fd, offset, first, vectors, count);
    return count;
}

/* Submit the runs of a list. Return how many the kernel took, from the first on. */
static PyObject *queue_submit(Queue *queue, PyObject *args) {
    int fd;
    PyObject *runs;
    struct iocb requests[MOST_SLOTS], *pointers[MOST_SLOTS];
    struct iovec vectors[MOST_SLOTS];
    Py_ssize_t used = 0;
    if (!PyArg_ParseTuple(args, "iO!", &fd, &PyList_Type, &runs)) return NULL;
    if (!queue->slots) return PyErr_Format(PyExc_ValueError, "the queue is closed");
    Py_ssize_t nr_runs = PyList_GET_SIZE(runs);
    if (nr_runs > (Py_ssize_t)queue->nr_slots) return PyErr_Format(PyExc_ValueError, "more runs than slots");
    for (Py_ssize_t i = 0; i < nr_runs; i++) {
        Py_ssize_t count = describe(
            queue, fd, PyList_GET_ITEM(runs, i), &requests[i], vectors + used, (Py_ssize_t)queue->nr_slots - used);
        if (count < 0) return NULL;
        pointers[i] = &requests[i];
        used += count;
    }
    long taken = syscall(SYS_io_submit, queue->context, nr_runs, pointers);
    return PyLong_FromLong(taken < 0 ? 0 : taken);
}

/* Submit the read of one block. Return whether the kernel took it. */
static PyObject *queue_submit_one(Queue *queue, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 3) return PyErr_Format(PyExc_TypeError, "submit_one(fd, offset, slot)");
    int fd = (int)PyLong_AsLong(args[0]);
    unsigned long long offset = PyErr_Occurred() ? 0 : PyLong_AsUnsignedLongLong(args[1]);
    unsigned long slot = PyErr_Occurred() ? 0 : PyLong_AsUnsignedLong(args[2]);
    if (PyErr_Occurred()) return NULL;
    if (!queue->slots) return PyErr_Format(PyExc_ValueError, "the queue is closed");
    if (slot >= queue->nr_slots) return PyErr_Format(PyExc_IndexError, "there is no slot %lu", slot);
    struct iovec vector = {queue->slots + (slot << PAGE_SHIFT), PAGE_SIZE};
    struct iocb request = request_for(queue, fd, offset, slot, &vector, 1), *pointer = &request;
    return PyBool_FromLong(syscall(SYS_io_submit, queue->context, 1, &pointer) == 1);
}

/* Return the ring of the completions, or NULL if its layout is unknown. */
static const struct ring *ring_of(const Queue *queue) {
    const struct ring *ring = (const struct ring *)queue->context;
    return ring && ring->magic == 0xa10a10a1 && !ring->incompat_features ? ring : NULL;
}

/* Return whether more runs have ended than one call of `reap` takes. */
static int has_many(const Queue *queue) {
    const struct ring *ring = ring_of(queue);
    if (!ring) return 0;
    uint32_t head = __atomic_load_n(&ring->head, __ATOMIC_ACQUIRE), tail = __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE);
    return (tail + ring->nr - head) % ring->nr > AT_ONCE;
}

/* Return runs that have ended: AT_ONCE of them if there are many, so that the caller can submit others between two calls, and the
   disk always has some. The descriptor stays readable then. Never waits. */
static PyObject *queue_reap(Queue *queue, PyObject *none) {
    (void)none;
    if (!queue->slots) return PyErr_Format(PyExc_ValueError, "the queue is closed");
    uint64_t count;
    const int many = has_many(queue);
    if (!many && read(queue->event_fd, &count, sizeof count) < 0 && errno != EAGAIN) return refused(errno);
    struct io_event events[MOST_SLOTS];
    struct timespec moment = {0};
    long got = syscall(SYS_io_getevents, queue->context, 0, many ? AT_ONCE : queue->nr_slots, events, &moment);
    if (got < 0) return refused(errno);
    PyObject *list = PyList_New(got);
    for (long i = 0; list && i < got; i++) {
        PyObject *pair = Py_BuildValue("(KL)", (unsigned long long)events[i].data, (long long)events[i].res);
        if (!pair) Py_CLEAR(list);
        else PyList_SET_ITEM(list, i, pair);
    }
    return list;
}

static PyObject *queue_fileno(Queue *queue, PyObject *none) {
    (void)none;
    return PyLong_FromLong(queue->event_fd);
}

static PyObject *queue_ring(Queue *queue, PyObject *none) {
    (void)none;
    const struct ring *ring = ring_of(queue);
    return PyLong_FromVoidPtr(ring ? (void *)&ring->head : NULL);
}

static PyObject *queue_close(Queue *queue, PyObject *none) {
    (void)none;
    Py_BEGIN_ALLOW_THREADS
    tear_down(queue);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef queue_methods[] = {
    {"submit", (PyCFunction)queue_submit, METH_VARARGS,
        "submit(fd, [(offset, [slot, ...]), ...]) -> int: runs that the kernel took, from the first on"},
    {"submit_one", (PyCFunction)(void (*)(void))queue_submit_one, METH_FASTCALL,
        "submit_one(fd, offset, slot) -> bool: read one block; whether the kernel took the read"},
    {"reap", (PyCFunction)queue_reap, METH_NOARGS,
        "reap() -> [(slot, result), ...]: runs that have ended, by their first slot; bytes read or -errno"},
    {"slot", (PyCFunction)queue_slot, METH_O, "slot(number) -> memoryview: 4096 bytes; not to be used after close()"},
    {"fileno", (PyCFunction)queue_fileno, METH_NOARGS, "fileno() -> int: an eventfd that is readable when a run has ended"},
    {"ring", (PyCFunction)queue_ring, METH_NOARGS,
        "ring() -> int: address of two 32-bit numbers that differ while there is something to reap; 0: unknown"},
    {"close", (PyCFunction)queue_close, METH_NOARGS, "close(): wait for what is in flight and free everything"},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject queue_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "zbudfs.store._aio.Queue",
    .tp_basicsize = sizeof(Queue),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "Queue(nr_slots): reads that the kernel does beside this thread. OSError if the kernel refuses the queue.",
    .tp_new = queue_new,
    .tp_dealloc = (destructor)queue_dealloc,
    .tp_methods = queue_methods,
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_aio", "Reads with Linux AIO; see aio.c.", -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__aio(void);
PyMODINIT_FUNC PyInit__aio(void) {
    if (PyType_Ready(&queue_type) < 0) return NULL;
    PyObject *made = PyModule_Create(&module);
    if (made && PyModule_AddObjectRef(made, "Queue", (PyObject *)&queue_type) < 0) Py_CLEAR(made);
    return made;
}
