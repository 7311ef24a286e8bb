#!/bin/bash
# SPDX-License-Identifier: MIT
# Build all C code with AddressSanitizer and UndefinedBehaviorSanitizer in a copy of the sources, and run the tests of it.
# A finding ends its process, and so fails the test. Usage: scripts/sanitize.sh [pytest arguments]
# Name no test that mounts: the daemon locks its memory, and with it the terabytes of the sanitizer's shadow.
set -euo pipefail
cd "$(dirname "$0")/.."
copy=build/sanitize
rm -rf "$copy"
mkdir -p "$copy"
cp -r zbudfs tests bench kit scripts docs setup.py pyproject.toml Makefile README.md "$copy"
find "$copy/zbudfs" -name '*.so' -delete
python=$PWD/${VENV:-.venv}/bin/python
cd "$copy"
CFLAGS="-Werror -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all" \
    LDFLAGS="-fsanitize=address,undefined" "$python" setup.py -q build_ext --inplace >build.log 2>&1 || { cat build.log; exit 1; }
if [ $# -eq 0 ]; then
    set -- -k "not killed_at_any" tests/store/test_hot.py tests/store/test_cipher.py tests/store/test_aio_page_in.py tests/core/test_recovery.py
fi
# Python does not free all memory at exit, so leaks are not detected. libstdc++ is preloaded, since the hooks of the sanitizer
# look for it. PYTHONPATH selects this copy.
env ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$PWD" PYTHONMALLOC=malloc \
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
    "$python" -m pytest -q -p no:cacheprovider "$@"
