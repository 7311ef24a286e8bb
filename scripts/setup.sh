#!/bin/bash
# SPDX-License-Identifier: MIT
# Makes a fresh Debian 12 or 13 ready for `make test` and `make demo`: what is missing is installed with apt, then a
# virtual environment is made with the pinned versions. Does nothing, quickly, when all that has been done before.
#
#   PYTHON   the interpreter to build with (default: python3; 3.11 or later)
#   VENV     where the virtual environment is (default: .venv)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
PATH=$PATH:/usr/sbin:/sbin

fail() { echo "setup: $*" >&2; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }
python_can() { "$PYTHON" -c "$1" >/dev/null 2>&1; }

missing_packages() {
    has gcc && has ld || echo gcc
    [ -e /usr/include/stdlib.h ] || echo libc6-dev
    if has pkg-config; then pkg-config --exists fuse3 || echo libfuse3-dev; else echo pkg-config libfuse3-dev; fi
    has fusermount3 || echo fuse3
    [ -e /usr/include/zstd.h ] || echo libzstd-dev
    has losetup && has swapon || echo mount
    has mkswap && has findmnt || echo util-linux
    has modprobe || echo kmod
    has mkfs.ext4 || echo e2fsprogs
    has fio || echo fio
    has nbdkit || echo nbdkit
    has nbdfuse || echo libnbd-bin
    has systemd-analyze || echo systemd
    has tmux || echo tmux
    if has "$PYTHON"; then
        python_can 'import ensurepip, venv' || echo python3-venv
        python_can 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' || echo python3-dev
    else
        echo python3 python3-venv python3-dev
    fi
}

install_packages() {
    local packages
    mapfile -t packages < <(missing_packages | tr ' ' '\n')
    [ ${#packages[@]} -gt 0 ] || return 0
    has apt-get || fail "missing, and there is no apt-get to install it: ${packages[*]} (Debian's names)"
    [ "$(id -u)" = 0 ] || fail "missing: run as root: apt-get install ${packages[*]}"
    echo "setup: installing ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    apt-get install -q -y --no-install-recommends "${packages[@]}"
    mapfile -t packages < <(missing_packages | tr ' ' '\n')
    [ ${#packages[@]} -eq 0 ] || fail "still missing after apt-get: ${packages[*]} (is PYTHON=$PYTHON Debian's own?)"
}

# What the environment was made from: it is made again when any of this changes, or when the folder has moved.
fingerprint() {
    "$PYTHON" -VV
    pwd
    cksum requirements-dev.txt pyproject.toml setup.py zbudfs/fuse/shim.c zbudfs/core/hot*.[ch] zbudfs/store/*.c
}

make_venv() {
    local stamp=$VENV/made-from
    [ "$(cat "$stamp" 2>/dev/null)" != "$(fingerprint)" ] || return 0
    python_can 'import sys; assert sys.version_info >= (3, 11)' || fail "$PYTHON is older than 3.11: set PYTHON"
    echo "setup: making $VENV"
    "$PYTHON" -m venv --clear "$VENV"
    "$VENV/bin/python" -m pip install -q --disable-pip-version-check -r requirements-dev.txt
    # With the pinned setuptools, not with one that pip looks for; its dependencies are pinned above.
    "$VENV/bin/python" -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
    fingerprint >"$stamp"
}

install_packages
make_venv
