"""Remove the GPU code of all architectures but one from a shared library: python tools/maintain/keep_gpu_code.py LIBRARY sm_90

CUDA's compiler puts the code of a source file for every architecture into one container of the section `.nv_fatbin`, and the driver picks
an entry when it loads the container. Here the entries of the architecture move to the front of their container, whose size in its header
shrinks to them, and the rest of it becomes zeros: the file keeps its layout and compresses well. A container without such an entry is
refused, since the driver would compile its code for another architecture. Prints MiB by kind and architecture before, and the MiB kept.
"""

import argparse
import mmap
import os
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CONTAINER = struct.Struct("<IHHQ")
"""Magic number, version, bytes of this header, bytes of all entries."""
_MAGIC = 0xBA55ED50
_ENTRY = struct.Struct("<HHIQ12xI")
"""Kind, version, bytes of this header, bytes of the code, architecture."""
_KINDS = {1: "ptx", 2: "cubin"}
_ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """GPU code of one architecture."""

    kind: str
    architecture: int
    """90 for sm_90."""
    start: int
    """Offset in the file, its header included."""
    nbytes: int


@dataclass(frozen=True)
class Container:
    """GPU code of one source file."""

    start: int
    """Offset of the header in the file."""
    header_bytes: int
    entries: tuple[Entry, ...]


def section(data, name: str) -> tuple[int, int]:
    """Return offset and bytes of a section of an ELF file of 64 bits. Raises ValueError if there is none."""
    if data[:5] != b"\x7fELF\x02":
        raise ValueError("it is no ELF file of 64 bits")
    (table,), (width, count, names) = struct.unpack_from("<Q", data, 0x28), struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<I20xQQ", data, table + width * number) for number in range(count)]
    for at, offset, nbytes in headers:
        start = headers[names][1] + at
        if data[start : data.find(b"\0", start)] == name.encode():
            return offset, nbytes
    raise ValueError(f"it has no section {name}")


def containers(data, start: int, nbytes: int) -> Iterator[Container]:
    """Yield the containers of a section. Raises ValueError for bytes that are neither a container nor padding."""
    offset, end = start, start + nbytes
    while offset + _CONTAINER.size <= end:
        magic, _, header, size = _CONTAINER.unpack_from(data, offset)
        if magic == 0:
            offset += _ALIGNMENT
            continue
        if magic != _MAGIC or offset + header + size > end:
            raise ValueError(f"unknown GPU code at byte {offset}")
        yield Container(offset, header, tuple(_entries(data, offset + header, offset + header + size)))
        offset += header + size


def _entries(data, offset: int, end: int) -> Iterator[Entry]:
    while offset < end:
        kind, _, header, code, architecture = _ENTRY.unpack_from(data, offset)
        if kind not in _KINDS or not header or offset + header + code > end:
            raise ValueError(f"unknown GPU code at byte {offset}")
        yield Entry(_KINDS[kind], architecture, offset, header + code)
        offset += header + code


def keep(data, container: Container, architecture: int) -> int:
    """Keep only the cubins of the architecture in a container; return their bytes. Raises ValueError if there are none."""
    kept = [entry for entry in container.entries if (entry.kind, entry.architecture) == ("cubin", architecture)]
    if not kept:
        raise ValueError(f"its GPU code at byte {container.start} has no part for sm_{architecture}")
    code = b"".join(data[entry.start : entry.start + entry.nbytes] for entry in kept)
    before = sum(entry.nbytes for entry in container.entries)
    start = container.start + container.header_bytes
    data[start : start + before] = code + bytes(before - len(code))
    magic, version, header, _ = _CONTAINER.unpack_from(data, container.start)
    _CONTAINER.pack_into(data, container.start, magic, version, header, len(code))
    return len(code)


def trim(library: Path, architecture: int) -> tuple[Counter, int]:
    """Trim a library, atomically; return bytes by (kind, architecture) before, and bytes kept.

    Raises ValueError for a file of unknown layout, or a container with no code for the architecture.
    """
    part = library.with_name(library.name + ".part")
    shutil.copyfile(library, part)
    try:
        with part.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
            found = list(containers(data, *section(data, ".nv_fatbin")))
            before: Counter = Counter()
            for container in found:
                for entry in container.entries:
                    before[entry.kind, entry.architecture] += entry.nbytes
            kept = sum(keep(data, container, architecture) for container in found)
        os.replace(part, library)
    finally:
        part.unlink(missing_ok=True)
    return before, kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("architecture", help="sm_90 for Hopper")
    parsed = parser.parse_args()
    prefix, _, number = parsed.architecture.partition("_")
    if prefix != "sm" or not number.isdecimal():
        parser.error(f"{parsed.architecture} is no architecture; Hopper's is sm_90")
    try:
        before, kept = trim(parsed.library, int(number))
    except (OSError, ValueError) as error:
        print(f"keep_gpu_code: error: {parsed.library}: {error}", file=sys.stderr)
        return 1
    for (kind, architecture), nbytes in sorted(before.items()):
        print(f"{kind} sm_{architecture}: {nbytes / 2**20:.1f} MiB")
    print(f"kept: {kept / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
