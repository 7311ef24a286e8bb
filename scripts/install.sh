#!/bin/bash
# SPDX-License-Identifier: MIT
# Install or uninstall zbudfs. `make install` and `make uninstall` run this script.
#
#   install.sh install|uninstall|files      with these variables in the environment, and their defaults:
#   PREFIX      /usr/local            prefix of the folders below that begin with PREFIX
#   DESTDIR                           install below this folder, which is moved to / later (for a package)
#   LIBDIR      PREFIX/lib/zbudfs     the program, in its own virtual environment
#   BINDIR      PREFIX/bin            the command: a script that starts the program
#   HELPERDIR   /sbin                 the helpers of mount(8) and umount(8), which look for them in no other folder
#   SYSCONFDIR  /etc                  zbudfs/swap.toml, if there is none; files for needrestart and initramfs-tools
#   UNITDIR     PREFIX/lib/systemd/system        the units
#   SLEEPDIR    /usr/lib/systemd/system-sleep    the hook of systemd-sleep(8), which looks for it in no other folder
#   DATADIR     PREFIX/share          man/, doc/zbudfs/, and completions for bash, zsh and fish
#   EXTRAS                            "top", "exporter", "plot", or several with commas: the libraries of these commands. The
#                                     next `make install` installs them too, unless it has EXTRAS=none
#   WHEELHOUSE                        a folder with wheels: then the network is not used
#   PYTHON      python3               3.11 or later; the installed program depends on this interpreter
#
# The new environment is made beside the old one and then replaces it in one step, so that running processes go on. After
# that, `zbudfs restart` or `systemctl restart` hands over to the new version. LIBDIR/installed lists all files and folders
# outside of LIBDIR. uninstall removes these files, and these folders if they are empty. It keeps a changed configuration.
#
# `files` is for a package (debian/rules): it installs everything but the program below DESTDIR. PYTHON must find the
# program; otherwise the commands print REMEDY.
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
ZSHDIR=${ZSHDIR:-$DATADIR/zsh/site-functions}
INITRAMFSDIR=${INITRAMFSDIR:-$SYSCONFDIR/initramfs-tools}
REMEDY=${REMEDY:-install zbudfs again (make install)}
EXTRAS=${EXTRAS:-}
WHEELHOUSE=${WHEELHOUSE:-}
PYTHON=${PYTHON:-python3}
LIST=$DESTDIR$LIBDIR/installed
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1

fail() { echo "install: $*" >&2; exit 1; }

for folder in "$PREFIX" "$LIBDIR" "$BINDIR" "$HELPERDIR" "$SYSCONFDIR" "$UNITDIR" "$SLEEPDIR" "$DATADIR" "$ZSHDIR" "$INITRAMFSDIR" "${DESTDIR:-/}"; do
    [[ $folder = /* && $folder != *$'\n'* ]] || fail "'$folder' is not an absolute path: write one that starts with /"
done

version() { sed -n 's/^__version__ = "\(.*\)"/\1/p' zbudfs/__init__.py; }

# ---- checks ----------------------------------------------------------------------------------------------------------

check_machine() {
    command -v "$PYTHON" >/dev/null || fail "$PYTHON is missing: apt-get install python3, or set PYTHON"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$PYTHON is older than 3.11: set PYTHON"
    "$PYTHON" -c 'import venv' || fail "$PYTHON cannot make virtual environments: apt-get install python3-venv"
    if [ -n "$WHEELHOUSE" ]; then
        [ -d "$WHEELHOUSE" ] || fail "WHEELHOUSE=$WHEELHOUSE is not a folder: set it to a folder with wheels"
        WHEELHOUSE=$(readlink -f "$WHEELHOUSE")
        return
    fi
    local missing=() include
    command -v gcc >/dev/null || missing+=(gcc libc6-dev)
    command -v pkg-config >/dev/null && pkg-config --exists fuse3 || missing+=(pkg-config libfuse3-dev)
    include=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -e "$include/Python.h" ] || missing+=(python3-dev)
    [ ${#missing[@]} -eq 0 ] || fail "packages for the build are missing: apt-get install ${missing[*]}"
}

# Fails if a process runs from LIBDIR: its command line begins with LIBDIR's interpreter.
check_idle() {
    [ -z "$DESTDIR" ] || return 0
    local process
    for process in /proc/[0-9]*; do
        if { tr '\0' '\n' <"$process/cmdline"; } 2>/dev/null | head -n 1 | grep -qxF "$LIBDIR/bin/python"; then
            fail "process ${process#/proc/} still runs from $LIBDIR: run zbudfs swapoff --umount MOUNTPOINT first"
        fi
    done
}

# ---- the list of installed files -------------------------------------------------------------------------------------
# Lines of two or three words with tabs between them: "dir PATH", "file PATH", "config PATH CHECKSUM". Paths lack DESTDIR.

entries=()

checksum() { cksum <"$1" | tr ' ' '-'; }

make_folder() {
    [ "$1" != / ] && [ ! -d "$DESTDIR$1" ] || return 0
    make_folder "$(dirname "$1")"
    mkdir "$DESTDIR$1"
    entries+=("dir"$'\t'"$1")
}

# Installs the file $1 as $2, in one step: a symbolic link at $2 is replaced, not followed, and a command is never missing.
put_file() {
    make_folder "$(dirname "$2")"
    install -m "${3:-0644}" "$1" "$DESTDIR$2.new"
    mv -fT "$DESTDIR$2.new" "$DESTDIR$2"
    entries+=("file"$'\t'"$2")
}

# Prints the file $1 with the real paths of this installation.
with_places() { sed "s|/usr/local/bin/zbudfs|$BINDIR/zbudfs|g; s|/usr/local/lib/zbudfs|$LIBDIR|g" "$1"; }

# Installs a command: a script that starts the program, or says why it cannot.
put_command() {
    with_places systemd/libexec/launcher | sed "s|COMMAND\"|$1\"|; s|^python=.*|python=$python|; /^echo/s|install zbudfs again (make install)|$REMEDY|" >"$scratch/command"
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

# Writes the script $1, which calls the function $2. The scripts of pip would print a traceback if the interpreter has another
# version than at the installation.
make_script() {
    cat >"$1" <<EOF
#!$python -I
import os
import sys

try:
    if sys.version_info[:2] != ($built_for):
        raise ImportError("zbudfs was built for another version")
    from zbudfs.cli.entry import $2
except ImportError as error:
    python = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
    print(f"zbudfs: cannot start with {python}: {error}; $REMEDY", file=sys.stderr)
    sys.exit(127 if os.environ.get("LISTEN_FDS", "0") in ("", "0") else 1)
sys.exit($2())
EOF
    chmod 0755 "$1"
}

make_scripts() {
    local built_for
    built_for=$("$PYTHON" -c 'import sys; print("%d, %d" % sys.version_info[:2])')
    make_script "$1/zbudfs" main
    make_script "$1/mount.fuse.zbudfs" mount_main
    make_script "$1/umount.fuse.zbudfs" umount_main
}

# Sets EXTRAS to "[a,b]", or to nothing: the wanted extras, and those of the installation before.
choose_extras() {
    if [ "$EXTRAS" = none ]; then EXTRAS=; else EXTRAS+=,$(old_entries extras | cut -f 2); fi
    EXTRAS=$(tr ',' '\n' <<<"$EXTRAS" | sed '/^$/d' | sort -u | paste -sd ,)
    [ -n "$EXTRAS" ] || return 0
    local name
    for name in ${EXTRAS//,/ }; do
        case $name in
        top | exporter | plot) ;;
        *) fail "the extra $name is unknown: write top, exporter and plot, with commas, after EXTRAS=" ;;
        esac
    done
    entries+=("extras"$'\t'"$EXTRAS")
    EXTRAS="[$EXTRAS]"
}

make_environment() {
    local new=$1 scratch=$2 what=.
    "$PYTHON" -m venv --without-pip "$new"
    # Any pip that can install into another environment works (22.3 or later); the environment itself needs no pip.
    if ! "${pip[@]}" --python "$new/bin/python" --version >/dev/null 2>&1; then
        "$PYTHON" -m venv "$scratch/pip" || fail "$PYTHON has no pip: apt-get install python3-venv"
        pip=("$scratch/pip/bin/python" -m pip)
    fi
    if [ -n "$WHEELHOUSE" ]; then
        options=(--no-index --find-links "$WHEELHOUSE")
        if compgen -G "$WHEELHOUSE/zbudfs-*.whl" >/dev/null; then
            what=zbudfs$EXTRAS==$(version)
        fi
    fi
    if [ "$what" = . ]; then  # the build uses a copy, since it would leave folders of root in the source
        mkdir "$scratch/source"
        cp -r LICENSE README.md pyproject.toml setup.py zbudfs "$scratch/source"
        what=$scratch/source$EXTRAS
    fi
    "${pip[@]}" --python "$new/bin/python" install --quiet --no-compile "${options[@]}" "$what"
    # Scripts and compiled files name the final folder, not the temporary one.
    rm -f "$new"/bin/activate* "$new"/bin/Activate*
    grep -rlIF "$new/bin/python" "$new/bin" | xargs -r sed -i "1s|^#!.*|#!$LIBDIR/bin/python -I|"
    make_scripts "$new/bin"
    sed -i "/^command = /d" "$new/pyvenv.cfg"
    rm -f "$new"/lib/*/site-packages/zbudfs-*.dist-info/direct_url.json
    "$new/bin/python" -I -m compileall -q -s "$new" -p "$LIBDIR" "$new/lib"
    "$new/bin/python" -I -m zbudfs --version >/dev/null || fail "the built program does not start: see the error above"
}

# Sets `pages` to the folder of manual pages, completion and example: this folder in a release, otherwise a folder in $2. There
# the program in the environment $1 makes them, with tools that are not kept. Without the tools, only the example is made.
make_pages() {
    pages=.
    [ -e .git ] || [ ! -e completion/zbudfs.bash ] || return 0
    pages=$2/pages
    "${pip[@]}" --python "$1/bin/python" install --quiet --target "$2/tools" "${options[@]}" docutils shtab 2>/dev/null || true
    PYTHONPATH=$2/tools PYTHONDONTWRITEBYTECODE=1 "$1/bin/python" scripts/pages.py "$pages"
}

# Installs the completion for the shell $1, if it could be made.
put_made() { [ ! -e "$pages/completion/zbudfs.$1" ] || put_file "$pages/completion/zbudfs.$1" "$2"; }

# Installs everything but the program, and the libexec/ of the folder $1.
put_files() {
    local new=$1 helper page unit
    put_command zbudfs "$BINDIR/zbudfs"
    for helper in {u,}mount.fuse.zbudfs; do
        put_command "$helper" "$HELPERDIR/$helper"
    done
    mkdir -p "$new/libexec"
    for helper in systemd/libexec/*; do
        [ "${helper##*/}" != launcher ] || continue
        with_places "$helper" >"$new/libexec/${helper##*/}"
        chmod 0755 "$new/libexec/${helper##*/}"
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
    for page in "$pages"/docs/man/*.[1-9]; do
        [ ! -f "$page" ] || put_file "$page" "$DATADIR/man/man${page##*.}/${page##*/}"
    done
    put_file "$pages/docs/zbudfs.toml.example" "$DATADIR/doc/zbudfs/zbudfs.toml.example"
    put_made bash "$DATADIR/bash-completion/completions/zbudfs"
    put_made zsh "$ZSHDIR/_zbudfs"
    put_made fish "$DATADIR/fish/vendor_completions.d/zbudfs.fish"
    put_config "$pages/docs/zbudfs.toml.example" "$SYSCONFDIR/zbudfs/swap.toml"
    put_config systemd/other/needrestart.conf "$SYSCONFDIR/needrestart/conf.d/zbudfs.conf"
    put_config systemd/other/initramfs-hook "$INITRAMFSDIR/hooks/zbudfs" 0755
}

install_files() {
    [ -n "$DESTDIR" ] || fail "DESTDIR is missing: \`files\` is for a package, so set DESTDIR"
    local python=$PYTHON pages=.
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    mkdir -p "$DESTDIR$LIBDIR/bin"
    put_files "$DESTDIR$LIBDIR"
    make_scripts "$DESTDIR$LIBDIR/bin"
}

install_all() {
    check_machine
    local options=() pages pip=("$PYTHON" -m pip)
    local new=$DESTDIR$LIBDIR.new old=$DESTDIR$LIBDIR.old python=$LIBDIR/bin/python entry
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch" "$DESTDIR$LIBDIR.new"' EXIT
    rm -rf "$new" "$old"
    [ -z "$DESTDIR" ] || mkdir -p "$DESTDIR"
    while read -r entry; do [ -z "$entry" ] || entries+=("$entry"); done < <(old_entries dir)
    choose_extras
    make_folder "$(dirname "$LIBDIR")"
    make_environment "$new" "$scratch"
    make_pages "$new" "$scratch"
    put_files "$new"
    put_file README.md "$DATADIR/doc/zbudfs/README.md"
    put_file LICENSE "$DATADIR/doc/zbudfs/LICENSE"

    # Remove files that only the version before had.
    while IFS=$'\t' read -r _ entry; do
        [[ -z $entry || $'\n'"$(printf '%s\n' "${entries[@]}")"$'\n' = *$'\n'file$'\t'"$entry"$'\n'* ]] || rm -f "$DESTDIR$entry"
    done < <(old_entries file)
    printf '%s\n' "${entries[@]}" >"$new/installed"
    [ ! -e "$DESTDIR$LIBDIR" ] || mv -T "$DESTDIR$LIBDIR" "$old"
    mv -T "$new" "$DESTDIR$LIBDIR"
    rm -rf "$old"
    reload_units
    echo "installed in $DESTDIR$LIBDIR; next: edit $SYSCONFDIR/zbudfs/swap.toml, and run zbudfs doctor"
}

# ---- uninstall -------------------------------------------------------------------------------------------------------

uninstall_all() {
    [ -e "$LIST" ] || fail "$LIST is missing: set PREFIX, DESTDIR and LIBDIR as at the installation"
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
                echo "kept $DESTDIR$path, since it was changed"
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
files) install_files ;;
uninstall) uninstall_all ;;
*) sed -n '3,23s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
