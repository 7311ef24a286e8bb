// SPDX-License-Identifier: MIT
/* AES-256-XTS of many data units in one call, by the system's libcrypto. store/cipher.py uses `cryptography` if it is missing.

       Xts(key, library)  -->  encrypt(number, pieces, target)      each piece is a data unit, its number is the tweak
                               decrypt(number, pieces)              in place

   The constructor makes three contexts with the key, one for encryption and two for decryption, each with a lock. A data unit
   then costs its tweak and the AES, and no memory. The GIL is released for MANY pieces or more. For fewer, taking it again would
   take longer than the work.

   The library is opened, not linked. So a build does not need its headers, and a daemon that does not encrypt does not need the
   library. The functions in use are the same in every release of OpenSSL since 1.1. The library is opened without its
   configuration file, which could replace its AES. All cryptography is the library's; this file has only lengths, numbers and
   locks. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>

enum {
    KEY_BYTES = 64,
    TWEAK_BYTES = 16,
    LEAST_BYTES = 16, /* smallest data unit of XTS */
    MOST_BYTES = 1 << 24,
    PIECES = 64, /* pieces of one call of `some` */
    MANY = 8,
    LANES = 3, /* the first encrypts */
};
#define NO_LOAD_CONFIG 0x80ull
#define NO_ATEXIT 0x80000ull

typedef int (*init_function)(
    void *context, const void *cipher, void *engine, const unsigned char *key, const unsigned char *iv);
typedef int (*update_function)(void *context, unsigned char *out, int *written, const unsigned char *in, int length);

static int (*init_crypto)(uint64_t options, const void *settings);
static void *(*context_new)(void);
static void (*context_free)(void *context);
static const void *(*aes_256_xts)(void);
static init_function encrypt_init, decrypt_init;
static update_function encrypt_update, decrypt_update;

static const struct {
    const char *name;
    void *to;
} functions[] = {
    {"OPENSSL_init_crypto", &init_crypto},
    {"EVP_CIPHER_CTX_new", &context_new},
    {"EVP_CIPHER_CTX_free", &context_free},
    {"EVP_aes_256_xts", &aes_256_xts},
    {"EVP_EncryptInit_ex", &encrypt_init},
    {"EVP_DecryptInit_ex", &decrypt_init},
    {"EVP_EncryptUpdate", &encrypt_update},
    {"EVP_DecryptUpdate", &decrypt_update},
};

struct lane {
    pthread_mutex_t lock;
    void *context;
};

typedef struct {
    PyObject_HEAD
    struct lane lanes[LANES];
} Xts;

/* Open the library; it stays open if it is usable. 0, or -1 with an OSError and without a change. */
static int open_library(const char *name) {
    enum { COUNT = sizeof functions / sizeof *functions };
    void *found[COUNT], *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    int usable = library != NULL;
    for (size_t i = 0; usable && i < COUNT; i++) usable = (found[i] = dlsym(library, functions[i].name)) != NULL;
    for (size_t i = 0; usable && i < COUNT; i++) *(void **)functions[i].to = found[i];
    if (usable && init_crypto(NO_LOAD_CONFIG | NO_ATEXIT, NULL) == 1) return 0;
    if (library) dlclose(library);
    PyErr_Format(PyExc_OSError, "%s is not there, or not usable", name);
    return -1;
}

/* Encrypt or decrypt one data unit. 0, or -1. */
static int unit(void *context, int encrypting, uint64_t number, const unsigned char *in, unsigned char *out, int length) {
    unsigned char tweak[TWEAK_BYTES] = {0};
    for (unsigned i = 0; i < sizeof number; i++) tweak[i] = (unsigned char)(number >> 8 * i);
    int written = 0;
    if ((encrypting ? encrypt_init : decrypt_init)(context, NULL, NULL, NULL, tweak) != 1) return -1;
    if ((encrypting ? encrypt_update : decrypt_update)(context, out, &written, in, length) != 1) return -1;
    return written == length ? 0 : -1;
}

static int units(Xts *self, int encrypting, uint64_t number, const Py_buffer *pieces, Py_ssize_t count, unsigned char *target) {
    struct lane *lane = self->lanes;
    if (!encrypting && pthread_mutex_trylock(&(++lane)->lock)) pthread_mutex_lock(&(++lane)->lock);
    if (encrypting) pthread_mutex_lock(&lane->lock);
    int failed = 0;
    for (Py_ssize_t i = 0; i < count && !failed; i++) {
        unsigned char *in = pieces[i].buf;
        failed = unit(lane->context, encrypting, number + (uint64_t)i, in, encrypting ? target : in, (int)pieces[i].len);
        target += encrypting ? pieces[i].len : 0;
    }
    pthread_mutex_unlock(&lane->lock);
    return failed;
}

/* Encrypt or decrypt up to PIECES pieces of the sequence from `first` on. Return the number of their bytes, or -1. */
static Py_ssize_t some(
    Xts *self, int encrypting, uint64_t number, PyObject *const *items, Py_ssize_t count, const Py_buffer *target) {
    Py_buffer pieces[PIECES];
    Py_ssize_t held = 0, bytes = 0;
    for (; held < count; held++) {
        if (PyObject_GetBuffer(items[held], &pieces[held], encrypting ? PyBUF_SIMPLE : PyBUF_WRITABLE)) break;
        bytes += pieces[held].len;
        if (pieces[held].len < LEAST_BYTES || pieces[held].len > MOST_BYTES) {
            PyErr_Format(PyExc_ValueError, "a data unit of %zd bytes", pieces[held++].len);
            break;
        }
    }
    if (!PyErr_Occurred() && encrypting && bytes > target->len)
        PyErr_Format(PyExc_ValueError, "%zd bytes do not fit into %zd", bytes, target->len);
    if (!PyErr_Occurred()) {
        PyThreadState *saved = count >= MANY ? PyEval_SaveThread() : NULL;
        int failed = units(self, encrypting, number, pieces, count, encrypting ? target->buf : NULL);
        if (saved) PyEval_RestoreThread(saved);
        if (failed)
            PyErr_Format(PyExc_RuntimeError, "libcrypto refused to %s data unit %llu or one after it",
                encrypting ? "encrypt" : "decrypt", (unsigned long long)number);
    }
    while (held) PyBuffer_Release(&pieces[--held]);
    return PyErr_Occurred() ? -1 : bytes;
}

static PyObject *all(Xts *self, int encrypting, PyObject *first, PyObject *sequence, Py_buffer *target) {
    uint64_t number = PyLong_AsUnsignedLongLong(first);
    if (PyErr_Occurred()) return NULL;
    PyObject *items = PySequence_Tuple(sequence); /* a copy, which no other thread changes while the GIL is released */
    if (!items) return NULL;
    Py_ssize_t count = PyTuple_GET_SIZE(items), bytes = 0;
    for (Py_ssize_t at = 0; at < count && bytes >= 0; at += PIECES) {
        bytes = some(self, encrypting, number + (uint64_t)at, &PyTuple_GET_ITEM(items, at),
            count - at < PIECES ? count - at : PIECES, target);
        if (bytes > 0 && encrypting) {
            target->buf = (char *)target->buf + bytes;
            target->len -= bytes;
        }
    }
    Py_DECREF(items);
    return bytes < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *xts_encrypt(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Py_buffer target;
    if (nargs != 3) return PyErr_Format(PyExc_TypeError, "encrypt(number, pieces, target)");
    if (PyObject_GetBuffer(args[2], &target, PyBUF_WRITABLE)) return NULL;
    Py_buffer rest = target;
    PyObject *result = all((Xts *)self, 1, args[0], args[1], &rest);
    PyBuffer_Release(&target);
    return result;
}

static PyObject *xts_decrypt(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 2) return PyErr_Format(PyExc_TypeError, "decrypt(number, pieces)");
    return all((Xts *)self, 0, args[0], args[1], NULL);
}

static void xts_dealloc(PyObject *self) {
    for (int i = 0; i < LANES; i++)
        if (((Xts *)self)->lanes[i].context) context_free(((Xts *)self)->lanes[i].context); /* it overwrites the key */
    Py_TYPE(self)->tp_free(self);
}

static PyObject *xts_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    Py_buffer key;
    const char *library;
    if (kwargs && PyDict_GET_SIZE(kwargs)) return PyErr_Format(PyExc_TypeError, "Xts(key, library)");
    if (!PyArg_ParseTuple(args, "y*s:Xts", &key, &library)) return NULL;
    Xts *xts = NULL;
    if (key.len != KEY_BYTES) PyErr_Format(PyExc_ValueError, "a key of %zd bytes instead of %d", key.len, KEY_BYTES);
    else if (!open_library(library)) xts = (Xts *)type->tp_alloc(type, 0); /* the memory is zeroed */
    for (int i = 0; xts && i < LANES; i++) {
        struct lane *lane = &xts->lanes[i];
        pthread_mutex_init(&lane->lock, NULL);
        lane->context = context_new();
        if (!lane->context || (i ? decrypt_init : encrypt_init)(lane->context, aes_256_xts(), NULL, key.buf, NULL) != 1) {
            PyErr_Format(PyExc_OSError, "%s has no AES-256-XTS, or refuses the key", library);
            Py_CLEAR(xts);
        }
    }
    PyBuffer_Release(&key);
    return (PyObject *)xts;
}

static PyMethodDef xts_methods[] = {
    {"encrypt", (PyCFunction)(void (*)(void))xts_encrypt, METH_FASTCALL,
        "encrypt(number, pieces, target): put the encrypted form of the data units `number` and on into `target`, one after "
        "the other"},
    {"decrypt", (PyCFunction)(void (*)(void))xts_decrypt, METH_FASTCALL,
        "decrypt(number, pieces): decrypt the data units `number` and on in their places"},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject xts_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "zbudfs.store._cipher.Xts",
    .tp_doc = "Xts(key, library): AES-256-XTS by the library of that name; see cipher.c. OSError if it cannot be had.",
    .tp_basicsize = sizeof(Xts),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = xts_new,
    .tp_dealloc = xts_dealloc,
    .tp_methods = xts_methods,
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_cipher", "AES-256-XTS; see cipher.c.", -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__cipher(void);
PyMODINIT_FUNC PyInit__cipher(void) {
    PyObject *made = PyType_Ready(&xts_type) ? NULL : PyModule_Create(&module);
    if (made && PyModule_AddObjectRef(made, "Xts", (PyObject *)&xts_type)) Py_CLEAR(made);
    return made;
}
