#!/bin/bash
# SPDX-License-Identifier: MIT
# Puts zbudfs on a machine, or takes it away again: what `make install` and `make uninstall` run.
#
#   install.sh install|uninstall      with, in the environment:
#   PREFIX      /usr/local            what all the following start with, where they do not say otherwise
#   DESTDIR                           put it all below this folder, to be moved to / later (a package)
#   LIBDIR      PREFIX/lib/zbudfs     the program, in a virtual environment of its own
#   BINDIR      PREFIX/bin            the command: a script that starts the program
#   HELPERDIR   /sbin                 the same for mount(8) and umount(8), which look nowhere else
#   SYSCONFDIR  /etc                  zbudfs/swap.toml, if there is none; files for needrestart and initramfs-tools
#   UNITDIR     PREFIX/lib/systemd/system
#   SLEEPDIR    /usr/lib/systemd/system-sleep    the hook of systemd-sleep(8), which looks nowhere else
#   DATADIR     PREFIX/share          man/, doc/zbudfs/, and completions for bash, zsh and fish
#   WHEELHOUSE                        a folder with wheels: nothing is looked for on the network
#   PYTHON      python3               3.11 or later; the program depends on this interpreter from then on
#
# The environment is made beside the old one and takes its place at once, so that what runs goes on running; then
# `zbudfs restart` or `systemctl restart` hands over to it. LIBDIR/installed lists all that was put anywhere else, and
# uninstall removes that list: files, and folders that were made for them if they are empty. A configuration that has
# been changed stays.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
umask 022

PREFIX=${PREFIX:-/usr/local}
DESTDIR=${DESTDIR:-}
LIBDIR=${LIBDIR:-$PREFIX/lib/zbudfs}
BINDIR=${BINDIR:-$PREFIX/bin}
HELPERDIR=${HELPERDIR:-$(readlink -f /sbin)}
SYSCONFDIR=${SYSCONFDIR:-/etc}
UNITDIR=${UNITDIR:-$PREFIX/lib/systemd/system}
SLEEPDIR=${SLEEPDIR:-/usr/lib/systemd/system-sleep}
DATADIR=${DATADIR:-$PREFIX/share}
WHEELHOUSE=${WHEELHOUSE:-}
PYTHON=${PYTHON:-python3}
LIST=$DESTDIR$LIBDIR/installed
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1

fail() { echo "install: $*" >&2; exit 1; }

for folder in "$PREFIX" "$LIBDIR" "$BINDIR" "$HELPERDIR" "$SYSCONFDIR" "$UNITDIR" "$SLEEPDIR" "$DATADIR" "${DESTDIR:-/}"; do
    [[ $folder = /* && $folder != *$'\n'* ]] || fail "'$folder' is not an absolute path: write one that starts with /"
done

# ---- what can be done at all -----------------------------------------------------------------------------------------

check_machine() {
    command -v "$PYTHON" >/dev/null || fail "there is no $PYTHON: apt-get install python3, or set PYTHON"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$PYTHON is older than 3.11: set PYTHON"
    "$PYTHON" -c 'import venv' || fail "$PYTHON cannot make virtual environments: apt-get install python3-venv"
    if [ -n "$WHEELHOUSE" ]; then
        [ -d "$WHEELHOUSE" ] || fail "WHEELHOUSE=$WHEELHOUSE is not a folder"
        WHEELHOUSE=$(readlink -f "$WHEELHOUSE")
        return
    fi
    local missing=() include
    command -v gcc >/dev/null || missing+=(gcc libc6-dev)
    command -v pkg-config >/dev/null && pkg-config --exists fuse3 || missing+=(pkg-config libfuse3-dev)
    include=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -e "$include/Python.h" ] || missing+=(python3-dev)
    [ ${#missing[@]} -eq 0 ] || fail "to build it, first: apt-get install ${missing[*]}"
}

# Whatever is started from LIBDIR shows it in its command line.
check_idle() {
    [ -z "$DESTDIR" ] || return 0
    local process
    for process in /proc/[0-9]*; do
        if { tr '\0' '\n' <"$process/cmdline"; } 2>/dev/null | head -n 1 | grep -qxF "$LIBDIR/bin/python"; then
            fail "process ${process#/proc/} still runs from $LIBDIR: zbudfs swapoff --umount MOUNTPOINT first"
        fi
    done
}

# ---- the list of what was put where ----------------------------------------------------------------------------------
# Lines of two or three words, parted by tabs: "dir PATH", "file PATH", "config PATH CHECKSUM"; all without DESTDIR.

entries=()

checksum() { cksum <"$1" | tr ' ' '-'; }

make_folder() {
    [ "$1" != / ] && [ ! -d "$DESTDIR$1" ] || return 0
    make_folder "$(dirname "$1")"
    mkdir "$DESTDIR$1"
    entries+=("dir"$'\t'"$1")
}

# Replaces what has that name in one step: a link of the user's is not written through, and a command is never missing.
put_file() {
    make_folder "$(dirname "$2")"
    install -m "${3:-0644}" "$1" "$DESTDIR$2.new"
    mv -fT "$DESTDIR$2.new" "$DESTDIR$2"
    entries+=("file"$'\t'"$2")
}

# A file with the real places in it.
with_places() { sed "s|/usr/local/bin/zbudfs|$BINDIR/zbudfs|g; s|/usr/local/lib/zbudfs|$LIBDIR|g" "$1"; }

# A command: a script that starts the program, or says why it cannot.
put_command() {
    with_places systemd/libexec/launcher | sed "s|COMMAND\"|$1\"|" >"$scratch/command"
    put_file "$scratch/command" "$2" 0755
}

put_config() {
    local before
    before=$(old_entries config | awk -F'\t' -v path="$2" '$2 == path { print $3 }')
    if [ -e "$DESTDIR$2" ] && [ "$(checksum "$DESTDIR$2")" != "$before" ]; then
        [ -z "$before" ] || entries+=("config"$'\t'"$2"$'\t'"$before")
        return 0
    fi
    make_folder "$(dirname "$2")"
    install -m "${3:-0644}" "$1" "$DESTDIR$2"
    entries+=("config"$'\t'"$2"$'\t'"$(checksum "$1")")
}

old_entries() { [ ! -e "$LIST" ] || grep "^$1"$'\t' "$LIST" || true; }

# ---- install ---------------------------------------------------------------------------------------------------------

# pip's own scripts show a traceback when the interpreter is another version than the one that zbudfs was installed for.
make_script() {
    cat >"$1" <<EOF
#!$LIBDIR/bin/python -I
import os
import sys

try:
    from zbudfs.cli.entry import $2
except ImportError as error:
    python = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
    print(f"zbudfs: cannot start with {python}: {error}; install zbudfs again (make install)", file=sys.stderr)
    sys.exit(127 if os.environ.get("LISTEN_FDS", "0") in ("", "0") else 1)
sys.exit($2())
EOF
    chmod 0755 "$1"
}

make_environment() {
    local new=$1 scratch=$2 options=() what=. pip=("$PYTHON" -m pip)
    "$PYTHON" -m venv --without-pip "$new"
    # Any pip that can install elsewhere will do (22.3); the environment itself needs none.
    if ! "${pip[@]}" --python "$new/bin/python" --version >/dev/null 2>&1; then
        "$PYTHON" -m venv "$scratch/pip" || fail "$PYTHON has no pip: apt-get install python3-venv"
        pip=("$scratch/pip/bin/python" -m pip)
    fi
    if [ -n "$WHEELHOUSE" ]; then
        options=(--no-index --find-links "$WHEELHOUSE")
        if compgen -G "$WHEELHOUSE/zbudfs-*.whl" >/dev/null; then
            what=zbudfs==$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
        fi
    fi
    if [ "$what" = . ]; then  # a copy, since building leaves folders behind, which root's would be
        mkdir "$scratch/source"
        cp -r LICENSE README.md pyproject.toml setup.py zbudfs "$scratch/source"
        what=$scratch/source
    fi
    "${pip[@]}" --python "$new/bin/python" install --quiet --no-compile "${options[@]}" "$what"
    # Scripts and compiled files name the place where all this will be, not where it is made.
    rm -f "$new"/bin/activate* "$new"/bin/Activate*
    grep -rlIF "$new/bin/python" "$new/bin" | xargs -r sed -i "1s|^#!.*|#!$LIBDIR/bin/python -I|"
    make_script "$new/bin/zbudfs" main
    make_script "$new/bin/mount.fuse.zbudfs" mount_main
    make_script "$new/bin/umount.fuse.zbudfs" umount_main
    sed -i "/^command = /d" "$new/pyvenv.cfg"
    rm -f "$new"/lib/*/site-packages/zbudfs-*.dist-info/direct_url.json
    "$new/bin/python" -I -m compileall -q -s "$new" -p "$LIBDIR" "$new/lib"
    "$new/bin/python" -I -m zbudfs --version >/dev/null || fail "what was built does not start"
}

install_all() {
    check_machine
    local new=$DESTDIR$LIBDIR.new old=$DESTDIR$LIBDIR.old entry
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch" "$DESTDIR$LIBDIR.new"' EXIT
    rm -rf "$new" "$old"
    [ -z "$DESTDIR" ] || mkdir -p "$DESTDIR"
    while read -r entry; do [ -z "$entry" ] || entries+=("$entry"); done < <(old_entries dir)
    make_folder "$(dirname "$LIBDIR")"
    make_environment "$new" "$scratch"

    put_command zbudfs "$BINDIR/zbudfs"
    local helper page unit
    for helper in {u,}mount.fuse.zbudfs; do
        put_command "$helper" "$HELPERDIR/$helper"
    done
    mkdir "$new/libexec"
    for helper in systemd/libexec/*; do
        [ "${helper##*/}" = launcher ] || with_places "$helper" >"$new/libexec/${helper##*/}"
    done
    for unit in systemd/*.*; do
        [ -f "$unit" ] || continue
        with_places "$unit" >"$scratch/unit"
        put_file "$scratch/unit" "$UNITDIR/${unit##*/}"
    done
    for unit in systemd/*.d/*.conf; do
        put_file "$unit" "$UNITDIR/${unit#systemd/}"
    done
    with_places systemd/libexec/sleep >"$scratch/hook"
    put_file "$scratch/hook" "$SLEEPDIR/zbudfs" 0755
    for page in docs/man/*.[1-9]; do
        [ ! -f "$page" ] || put_file "$page" "$DATADIR/man/man${page##*.}/${page##*/}"
    done
    put_file README.md "$DATADIR/doc/zbudfs/README.md"
    put_file LICENSE "$DATADIR/doc/zbudfs/LICENSE"
    put_file docs/zbudfs.toml.example "$DATADIR/doc/zbudfs/zbudfs.toml.example"
    put_file completion/zbudfs.bash "$DATADIR/bash-completion/completions/zbudfs"
    put_file completion/zbudfs.zsh "$DATADIR/zsh/site-functions/_zbudfs"
    put_file completion/zbudfs.fish "$DATADIR/fish/vendor_completions.d/zbudfs.fish"
    put_config docs/zbudfs.toml.example "$SYSCONFDIR/zbudfs/swap.toml"
    put_config systemd/other/needrestart.conf "$SYSCONFDIR/needrestart/conf.d/zbudfs.conf"
    put_config systemd/other/initramfs-hook "$SYSCONFDIR/initramfs-tools/hooks/zbudfs" 0755

    # What the version before had and this one has not.
    while IFS=$'\t' read -r _ entry; do
        [[ -z $entry || $'\n'"$(printf '%s\n' "${entries[@]}")"$'\n' = *$'\n'file$'\t'"$entry"$'\n'* ]] || rm -f "$DESTDIR$entry"
    done < <(old_entries file)
    printf '%s\n' "${entries[@]}" >"$new/installed"
    [ ! -e "$DESTDIR$LIBDIR" ] || mv -T "$DESTDIR$LIBDIR" "$old"
    mv -T "$new" "$DESTDIR$LIBDIR"
    rm -rf "$old"
    reload_units
    echo "installed in $DESTDIR$LIBDIR; next: look at $SYSCONFDIR/zbudfs/swap.toml, run zbudfs doctor"
}

# ---- uninstall -------------------------------------------------------------------------------------------------------

uninstall_all() {
    [ -e "$LIST" ] || fail "there is no $LIST: zbudfs was not installed with these PREFIX, DESTDIR and LIBDIR"
    check_idle
    local kind path sum units=()
    while IFS=$'\t' read -r kind path sum; do
        case $kind in
        file)
            [[ $path != */systemd/*@.* ]] || units+=("$path")
            rm -f "$DESTDIR$path"
            ;;
        config)
            if [ ! -e "$DESTDIR$path" ] || [ "$(checksum "$DESTDIR$path")" = "$sum" ]; then
                rm -f "$DESTDIR$path"
            else
                echo "kept: $DESTDIR$path, which has been changed"
            fi
            ;;
        esac
    done <"$LIST"
    [ -n "$DESTDIR" ] || for path in "${units[@]}"; do
        find /etc/systemd/system -mindepth 2 -maxdepth 2 -type l -lname "$path" -delete 2>/dev/null || true
    done
    local folders
    folders=$(old_entries dir | cut -f 2 | sort -r)
    rm -rf "$DESTDIR$LIBDIR"
    while read -r path; do [ -z "$path" ] || rmdir "$DESTDIR$path" 2>/dev/null || true; done <<<"$folders"
    reload_units
}

reload_units() {
    if [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; then systemctl daemon-reload || true; fi
}

case ${1:-} in
install) install_all ;;
uninstall) uninstall_all ;;
*) sed -n '3,21s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
