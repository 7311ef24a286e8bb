// SPDX-License-Identifier: MIT
/* The most frequent page-in: a read request of one page whose zpage is in a block, while nothing else reads the block.

       AioPageIn._begin_page   -->  begin(key, page, now)     hold the block, submit its read
       AioPageIn._finish_page  -->  finish(slot, result)      decrypt, copy into a frame, confirm, decompress, answer, release

   It does the steps of store/aio_page_in.py, in the same order. Between the two functions the block is held by its live bit HOLD
   alone. Everything else goes to Python: `begin` and `finish` return False, and Python takes the read over with `take(slot)`. It
   does so, too, when another request needs the block.

   No argument of these functions is older than a checkpoint. `finish` reads the tables again: the page may have changed. */
#include "hot.h"
#include "latency.h"
#include <stddef.h>
#include <structmember.h>

enum {
    MOST_SLOTS = 256, /* as in store/aio.c */
    HOLD = 1 << MOST_ZPAGES, /* HOLD_INDEX of store/state.py */
    SEGMENT_SHIFT = 6, /* SEGMENT_BLOCKS of core/block_map.py */
};
enum { LIVE, WRITTEN_AT, LATENCIES, COUNTER_WORDS, TABLES };
enum { SUBMIT, TAKE_FRAME, DECRYPT, DECOMPRESS, CALLS };
enum { PAGEIN_BLOCKS, REFAULT_BLOCKS, READ_PAGES, PAGEIN_PAGES, COUNTED };

/* A read in flight. `key` is NULL while the slot has none. */
struct page_read {
    PyObject *key;
    uint64_t page, entry, block;
    long long began; /* in nanoseconds of the monotonic clock */
    long long frame; /* the frame for the block, which is free; -1 before */
};

typedef struct {
    PyObject_HEAD
    Hot *hot;
    PyObject *free, *slots, *calls[CALLS], *reply;
    Py_buffer tables[TABLES];
    unsigned char *live;
    uint32_t *written_at;
    unsigned long long *latencies;
    uint64_t *counters[COUNTED], start;
    struct page_read reads[MOST_SLOTS];
} PageReads;

/* Return the read in the slot of this number; NULL, with an error, for no number of a slot. */
static struct page_read *read_of(PageReads *self, PyObject *slot) {
    long number = PyLong_AsLong(slot);
    if (number >= 0 && number < MOST_SLOTS) return &self->reads[number];
    if (!PyErr_Occurred()) PyErr_Format(PyExc_IndexError, "there is no slot %ld", number);
    return NULL;
}

/* Submit the read of a block into a slot. 1; 0 if the kernel did not take it; -1. */
static int submit(const PageReads *self, uint64_t block, PyObject *slot) {
    PyObject *offset = PyLong_FromUnsignedLongLong(self->start + (block << PAGE_SHIFT));
    return truth(call_function(self->calls[SUBMIT], offset, Py_NewRef(slot)));
}

/* Begin to answer a read of one page. False: nothing was begun, and Python looks what the page needs. */
static PyObject *reads_begin(PageReads *self, PyObject *const *args, Py_ssize_t nargs) {
    const Hot *hot = self->hot;
    if (nargs != 3) return PyErr_Format(PyExc_TypeError, "begin(key, page, now)");
    uint64_t page = PyLong_AsUnsignedLongLong(args[1]), now = PyErr_Occurred() ? 0 : PyLong_AsUnsignedLongLong(args[2]);
    if (PyErr_Occurred()) return NULL;
    if (page >= hot->nr_pages) Py_RETURN_FALSE;
    uint64_t entry = hot->entries[page], block = (entry >> KIND_BITS & REF_MASK) >> REF_BITS;
    Py_ssize_t last = PyList_GET_SIZE(self->free) - 1;
    if ((entry & KIND_MASK) != BLOCK || block >= (uint64_t)self->tables[LIVE].len || self->live[block] & HOLD || last < 0)
        Py_RETURN_FALSE;
    PyObject *slot = Py_NewRef(PyList_GET_ITEM(self->free, last));
    struct page_read *read = read_of(self, slot);
    if (read && read->key) corrupt("the read in slot", (uint64_t)(read - self->reads));
    int begun = PyErr_Occurred() || PyList_SetSlice(self->free, last, last + 1, NULL) ? -1 : submit(self, block, slot);
    if (begun > 0) {
        *read = (struct page_read){Py_NewRef(args[0]), page, entry, block, now_ns(), -1};
        self->live[block] |= HOLD;
        ++*self->counters[PAGEIN_BLOCKS];
        if (now < self->written_at[block >> SEGMENT_SHIFT]) ++*self->counters[REFAULT_BLOCKS];
    } else if (!begun && PyList_Append(self->free, slot)) {
        begun = -1;
    }
    Py_DECREF(slot);
    return begun < 0 ? NULL : PyBool_FromLong(begun);
}

/* Take a frame for a block that was read, and decrypt the block in its slot. 1; 0 if there is no frame; -1. */
static int decrypted(const PageReads *self, struct page_read *read, PyObject *view) {
    PyObject *number = call_function(self->calls[TAKE_FRAME], NULL, NULL);
    if (!number) return -1;
    long long frame = PyLong_AsLongLong(number);
    Py_DECREF(number);
    if (frame == -1) return PyErr_Occurred() ? -1 : 0;
    read->frame = frame;
    PyObject *block = PyLong_FromUnsignedLongLong(read->block);
    return done(call_function(self->calls[DECRYPT], block, PyTuple_Pack(1, view))) ? -1 : 1;
}

/* Finish a read that the kernel has completed. False: the slot has no read, or Python must finish it. */
static PyObject *reads_finish(PageReads *self, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 2) return PyErr_Format(PyExc_TypeError, "finish(slot, result)");
    struct page_read *read = read_of(self, args[0]);
    long long result = read ? PyLong_AsLongLong(args[1]) : 0;
    if (PyErr_Occurred()) return NULL;
    if (!read->key || result != PAGE_SIZE) Py_RETURN_FALSE;
    const long long ended = now_ns();
    PyObject *view = PyList_GetItem(self->slots, read - self->reads);
    int ready = view ? decrypted(self, read, view) : -1;
    if (ready <= 0) return ready ? NULL : Py_NewRef(Py_False);
    unsigned live = self->live[read->block] & (HOLD - 1u);
    PyObject *content = page_in_one(
        self->hot, (uint64_t)read->frame, view, read->block, live, read->page, read->entry, self->calls[DECOMPRESS]);
    if (!content) return PyErr_Occurred() ? NULL : Py_NewRef(Py_False);
    record(self->latencies, (unsigned long long)(ended - read->began));
    self->live[read->block] = (unsigned char)live; /* the page itself is live, so the block is not free */
    ++*self->counters[READ_PAGES];
    ++*self->counters[PAGEIN_PAGES];
    PyObject *key = read->key;
    read->key = NULL;
    int failed = PyList_Append(self->free, args[0]);
    if (done(call_function(self->reply, key, content))) failed = -1;
    return failed ? NULL : Py_NewRef(Py_True);
}

/* Give a read to Python, and forget it. None: the slot has none. */
static PyObject *reads_take(PageReads *self, PyObject *slot) {
    struct page_read *read = read_of(self, slot);
    if (!read) return NULL;
    if (!read->key) Py_RETURN_NONE;
    PyObject *key = read->key;
    read->key = NULL;
    return Py_BuildValue("NKKKLL", key, (unsigned long long)read->page, (unsigned long long)read->entry,
        (unsigned long long)read->block, read->began, read->frame);
}

/* Return the reads in flight. */
static PyObject *reads_in_flight(PageReads *self, PyObject *Py_UNUSED(none)) {
    PyObject *found = PyList_New(0);
    for (long slot = 0; found && slot < MOST_SLOTS; slot++) {
        const struct page_read *read = &self->reads[slot];
        if (!read->key) continue;
        PyObject *one = Py_BuildValue("lKL", slot, (unsigned long long)read->block, read->began);
        if (!one || PyList_Append(found, one)) Py_CLEAR(found);
        Py_XDECREF(one);
    }
    return found;
}

/* The functions that this object calls belong to the store that owns it, so only the garbage collector can free both. */
static int reads_traverse(PageReads *self, visitproc visit, void *arg) {
    for (int i = 0; i < CALLS; i++) Py_VISIT(self->calls[i]);
    for (int i = 0; i < MOST_SLOTS; i++) Py_VISIT(self->reads[i].key);
    Py_VISIT(self->hot);
    Py_VISIT(self->free);
    Py_VISIT(self->slots);
    Py_VISIT(self->reply);
    return 0;
}

static int reads_clear(PageReads *self) {
    for (int i = 0; i < CALLS; i++) Py_CLEAR(self->calls[i]);
    for (int i = 0; i < MOST_SLOTS; i++) Py_CLEAR(self->reads[i].key);
    Py_CLEAR(self->hot);
    Py_CLEAR(self->free);
    Py_CLEAR(self->slots);
    Py_CLEAR(self->reply);
    return 0;
}

static void reads_dealloc(PageReads *self) {
    PyObject_GC_UnTrack(self);
    for (int i = 0; i < TABLES; i++)
        if (self->tables[i].obj) PyBuffer_Release(&self->tables[i]);
    reads_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *reads_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    PyObject *hot, *tables[TABLES], *calls[CALLS], *free, *slots;
    unsigned long long start, numbers[COUNTED];
    if (kwargs) return PyErr_Format(PyExc_TypeError, "PageReads takes no keywords");
    if (!PyArg_ParseTuple(args, "O!(OOOO)(KKKK)(OOOO)O!O!K", &hot_type, &hot, &tables[LIVE], &tables[WRITTEN_AT],
            &tables[LATENCIES], &tables[COUNTER_WORDS], &numbers[0], &numbers[1], &numbers[2], &numbers[3], &calls[0],
            &calls[1], &calls[2], &calls[3], &PyList_Type, &free, &PyList_Type, &slots, &start))
        return NULL;
    PageReads *self = (PageReads *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    static const size_t widths[TABLES] = {1, 4, 8, 8};
    for (int i = 0; i < TABLES; i++) {
        if (PyObject_GetBuffer(tables[i], &self->tables[i], PyBUF_WRITABLE)) goto failed;
        if ((uintptr_t)self->tables[i].buf % widths[i]) {
            PyErr_Format(PyExc_ValueError, "table %d is not aligned", i);
            goto failed;
        }
    }
    const uint64_t words = (uint64_t)self->tables[COUNTER_WORDS].len / 8, segments = (uint64_t)self->tables[WRITTEN_AT].len / 4;
    if ((uint64_t)self->tables[LIVE].len > segments << SEGMENT_SHIFT || self->tables[LATENCIES].len < ROW_WORDS * 8) {
        PyErr_SetString(PyExc_ValueError, "a table is too short");
        goto failed;
    }
    for (int i = 0; i < COUNTED; i++) {
        if (numbers[i] >= words) {
            PyErr_Format(PyExc_ValueError, "there is no counter %llu", numbers[i]);
            goto failed;
        }
        self->counters[i] = (uint64_t *)self->tables[COUNTER_WORDS].buf + numbers[i];
    }
    for (int i = 0; i < CALLS; i++) self->calls[i] = Py_NewRef(calls[i]);
    self->hot = (Hot *)Py_NewRef(hot);
    self->free = Py_NewRef(free);
    self->slots = Py_NewRef(slots);
    self->reply = Py_NewRef(Py_None);
    self->live = self->tables[LIVE].buf;
    self->written_at = self->tables[WRITTEN_AT].buf;
    self->latencies = self->tables[LATENCIES].buf;
    self->start = start;
    return (PyObject *)self;
failed:
    Py_DECREF(self);
    return NULL;
}

static PyMethodDef reads_methods[] = {
    {"begin", (PyCFunction)(void (*)(void))reads_begin, METH_FASTCALL,
        "begin(key, page, now) -> bool: begin to answer a read of one page; False: nothing was begun"},
    {"finish", (PyCFunction)(void (*)(void))reads_finish, METH_FASTCALL,
        "finish(slot, result) -> bool: finish a completed read; False: the slot has none, or Python must finish it"},
    {"take", (PyCFunction)reads_take, METH_O,
        "take(slot) -> (key, page, entry, block, began, frame) | None: give a read to Python; frame -1: it is not decrypted "
        "yet"},
    {"in_flight", (PyCFunction)reads_in_flight, METH_NOARGS, "in_flight() -> [(slot, block, began), ...]: reads in flight"},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef reads_members[] = {
    {"reply", T_OBJECT_EX, offsetof(PageReads, reply), 0, "reply(key, content): the function that answers a request"},
    {NULL, 0, 0, 0, NULL},
};

PyTypeObject page_reads_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "zbudfs.core._hot.PageReads",
    .tp_doc = "PageReads(hot, tables, counters, calls, free, slots, start): reads of single pages; see hot_reads.c.",
    .tp_basicsize = sizeof(PageReads),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = reads_new,
    .tp_dealloc = (destructor)reads_dealloc,
    .tp_traverse = (traverseproc)reads_traverse,
    .tp_clear = (inquiry)reads_clear,
    .tp_methods = reads_methods,
    .tp_members = reads_members,
};
