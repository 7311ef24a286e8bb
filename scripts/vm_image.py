# SPDX-License-Identifier: MIT
"""The parts of the virtual machine: an emulator that works, and a disk with Debian and the wheels.

    QEMU       the one of this machine, or a backport of Debian, which is unpacked and not installed
    rootfs     a folder that mmdebstrap makes: systemd, kernel, compilers
    wheels     the packages that pip would download or compile in the machine; they are built in the rootfs with chroot
    disk       an ext4 image made from the rootfs; a machine gets a copy

Each part is made once and kept in CACHE, under a name that depends on its ingredients. The packages come from the Debian
archive that this machine uses.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from kit.programs import PATH, find_program

ROOT: Final = Path(__file__).resolve().parent.parent
CACHE: Final = Path(os.environ.get("ZBUDFS_VM_CACHE", "/var/tmp/zbudfs-test-vm"))
SUITES: Final = {"trixie": "Debian 13", "bookworm": "Debian 12"}
SUITE: Final = os.environ.get("ZBUDFS_VM_SUITE", "trixie")
"""The Debian of the virtual machine."""
OLDEST_QEMU: Final = 8
"""Oldest version of QEMU. The emulation of QEMU 7.2 (Debian 12) crashes the guest at random, with general protection faults."""

PACKAGES: Final = (
    *("systemd", "systemd-sysv", "udev", "dbus", "util-linux", "mount", "kmod", "procps", "e2fsprogs", "iproute2"),
    *("fuse3", "python3", "python3-venv", "python3-dev", "python3-pip", "gcc", "libc6-dev", "make", "pkg-config"),
    *("libfuse3-dev", "stress-ng", "initramfs-tools", "zstd", "busybox", "linux-image-cloud-amd64"),
)
USER_PACKAGES: Final = (
    *("systemd", "systemd-sysv", "udev", "dbus", "util-linux", "mount", "kmod", "procps", "e2fsprogs", "python3"),
    *("initramfs-tools", "zstd", "busybox", "linux-image-cloud-amd64"),
)
"""Packages of a user's machine: no compiler, no pip, no library that zbudfs needs."""
INITRD_MODULES: Final = "virtio_pci virtio_blk ext4"
"""Modules of the initrd: only the drivers of the root disk, so that it starts quickly."""
QEMU_PACKAGES: Final = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")
MASKED: Final = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "fstrim.timer"),
    *("systemd-firstboot.service", "getty@tty1.service", "serial-getty@ttyS0.service", "systemd-networkd.service"),
)
RUN_NEEDS: Final = (
    *("pyfuse3", "trio", "zstandard", "cryptography", "cffi", "pycparser", "attrs", "idna", "outcome", "sniffio"),
    *("sortedcontainers", "setuptools"),
)
"""Packages that zbudfs needs to run and to be built."""
BUILD_NEEDS: Final = ("setuptools>=78.1.1", "setuptools_scm>=8", "Cython", "wheel")
"""Packages that the build of pyfuse3 needs."""
GUEST_UNIT: Final = """\
[Unit]
After=basic.target dbus.service
RequiresMountsFor=/vm
[Service]
Type=exec
ExecStart=/usr/bin/python3 -u /vm/vm_guest.py
StandardOutput=file:/dev/hvc0
StandardError=inherit
TimeoutStopSec=5
KillMode=mixed
SendSIGKILL=yes
OOMPolicy=continue
OOMScoreAdjust=-1000
MemorySwapMax=infinity
Environment=LC_ALL=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
[Install]
WantedBy=multi-user.target
"""
"""The unit that runs a scenario. At the shutdown it is one more program whose memory is in swap."""

DISK_MIB: Final = 4096
KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"


class VmError(Exception):
    """The virtual machine cannot be made. The text is for the user."""


def why_not() -> str | None:
    """Return why this machine cannot run a virtual machine, with the remedy; None if it can."""
    if os.geteuid() != 0:
        return "not root: run it with sudo"
    if SUITE not in SUITES:
        return f"ZBUDFS_VM_SUITE is {SUITE!r}: set it to one of {', '.join(SUITES)}"
    wanted = {"qemu-system-x86_64": "qemu-system-x86", "mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs"}
    missing = [package for program, package in wanted.items() if find_program(program) is None]
    return f"programs are missing: apt-get install --no-install-recommends {' '.join(missing)}" if missing else None


def run(*command: str | Path, log: Path | None = None, **more: str) -> str:
    """Run a program, and return its output. Raises VmError with its last lines."""
    environment = {**os.environ, "LC_ALL": "C", "PATH": PATH, **more}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if log is not None:
        log.write_text(done.stdout + done.stderr)
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()[-5:]
        raise VmError(f"{Path(command[0]).name} failed ({done.returncode}): {' | '.join(words)}")
    return done.stdout


def archive() -> str:
    """Return the URI of the Debian archive that this machine uses. Raises VmError."""
    found = run("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages").split()
    for uri in sorted(set(found)):
        if "debian" in uri and "security" not in uri:
            return uri
    raise VmError("the package sources of this machine have no Debian archive: add one")


def key(*parts: object) -> str:
    """Return a name that depends on `parts`, the ingredients of a file."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


@contextlib.contextmanager
def made(path: Path) -> Iterator[Path]:
    """Yield a temporary name, and rename it to `path` at the end, so that `path` is complete if it exists."""
    draft = path.with_name(f"{path.name}.draft-{os.getpid()}")
    try:
        yield draft
        draft.rename(path)
    finally:
        remove(draft)


def remove(tree: Path) -> None:
    """Remove a file or folder, if it exists. First unmount everything in it: an interrupted mmdebstrap leaves a /proc."""
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        place = line.split()[1]
        if place.startswith(f"{tree}/"):
            run("umount", place)
    if tree.is_dir():
        shutil.rmtree(tree)
    else:
        tree.unlink(missing_ok=True)


# ---- the emulator --------------------------------------------------------------------------------------------------


def qemu() -> list[str]:
    """Return the command of an emulator that is new enough."""
    version = re.search(r"version (\d+)", run("qemu-system-x86_64", "--version"))
    if version and int(version[1]) >= OLDEST_QEMU:
        return ["qemu-system-x86_64"]
    tree = CACHE / "qemu"
    if not tree.is_dir():
        with made(tree) as draft:
            _unpack_backport(draft)
    modules = tree / "usr/lib/x86_64-linux-gnu/qemu"
    data = ["-L", f"{tree}/usr/share/seabios", "-L", f"{tree}/usr/share/qemu"]
    return ["env", f"QEMU_MODULE_DIR={modules}", f"{tree}/usr/bin/qemu-system-x86_64", *data]


def _unpack_backport(tree: Path) -> None:
    """Unpack QEMU from bookworm-backports. The package sources of this machine do not change."""
    apt = tree / "apt"
    for folder in ("lists/partial", "cache/archives/partial", "deb"):
        (apt / folder).mkdir(parents=True)
    (apt / "status").touch()
    (apt / "sources.list").write_text(f"deb [signed-by={KEYRING}] {archive()} bookworm-backports main\n")
    settings = {
        "Dir::Etc::SourceList": apt / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State": apt,
        "Dir::State::Lists": apt / "lists",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "APT::Sandbox::User": "root",
    }
    options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
    run("apt-get", *options, "update")
    run("sh", "-c", 'cd "$0" && exec apt-get "$@"', apt / "deb", *options, "download", *QEMU_PACKAGES)
    for package in (apt / "deb").glob("*.deb"):
        run("dpkg", "-x", package, tree)
    shutil.rmtree(apt)


# ---- the system ----------------------------------------------------------------------------------------------------


def system(packages: Sequence[str] = PACKAGES) -> Path:
    """Return the folder of a Debian that boots."""
    tree = CACHE / f"{SUITE}-{key(packages, INITRD_MODULES, MASKED, GUEST_UNIT)}"
    if not tree.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with made(tree) as draft:
            _bootstrap(draft, packages)
    return tree


def _bootstrap(tree: Path, packages: Sequence[str]) -> None:
    sources = tree.with_name("sources.list")
    sources.write_text(f"deb [signed-by={KEYRING}] {archive()} {SUITE} main\n")
    run(
        *("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={','.join(packages)}"),
        *("--aptopt=APT::Install-Recommends false", "--aptopt=Acquire::Languages none"),
        *("--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/locale/*"),
        '--customize-hook=printf "MODULES=list\\nCOMPRESS=zstd\\n" > "$1/etc/initramfs-tools/conf.d/small"',
        f'--customize-hook=printf "%s\\n" {INITRD_MODULES} >> "$1/etc/initramfs-tools/modules"',
        '--customize-hook=chroot "$1" update-initramfs -u -k all',
        *(SUITE, tree, sources),
        log=CACHE / "mmdebstrap.log",
    )
    tree.chmod(0o755)
    (tree / "etc/hostname").write_text("zbudfs-vm\n")
    (tree / "etc/machine-id").write_text(f"{uuid.uuid4().hex}\n")
    (tree / "etc/fstab").write_text("/dev/vda / ext4 defaults,noatime 0 0\n/dev/vdb /vm ext4 ro,noatime 0 0\n")
    (tree / "vm").mkdir()
    (tree / "etc/systemd/system/vm-guest.service").write_text(GUEST_UNIT)
    run("chroot", tree, "systemctl", "enable", "vm-guest.service")
    for unit in MASKED:
        (tree / "etc/systemd/system" / unit).symlink_to("/dev/null")
    for stamp in ("etc/.updated", "var/.updated"):
        (tree / stamp).touch()  # so that systemd does not run the services after an update


# ---- the wheels ----------------------------------------------------------------------------------------------------


def pinned(*names: str) -> list[str]:
    """Return the lines of requirements-dev.txt for these packages."""
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    return [line for line in lines if line.partition("==")[0].lower() in names]


def sources() -> list[str]:
    """Return the names of the source files for a machine: the files in git, and new files that git does not ignore."""
    listed = run("git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


def wheels() -> Path:
    """Return the folder of the wheels that zbudfs needs in the virtual machine, with all their dependencies."""
    wanted = pinned(*RUN_NEEDS)
    tree = system()
    folder = CACHE / f"wheels-{key(tree.name, wanted)}"
    if not folder.is_dir():
        with made(folder) as draft:
            _build(tree, draft, wanted)
    return folder


def _build(tree: Path, folder: Path, wanted: list[str]) -> None:
    """Download packages here, for the Python of the rootfs, and build the wheels in the rootfs without a network."""
    python = run("chroot", tree, "python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    inside = Path("var/tmp/wheels")
    work = tree / inside
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "-d", work]
    compiled = [line for line in wanted if line.startswith("pyfuse3==")]
    ready = [line for line in wanted if line not in compiled]
    try:
        run(*pip, "--no-deps", "--no-binary", ":all:", *compiled)
        run(*pip, "--only-binary", ":all:", "--python-version", python, *ready, *BUILD_NEEDS)
        run(
            *("env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", f"TMPDIR=/{inside}", "chroot", tree),
            *(
                "python3",
                "-m",
                "pip",
                "wheel",
                "-q",
                "--no-index",
                "--find-links",
                f"/{inside}",
                "-w",
                f"/{inside}/out",
            ),
            *wanted,
            log=CACHE / "wheels.log",
        )
        shutil.copytree(work / "out", folder)
    finally:
        shutil.rmtree(work)


# ---- the disk ------------------------------------------------------------------------------------------------------


def disk(packages: Sequence[str] = PACKAGES) -> Path:
    """Return a folder with `root.img`, `vmlinuz` and `initrd`."""
    tree = system(packages)
    folder = CACHE / f"disk-{key(tree.name, DISK_MIB)}"
    if not folder.is_dir():
        with made(folder) as draft:
            draft.mkdir()
            for name, pattern in (("vmlinuz", "vmlinuz-*"), ("initrd", "initrd.img-*")):
                shutil.copy(next((tree / "boot").glob(pattern)), draft / name)
            make_ext4(draft / "root.img", tree, DISK_MIB)
    return folder


def make_ext4(image: Path, tree: Path, size_mib: int) -> None:
    """Make an ext4 image of `size_mib` MiB with the files of `tree`."""
    options = ["-E", "lazy_itable_init=1,lazy_journal_init=1", "-m", "0", "-d", str(tree)]
    run("mke2fs", "-q", "-F", "-t", "ext4", *options, image, f"{size_mib}M")


if __name__ == "__main__":
    print(*qemu())
    print(disk())
    print(wheels())
