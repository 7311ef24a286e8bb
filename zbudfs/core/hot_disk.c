// SPDX-License-Identifier: MIT
/* The hot path to the backing file and back: the steps for each frame of a batch, over the same tables.

       State.begin_writeback   -->  coldest(most), evict(frames)     persistent frames become zombies
       State.finish_writeback  -->  written(batch)                   their pages are in blocks from now on, the frames are free
       State.page_in           -->  page_in(frame, content, block, live, wanted, decompress)    a block becomes an ephemeral frame
       State.adopt             -->  adopt(frame, block, live)        the same for a frame that Python has filled
       State.drop_ephemeral    -->  drop()                           its pages are in its block again, the frame is free
       rebuild                 -->  restore(ref, page)               a new worker claims the zpages that the page table names

   It does the steps of core/allocator.py and store/state.py, for any packing, in the same order. An entry is stored when the
   form that it names is complete, and before the old form is given up. Blocks and the pool's free frames stay with Python. No
   argument of these functions is older than a checkpoint: each call reads from the tables which pages are in a frame, and where
   they are. Each function checks a whole frame before it changes any of it. */
#include "hot.h"

enum { EPHEMERAL = 2, ZOMBIE = 3 };
enum { PERS = 0, EPH = 1 }; /* PERSISTENT_KIND and EPHEMERAL_KIND of core/allocator.py */

/* A zpage of a frame, or the raw page that the frame holds. */
struct resident {
    uint64_t page;
    unsigned index, size;
};

/* Read the zpages of a frame at the indices of a mask, and return their number. -1, without an error, if the entry of one of
   their pages does not say that it is there.
   `where` is the ref of index 0 that entries give, in a frame or a block. */
static int residents(const Hot *hot, uint64_t frame, unsigned mask, uint64_t where, unsigned kind, struct resident *found) {
    int count = 0;
    for (unsigned index = 0; index < MOST_ZPAGES; index++) {
        if (!(mask >> index & 1)) continue;
        struct resident *here = &found[count++];
        *here = (struct resident){hot->packing->page_at(hot, frame, index), index, 0};
        if (here->page >= hot->nr_pages || !hot->packing->find(hot, frame, index, here->page, &here->size)) return -1;
        uint64_t entry = hot->entries[here->page];
        if ((entry & KIND_MASK) != kind || (entry >> KIND_BITS & REF_MASK) != (where | index)) return -1;
    }
    return count;
}

/* Read the zpages, or the raw page, that the allocator has in a frame of the pool, and return their number. -1 with an error. */
static int all_residents(const Hot *hot, uint64_t frame, struct resident *found) {
    uint64_t where = frame << REF_BITS;
    int count = 1;
    if (!hot->owner[frame]) {
        unsigned mask = hot->packing->live(hot, frame);
        count = mask >> hot->most_zpages ? -1 : residents(hot, frame, mask, where, FRAME, found);
    } else {
        *found = (struct resident){hot->owner[frame] - 1u, 0, 0};
        uint64_t entry = found->page < hot->nr_pages ? hot->entries[found->page] : ABSENT;
        if ((entry & KIND_MASK) != RAW_FRAME || (entry >> KIND_BITS & REF_MASK) != where) count = -1;
    }
    return count < 0 ? corrupt("what is in frame", frame) : count;
}

/* Commit a ref in a frame or a block as the place of the page; the check of its entry stays. */
static void move(Hot *hot, uint64_t page, unsigned kind, uint64_t ref) {
    uint64_t old = hot->entries[page];
    keep_order();
    __atomic_store_n(&hot->entries[page], old >> CHECK_SHIFT << CHECK_SHIFT | ref << KIND_BITS | kind, __ATOMIC_RELEASE);
    keep_order();
    hot->kinds[old & KIND_MASK]--;
    hot->kinds[kind]++;
}

/* Commit the pages of a frame as pages of its block, and return the mask of their indices. */
static unsigned move_to_block(Hot *hot, uint32_t frame, const struct resident *found, int count, uint64_t block) {
    unsigned live = 0, kind = hot->owner[frame] ? RAW_BLOCK : BLOCK;
    for (int i = 0; i < count; i++) {
        move(hot, found[i].page, kind, block << REF_BITS | found[i].index);
        live |= 1u << found[i].index;
    }
    return live;
}

/* Free a frame of this kind that is on no list, and to which no entry refers. */
static void forget(Hot *hot, uint32_t frame, unsigned kind, const struct resident *found, int count) {
    if (hot->owner[frame]) {
        hot->owner[frame] = 0;
        hot->counters[RAW_COUNT + kind]--;
    } else {
        for (int i = 0; i < count; i++) {
            hot->counters[ZPAGES + kind]--;
            hot->counters[ZBYTES + kind] -= found[i].size;
            hot->counters[HISTOGRAM + kind * NCHUNKS + ((found[i].size + ROUND_UP) >> CHUNK_SHIFT)]--;
        }
        hot->packing->clear(hot, frame);
    }
    hot->counters[EVICTED + kind]++;
    hot->counters[PAGEFRAMES + kind]--;
    hot->state[frame] = FREE;
}

/* Return whether a frame has this state and can be taken off its lists. */
static int can_leave(const Hot *hot, uint64_t frame, unsigned state) {
    if (frame >= hot->nr_frames || hot->state[frame] != state || hot->pins[frame] || !hangs(&hot->lru, frame)) return 0;
    return hot->owner[frame] || can_delist(hot, (uint32_t)frame, hot->packing->list_of(hot, frame));
}

static void leave_lists(Hot *hot, uint32_t frame, unsigned kind) {
    take_out(&hot->lru, frame);
    if (!hot->owner[frame]) delist_of(hot, frame, hot->packing->list_of(hot, frame), kind);
}

/* Return the first frame of a list, from this node on, that is not unevictable. A result >= nr_frames stands for none. */
static uint64_t evictable(const Hot *hot, uint64_t node) {
    while (node < hot->nr_frames && hot->pins[node]) node = hot->lru.next[node];
    return node;
}

/* ---- to the backing file ----------------------------------------------------------------------------------------- */

PyObject *hot_coldest(PyObject *self, PyObject *most) {
    Hot *hot = (Hot *)self;
    uint64_t wanted = PyLong_AsUnsignedLongLong(most);
    PyObject *found = PyErr_Occurred() ? NULL : PyList_New(0);
    uint64_t node = hot->lru.next[hot->nr_frames + PERS];
    for (uint64_t steps = 0; found && wanted--; node = hot->lru.next[node]) {
        if ((node = evictable(hot, node)) >= hot->nr_frames) break;
        PyObject *number = PyLong_FromUnsignedLongLong(node);
        if (steps++ > hot->nr_frames) corrupt("the LRU list at frame", node);
        if (!number || PyErr_Occurred() || PyList_Append(found, number)) Py_CLEAR(found);
        Py_XDECREF(number);
    }
    return found;
}

PyObject *hot_evict(PyObject *self, PyObject *frames) {
    Hot *hot = (Hot *)self;
    PyObject *all = PySequence_Tuple(frames);
    for (Py_ssize_t i = 0; all && i < PyTuple_GET_SIZE(all); i++) {
        uint64_t frame = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(all, i));
        if (PyErr_Occurred() || (!can_leave(hot, frame, PERSISTENT) && corrupt("not an evictable frame:", frame))) {
            Py_CLEAR(all);
            break;
        }
        hot->state[frame] = ZOMBIE;
        leave_lists(hot, (uint32_t)frame, PERS);
        hot->counters[ZOMBIES + PERS]++;
    }
    Py_XDECREF(all);
    return all ? Py_NewRef(Py_None) : NULL;
}

/* Free a zombie that is written to this block. Return the mask of the block's live zpages, or -1. */
static int written(Hot *hot, uint64_t frame, uint64_t block) {
    struct resident found[MOST_ZPAGES];
    if (frame >= hot->nr_frames || hot->state[frame] != ZOMBIE || block > REF_MASK >> REF_BITS)
        return corrupt("not a zombie:", frame);
    int count = all_residents(hot, frame, found);
    if (count < 0) return -1;
    unsigned live = move_to_block(hot, (uint32_t)frame, found, count, block);
    hot->counters[ZOMBIES + PERS]--;
    forget(hot, (uint32_t)frame, PERS, found, count);
    return (int)live;
}

PyObject *hot_written(PyObject *self, PyObject *batch) {
    PyObject *pairs = PySequence_Tuple(batch);
    PyObject *lives = pairs ? PyBytes_FromStringAndSize(NULL, PyTuple_GET_SIZE(pairs)) : NULL;
    for (Py_ssize_t i = 0; lives && i < PyTuple_GET_SIZE(pairs); i++) {
        PyObject *pair = PyTuple_GET_ITEM(pairs, i);
        unsigned long long frame, block;
        int live = -1;
        if (!PyTuple_Check(pair)) PyErr_Format(PyExc_TypeError, "written([(frame, block), ...])");
        else if (PyArg_ParseTuple(pair, "KK", &frame, &block)) live = written((Hot *)self, frame, block);
        if (live < 0) Py_CLEAR(lives);
        else PyBytes_AS_STRING(lives)[i] = (char)live;
    }
    Py_XDECREF(pairs);
    return lives;
}

/* ---- from the backing file --------------------------------------------------------------------------------------- */

/* Return whether the check of a page's entry is the check of this zpage, as `check_of` in Python computes it. */
static int is_checked(uint64_t entry, const unsigned char *zpage, unsigned size) {
    const unsigned char *end = zpage + size;
    uint64_t check = size < 4 ? 0 : (end[-4] | (uint64_t)end[-3] << 8 | (uint64_t)end[-2] << 16) & CHECKSUM_MASK;
    return size >= 4 && entry >> CHECK_SHIFT == (check | (uint64_t)(size == WORD_ZPAGE_SIZE) << CHECK_BITS_BELOW);
}

/* Read the live zpages of a block from its copy in a frame, and return their number. 0: none is live, or one does not have the
   handle and the check of its page's entry. */
static int confirmed(const Hot *hot, uint64_t frame, uint64_t block, unsigned long live, struct resident *found) {
    int count = residents(hot, frame, (unsigned)live, block << REF_BITS, BLOCK, found);
    for (int i = 0; i < count; i++) {
        unsigned size;
        unsigned char *zpage = hot->packing->find(hot, frame, found[i].index, found[i].page, &size);
        if (!is_checked(hot->entries[found[i].page], zpage, size)) return 0;
    }
    return count < 0 ? 0 : count;
}

/* Commit the confirmed zpages of a block as zpages of its copy. The frame is on the LRU list and on no other. 0, or -1. */
static int adopt(Hot *hot, uint32_t frame, uint64_t block, const struct resident *found, int count) {
    for (int i = 0; i < count; i++) {
        hot->packing->claim(hot, frame, found[i].index, found[i].size);
        hot->counters[HISTOGRAM + EPH * NCHUNKS + ((found[i].size + ROUND_UP) >> CHUNK_SHIFT)]++;
        hot->counters[ZPAGES + EPH]++;
        hot->counters[ZBYTES + EPH] += found[i].size;
        hot->counters[CUMUL_ZPAGES + EPH]++;
        hot->counters[CUMUL_ZBYTES + EPH] += found[i].size;
    }
    unsigned used = hot->packing->list_of(hot, frame);
    if (used != FULL && !hangs(&hot->bud, hot->nr_frames + NCHUNKS + used)) return corrupt("a list of unbuddied frames:", used);
    enlist_of(hot, frame, used, EPH);
    hot->noted[frame] = (uint32_t)block;
    for (int i = 0; i < count; i++) move(hot, found[i].page, FRAME, (uint64_t)frame << REF_BITS | found[i].index);
    return 0;
}

/* Return the content of a page from the copy of its block in a frame. NULL without an error if Python must read it: its entry has
   changed meanwhile, or its zpage is a word or damaged. */
static PyObject *content_of(
    const Hot *hot, uint64_t frame, uint64_t block, uint64_t page, uint64_t entry, PyObject *decompress) {
    uint64_t ref = entry >> KIND_BITS & REF_MASK;
    if (page >= hot->nr_pages || hot->entries[page] != entry || (entry & KIND_MASK) != BLOCK || ref >> REF_BITS != block)
        return NULL;
    return unpacked(hot, page, frame << REF_BITS | (ref & INDEX_MASK), decompress);
}

/* Return the contents of the wanted pages, {page: content}, like `content_of`. */
static PyObject *contents_of(const Hot *hot, uint64_t frame, uint64_t block, PyObject *wanted, PyObject *decompress) {
    PyObject *contents = PyDict_New(), *key, *value;
    for (Py_ssize_t at = 0; contents && PyDict_Next(wanted, &at, &key, &value);) {
        uint64_t page = PyLong_AsUnsignedLongLong(key), entry = PyErr_Occurred() ? 0 : PyLong_AsUnsignedLongLong(value);
        PyObject *content = PyErr_Occurred() ? NULL : content_of(hot, frame, block, page, entry, decompress);
        if (!content || PyDict_SetItem(contents, key, content)) Py_CLEAR(contents);
        Py_XDECREF(content);
    }
    return contents;
}

/* Copy a block into a free frame, and confirm its live zpages. Return their number, 0 if one is not confirmed, or -1. */
static int copied(const Hot *hot, uint64_t frame, PyObject *bytes, uint64_t block, unsigned long live, struct resident *found) {
    Py_buffer content;
    if (PyErr_Occurred() || PyObject_GetBuffer(bytes, &content, PyBUF_SIMPLE)) return -1;
    int right = content.len == PAGE_SIZE && frame < hot->nr_frames && hot->state[frame] == FREE && !hot->owner[frame]
                && !hot->pins[frame] && hangs(&hot->lru, hot->nr_frames + EPH) && !(live >> hot->most_zpages)
                && block <= UINT32_MAX;
    if (right) memcpy(hot->frames + (frame << PAGE_SHIFT), content.buf, PAGE_SIZE);
    PyBuffer_Release(&content);
    return right ? confirmed(hot, frame, block, live, found) : corrupt("not a free frame, or not a block:", frame);
}

/* Make a frame with the confirmed copy of a block ephemeral. Return `contents`, which is NULL with an error after a failure. */
static PyObject *kept(Hot *hot, uint64_t frame, uint64_t block, const struct resident *found, int count, PyObject *contents) {
    hot->state[frame] = EPHEMERAL;
    hot->counters[PAGEFRAMES + EPH]++;
    append(&hot->lru, (uint32_t)hot->nr_frames + EPH, (uint32_t)frame);
    if (adopt(hot, (uint32_t)frame, block, found, count)) Py_CLEAR(contents);
    return contents;
}

PyObject *page_in_one(Hot *hot, uint64_t frame, PyObject *content, uint64_t block, unsigned live, uint64_t page, uint64_t entry,
    PyObject *decompress) {
    struct resident found[MOST_ZPAGES];
    int count = copied(hot, frame, content, block, live, found);
    PyObject *wanted = count > 0 ? content_of(hot, frame, block, page, entry, decompress) : NULL;
    return wanted ? kept(hot, frame, block, found, count, wanted) : NULL;
}

/* Copy a block into a free frame, and commit its live zpages as zpages of this ephemeral frame. Return the contents of the wanted
   pages, whose entries when the read began are given. None, without a change, if Python must do it. */
PyObject *hot_page_in(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Hot *hot = (Hot *)self;
    struct resident found[MOST_ZPAGES];
    if (nargs != 6 || !PyDict_Check(args[4]))
        return PyErr_Format(PyExc_TypeError, "page_in(frame, content, block, live, {page: entry}, decompress)");
    uint64_t frame = PyLong_AsUnsignedLongLong(args[0]);
    uint64_t block = PyErr_Occurred() ? 0 : PyLong_AsUnsignedLongLong(args[2]);
    unsigned long live = PyErr_Occurred() ? 0 : PyLong_AsUnsignedLong(args[3]);
    int count = copied(hot, frame, args[1], block, live, found);
    PyObject *contents = count > 0 ? contents_of(hot, frame, block, args[4], args[5]) : NULL;
    if (contents) return kept(hot, frame, block, found, count, contents);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

PyObject *hot_adopt(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Hot *hot = (Hot *)self;
    struct resident found[MOST_ZPAGES];
    if (nargs != 3) return PyErr_Format(PyExc_TypeError, "adopt(frame, block, live)");
    uint64_t frame = PyLong_AsUnsignedLongLong(args[0]);
    uint64_t block = PyErr_Occurred() ? 0 : PyLong_AsUnsignedLongLong(args[1]);
    unsigned long live = PyErr_Occurred() ? 0 : PyLong_AsUnsignedLong(args[2]);
    if (PyErr_Occurred()) return NULL;
    if (frame >= hot->nr_frames || hot->state[frame] != EPHEMERAL || !hot->pins[frame] || hot->owner[frame]
        || hot->packing->live(hot, frame) || live >> hot->most_zpages || block > UINT32_MAX) {
        corrupt("not a frame to be filled:", frame);
        return NULL;
    }
    int count = confirmed(hot, frame, block, live, found);
    if (!count) Py_RETURN_FALSE;
    hot->pins[frame]--;
    return adopt(hot, (uint32_t)frame, block, found, count) ? NULL : Py_NewRef(Py_True);
}

PyObject *hot_drop(PyObject *self, PyObject *Py_UNUSED(none)) {
    Hot *hot = (Hot *)self;
    struct resident found[MOST_ZPAGES];
    uint64_t frame = evictable(hot, hot->lru.next[hot->nr_frames + EPH]);
    if (frame >= hot->nr_frames) return PyLong_FromLong(-1);
    if (!can_leave(hot, frame, EPHEMERAL)) {
        corrupt("not an ephemeral frame:", frame);
        return NULL;
    }
    int count = all_residents(hot, frame, found);
    if (count < 0) return NULL;
    leave_lists(hot, (uint32_t)frame, EPH);
    move_to_block(hot, (uint32_t)frame, found, count, hot->noted[frame]);
    forget(hot, (uint32_t)frame, EPH, found, count);
    return PyLong_FromUnsignedLongLong(frame);
}

/* ---- after a crash ------------------------------------------------------------------------------------------------ */

PyObject *hot_restore(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Hot *hot = (Hot *)self;
    if (nargs != 2) return PyErr_Format(PyExc_TypeError, "restore(ref, page)");
    uint64_t ref = PyLong_AsUnsignedLongLong(args[0]), page = PyErr_Occurred() ? 0 : PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred()) return NULL;
    uint64_t frame = ref >> REF_BITS;
    unsigned index = ref & INDEX_MASK, size;
    if (frame >= hot->nr_frames || index >= hot->most_zpages || hot->owner[frame]
        || !hot->packing->find(hot, frame, index, page, &size) || hot->packing->overlaps(hot, frame, index, size))
        Py_RETURN_FALSE;
    hot->packing->claim(hot, frame, index, size);
    hot->counters[HISTOGRAM + PERS * NCHUNKS + ((size + ROUND_UP) >> CHUNK_SHIFT)]++;
    hot->counters[ZPAGES + PERS]++;
    hot->counters[ZBYTES + PERS] += size;
    Py_RETURN_TRUE;
}
