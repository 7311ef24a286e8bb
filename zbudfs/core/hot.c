// SPDX-License-Identifier: MIT
/* The hot path: the common case of a write, read and discard of a page, over the same tables as the Python code.

       Requests.write_nowait   -->  write(page, content, compress, state, between)
                                        one word repeated       -> its entry
                                        else compress -> match, or state.take_frame() -> copy -> commit -> free the old place
       Requests.read_nowait    -->  read(page, count, decompress)
                                        absent, word, zpage or raw page in a frame -> the bytes
       Requests.make_ready     -->  make_ready(decompress)
                                        the next page of a reader in order -> its bytes, kept beside a copy of its zpage
       Requests.discard        -->  discard(page, stop, most, state)
                                        commit -> free the old place

   The reference is `Allocator.match` / `create_prep` + `create_finish` / `free`, `State._commit` and `PageTable.store`. This file
   does the same steps in the same order. Tests run both and compare every byte of the tables. The steps of each packing are in
   hot_zbud.c and hot_dense.c, behind `struct packing` of hot.h; the rest, here, is the same for all packings. The caller passes
   python-zstandard's functions for the zstd calls. Rare cases go to methods of `state` (store/state.py), which handle them in
   Python within the same request:

       take_frame() -> frame or -1                give_frame(frame)         the pool
       put_word(page, word) -> stored             a word that does not fit an entry
       put(page, zpage, content) -> stored        a zpage that no frame can hold: the page is kept raw
       free_place(entry)                          an old place that is not a whole zpage in a persistent frame

   A rare case of a read goes to the caller: None says that Python must do the whole read. A page is then in a block, missing,
   damaged, or a word in a zpage. So this file never raises an error where Python would raise one with more details.

   Every index that comes from the tables is checked before it is used. A list of frames with wrong links is an AssertionError,
   and never a write to a wrong place. The order of stores matters, since a kill may come at any point. Zpage and handle are
   complete before the entry is stored, and the entry is stored before the old place is changed. A process that is killed has
   done all stores up to that point of the program. So it is enough that the compiler keeps the order.

   A large write takes a millisecond, and a reader would have to wait for it. So the write calls `between`, with the number of
   pages stored so far, after every page, when the tables are consistent. The daemon answers reads there.

   All of this runs on the thread that runs trio, with the GIL held except while zstd works. Code that calls Python reads the
   tables again after the call. */
#include "hot.h"

static PyObject *zero_page, *page_size, *name_now, *name_release, *name_take_frame, *name_give_frame, *name_put_word, *name_put,
    *name_free_place;

/* ---- calls of Python ------------------------------------------------------------------------------------------- */

/* Call state.NAME(...). The call takes over the references to the arguments; each may be NULL after an error. */
static PyObject *call(PyObject *state, PyObject *name, PyObject *one, PyObject *two, PyObject *three) {
    PyObject *arguments[] = {state, one, two, three};
    size_t count = three ? 4 : two ? 3 : one ? 2 : 1;
    PyObject *result = PyErr_Occurred() ? NULL : PyObject_VectorcallMethod(name, arguments, count, NULL);
    Py_XDECREF(one);
    Py_XDECREF(two);
    Py_XDECREF(three);
    return result;
}

/* Release a view that a call was given. Its memory will hold other data soon, so a callee that kept the view must not read it. */
static void let_go(PyObject *view) {
    if (Py_REFCNT(view) > 1) {
        PyObject *type, *value, *traceback;
        PyErr_Fetch(&type, &value, &traceback);
        PyObject *released = PyObject_CallMethodNoArgs(view, name_release);
        if (!released) PyErr_WriteUnraisable(view);
        Py_XDECREF(released);
        PyErr_Restore(type, value, traceback);
    }
    Py_DECREF(view);
}

/* ---- writing --------------------------------------------------------------------------------------------------- */

/* Take a free frame from the pool. 1; 0 if there is none; -1. */
static int take_frame(Hot *hot, PyObject *state, uint32_t *taken) {
    PyObject *number = call(state, name_take_frame, NULL, NULL, NULL);
    if (!number) return -1;
    long long frame = PyLong_AsLongLong(number);
    Py_DECREF(number);
    if (frame == -1) return PyErr_Occurred() ? -1 : 0;
    if (frame < 0 || (uint64_t)frame >= hot->nr_frames || hot->state[frame] != FREE || hot->owner[frame] || hot->pins[frame])
        return corrupt("not a free frame:", (uint64_t)frame);
    if (!hangs(&hot->lru, hot->nr_frames)) return corrupt("the LRU list at frame", (uint64_t)frame);
    *taken = (uint32_t)frame;
    return 1;
}

/* Store a zpage in a frame. No entry refers to it yet. 1; 0 if there is no frame for it; -1. */
static int place(Hot *hot, uint64_t page, const char *bytes, unsigned size, PyObject *state, uint32_t now, uint64_t *ref) {
    struct zpage zpage = {page, bytes, size};
    int placed = hot->packing->match(hot, &zpage, ref);
    if (!placed) {
        uint32_t frame;
        placed = take_frame(hot, state, &frame);
        if (placed > 0) placed = hot->packing->create(hot, frame, &zpage, ref);
        if (placed > 0) {
            hot->state[frame] = PERSISTENT;
            hot->counters[PAGEFRAMES]++;
            append(&hot->lru, (uint32_t)hot->nr_frames, frame);
        }
    }
    if (placed <= 0) return placed;
    hot->counters[HISTOGRAM + ((size + ROUND_UP) >> CHUNK_SHIFT)]++;
    hot->counters[ZPAGES]++;
    hot->counters[ZBYTES] += size;
    hot->counters[CUMUL_ZPAGES]++;
    hot->counters[CUMUL_ZBYTES] += size;
    hot->noted[*ref >> REF_BITS] = now;
    return 1;
}

/* Free a zpage in a persistent frame. 0, or -1. */
static int free_zpage(Hot *hot, uint32_t frame, unsigned index, unsigned size, PyObject *state) {
    if (!hangs(&hot->lru, frame)) return corrupt("the LRU list at frame", frame);
    int emptied = hot->packing->free(hot, frame, index, size);
    if (emptied < 0) return -1;
    hot->counters[ZPAGES]--;
    hot->counters[ZBYTES] -= size;
    hot->counters[HISTOGRAM + ((size + ROUND_UP) >> CHUNK_SHIFT)]--;
    if (!emptied) return 0;
    take_out(&hot->lru, frame);
    hot->state[frame] = FREE;
    hot->counters[PAGEFRAMES]--;
    return done(call(state, name_give_frame, PyLong_FromUnsignedLong(frame), NULL, NULL));
}

/* Commit `entry` as the state of the page, and free its old place. 1, or -1. */
static int commit(Hot *hot, uint64_t page, uint64_t entry, PyObject *state) {
    uint64_t old = hot->entries[page], frame = (old >> KIND_BITS & REF_MASK) >> REF_BITS;
    unsigned kind = old & KIND_MASK, index = old >> KIND_BITS & INDEX_MASK, size;
    if (!old) hot->touched[page >> STRETCH_SHIFT] = 1; /* first: a kill may come between the two stores */
    keep_order();
    __atomic_store_n(&hot->entries[page], entry, __ATOMIC_RELEASE);
    keep_order();
    hot->kinds[kind]--;
    hot->kinds[entry & KIND_MASK]++;
    if (old >> 63 && (kind == FRAME || kind == BLOCK)) hot->kinds[WORD_ZPAGES]--;
    if (kind < FRAME) return 1;
    if (kind == FRAME && frame < hot->nr_frames && hot->state[frame] == PERSISTENT && !hot->owner[frame]
        && hot->packing->find(hot, frame, index, page, &size))
        return free_zpage(hot, (uint32_t)frame, index, size, state) ? -1 : 1;
    return done(call(state, name_free_place, PyLong_FromUnsignedLongLong(old), NULL, NULL)) ? -1 : 1;
}

/* Return the entry of a page that is one word repeated; 0 if the word does not fit. */
static uint64_t entry_of_word(uint64_t word) {
    if (!(word >> (64 - KIND_BITS))) return word << KIND_BITS | WORD;
    if (!(~word >> (64 - KIND_BITS))) return ~word << KIND_BITS | WORD_INVERTED;
    if (word >> 32 == (word & 0xffffffff)) return word >> 32 << KIND_BITS | WORD_HALVES;
    return 0;
}

/* Store one page. 1; 0 if there is no frame for it; -1. */
static int put(Hot *hot, uint64_t page, const char *content, PyObject *compress, PyObject *state, uint32_t now) {
    if (!memcmp(content, content + sizeof(uint64_t), PAGE_SIZE - sizeof(uint64_t))) {
        uint64_t word, entry;
        memcpy(&word, content, sizeof word);
        if ((entry = entry_of_word(word))) return commit(hot, page, entry, state);
        return truth(call(state, name_put_word, PyLong_FromUnsignedLongLong(page), PyLong_FromUnsignedLongLong(word), NULL));
    }
    PyObject *view = PyMemoryView_FromMemory((char *)content, PAGE_SIZE, PyBUF_READ);
    if (!view) return -1;
    int stored;
    PyObject *zpage = PyObject_CallOneArg(compress, view);
    Py_ssize_t size = zpage && PyBytes_CheckExact(zpage) ? PyBytes_GET_SIZE(zpage) : 0;
    if (!zpage) {
        stored = -1;
    } else if (size >= 4 && size <= MAX_ZPAGE_SIZE && size != WORD_ZPAGE_SIZE) {
        const char *bytes = PyBytes_AS_STRING(zpage);
        const unsigned char *end = (const unsigned char *)bytes + size;
        uint64_t ref, check = (end[-4] | (uint64_t)end[-3] << 8 | (uint64_t)end[-2] << 16) & CHECKSUM_MASK;
        stored = place(hot, page, bytes, (unsigned)size, state, now, &ref);
        if (stored > 0) stored = commit(hot, page, check << CHECK_SHIFT | ref << KIND_BITS | FRAME, state);
    } else {
        stored = truth(call(state, name_put, PyLong_FromUnsignedLongLong(page), Py_NewRef(zpage), Py_NewRef(view)));
    }
    Py_XDECREF(zpage);
    let_go(view);
    return stored;
}

static int in_range(const Hot *hot, uint64_t page, uint64_t count) {
    if (page <= hot->nr_pages && count <= hot->nr_pages - page) return 1;
    PyErr_Format(PyExc_IndexError, "pages %llu .. %llu of %llu", (unsigned long long)page, (unsigned long long)(page + count),
        (unsigned long long)hot->nr_pages);
    return 0;
}

static PyObject *hot_write(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Hot *hot = (Hot *)self;
    if (nargs != 5) return PyErr_Format(PyExc_TypeError, "write(page, content, compress, state, between)");
    uint64_t page = PyLong_AsUnsignedLongLong(args[0]);
    if (PyErr_Occurred()) return NULL;
    PyObject *seconds = PyObject_GetAttr(args[3], name_now);
    uint32_t now = seconds ? (uint32_t)PyLong_AsUnsignedLong(seconds) : 0;
    Py_XDECREF(seconds);
    Py_buffer content;
    if (PyErr_Occurred() || PyObject_GetBuffer(args[1], &content, PyBUF_SIMPLE)) return NULL;
    uint64_t stored = 0, count = (uint64_t)content.len >> PAGE_SHIFT;
    int more = in_range(hot, page, count) ? 1 : -1;
    for (const char *at = content.buf; more > 0 && stored < count; at += PAGE_SIZE) {
        more = put(hot, page + stored, at, args[2], args[3], now);
        stored += more > 0;
        if (more > 0 && stored < count && done(call_function(args[4], PyLong_FromUnsignedLongLong(stored), NULL))) more = -1;
    }
    PyBuffer_Release(&content);
    return more < 0 ? NULL : PyLong_FromUnsignedLongLong(stored);
}

/* ---- discarding ------------------------------------------------------------------------------------------------ */

static PyObject *hot_discard(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Hot *hot = (Hot *)self;
    if (nargs != 4) return PyErr_Format(PyExc_TypeError, "discard(page, stop, most, state)");
    unsigned long long numbers[3], done = 0;
    for (int i = 0; i < 3; i++)
        if ((numbers[i] = PyLong_AsUnsignedLongLong(args[i])) == ~0ull && PyErr_Occurred()) return NULL;
    uint64_t page = numbers[0], stop = numbers[1];
    if (page > stop) stop = page;
    if (!in_range(hot, page, stop - page)) return NULL;
    for (; page < stop; page++) {
        if (!hot->entries[page]) {
            if (!hot->touched[page >> STRETCH_SHIFT]) page |= (1 << STRETCH_SHIFT) - 1; /* the whole stretch is absent */
            continue;
        }
        if (done == numbers[2]) break;
        if (commit(hot, page, ABSENT, args[3]) < 0) return NULL;
        done++;
    }
    if (page > stop) page = stop;
    return Py_BuildValue("KK", (unsigned long long)page, done);
}

/* ---- reading --------------------------------------------------------------------------------------------------- */

/* Return the 4096 bytes of the page whose zpage is at `ref`. NULL without an error if Python must do it; NULL with an error
   otherwise (KeyboardInterrupt, no memory for the view). */
PyObject *unpacked(const Hot *hot, uint64_t page, uint64_t ref, PyObject *decompress) {
    unsigned size;
    if (ref >> REF_BITS >= hot->nr_frames) return NULL;
    unsigned char *zpage = hot->packing->find(hot, ref >> REF_BITS, ref & INDEX_MASK, page, &size);
    if (!zpage || size == WORD_ZPAGE_SIZE || zpage[0] != DESCRIPTOR) return NULL;
    PyObject *view = PyMemoryView_FromMemory((char *)zpage, size, PyBUF_READ);
    if (!view) return NULL;
    PyObject *arguments[] = {view, page_size};
    PyObject *content = PyObject_Vectorcall(decompress, arguments, 2, NULL);
    let_go(view);
    if (content && PyBytes_CheckExact(content) && PyBytes_GET_SIZE(content) == PAGE_SIZE) return content;
    if (!content && PyErr_ExceptionMatches(PyExc_Exception)) PyErr_Clear(); /* Python raises it again with more details */
    Py_XDECREF(content);
    return NULL;
}

static void fill_with_word(unsigned char *to, uint64_t entry) {
    uint64_t payload = entry >> KIND_BITS;
    unsigned kind = entry & KIND_MASK;
    uint64_t word = kind == WORD_INVERTED ? ~payload
                    : kind == WORD_HALVES ? payload << 32 | payload
                    : kind == WORD        ? payload
                                          : 0;
    for (unsigned at = 0; at < PAGE_SIZE; at += sizeof word) memcpy(to + at, &word, sizeof word);
}

/* Return the content that was made ready for a page, if the page's zpage still has the bytes from which it was made. */
static const unsigned char *made_ready(const Hot *hot, uint64_t page, uint64_t ref) {
    const struct ready *ready = &hot->ready;
    uint64_t at = page - ready->first;
    unsigned size;
    if (at >= ready->done || !ready->sizes[at] || ref >> REF_BITS >= hot->nr_frames) return NULL;
    const unsigned char *zpage = hot->packing->find(hot, ref >> REF_BITS, ref & INDEX_MASK, page, &size);
    return zpage && size == ready->sizes[at] && !memcmp(zpage, ready->zpages[at], size) ? ready->contents[at] : NULL;
}

/* Copy the content of a page that is in RAM to `to`. 1; 0 if Python must do it; -1. */
static int get(Hot *hot, uint64_t page, PyObject *decompress, unsigned char *to) {
    uint64_t entry = hot->entries[page], ref = entry >> KIND_BITS & REF_MASK;
    switch (entry & KIND_MASK) {
    case FRAME: {
        const unsigned char *ready = made_ready(hot, page, ref);
        if (ready) {
            memcpy(to, ready, PAGE_SIZE);
            return 1;
        }
        PyObject *content = unpacked(hot, page, ref, decompress);
        if (!content) return PyErr_Occurred() ? -1 : 0;
        memcpy(to, PyBytes_AS_STRING(content), PAGE_SIZE);
        Py_DECREF(content);
        return 1;
    }
    case RAW_FRAME:
        if (ref >> REF_BITS >= hot->nr_frames) return 0;
        memcpy(to, hot->frames + (ref >> REF_BITS << PAGE_SHIFT), PAGE_SIZE);
        return 1;
    case BLOCK:
    case RAW_BLOCK:
        return 0;
    default:
        fill_with_word(to, entry);
        return 1;
    }
}

static PyObject *hot_read(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Hot *hot = (Hot *)self;
    if (nargs != 3) return PyErr_Format(PyExc_TypeError, "read(page, count, decompress)");
    uint64_t page = PyLong_AsUnsignedLongLong(args[0]);
    uint64_t count = PyErr_Occurred() ? 0 : PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred() || !in_range(hot, page, count)) return NULL;
    if (count == 1) {
        uint64_t entry = hot->entries[page];
        if ((entry & KIND_MASK) == ABSENT) return Py_NewRef(zero_page);
        if ((entry & KIND_MASK) == FRAME) { /* the result of zstd is returned without a copy */
            PyObject *content = unpacked(hot, page, entry >> KIND_BITS & REF_MASK, args[2]);
            return content || PyErr_Occurred() ? content : Py_NewRef(Py_None);
        }
    }
    for (uint64_t at = 0; at < count; at++)
        if ((hot->entries[page + at] & KIND_MASK) >= BLOCK) Py_RETURN_NONE; /* check all pages before any work */
    PyObject *contents = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(count << PAGE_SHIFT));
    if (!contents) return NULL;
    unsigned char *to = (unsigned char *)PyBytes_AS_STRING(contents);
    for (uint64_t at = 0; at < count; at++, to += PAGE_SIZE) {
        int got = get(hot, page + at, args[2], to);
        if (got > 0) continue;
        Py_DECREF(contents);
        return got < 0 ? NULL : Py_NewRef(Py_None);
    }
    hot->ready.first = page + count;
    hot->ready.done = 0;
    hot->ready.wanted = page != hot->read_until ? 0 : count < READY_PAGES ? (unsigned)count : READY_PAGES;
    hot->read_until = page + count;
    return contents;
}

/* Make one more page ready for a reader in order. */
static PyObject *hot_make_ready(PyObject *self, PyObject *decompress) {
    Hot *hot = (Hot *)self;
    struct ready *ready = &hot->ready;
    if (ready->done >= ready->wanted || ready->first + ready->done >= hot->nr_pages) Py_RETURN_FALSE;
    unsigned at = ready->done, size = 0;
    uint64_t page = ready->first + at, entry = hot->entries[page], ref = entry >> KIND_BITS & REF_MASK;
    ready->sizes[at] = 0;
    ready->done++;
    if ((entry & KIND_MASK) == FRAME) {
        PyObject *content = unpacked(hot, page, ref, decompress);
        if (!content && PyErr_Occurred()) return NULL;
        const unsigned char *zpage = content ? hot->packing->find(hot, ref >> REF_BITS, ref & INDEX_MASK, page, &size) : NULL;
        if (zpage) {
            memcpy(ready->zpages[at], zpage, size);
            memcpy(ready->contents[at], PyBytes_AS_STRING(content), PAGE_SIZE);
            ready->sizes[at] = size;
        }
        Py_XDECREF(content);
    }
    Py_RETURN_TRUE;
}

/* ---- the type -------------------------------------------------------------------------------------------------- */

static void hot_dealloc(PyObject *self) {
    Hot *hot = (Hot *)self;
    for (int i = 0; i < MOST_BUFFERS; i++)
        if (hot->buffers[i].obj) PyBuffer_Release(&hot->buffers[i]);
    Py_TYPE(self)->tp_free(self);
}

/* Take over one of the buffers, which must have room for `entries` entries of `width` bytes. 0, or -1. */
static int take_buffer(Hot *hot, int number, PyObject *given, uint64_t entries, unsigned width) {
    Py_buffer *buffer = &hot->buffers[number];
    if (PyObject_GetBuffer(given, buffer, PyBUF_WRITABLE)) return -1;
    if ((uint64_t)buffer->len >= entries * width && !((uintptr_t)buffer->buf & (width - 1))) return 0;
    PyErr_Format(PyExc_ValueError, "buffer %d has %zd bytes instead of %llu, or is not aligned", number, buffer->len,
        (unsigned long long)(entries * width));
    return -1;
}

static PyObject *hot_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static const struct packing *const packings[] = {&hot_zbud, &hot_dense};
    const Py_ssize_t numbers = 3, given = PyTuple_GET_SIZE(args) - numbers;
    if (given < OWN || kwargs) return PyErr_Format(PyExc_TypeError, "Hot(layout, most_zpages, nr_frames, buffers ...)");
    unsigned long layout = PyLong_AsUnsignedLong(PyTuple_GET_ITEM(args, 0)), most_zpages = 0;
    if (!PyErr_Occurred()) most_zpages = PyLong_AsUnsignedLong(PyTuple_GET_ITEM(args, 1));
    uint64_t n = PyErr_Occurred() ? 0 : PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(args, 2));
    if (PyErr_Occurred()) return NULL;
    const struct packing *packing = NULL;
    for (size_t i = 0; i < sizeof packings / sizeof *packings; i++)
        if (packings[i]->layout == layout && packings[i]->fewest_zpages <= most_zpages
            && most_zpages <= packings[i]->most_zpages)
            packing = packings[i];
    if (!packing) return PyErr_Format(PyExc_ValueError, "no packing has the layout %lu with %lu zpages", layout, most_zpages);
    if (n >= 1ull << 31) return PyErr_Format(PyExc_ValueError, "too many frames");
    int own = 0;
    while (own < OWN_COLUMNS && packing->own_widths[own]) own++;
    if (given != OWN + own + 1) return PyErr_Format(PyExc_TypeError, "%zd buffers instead of %d", given, OWN + own + 1);
    Hot *hot = (Hot *)type->tp_alloc(type, 0); /* the memory is zeroed */
    if (!hot) return NULL;
    const struct {
        uint64_t entries;
        unsigned width;
    } shared[OWN] = {{0, 8}, {TABLE_COUNTS, 8}, {n << PAGE_SHIFT >> 3, 8}, {n + 2, 4}, {n + 2, 4}, {n + 2 * NCHUNKS, 4},
        {n + 2 * NCHUNKS, 4}, {n, 4}, {n, 1}, {n, 1}, {COUNTERS, 8}, {n, 4}, {0, 1}};
    for (int i = 0; i < OWN; i++)
        if (take_buffer(hot, i, PyTuple_GET_ITEM(args, numbers + i), shared[i].entries, shared[i].width)) goto failed;
    uint64_t pages = (uint64_t)hot->buffers[ENTRIES].len / sizeof *hot->entries,
             stretches = (pages + (1 << STRETCH_SHIFT) - 1) >> STRETCH_SHIFT;
    if ((uint64_t)hot->buffers[TOUCHED].len < stretches) {
        PyErr_Format(PyExc_ValueError, "buffer %d has %zd bytes instead of %llu", TOUCHED, hot->buffers[TOUCHED].len,
            (unsigned long long)stretches);
        goto failed;
    }
    for (int i = 0; i < own; i++) {
        if (take_buffer(hot, OWN + i, PyTuple_GET_ITEM(args, numbers + OWN + i), n, packing->own_widths[i])) goto failed;
        hot->own[i] = hot->buffers[OWN + i].buf;
    }
    if (take_buffer(hot, OWN + own, PyTuple_GET_ITEM(args, numbers + OWN + own), packing->own_bytes / 8, 8)) goto failed;
    hot->own_bytes = hot->buffers[OWN + own].buf;
    hot->packing = packing;
    hot->most_zpages = (unsigned)most_zpages;
    hot->nr_frames = n;
    hot->entries = hot->buffers[ENTRIES].buf;
    hot->nr_pages = pages;
    hot->touched = hot->buffers[TOUCHED].buf;
    hot->kinds = hot->buffers[TABLE].buf;
    hot->frames = hot->buffers[FRAMES].buf;
    hot->lru = (struct rings){hot->buffers[LRU_NEXT].buf, hot->buffers[LRU_PREV].buf, n + 2};
    hot->bud = (struct rings){hot->buffers[BUD_NEXT].buf, hot->buffers[BUD_PREV].buf, n + 2 * NCHUNKS};
    hot->owner = hot->buffers[OWNER].buf;
    hot->state = hot->buffers[STATE].buf;
    hot->pins = hot->buffers[PINS].buf;
    hot->counters = hot->buffers[COUNTS].buf;
    hot->noted = hot->buffers[NOTED].buf;
    return (PyObject *)hot;
failed:
    Py_DECREF(hot);
    return NULL;
}

static PyMethodDef hot_methods[] = {
    {"write", (PyCFunction)(void (*)(void))hot_write, METH_FASTCALL,
        "write(page, content, compress, state, between) -> int: store whole pages, as many as there are frames for: how many"},
    {"discard", (PyCFunction)(void (*)(void))hot_discard, METH_FASTCALL,
        "discard(page, stop, most, state) -> (int, int): free up to so many stored pages: the page to go on at, and how many"},
    {"read", (PyCFunction)(void (*)(void))hot_read, METH_FASTCALL,
        "read(page, count, decompress) -> bytes | None: the contents of pages; None if Python must get them"},
    {"make_ready", hot_make_ready, METH_O,
        "make_ready(decompress) -> bool: one more page for a reader in order; False: there is none"},
    {"coldest", hot_coldest, METH_O, "coldest(most) -> list[int]: persistent frames that are not unevictable, coldest first"},
    {"evict", hot_evict, METH_O, "evict(frames): make persistent frames zombies"},
    {"written", hot_written, METH_O,
        "written(batch) -> bytes: zombies are in their blocks and free, by (frame, block): the live zpages of each block"},
    {"page_in", (PyCFunction)(void (*)(void))hot_page_in, METH_FASTCALL,
        "page_in(frame, content, block, live, {page: entry}, decompress) -> {page: content} | None: make a block an ephemeral "
        "frame, and read the wanted pages; None, without a change, if Python must do it"},
    {"adopt", (PyCFunction)(void (*)(void))hot_adopt, METH_FASTCALL,
        "adopt(frame, block, live) -> bool: a frame holds a copy of a block: let its live zpages be there"},
    {"drop", hot_drop, METH_NOARGS, "drop() -> int: free the coldest ephemeral frame, and which it is; -1 if there is none"},
    {"restore", (PyCFunction)(void (*)(void))hot_restore, METH_FASTCALL,
        "restore(ref, page) -> bool: after a crash, claim the zpage at a ref; False if it is not the page's or its place is "
        "taken"},
    {NULL, NULL, 0, NULL},
};

PyTypeObject hot_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "zbudfs.core._hot.Hot",
    .tp_doc =
        "Hot(layout, most_zpages, nr_frames, entries, kinds, frames, ...): the hot path over the tables of a store; see hot.c.",
    .tp_basicsize = sizeof(Hot),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = hot_new,
    .tp_dealloc = hot_dealloc,
    .tp_methods = hot_methods,
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_hot", "The hot path; see hot.c.", -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__hot(void);
PyMODINIT_FUNC PyInit__hot(void) {
    const struct {
        PyObject **name;
        const char *text;
    } names[] = {{&name_now, "now"}, {&name_release, "release"}, {&name_take_frame, "take_frame"},
        {&name_give_frame, "give_frame"}, {&name_put_word, "put_word"}, {&name_put, "put"}, {&name_free_place, "free_place"}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!*names[i].name && !(*names[i].name = PyUnicode_InternFromString(names[i].text))) return NULL;
    if (!page_size && !(page_size = PyLong_FromLong(PAGE_SIZE))) return NULL;
    if (!zero_page) {
        if (!(zero_page = PyBytes_FromStringAndSize(NULL, PAGE_SIZE))) return NULL;
        memset(PyBytes_AS_STRING(zero_page), 0, PAGE_SIZE);
    }
    PyObject *made = PyType_Ready(&hot_type) || PyType_Ready(&page_reads_type) ? NULL : PyModule_Create(&module);
    if (made
        && (PyModule_AddObjectRef(made, "Hot", (PyObject *)&hot_type)
            || PyModule_AddObjectRef(made, "PageReads", (PyObject *)&page_reads_type)))
        Py_CLEAR(made);
    return made;
}
