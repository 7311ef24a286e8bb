// SPDX-License-Identifier: MIT
/* The common part of the hot path (hot.c, hot_disk.c, hot_reads.c) and its packings (hot_zbud.c, hot_dense.c): tables, and steps of a list.

   A packing is a set of functions over the tables (`struct packing`). All packings share the steps of this file. Each step
   checks an index that comes from the tables before it uses it. It changes lists only after all checks. */
#ifndef ZBUDFS_HOT_H
#define ZBUDFS_HOT_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

/* These constants have the values of core/units.py, core/allocator.py, core/page_table.py and core/codec.py. */
enum {
    PAGE_SHIFT = 12,
    STRETCH_SHIFT = 9,
    PAGE_SIZE = 1 << PAGE_SHIFT,
    CHUNK_SHIFT = 6,
    CHUNK_SIZE = 1 << CHUNK_SHIFT,
    NCHUNKS = 64,
    HANDLE_SIZE = 8,
    ROUND_UP = HANDLE_SIZE + CHUNK_SIZE - 1,
    MAX_ZPAGE_SIZE = (NCHUNKS - 1) * CHUNK_SIZE - HANDLE_SIZE,
    MOST_ZPAGES = 7,
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
    CHECK_BITS_BELOW = 24, /* bits of the checksum in a check; the bit above them says that the zpage is a word */
};
#define REF_MASK ((1ull << 36) - 1)
enum { ABSENT, WORD, WORD_INVERTED, WORD_HALVES, FRAME, RAW_FRAME, BLOCK, RAW_BLOCK, WORD_ZPAGES, TABLE_COUNTS };
enum { FREE, PERSISTENT };
enum { FULL = 0 }; /* the number that replaces an unbuddied list for a frame without room, which is on none */

/* The allocator's counters: pairs of persistent and ephemeral, then a row of NCHUNKS for each. See `_map_counters` in Python. */
enum {
    MASK = 0,
    PAGEFRAMES = 2,
    ZPAGES = 4,
    ZBYTES = 6,
    CUMUL_ZPAGES = 8,
    CUMUL_ZBYTES = 10,
    BUDDIED = 12,
    UNBUDDIED_COUNT = 14,
    EVICTED = 16,
    ZOMBIES = 18,
    RAW_COUNT = 20,
    UNBUDDIED = 22,
    HISTOGRAM = UNBUDDIED + 2 * NCHUNKS,
    COUNTERS = HISTOGRAM + 2 * NCHUNKS,
};

/* The buffers in the order of the arguments. The packing's own columns follow, and then its own bytes. */
enum {
    ENTRIES,
    TABLE,
    FRAMES,
    LRU_NEXT,
    LRU_PREV,
    BUD_NEXT,
    BUD_PREV,
    OWNER,
    STATE,
    PINS,
    COUNTS,
    NOTED,
    TOUCHED,
    OWN,
    OWN_COLUMNS = 3
};
enum { MOST_BUFFERS = OWN + OWN_COLUMNS + 1 };

/* Lists as in core/lists.py: rings of indices through sentinels. All indices are below `nodes`. */
struct rings {
    uint32_t *next, *prev;
    uint64_t nodes;
};

struct packing;

/* Pages that a reader in order will request next, decompressed in an idle moment. Each is kept beside a copy of its zpage. It is
   valid only while the page's zpage has the same bytes as the copy. */
enum { READY_PAGES = 8 };
struct ready {
    uint64_t first; /* page number */
    unsigned wanted, done; /* numbers of pages */
    unsigned sizes[READY_PAGES]; /* of the zpages, in bytes; 0: the page is not ready */
    unsigned char zpages[READY_PAGES][MAX_ZPAGE_SIZE], contents[READY_PAGES][PAGE_SIZE];
};

typedef struct {
    PyObject_HEAD
    Py_buffer buffers[MOST_BUFFERS];
    const struct packing *packing;
    unsigned most_zpages;
    uint64_t *entries, nr_pages;
    unsigned char *touched; /* one byte for each stretch of the page table */
    int64_t *kinds; /* entries of each kind, then the words in zpages */
    unsigned char *frames, *state, *pins;
    struct rings lru, bud;
    uint32_t *owner;
    uint32_t *noted; /* of a persistent frame: time of the last store to it; of an ephemeral frame: its block */
    int64_t *counters;
    uint64_t nr_frames;
    void *own[OWN_COLUMNS]; /* the packing's own columns, by frame */
    unsigned char *own_bytes;
    uint64_t read_until; /* the page after the last read of several pages */
    struct ready ready;
} Hot;

/* A zpage to be stored. */
struct zpage {
    uint64_t page;
    const char *bytes;
    unsigned size;
};

/* The functions of a packing. -1 is an error that is set, without a change. The frames in the arguments exist, are persistent
   (except for `create`) and not raw. */
struct packing {
    unsigned layout; /* LAYOUT in Python */
    unsigned own_widths[OWN_COLUMNS]; /* OWN_WIDTHS: bytes of an entry of each column, 0 = none */
    unsigned own_bytes; /* OWN_BYTES */
    unsigned fewest_zpages, most_zpages;
    /* Store a zpage, with its handle, in the fullest frame with room for it, and set `ref`. 1; 0 if there is no room; -1. */
    int (*match)(Hot *hot, const struct zpage *zpage, uint64_t *ref);
    /* Store a zpage as the first one of a free frame, and set `ref`. 1; -1. */
    int (*create)(Hot *hot, uint32_t frame, const struct zpage *zpage, uint64_t *ref);
    /* Forget the zpage of `size` bytes whose handle `find` has checked. 1 if it was the last one of the frame, else 0; -1. */
    int (*free)(Hot *hot, uint32_t frame, unsigned index, unsigned size);
    /* Return the zpage of `page` and set `size`; NULL if no zpage is at this index, or its handle names another page. */
    unsigned char *(*find)(const Hot *hot, uint64_t frame, unsigned index, uint64_t page, unsigned *size);
    /* Return the mask of the indices in use, and the unbuddied list to which the frame belongs. */
    unsigned (*live)(const Hot *hot, uint64_t frame);
    unsigned (*list_of)(const Hot *hot, uint64_t frame);
    /* Return the page that the handle at an index names, whether or not a zpage is there. */
    uint64_t (*page_at)(const Hot *hot, uint64_t frame, unsigned index);
    /* Return whether the zpage of `size` bytes that `find` has found overlaps another zpage of its frame. */
    int (*overlaps)(const Hot *hot, uint64_t frame, unsigned index, unsigned size);
    /* Count the zpage of `size` bytes that `find` has found as stored. No other zpage is at this index. */
    void (*claim)(Hot *hot, uint64_t frame, unsigned index, unsigned size);
    void (*clear)(Hot *hot, uint64_t frame);
};
extern const struct packing hot_zbud, hot_dense;

/* This function is in hot.c. */
PyObject *unpacked(const Hot *hot, uint64_t page, uint64_t ref, PyObject *decompress);

/* These functions are in hot_disk.c. */
PyObject *hot_coldest(PyObject *self, PyObject *most);
PyObject *hot_evict(PyObject *self, PyObject *frames);
PyObject *hot_written(PyObject *self, PyObject *batch);
PyObject *hot_page_in(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *hot_adopt(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *hot_drop(PyObject *self, PyObject *none);
PyObject *hot_restore(PyObject *self, PyObject *const *args, Py_ssize_t nargs);

/* Do the same as `hot_page_in` for one wanted page, and return its content. NULL without an error if Python must do it. */
PyObject *page_in_one(Hot *hot, uint64_t frame, PyObject *content, uint64_t block, unsigned live, uint64_t page, uint64_t entry,
    PyObject *decompress);

extern PyTypeObject hot_type; /* in hot.c */
extern PyTypeObject page_reads_type; /* in hot_reads.c */

static inline void keep_order(void) { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

static inline int corrupt(const char *what, uint64_t number) {
    if (!PyErr_Occurred())
        PyErr_Format(PyExc_AssertionError, "the tables are damaged: %s %llu", what, (unsigned long long)number);
    return -1;
}

/* ---- calls of Python ------------------------------------------------------------------------------------------- */

/* Call a function, and take over the references to its arguments, each of which may be NULL after an error. */
static inline PyObject *call_function(PyObject *function, PyObject *one, PyObject *two) {
    PyObject *arguments[] = {one, two}, *result = NULL;
    if (!PyErr_Occurred()) result = PyObject_Vectorcall(function, arguments, two ? 2 : one ? 1 : 0, NULL);
    Py_XDECREF(one);
    Py_XDECREF(two);
    return result;
}

/* Return the truth value of the result of a call, or -1. */
static inline int truth(PyObject *result) {
    int yes = result ? PyObject_IsTrue(result) : -1;
    Py_XDECREF(result);
    return yes;
}

/* Release the result of a call. 0, or -1. */
static inline int done(PyObject *result) {
    Py_XDECREF(result);
    return result ? 0 : -1;
}

/* ---- lists ----------------------------------------------------------------------------------------------------- */

/* Return whether a node and its neighbours are linked correctly, so that the node can be removed, or another put beside it. */
static inline int hangs(const struct rings *rings, uint64_t node) {
    if (node >= rings->nodes) return 0;
    uint32_t after = rings->next[node], before = rings->prev[node];
    return after < rings->nodes && before < rings->nodes && rings->prev[after] == node && rings->next[before] == node;
}

static inline void take_out(struct rings *rings, uint32_t node) {
    uint32_t after = rings->next[node], before = rings->prev[node];
    rings->next[before] = after;
    rings->prev[after] = before;
}

static inline void append(struct rings *rings, uint32_t sentinel, uint32_t node) {
    uint32_t last = rings->prev[sentinel];
    rings->next[last] = node;
    rings->prev[node] = last;
    rings->next[node] = sentinel;
    rings->prev[sentinel] = node;
}

/* Put a frame on the unbuddied list of its kind for frames that use `used` chunks; if that is FULL, count it as buddied. */
static inline void enlist_of(Hot *hot, uint32_t frame, unsigned used, unsigned kind) {
    if (used == FULL) {
        hot->counters[BUDDIED + kind]++;
        return;
    }
    append(&hot->bud, (uint32_t)hot->nr_frames + kind * NCHUNKS + used, frame);
    if (!hot->counters[UNBUDDIED + kind * NCHUNKS + used]++) hot->counters[MASK + kind] |= (int64_t)(1ull << used);
    hot->counters[UNBUDDIED_COUNT + kind]++;
}

static inline void delist_of(Hot *hot, uint32_t frame, unsigned used, unsigned kind) {
    if (used == FULL) {
        hot->counters[BUDDIED + kind]--;
        return;
    }
    take_out(&hot->bud, frame);
    if (!--hot->counters[UNBUDDIED + kind * NCHUNKS + used]) hot->counters[MASK + kind] &= (int64_t)~(1ull << used);
    hot->counters[UNBUDDIED_COUNT + kind]--;
}

/* The same two functions for persistent frames. */
static inline void enlist(Hot *hot, uint32_t frame, unsigned used) { enlist_of(hot, frame, used, 0); }
static inline void delist(Hot *hot, uint32_t frame, unsigned used) { delist_of(hot, frame, used, 0); }

/* Return whether a frame can be taken off the unbuddied list `used`, and whether one can be put on it. */
static inline int can_delist(const Hot *hot, uint32_t frame, unsigned used) { return used == FULL || hangs(&hot->bud, frame); }
static inline int can_enlist(const Hot *hot, unsigned used) { return used == FULL || hangs(&hot->bud, hot->nr_frames + used); }

/* Find the fullest frame with room for `chunks` chunks, and its unbuddied list. 1; 0 if there is none; -1. */
static inline int find_room(const Hot *hot, unsigned chunks, uint32_t *found, unsigned *used) {
    uint64_t fitting = (uint64_t)hot->counters[MASK] & (~0ull >> (chunks - 1)) & ~1ull;
    if (!fitting) return 0;
    *used = 63u - (unsigned)__builtin_clzll(fitting);
    uint32_t frame = *found = hot->bud.next[hot->nr_frames + *used];
    if (frame >= hot->nr_frames || !hangs(&hot->bud, frame) || hot->counters[UNBUDDIED + *used] < 1)
        return corrupt("a list of unbuddied frames:", *used);
    if (!hangs(&hot->lru, frame) || !hangs(&hot->lru, hot->nr_frames)) return corrupt("the LRU list at frame", frame);
    if (hot->state[frame] != PERSISTENT || hot->owner[frame]) return corrupt("not an unbuddied frame:", frame);
    return 1;
}

/* Move a frame of `find_room`, in which a zpage was stored, from list `before` to list `used`, and make it the most recent. */
static inline void added(Hot *hot, uint32_t frame, unsigned before, unsigned used) {
    delist(hot, frame, before);
    enlist(hot, frame, used);
    if (hot->lru.next[frame] != hot->nr_frames) { /* it is not the most recent already */
        take_out(&hot->lru, frame);
        append(&hot->lru, (uint32_t)hot->nr_frames, frame);
    }
}

#endif
