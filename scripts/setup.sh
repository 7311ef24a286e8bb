#!/bin/bash
# SPDX-License-Identifier: MIT
# Prepare a checkout for development: check the system packages, then make a virtual environment with pinned versions.
#
#   scripts/setup.sh             report missing system packages and end with status 1; install nothing into the system
#   scripts/setup.sh --install   install them with apt-get, as root (Debian 12 or 13)
#
#   PYTHON   the interpreter to build with (default: python3; 3.11 or later)
#   VENV     where the virtual environment is (default: .venv)
#
# A second run finds nothing to do and takes a fraction of a second.
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

report_packages() {
    local packages
    packages=$(missing_packages | tr '\n' ' ')
    [ -z "$packages" ] || fail "missing system packages: ${packages% }. Run 'make setup' as root, or: apt-get install ${packages% }"
}

install_packages() {
    local packages
    mapfile -t packages < <(missing_packages | tr ' ' '\n')
    [ ${#packages[@]} -gt 0 ] || return 0
    has apt-get || fail "no apt-get here. Install these packages (Debian's names): ${packages[*]}"
    [ "$(id -u)" = 0 ] || fail "not root. Run as root: apt-get install ${packages[*]}"
    echo "setup: installing ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    apt-get install -q -y --no-install-recommends "${packages[@]}"
    mapfile -t packages < <(missing_packages | tr ' ' '\n')
    [ ${#packages[@]} -eq 0 ] || fail "still missing after apt-get: ${packages[*]} (is PYTHON=$PYTHON Debian's own?)"
}

# Print what the environment depends on. It is made again when any of this changes, or when the folder has moved.
environment() {
    "$PYTHON" -VV
    pwd
    cksum requirements-dev.txt
}

# Print what the build of zbudfs in the environment depends on.
build() {
    cksum pyproject.toml setup.py zbudfs/*/*.[ch]
}

make_venv() {
    local made=$VENV/made-from built=$VENV/built-from
    if [ "$(cat "$made" 2>/dev/null)" != "$(environment)" ]; then
        python_can 'import sys; assert sys.version_info >= (3, 11)' || fail "$PYTHON is older than 3.11: set PYTHON"
        echo "setup: making $VENV"
        "$PYTHON" -m venv --clear "$VENV"
        "$VENV/bin/python" -m pip install -q --disable-pip-version-check -r requirements-dev.txt
        environment >"$made"
    fi
    if [ "$(cat "$built" 2>/dev/null)" != "$(build)" ]; then
        # With the pinned setuptools, not with one that pip looks for; its dependencies are pinned above.
        # In development a warning of the C compiler is an error. "compat" installs a path instead of an import hook, which
        # would load modules into the daemon that no user's installation loads.
        CFLAGS="-Werror ${CFLAGS:-}" \
            "$VENV/bin/python" -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps \
            --config-settings editable_mode=compat -e .
        build >"$built"
    fi
}

case ${1:-} in
    "") report_packages ;;
    --install) install_packages ;;
    *) fail "unknown argument: $1. Known: --install" ;;
esac
make_venv
