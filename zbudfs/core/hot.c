// SPDX-License-Identifier: MIT
/* The hot path: the common case of a page's write and read, over the tables that Python works with as well.

       PageStore.write_nowait  -->  write(page, content, compress, state)
                                        one word repeated       -> its entry
                                        else compress -> match, or state.take_frame() -> copy -> commit -> free the old place
       PageStore.read_nowait   -->  read(page, count, decompress)
                                        absent, word, zpage or raw page in a frame -> the bytes

   This is `Zbud.match` / `create_prep` + `create_finish` / `free`, `State._commit` and `PageTable.store` once more, statement
   by statement and in the same order; those are the reference, and tests drive both and compare every byte of the tables. The
   zstd calls are python-zstandard's here too. What this knows nothing of it leaves to methods of `state` (store/state.py), which
   do it in Python, within the same request:

       take_frame() -> frame or -1                give_frame(frame)         the pool
       put_word(page, word) -> stored             a word that does not fit an entry
       put(page, zpage, content) -> stored        a zpage that no buddy can be: the page is kept raw
       free_place(entry)                          an old place that is not a zpage in a persistent frame of its own

   or, for a read, to the caller: None says that Python must do all of it, since something is in a block, or missing, or
   damaged, or a word in a zpage. So no error is raised here that Python would raise with more to say.

   Every index that comes from the tables is looked at before it is used: a list of frames that does not hang together is an
   AssertionError and never a write to somewhere else. The order of stores matters for a kill at any point: zpage and handle are
   complete before the entry is stored, and the entry is stored before anything of the old place is touched. A process that
   is killed has done what stands before in its program; so all that is needed is that the compiler keeps the order.

   All of this runs on the one thread that runs trio, with the GIL held, but while zstd works. Whatever was looked up before
   a call out is looked up again after it. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

/* As in core/units.py, core/allocator.py, core/page_table.py, core/codec.py. */
enum {
    PAGE_SHIFT = 12,
    PAGE_SIZE = 1 << PAGE_SHIFT,
    CHUNK_SHIFT = 6,
    NCHUNKS = 64,
    HANDLE_SIZE = 8,
    ROUND_UP = HANDLE_SIZE + (1 << CHUNK_SHIFT) - 1,
    MAX_ZPAGE_SIZE = (NCHUNKS - 1) * (1 << CHUNK_SHIFT) - HANDLE_SIZE,
    WORD_ZPAGE_SIZE = 12,
    DESCRIPTOR = 4,
    SIZE_BITS = 12,
    SIZE_MASK = (1 << SIZE_BITS) - 1,
    REF_BITS = 3,
    INDEX_MASK = (1 << REF_BITS) - 1,
    KIND_BITS = 3,
    KIND_MASK = (1 << KIND_BITS) - 1,
    CHECK_SHIFT = 39,
    CHECKSUM_MASK = (1 << 24) - 1,
};
#define REF_MASK ((1ull << 36) - 1)
enum { ABSENT, WORD, WORD_INVERTED, WORD_HALVES, FRAME, RAW_FRAME, BLOCK, RAW_BLOCK, WORD_ZPAGES, TABLE_COUNTS };
enum { FREE, PERSISTENT };

/* The allocator's counters: pairs of persistent and ephemeral, then a row of NCHUNKS for either. `_map_counters` in Python. */
enum {
    MASK = 0,
    PAGEFRAMES = 2,
    ZPAGES = 4,
    ZBYTES = 6,
    CUMUL_ZPAGES = 8,
    CUMUL_ZBYTES = 10,
    BUDDIED = 12,
    UNBUDDIED_COUNT = 14,
    UNBUDDIED = 22,
    HISTOGRAM = UNBUDDIED + 2 * NCHUNKS,
    COUNTERS = HISTOGRAM + 2 * NCHUNKS,
};

/* The buffers, in the order in which they are given. */
enum { ENTRIES, TABLE, FRAMES, LRU_NEXT, LRU_PREV, BUD_NEXT, BUD_PREV, OWNER, STATE, FIRST, LAST, COUNTS, STORED_AT, NR_BUFFERS };

/* Lists as in core/lists.py: rings of indices through sentinels, all below `nodes`. */
struct rings {
    uint32_t *next, *prev;
    uint64_t nodes;
};

typedef struct {
    PyObject_HEAD
    Py_buffer buffers[NR_BUFFERS];
    uint64_t *entries, nr_pages;
    int64_t *kinds; /* by kind of entry, then the words in zpages */
    unsigned char *frames, *state, *first, *last;
    struct rings lru, bud;
    uint32_t *owner, *stored_at;
    int64_t *counters;
    uint64_t nr_frames;
} Hot;

static PyObject *zero_page, *page_size, *name_now, *name_release, *name_take_frame, *name_give_frame, *name_put_word, *name_put,
    *name_free_place;

static inline void keep_order(void) { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

static int corrupt(const char *what, uint64_t number) {
    if (!PyErr_Occurred()) PyErr_Format(PyExc_AssertionError, "the tables are damaged: %s %llu", what, (unsigned long long)number);
    return -1;
}

/* ---- lists ----------------------------------------------------------------------------------------------------- */

/* Whether a node and its neighbours are where they say: then it can be taken out, or another be put beside it. */
static int hangs(const struct rings *rings, uint64_t node) {
    if (node >= rings->nodes) return 0;
    uint32_t after = rings->next[node], before = rings->prev[node];
    return after < rings->nodes && before < rings->nodes && rings->prev[after] == node && rings->next[before] == node;
}

static void take_out(struct rings *rings, uint32_t node) {
    uint32_t after = rings->next[node], before = rings->prev[node];
    rings->next[before] = after;
    rings->prev[after] = before;
}

static void append(struct rings *rings, uint32_t sentinel, uint32_t node) {
    uint32_t last = rings->prev[sentinel];
    rings->next[last] = node;
    rings->prev[node] = last;
    rings->next[node] = sentinel;
    rings->prev[sentinel] = node;
}

/* The persistent frames' unbuddied list of frames that use so many chunks. */
static void link_unbuddied(Hot *hot, uint32_t frame, unsigned used) {
    append(&hot->bud, (uint32_t)hot->nr_frames + used, frame);
    if (!hot->counters[UNBUDDIED + used]++) hot->counters[MASK] |= (int64_t)(1ull << used);
    hot->counters[UNBUDDIED_COUNT]++;
}

static void unlink_unbuddied(Hot *hot, uint32_t frame, unsigned used) {
    take_out(&hot->bud, frame);
    if (!--hot->counters[UNBUDDIED + used]) hot->counters[MASK] &= (int64_t)~(1ull << used);
    hot->counters[UNBUDDIED_COUNT]--;
}

/* ---- calls of Python ------------------------------------------------------------------------------------------- */

/* state.NAME(...), taking over the references to the arguments, any of which may be NULL after an error. */
static PyObject *call(PyObject *state, PyObject *name, PyObject *one, PyObject *two, PyObject *three) {
    PyObject *arguments[] = {state, one, two, three};
    size_t count = three ? 4 : two ? 3 : one ? 2 : 1;
    PyObject *result = PyErr_Occurred() ? NULL : PyObject_VectorcallMethod(name, arguments, count, NULL);
    Py_XDECREF(one);
    Py_XDECREF(two);
    Py_XDECREF(three);
    return result;
}

/* What a call returned as truth, or -1. */
static int truth(PyObject *result) {
    int yes = result ? PyObject_IsTrue(result) : -1;
    Py_XDECREF(result);
    return yes;
}

static int done(PyObject *result) {
    Py_XDECREF(result);
    return result ? 0 : -1;
}

/* The views that a call was given are of memory that will be something else soon: whoever kept one must not see that. */
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

/* A free frame for a zpage of so many chunks, which is linked as if it were stored already. 1, 0 if there is none, -1. */
static int take_frame(Hot *hot, PyObject *state, unsigned chunks, uint32_t *taken) {
    PyObject *number = call(state, name_take_frame, NULL, NULL, NULL);
    if (!number) return -1;
    long long frame = PyLong_AsLongLong(number);
    Py_DECREF(number);
    if (frame == -1) return PyErr_Occurred() ? -1 : 0;
    if (frame < 0 || (uint64_t)frame >= hot->nr_frames || hot->state[frame] != FREE || hot->owner[frame] || hot->first[frame] || hot->last[frame])
        return corrupt("not a free frame:", (uint64_t)frame);
    if (!hangs(&hot->lru, hot->nr_frames) || !hangs(&hot->bud, hot->nr_frames + chunks)) return corrupt("a list of unbuddied frames:", chunks);
    hot->state[frame] = PERSISTENT;
    hot->counters[PAGEFRAMES]++;
    append(&hot->lru, (uint32_t)hot->nr_frames, (uint32_t)frame);
    link_unbuddied(hot, (uint32_t)frame, chunks);
    *taken = (uint32_t)frame;
    return 1;
}

/* The fullest frame with room for so many chunks, which becomes a buddied one and the most recent. 1, 0 if there is none, -1. */
static int match(Hot *hot, unsigned chunks, uint32_t *matched) {
    uint64_t fitting = (uint64_t)hot->counters[MASK] & (~0ull >> (chunks - 1)) & ~1ull;
    if (!fitting) return 0;
    unsigned used = 63u - (unsigned)__builtin_clzll(fitting);
    uint64_t sentinel = hot->nr_frames + used;
    uint32_t frame = hot->bud.next[sentinel];
    if (frame >= hot->nr_frames || !hangs(&hot->bud, frame) || hot->counters[UNBUDDIED + used] < 1)
        return corrupt("a list of unbuddied frames:", used);
    if (!hangs(&hot->lru, frame) || !hangs(&hot->lru, hot->nr_frames)) return corrupt("the LRU list at frame", frame);
    if (hot->state[frame] != PERSISTENT || hot->owner[frame] || hot->first[frame] + hot->last[frame] != (int)used ||
        (hot->first[frame] && hot->last[frame]))
        return corrupt("not an unbuddied frame:", frame);
    unlink_unbuddied(hot, frame, used);
    hot->counters[BUDDIED]++;
    if (hot->lru.next[frame] != hot->nr_frames) { /* not the most recent already */
        take_out(&hot->lru, frame);
        append(&hot->lru, (uint32_t)hot->nr_frames, frame);
    }
    *matched = frame;
    return 1;
}

static uint64_t *handle_of(Hot *hot, uint64_t frame, unsigned last) {
    return (uint64_t *)(void *)(hot->frames + (last ? ((frame + 1) << PAGE_SHIFT) - HANDLE_SIZE : frame << PAGE_SHIFT));
}

/* Where the zpage of so many chunks is. */
static unsigned char *zpage_at(Hot *hot, uint64_t frame, unsigned last, unsigned chunks) {
    return hot->frames + (last ? ((frame + 1) << PAGE_SHIFT) - (chunks << CHUNK_SHIFT) : (frame << PAGE_SHIFT) + HANDLE_SIZE);
}

/* Store a zpage in a frame, complete with its handle; nothing refers to it yet. 1, 0 if there is no frame for it, -1. */
static int place(Hot *hot, uint64_t page, const char *zpage, unsigned size, PyObject *state, uint32_t now, uint64_t *ref) {
    unsigned chunks = (size + ROUND_UP) >> CHUNK_SHIFT;
    uint32_t frame = 0;
    int found = match(hot, chunks, &frame);
    if (!found) found = take_frame(hot, state, chunks, &frame);
    if (found <= 0) return found;
    unsigned last = hot->first[frame] != 0;
    memcpy(zpage_at(hot, frame, last, chunks), zpage, size);
    *handle_of(hot, frame, last) = page << SIZE_BITS | size;
    (last ? hot->last : hot->first)[frame] = (unsigned char)chunks;
    hot->counters[HISTOGRAM + chunks]++;
    hot->counters[ZPAGES]++;
    hot->counters[ZBYTES] += size;
    hot->counters[CUMUL_ZPAGES]++;
    hot->counters[CUMUL_ZBYTES] += size;
    hot->stored_at[frame] = now;
    *ref = (uint64_t)frame << REF_BITS | last;
    return 1;
}

/* A zpage in a persistent frame is wanted no more. */
static int free_zpage(Hot *hot, uint32_t frame, unsigned last, PyObject *state) {
    unsigned char *mine = last ? hot->last : hot->first, *others = last ? hot->first : hot->last;
    unsigned chunks = mine[frame], other = others[frame];
    if (!chunks || chunks >= NCHUNKS || other >= NCHUNKS) return corrupt("the chunks of frame", frame);
    if (other ? !hangs(&hot->bud, hot->nr_frames + other) : !hangs(&hot->bud, frame) || !hangs(&hot->lru, frame))
        return corrupt("a list at frame", frame);
    mine[frame] = 0;
    hot->counters[ZPAGES]--;
    hot->counters[ZBYTES] -= (int64_t)(*handle_of(hot, frame, last) & SIZE_MASK);
    hot->counters[HISTOGRAM + chunks]--;
    if (other) {
        hot->counters[BUDDIED]--;
        link_unbuddied(hot, frame, other);
        return 0;
    }
    unlink_unbuddied(hot, frame, chunks);
    take_out(&hot->lru, frame);
    hot->state[frame] = FREE;
    hot->counters[PAGEFRAMES]--;
    return done(call(state, name_give_frame, PyLong_FromUnsignedLong(frame), NULL, NULL));
}

/* The page is from now on what the entry says, and its old place is free. 1, or -1. */
static int commit(Hot *hot, uint64_t page, uint64_t entry, PyObject *state) {
    uint64_t old = hot->entries[page], frame = (old >> KIND_BITS & REF_MASK) >> REF_BITS;
    unsigned kind = old & KIND_MASK, index = old >> KIND_BITS & INDEX_MASK;
    keep_order();
    __atomic_store_n(&hot->entries[page], entry, __ATOMIC_RELEASE);
    keep_order();
    hot->kinds[kind]--;
    hot->kinds[entry & KIND_MASK]++;
    if (old >> 63 && (kind == FRAME || kind == BLOCK)) hot->kinds[WORD_ZPAGES]--;
    if (kind < FRAME) return 1;
    if (kind == FRAME && frame < hot->nr_frames && index < 2 && hot->state[frame] == PERSISTENT && !hot->owner[frame])
        return free_zpage(hot, (uint32_t)frame, index, state) ? -1 : 1;
    return done(call(state, name_free_place, PyLong_FromUnsignedLongLong(old), NULL, NULL)) ? -1 : 1;
}

/* The entry of a page that is one word repeated; 0 if the word does not fit. */
static uint64_t entry_of_word(uint64_t word) {
    if (!(word >> (64 - KIND_BITS))) return word << KIND_BITS | WORD;
    if (!(~word >> (64 - KIND_BITS))) return ~word << KIND_BITS | WORD_INVERTED;
    if (word >> 32 == (word & 0xffffffff)) return word >> 32 << KIND_BITS | WORD_HALVES;
    return 0;
}

/* Store one page. 1, 0 if there is no frame for it, -1. */
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
    if (nargs != 4) return PyErr_Format(PyExc_TypeError, "write(page, content, compress, state)");
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
    }
    PyBuffer_Release(&content);
    return more < 0 ? NULL : PyLong_FromUnsignedLongLong(stored);
}

/* ---- reading --------------------------------------------------------------------------------------------------- */

/* The 4096 bytes of the page whose zpage is at `ref`; NULL, without an error unless it is not for Python to tell, if that is
   not so. */
static PyObject *unpacked(Hot *hot, uint64_t page, uint64_t ref, PyObject *decompress) {
    uint64_t frame = ref >> REF_BITS;
    unsigned index = ref & INDEX_MASK;
    if (frame >= hot->nr_frames || index > 1) return NULL;
    uint64_t handle = *handle_of(hot, frame, index);
    unsigned size = handle & SIZE_MASK;
    if (handle >> SIZE_BITS != page || !size || size > MAX_ZPAGE_SIZE || size == WORD_ZPAGE_SIZE) return NULL;
    unsigned char *zpage = zpage_at(hot, frame, index, (size + ROUND_UP) >> CHUNK_SHIFT);
    if (zpage[0] != DESCRIPTOR) return NULL;
    PyObject *view = PyMemoryView_FromMemory((char *)zpage, size, PyBUF_READ);
    if (!view) return NULL;
    PyObject *arguments[] = {view, page_size};
    PyObject *content = PyObject_Vectorcall(decompress, arguments, 2, NULL);
    let_go(view);
    if (content && PyBytes_CheckExact(content) && PyBytes_GET_SIZE(content) == PAGE_SIZE) return content;
    if (!content && PyErr_ExceptionMatches(PyExc_Exception)) PyErr_Clear(); /* Python comes by it again, and says more */
    Py_XDECREF(content);
    return NULL;
}

static void fill_with_word(unsigned char *to, uint64_t entry) {
    uint64_t payload = entry >> KIND_BITS;
    unsigned kind = entry & KIND_MASK;
    uint64_t word = kind == WORD_INVERTED ? ~payload : kind == WORD_HALVES ? payload << 32 | payload : kind == WORD ? payload : 0;
    for (unsigned at = 0; at < PAGE_SIZE; at += sizeof word) memcpy(to + at, &word, sizeof word);
}

/* Put the content of a page that is in RAM at `to`. 1, 0 if Python must do it, -1. */
static int get(Hot *hot, uint64_t page, PyObject *decompress, unsigned char *to) {
    uint64_t entry = hot->entries[page], ref = entry >> KIND_BITS & REF_MASK;
    switch (entry & KIND_MASK) {
    case FRAME: {
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
        if ((entry & KIND_MASK) == FRAME) { /* without another copy */
            PyObject *content = unpacked(hot, page, entry >> KIND_BITS & REF_MASK, args[2]);
            return content || PyErr_Occurred() ? content : Py_NewRef(Py_None);
        }
    }
    for (uint64_t at = 0; at < count; at++)
        if ((hot->entries[page + at] & KIND_MASK) >= BLOCK) Py_RETURN_NONE; /* before any work is done */
    PyObject *contents = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(count << PAGE_SHIFT));
    if (!contents) return NULL;
    unsigned char *to = (unsigned char *)PyBytes_AS_STRING(contents);
    for (uint64_t at = 0; at < count; at++, to += PAGE_SIZE) {
        int got = get(hot, page + at, args[2], to);
        if (got > 0) continue;
        Py_DECREF(contents);
        return got < 0 ? NULL : Py_NewRef(Py_None);
    }
    return contents;
}

/* ---- the type -------------------------------------------------------------------------------------------------- */

static void hot_dealloc(PyObject *self) {
    Hot *hot = (Hot *)self;
    for (int i = 0; i < NR_BUFFERS; i++)
        if (hot->buffers[i].obj) PyBuffer_Release(&hot->buffers[i]);
    Py_TYPE(self)->tp_free(self);
}

static PyObject *hot_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    if (PyTuple_GET_SIZE(args) != 1 + NR_BUFFERS || kwargs) return PyErr_Format(PyExc_TypeError, "Hot(nr_frames, %d buffers)", NR_BUFFERS);
    uint64_t n = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(args, 0));
    if (PyErr_Occurred()) return NULL;
    if (n >= 1ull << 31) return PyErr_Format(PyExc_ValueError, "too many frames");
    uint64_t lru_bytes = 4 * (n + 2), bud_bytes = 4 * (n + 2 * NCHUNKS);
    uint64_t needed[] = {0, 8 * TABLE_COUNTS, n << PAGE_SHIFT, lru_bytes, lru_bytes, bud_bytes, bud_bytes, 4 * n, n, n, n, 8 * COUNTERS, 4 * n};
    Hot *hot = (Hot *)type->tp_alloc(type, 0); /* zeroed */
    if (!hot) return NULL;
    for (int i = 0; i < NR_BUFFERS; i++) {
        Py_buffer *buffer = &hot->buffers[i];
        if (PyObject_GetBuffer(PyTuple_GET_ITEM(args, 1 + i), buffer, PyBUF_WRITABLE)) goto failed;
        int bytes = i == STATE || i == FIRST || i == LAST;
        if ((uint64_t)buffer->len < needed[i] || (!bytes && (uintptr_t)buffer->buf & (i <= FRAMES || i == COUNTS ? 7 : 3))) {
            PyErr_Format(PyExc_ValueError, "buffer %d has %zd bytes instead of %llu, or is not aligned", i, buffer->len, (unsigned long long)needed[i]);
            goto failed;
        }
    }
    hot->nr_frames = n;
    hot->entries = hot->buffers[ENTRIES].buf;
    hot->nr_pages = (uint64_t)hot->buffers[ENTRIES].len / sizeof *hot->entries;
    hot->kinds = hot->buffers[TABLE].buf;
    hot->frames = hot->buffers[FRAMES].buf;
    hot->lru = (struct rings){hot->buffers[LRU_NEXT].buf, hot->buffers[LRU_PREV].buf, n + 2};
    hot->bud = (struct rings){hot->buffers[BUD_NEXT].buf, hot->buffers[BUD_PREV].buf, n + 2 * NCHUNKS};
    hot->owner = hot->buffers[OWNER].buf;
    hot->state = hot->buffers[STATE].buf;
    hot->first = hot->buffers[FIRST].buf;
    hot->last = hot->buffers[LAST].buf;
    hot->counters = hot->buffers[COUNTS].buf;
    hot->stored_at = hot->buffers[STORED_AT].buf;
    return (PyObject *)hot;
failed:
    Py_DECREF(hot);
    return NULL;
}

static PyMethodDef hot_methods[] = {
    {"write", (PyCFunction)(void (*)(void))hot_write, METH_FASTCALL,
     "write(page, content, compress, state) -> int: store whole pages, as many as there are frames for: how many"},
    {"read", (PyCFunction)(void (*)(void))hot_read, METH_FASTCALL,
     "read(page, count, decompress) -> bytes | None: the contents of pages; None if Python must get them"},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject hot_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "zbudfs.core._hot.Hot",
    .tp_doc = "Hot(nr_frames, entries, kinds, frames, ...): the hot path over the tables of a store; see hot.c.",
    .tp_basicsize = sizeof(Hot),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = hot_new,
    .tp_dealloc = hot_dealloc,
    .tp_methods = hot_methods,
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_hot", "The hot path; see hot.c.", -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__hot(void);
PyMODINIT_FUNC PyInit__hot(void) {
    const struct {
        PyObject **name;
        const char *text;
    } names[] = {{&name_now, "now"},
                 {&name_release, "release"},
                 {&name_take_frame, "take_frame"},
                 {&name_give_frame, "give_frame"},
                 {&name_put_word, "put_word"},
                 {&name_put, "put"},
                 {&name_free_place, "free_place"}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!*names[i].name && !(*names[i].name = PyUnicode_InternFromString(names[i].text))) return NULL;
    if (!page_size && !(page_size = PyLong_FromLong(PAGE_SIZE))) return NULL;
    if (!zero_page) {
        if (!(zero_page = PyBytes_FromStringAndSize(NULL, PAGE_SIZE))) return NULL;
        memset(PyBytes_AS_STRING(zero_page), 0, PAGE_SIZE);
    }
    PyObject *made = PyType_Ready(&hot_type) ? NULL : PyModule_Create(&module);
    if (made && PyModule_AddObjectRef(made, "Hot", (PyObject *)&hot_type)) Py_CLEAR(made);
    return made;
}
