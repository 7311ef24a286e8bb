// SPDX-License-Identifier: MIT
/* The packing `dense` of the hot path: up to seven zpages to a frame.

   It does the steps of `Dense.match`, `create_prep` + `create_finish`, `zpage`, `free` and `_compact` of core/dense.py. That file
   describes the layout, and the state that a kill in the middle of a compaction leaves. */
#include "hot.h"

enum {
    LAYOUT = 0xD1,
    OFFSET_SHIFT = SIZE_BITS,
    PAGE_NUMBER_SHIFT = 2 * SIZE_BITS,
};
#define MARK ((uint64_t)LAYOUT << 32) /* the bits above the page number in a handle */
#define UNDO (0x756E646Full << 32)

/* The columns, by frame. */
static uint16_t *used_of(const Hot *hot) { return hot->own[0]; } /* bytes of its zpages */
static uint16_t *tail_of(const Hot *hot) { return hot->own[1]; } /* where the tail starts */
static unsigned char *live_of(const Hot *hot) { return hot->own[2]; } /* mask of the indices in use */

static unsigned start_of(const Hot *hot) { return HANDLE_SIZE * hot->most_zpages; }
static unsigned all_live(const Hot *hot) { return (1u << hot->most_zpages) - 1; }
static unsigned chunks_for(unsigned size) { return (size + CHUNK_SIZE - 1) >> CHUNK_SHIFT; }

static uint64_t *handles_of(const Hot *hot, uint64_t frame) {
    return (uint64_t *)(void *)(hot->frames + (frame << PAGE_SHIFT));
}
static unsigned size_in(uint64_t handle) { return handle & SIZE_MASK; }
static unsigned offset_in(uint64_t handle) { return handle >> OFFSET_SHIFT & SIZE_MASK; }

/* Return the end of the room that is in use. Only the tail of an unevictable frame is free; other frames have free holes too. */
static unsigned end_of(const Hot *hot, uint32_t frame) {
    return hot->pins[frame] ? tail_of(hot)[frame] : start_of(hot) + used_of(hot)[frame];
}

/* Return the unbuddied list of a frame with these indices in use and this end. */
static unsigned list_for(const Hot *hot, unsigned live, unsigned end) {
    return live == all_live(hot) || chunks_for(end) >= NCHUNKS ? FULL : chunks_for(end);
}

/* Return whether the columns of a frame are consistent. */
static int sound(const Hot *hot, uint32_t frame) {
    unsigned live = live_of(hot)[frame], tail = tail_of(hot)[frame];
    return live && live <= all_live(hot) && tail <= PAGE_SIZE && start_of(hot) + used_of(hot)[frame] <= tail;
}

/* Store a zpage at the tail, and return its ref. */
static uint64_t put_in(Hot *hot, uint32_t frame, const struct zpage *zpage) {
    unsigned live = live_of(hot)[frame], offset = tail_of(hot)[frame], index = (unsigned)__builtin_ctz(~live);
    memcpy(hot->frames + ((uint64_t)frame << PAGE_SHIFT) + offset, zpage->bytes, zpage->size);
    handles_of(hot, frame)[index] = (MARK | zpage->page) << PAGE_NUMBER_SHIFT | (uint64_t)offset << OFFSET_SHIFT | zpage->size;
    live_of(hot)[frame] = (unsigned char)(live | 1u << index);
    tail_of(hot)[frame] = (uint16_t)(offset + zpage->size);
    used_of(hot)[frame] = (uint16_t)(used_of(hot)[frame] + zpage->size);
    return (uint64_t)frame << REF_BITS | index;
}

/* Move the room of a frame together, to its tail. If a kill interrupts this, `Dense.reset` undoes it. 0, or -1. */
static int compact(Hot *hot, uint32_t frame) {
    uint64_t *handles = handles_of(hot, frame), *undo_of = (uint64_t *)(void *)hot->own_bytes;
    unsigned char *bytes = (unsigned char *)handles, *copy = hot->own_bytes + sizeof *undo_of;
    unsigned live = live_of(hot)[frame], total = 0;
    for (unsigned index = 0; index < hot->most_zpages; index++) {
        if (!(live >> index & 1)) continue;
        uint64_t handle = handles[index];
        unsigned size = size_in(handle), offset = offset_in(handle);
        if (handle >> PAGE_NUMBER_SHIFT >> 32 != LAYOUT || !size || offset < start_of(hot)
            || offset + size > tail_of(hot)[frame])
            return corrupt("a handle in frame", frame);
        total += size;
    }
    if (hot->pins[frame] || total != used_of(hot)[frame]) return corrupt("the zpages of frame", frame);
    memcpy(copy, bytes, PAGE_SIZE);
    keep_order();
    __atomic_store_n(undo_of, UNDO + frame, __ATOMIC_RELEASE);
    keep_order();
    unsigned tail = start_of(hot);
    for (unsigned index = 0; index < hot->most_zpages; index++) {
        if (!(live >> index & 1)) continue;
        unsigned size = size_in(handles[index]), offset = offset_in(handles[index]);
        if (offset != tail) { /* otherwise it is in place already, and all zpages moved before lie in front of it */
            memcpy(bytes + tail, copy + offset, size);
            handles[index] = (handles[index] & ~((uint64_t)SIZE_MASK << OFFSET_SHIFT)) | (uint64_t)tail << OFFSET_SHIFT;
        }
        tail += size;
    }
    keep_order();
    __atomic_store_n(undo_of, 0, __ATOMIC_RELEASE);
    keep_order();
    tail_of(hot)[frame] = (uint16_t)tail;
    return 0;
}

static int match(Hot *hot, const struct zpage *zpage, uint64_t *ref) {
    uint32_t frame = 0;
    unsigned before = 0;
    int found = find_room(hot, chunks_for(zpage->size), &frame, &before);
    if (found <= 0) return found;
    unsigned live = live_of(hot)[frame], end = end_of(hot, frame);
    if (!sound(hot, frame) || list_for(hot, live, end) != before) return corrupt("not an unbuddied frame:", frame);
    unsigned used = list_for(hot, live | (live + 1), end + zpage->size);
    if (!can_enlist(hot, used)) return corrupt("a list of unbuddied frames:", used);
    if (tail_of(hot)[frame] + zpage->size > PAGE_SIZE && compact(hot, frame)) return -1;
    *ref = put_in(hot, frame, zpage);
    added(hot, frame, before, used);
    return 1;
}

static int create(Hot *hot, uint32_t frame, const struct zpage *zpage, uint64_t *ref) {
    unsigned used = list_for(hot, 1, start_of(hot) + zpage->size);
    if (live_of(hot)[frame] || used_of(hot)[frame]) return corrupt("not a free frame:", frame);
    if (!can_enlist(hot, used)) return corrupt("a list of unbuddied frames:", used);
    tail_of(hot)[frame] = (uint16_t)start_of(hot);
    *ref = put_in(hot, frame, zpage);
    enlist(hot, frame, used);
    return 1;
}

static int free_zpage(Hot *hot, uint32_t frame, unsigned index, unsigned size) {
    unsigned live = live_of(hot)[frame], end = end_of(hot, frame), offset = offset_in(handles_of(hot, frame)[index]);
    unsigned tail = tail_of(hot)[frame], now_live = live & ~(1u << index), now_tail = offset + size == tail ? offset : tail;
    if (!sound(hot, frame) || now_live == live || offset + size > tail || size > used_of(hot)[frame])
        return corrupt("the zpages of frame", frame);
    unsigned before = list_for(hot, live, end), used = list_for(hot, now_live, hot->pins[frame] ? now_tail : end - size);
    if (!can_delist(hot, frame, before) || !can_enlist(hot, used)) return corrupt("a list at frame", frame);
    used_of(hot)[frame] = (uint16_t)(used_of(hot)[frame] - size);
    tail_of(hot)[frame] = (uint16_t)now_tail;
    live_of(hot)[frame] = (unsigned char)now_live;
    if (now_live && used == before) return 0; /* the frame keeps its place on the list */
    delist(hot, frame, before);
    if (!now_live) return 1;
    enlist(hot, frame, used);
    return 0;
}

static unsigned char *find(const Hot *hot, uint64_t frame, unsigned index, uint64_t page, unsigned *size) {
    if (index >= hot->most_zpages) return NULL;
    uint64_t handle = handles_of(hot, frame)[index];
    unsigned offset = offset_in(handle);
    *size = size_in(handle);
    if (handle >> PAGE_NUMBER_SHIFT != (MARK | page) || !*size || *size > MAX_ZPAGE_SIZE || offset < start_of(hot)
        || offset + *size > PAGE_SIZE)
        return NULL;
    return hot->frames + (frame << PAGE_SHIFT) + offset;
}

static unsigned live(const Hot *hot, uint64_t frame) { return live_of(hot)[frame]; }

static unsigned list_of(const Hot *hot, uint64_t frame) {
    return list_for(hot, live_of(hot)[frame], end_of(hot, (uint32_t)frame));
}

static uint64_t page_at(const Hot *hot, uint64_t frame, unsigned index) {
    return index < hot->most_zpages ? handles_of(hot, frame)[index] >> PAGE_NUMBER_SHIFT & UINT32_MAX : UINT64_MAX;
}

static int overlaps(const Hot *hot, uint64_t frame, unsigned index, unsigned size) {
    const uint64_t *handles = handles_of(hot, frame);
    unsigned offset = offset_in(handles[index]), live = live_of(hot)[frame];
    for (unsigned other = 0; other < hot->most_zpages; other++) { /* including the index itself, if it is in use */
        unsigned start = offset_in(handles[other]);
        if (live >> other & 1 && offset < start + size_in(handles[other]) && start < offset + size) return 1;
    }
    return 0;
}

static void claim(Hot *hot, uint64_t frame, unsigned index, unsigned size) {
    unsigned end = offset_in(handles_of(hot, frame)[index]) + size, before = live_of(hot)[frame] ? tail_of(hot)[frame] : 0;
    tail_of(hot)[frame] = (uint16_t)(end > before ? end : before);
    used_of(hot)[frame] = (uint16_t)(used_of(hot)[frame] + size);
    live_of(hot)[frame] = (unsigned char)(live_of(hot)[frame] | 1u << index);
}

static void clear(Hot *hot, uint64_t frame) { live_of(hot)[frame] = 0, used_of(hot)[frame] = 0; }

const struct packing hot_dense = {
    .layout = LAYOUT,
    .own_widths = {2, 2, 1},
    .own_bytes = sizeof(uint64_t) + PAGE_SIZE,
    .fewest_zpages = 2,
    .most_zpages = MOST_ZPAGES,
    .match = match,
    .create = create,
    .free = free_zpage,
    .find = find,
    .live = live,
    .list_of = list_of,
    .page_at = page_at,
    .overlaps = overlaps,
    .claim = claim,
    .clear = clear,
};
