// SPDX-License-Identifier: MIT
/* The floor: a minimal FUSE file system, which shows the cost of FUSE itself on this machine.

       floor MOUNTPOINT BYTES [LEVEL]

   It has one file, `swapfile`, of BYTES bytes. Without LEVEL, the bytes are in one piece of memory, uncompressed. With LEVEL,
   each page is a zstd frame of that level in its own memory from malloc(). The program has one thread, the loop of libfuse,
   and the mount options and request size of zbudfs. It has no allocator of frames, no same-filled pages, no limit, no
   writeback, no checksums and no statistics. Nothing keeps it alive when memory is short: it shows what is possible, and is
   not safe. */

#define FUSE_USE_VERSION 312
#define _GNU_SOURCE
#include <errno.h>
#include <fuse_lowlevel.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <zstd.h>

#define PAGE ((size_t)4096)
#define LARGEST_REQUEST ((size_t)1 << 20)
#define FOREVER 1e9
#define SWAPFILE 2 /* inode of swapfile; the inode of the root is FUSE_ROOT_ID */

struct zpage {
    uint32_t size;
    unsigned char bytes[];
};

static size_t device_size;
static unsigned char *plain;   /* without LEVEL: all bytes */
static struct zpage **zpages;  /* with LEVEL: by page; NULL: zeros */
static ZSTD_CCtx *compressor;
static ZSTD_DCtx *decompressor;
static unsigned char answer[LARGEST_REQUEST];

static struct stat attributes(fuse_ino_t inode) {
    struct stat s = {.st_ino = inode, .st_blksize = PAGE, .st_nlink = inode == SWAPFILE ? 1 : 2};
    s.st_mode = inode == SWAPFILE ? S_IFREG | 0600 : S_IFDIR | 0555;
    if (inode == SWAPFILE) {
        s.st_size = device_size;
        s.st_blocks = device_size / 512;
    }
    return s;
}

static void on_init(void *data, struct fuse_conn_info *connection) {
    (void)data;
    if (connection->max_write > LARGEST_REQUEST) connection->max_write = LARGEST_REQUEST;
}

static void on_lookup(fuse_req_t request, fuse_ino_t parent, const char *name) {
    if (parent != FUSE_ROOT_ID || strcmp(name, "swapfile") != 0) {
        fuse_reply_err(request, ENOENT);
        return;
    }
    struct fuse_entry_param entry = {.ino = SWAPFILE, .attr = attributes(SWAPFILE)};
    entry.attr_timeout = entry.entry_timeout = FOREVER;
    fuse_reply_entry(request, &entry);
}

static void on_getattr(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *file) {
    (void)file;
    struct stat s = attributes(inode);
    fuse_reply_attr(request, &s, FOREVER);
}

static void on_setattr(fuse_req_t request, fuse_ino_t inode, struct stat *wanted, int fields, struct fuse_file_info *file) {
    (void)wanted, (void)fields;
    on_getattr(request, inode, file);
}

static void on_open(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *file) {
    (void)inode;
    file->direct_io = 1;
    fuse_reply_open(request, file);
}

static void on_nothing(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *file) {
    (void)inode, (void)file;
    fuse_reply_err(request, 0);
}

static void on_fsync(fuse_req_t request, fuse_ino_t inode, int data_only, struct fuse_file_info *file) {
    (void)data_only;
    on_nothing(request, inode, file);
}

static int load(size_t page, unsigned char *to) {
    const struct zpage *zpage = zpages[page];
    if (!zpage) {
        memset(to, 0, PAGE);
        return 0;
    }
    return ZSTD_decompressDCtx(decompressor, to, PAGE, zpage->bytes, zpage->size) == PAGE ? 0 : -1;
}

static int store(size_t page, const unsigned char *from) {
    static unsigned char room[2 * 4096];
    size_t size = ZSTD_compress2(compressor, room, sizeof room, from, PAGE);
    if (ZSTD_isError(size)) return -1;
    struct zpage *zpage = malloc(sizeof *zpage + size);
    if (!zpage) return -1;
    zpage->size = size;
    memcpy(zpage->bytes, room, size);
    free(zpages[page]);
    zpages[page] = zpage;
    return 0;
}

/* All requests are whole pages, since loop with 4096-byte sectors and fio open the file for direct I/O. */
static int odd(size_t length, off_t offset) { return length % PAGE || offset % PAGE || length > LARGEST_REQUEST; }

static void on_read(fuse_req_t request, fuse_ino_t inode, size_t length, off_t offset, struct fuse_file_info *file) {
    (void)inode, (void)file;
    if ((size_t)offset >= device_size) length = 0;
    else if (length > device_size - offset) length = device_size - offset;
    if (plain) {
        fuse_reply_buf(request, (char *)plain + offset, length);
        return;
    }
    if (odd(length, offset)) {
        fuse_reply_err(request, EINVAL);
        return;
    }
    for (size_t done = 0; done < length; done += PAGE)
        if (load((offset + done) / PAGE, answer + done)) {
            fuse_reply_err(request, EIO);
            return;
        }
    fuse_reply_buf(request, (char *)answer, length);
}

static void on_write(
    fuse_req_t request, fuse_ino_t inode, const char *bytes, size_t length, off_t offset, struct fuse_file_info *file) {
    (void)inode, (void)file;
    if (offset + length > device_size) {
        fuse_reply_err(request, ENOSPC);
        return;
    }
    if (plain) memcpy(plain + offset, bytes, length);
    else if (odd(length, offset)) {
        fuse_reply_err(request, EINVAL);
        return;
    } else
        for (size_t done = 0; done < length; done += PAGE)
            if (store((offset + done) / PAGE, (const unsigned char *)bytes + done)) {
                fuse_reply_err(request, ENOSPC);
                return;
            }
    fuse_reply_write(request, length);
}

/* Discards pages. Without LEVEL, the memory is kept, since it would have to be touched again. */
static void on_fallocate(
    fuse_req_t request, fuse_ino_t inode, int mode, off_t offset, off_t length, struct fuse_file_info *file) {
    (void)inode, (void)mode, (void)file;
    size_t end = (size_t)(offset + length) < device_size ? (size_t)(offset + length) : device_size;
    for (size_t page = (offset + PAGE - 1) / PAGE; page < end / PAGE; page++)
        if (plain) memset(plain + page * PAGE, 0, PAGE);
        else {
            free(zpages[page]);
            zpages[page] = NULL;
        }
    fuse_reply_err(request, 0);
}

static const struct fuse_lowlevel_ops operations = {
    .init = on_init,
    .lookup = on_lookup,
    .getattr = on_getattr,
    .setattr = on_setattr,
    .open = on_open,
    .read = on_read,
    .write = on_write,
    .flush = on_nothing,
    .fsync = on_fsync,
    .fallocate = on_fallocate,
};

int main(int count, char **words) {
    if (count < 3 || count > 4) {
        fprintf(stderr, "usage: floor MOUNTPOINT BYTES [LEVEL]\n");
        return 2;
    }
    device_size = strtoull(words[2], NULL, 10) / PAGE * PAGE;
    if (count == 4) {
        compressor = ZSTD_createCCtx();
        decompressor = ZSTD_createDCtx();
        ZSTD_CCtx_setParameter(compressor, ZSTD_c_compressionLevel, atoi(words[3]));
        zpages = calloc(device_size / PAGE, sizeof *zpages);
    } else {
        plain = mmap(NULL, device_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (plain == MAP_FAILED) plain = NULL;
    }
    if (!plain && !zpages) {
        perror("floor");
        return 1;
    }
    char *arguments[] = {words[0], "-o", "allow_other,default_permissions,nosuid,nodev,noexec,noatime,fsname=floor", NULL};
    struct fuse_args fuse_arguments = FUSE_ARGS_INIT(3, arguments);
    struct fuse_session *session = fuse_session_new(&fuse_arguments, &operations, sizeof operations, NULL);
    if (!session || fuse_session_mount(session, words[1])) return 1;
    int status = fuse_session_loop(session);
    fuse_session_unmount(session);
    fuse_session_destroy(session);
    return status < 0;
}
