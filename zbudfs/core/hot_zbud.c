// SPDX-License-Identifier: MIT
/* The packing `zbud` of the hot path: two zpages to a frame.

   It does the steps of `Zbud.match`, `create_prep` + `create_finish`, `zpage` and `free` of core/zbud.py, which describes the
   layout. */
#include "hot.h"

/* The column of the chunks of the first or the last buddy; 0 stands for no buddy. */
static unsigned char *chunks_of(const Hot *hot, unsigned last) { return hot->own[last]; }

static unsigned chunks_for(unsigned size) { return (size + ROUND_UP) >> CHUNK_SHIFT; }

static uint64_t *handle_of(const Hot *hot, uint64_t frame, unsigned last) {
    return (uint64_t *)(void *)(hot->frames + (last ? ((frame + 1) << PAGE_SHIFT) - HANDLE_SIZE : frame << PAGE_SHIFT));
}

/* Return the address of the zpage of a buddy that takes `chunks` chunks. */
static unsigned char *zpage_at(const Hot *hot, uint64_t frame, unsigned last, unsigned chunks) {
    return hot->frames + (last ? ((frame + 1) << PAGE_SHIFT) - (chunks << CHUNK_SHIFT) : (frame << PAGE_SHIFT) + HANDLE_SIZE);
}

static uint64_t put_in(Hot *hot, uint32_t frame, unsigned last, const struct zpage *zpage) {
    unsigned chunks = chunks_for(zpage->size);
    memcpy(zpage_at(hot, frame, last, chunks), zpage->bytes, zpage->size);
    *handle_of(hot, frame, last) = zpage->page << SIZE_BITS | zpage->size;
    chunks_of(hot, last)[frame] = (unsigned char)chunks;
    return (uint64_t)frame << REF_BITS | last;
}

static int match(Hot *hot, const struct zpage *zpage, uint64_t *ref) {
    uint32_t frame = 0;
    unsigned used = 0;
    int found = find_room(hot, chunks_for(zpage->size), &frame, &used);
    if (found <= 0) return found;
    unsigned first = chunks_of(hot, 0)[frame], last = chunks_of(hot, 1)[frame];
    if (first + last != used || (first && last)) return corrupt("not an unbuddied frame:", frame);
    *ref = put_in(hot, frame, first != 0, zpage);
    added(hot, frame, used, FULL);
    return 1;
}

static int create(Hot *hot, uint32_t frame, const struct zpage *zpage, uint64_t *ref) {
    unsigned chunks = chunks_for(zpage->size);
    if (chunks_of(hot, 0)[frame] || chunks_of(hot, 1)[frame]) return corrupt("not a free frame:", frame);
    if (!can_enlist(hot, chunks)) return corrupt("a list of unbuddied frames:", chunks);
    *ref = put_in(hot, frame, 0, zpage);
    enlist(hot, frame, chunks);
    return 1;
}

static int free_zpage(Hot *hot, uint32_t frame, unsigned index, unsigned size) {
    unsigned char *mine = chunks_of(hot, index);
    unsigned chunks = mine[frame], other = chunks_of(hot, !index)[frame];
    if (chunks != chunks_for(size) || other >= NCHUNKS) return corrupt("the chunks of frame", frame);
    unsigned before = other ? FULL : chunks;
    if (!can_delist(hot, frame, before) || !can_enlist(hot, other)) return corrupt("a list at frame", frame);
    mine[frame] = 0;
    delist(hot, frame, before);
    if (!other) return 1;
    enlist(hot, frame, other);
    return 0;
}

static unsigned char *find(const Hot *hot, uint64_t frame, unsigned index, uint64_t page, unsigned *size) {
    if (index >= hot->most_zpages) return NULL;
    uint64_t handle = *handle_of(hot, frame, index);
    *size = handle & SIZE_MASK;
    if (handle >> SIZE_BITS != page || !*size || *size > MAX_ZPAGE_SIZE) return NULL;
    return zpage_at(hot, frame, index, chunks_for(*size));
}

static unsigned live(const Hot *hot, uint64_t frame) {
    return (chunks_of(hot, 0)[frame] != 0) | (unsigned)(chunks_of(hot, 1)[frame] != 0) << 1;
}

static unsigned list_of(const Hot *hot, uint64_t frame) {
    unsigned first = chunks_of(hot, 0)[frame], last = chunks_of(hot, 1)[frame];
    return (first && last) || first + last >= NCHUNKS ? FULL : first + last;
}

static uint64_t page_at(const Hot *hot, uint64_t frame, unsigned index) {
    return index < hot->most_zpages ? *handle_of(hot, frame, index) >> SIZE_BITS : UINT64_MAX;
}

static int overlaps(const Hot *hot, uint64_t frame, unsigned index, unsigned size) {
    return chunks_of(hot, index)[frame] || chunks_for(size) + chunks_of(hot, !index)[frame] > NCHUNKS;
}

static void claim(Hot *hot, uint64_t frame, unsigned index, unsigned size) {
    chunks_of(hot, index)[frame] = (unsigned char)chunks_for(size);
}

static void clear(Hot *hot, uint64_t frame) { chunks_of(hot, 0)[frame] = chunks_of(hot, 1)[frame] = 0; }

const struct packing hot_zbud = {
    .layout = 0xB1,
    .own_widths = {1, 1},
    .fewest_zpages = 2,
    .most_zpages = 2,
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
