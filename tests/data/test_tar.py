"""Tars as tarfile, GNU tar's formats and damage make them; tarfile is the oracle where it reads them."""

import io
import struct
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mug.data.errors import DataError
from mug.data.index import tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def make(members, format="gnu", **fields) -> bytes:
    """A tar of (name or TarInfo, body) pairs, or of TarInfos."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[format]) as archive:
        for member in members:
            name, body = (member, b"") if isinstance(member, tarfile.TarInfo) else member
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            for name, value in {"size": len(body), **fields}.items():
                setattr(info, name, value)
            archive.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


def read_of(data: bytes):
    return lambda offset, length: data[offset : offset + length]


def scan(data: bytes, window: int = tar.NEAR) -> list[tuple[bytes, int, int]]:
    """(name, offset, length) of each file; the smallest window reads most often."""
    files = tar.scan(read_of(data), len(data), window)
    return [(n, *p) for batch in files for n, p in zip(batch.names.to_pylist(), batch.places.tolist(), strict=True)]


def oracle(data: bytes) -> list[tuple[bytes, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        return [(m.name.encode(errors="surrogateescape"), m.offset_data, m.size) for m in archive if m.isreg()]


def fix_checksum(header: bytearray) -> None:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)


names = st.text(st.sampled_from("ab.é 0"), min_size=1, max_size=40) | st.text(
    st.sampled_from("xyz"), min_size=90, max_size=300
)
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
bodies = st.integers(0, 2500).map(lambda n: b"z" * n)


@given(st.lists(st.tuples(paths, bodies), max_size=8), st.sampled_from(["gnu", "pax"]), st.booleans(), st.data())
def test_scans_what_tarfile_reads(members, format, odd_time, draw):
    data = make(members, format, mtime=0.5 if odd_time else 1)
    expected = oracle(data)
    assert len(expected) == len(members)
    assert scan(data, draw.draw(st.sampled_from([tar.NEAR, 4096, 2**20]))) == expected


@given(st.lists(st.tuples(st.text(st.sampled_from("ab."), min_size=1, max_size=150), bodies), max_size=8))
def test_scans_ustar_with_the_name_in_two_fields(members):
    members = [(f"{name[:100]}/{name[:90]}", body) for name, body in members]
    data = make(members, "ustar")
    assert scan(data) == oracle(data)


@given(st.binary(max_size=3000), st.integers(0, 6000))
def test_damage_is_refused_or_does_not_matter(noise, at):
    """Whatever is written over a tar: it scans to files that lie in it, or is refused."""
    data = bytearray(make([(f"{i}.jpg", b"i" * 700 * i) for i in range(4)]))
    data[at : at + len(noise)] = noise[: len(data) - at]
    try:
        files = scan(bytes(data))
    except DataError:
        return
    assert all(min(offset, length) >= 0 and offset + length <= len(data) for _, offset, length in files)


def test_many_batches_and_bodies(monkeypatch):
    monkeypatch.setattr(tar, "BATCH", 7)
    monkeypatch.setattr(tar, "WIDE", 4096)  # a batch ends with what was read at once
    members = [(f"{i:05d}.jpg", bytes([i]) * (i * 37)) for i in range(100)]
    data = make(members, "pax", mtime=0.5)
    assert scan(data) == oracle(data)
    batches = list(tar.scan(read_of(data), len(data), 4096))
    assert max(len(batch.names) for batch in batches) <= 7


def test_a_size_in_base_256():
    data = bytearray(make([("a.jpg", b"x" * 600), ("b.jpg", b"y")]))
    data[124:136] = b"\x80" + (600).to_bytes(11, "big")
    header = bytearray(data[:512])
    fix_checksum(header)
    data[:512] = header
    assert scan(bytes(data)) == oracle(bytes(data)) == [(b"a.jpg", 512, 600), (b"b.jpg", 2048, 1)]


@pytest.mark.parametrize("size", [b"\xff" * 12, b"-0000000001\0", b"0000000zz00\0"])
def test_a_size_that_is_none(size):
    data = bytearray(make([("a.jpg", b"x" * 600)]))
    data[124:136] = size
    header = bytearray(data[:512])
    fix_checksum(header)
    data[:512] = header
    with pytest.raises(DataError, match=r"header at byte 0 cannot be read \((negative size|invalid header)\)"):
        scan(bytes(data))


def test_a_size_that_octal_digits_cannot_hold():
    """9 GB: such a member is distinguished from a cut one by its place alone, so it need not be there."""
    info = tarfile.TarInfo("big.jpg")
    info.size = 9 * 2**30
    for format in ("gnu", "pax"):  # base 256; a PAX record next to a field of zeros
        header = info.tobuf(FORMATS[format])
        size = len(header) + info.size + 1024
        end = len(header) + info.size

        def read(offset, length, header=header, end=end, size=size):
            if offset >= end:
                return bytes(min(length, size - offset))
            return header[offset : offset + length].ljust(min(length, size - offset), b"x")

        (files,) = tar.scan(read, size, 4096)
        assert files.places.tolist() == [[len(header), info.size]]
        with pytest.raises(DataError, match=r"cut short inside 'big\.jpg'"):
            list(tar.scan(read, size - 2000, 4096))


def test_checksums_of_signed_bytes():
    header = bytearray(make([("é.jpg", b"x")])[:512])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(struct.unpack("512b", header))
    data = bytes(header) + b"x".ljust(512, b"\0") + bytes(1024)
    assert scan(data) == oracle(data) == [("é.jpg".encode(), 512, 1)]


def test_a_name_for_all_that_follow():
    """A global PAX header counts until another one; GNU tar writes them for comments."""
    body = b"22 comment=0123456789\n"
    assert len(body) == 22
    data = bytearray(make([("pax_global", body), ("a.jpg", b"x"), ("b.jpg", b"y")]))
    header = data[:512]
    header[156] = ord("g")
    fix_checksum(header)
    data[:512] = header
    assert scan(bytes(data)) == oracle(bytes(data))
    assert [name for name, _, _ in scan(bytes(data))] == [b"a.jpg", b"b.jpg"]


def test_times_that_gnu_keeps_in_the_place_of_a_long_name_are_not_part_of_it():
    """As `tar --incremental` writes them, which tarfile takes for the beginning of the name."""
    data = bytearray(make([("a.jpg", b"x")]))
    header = data[:512]
    header[345:357] = b"14067777777\0"
    fix_checksum(header)
    data[:512] = header
    assert scan(bytes(data)) == [(b"a.jpg", 512, 1)]
    assert oracle(bytes(data)) == [(b"14067777777/a.jpg", 512, 1)]


@pytest.mark.parametrize(
    ("count", "size", "reason"), [(1000, 4, "header at byte 0 cannot be read"), (1, 2**20, "more than 1,048,576")]
)
def test_extended_headers_without_end_are_refused(count, size, reason):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, size
    extended = info.tobuf(tarfile.GNU_FORMAT) + bytes(-(-size // 512) * 512)
    with pytest.raises(DataError, match=reason):
        scan(extended * count + WHOLE)


def link(name: str, type: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type, "/etc/passwd"
    return info


def test_links_folders_and_devices_are_ignored():
    types = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
    data = make([("a.jpg", b"1"), *(link(f"{i}.jpg", type) for i, type in enumerate(types)), ("b.jpg", b"2")])
    assert [name for name, _, _ in scan(data)] == [b"a.jpg", b"b.jpg"]


@pytest.mark.parametrize("kind", ["S typeflag", "PAX record"])
def test_sparse_files_are_refused_by_name(kind):
    if kind == "S typeflag":
        info = tarfile.TarInfo("holes.jpg")
        info.type = tarfile.GNUTYPE_SPARSE
    else:
        info = tarfile.TarInfo("GNUSparseFile.0/holes.jpg")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "holes.jpg"}
        info = (info, b"0\n".ljust(512, b"\0"))  # a map of no pieces
    with pytest.raises(DataError, match=r"sparse file, 'holes\.jpg'"):
        scan(make([("a.jpg", b"1"), info], "pax"))


def damaged_header() -> bytes:
    data = bytearray(make([("a.jpg", b"x" * 600), ("b.jpg", b"y"), ("c.jpg", b"z")]))
    data[1536 + 3] ^= 1  # in the name of b.jpg, which is one of its bytes
    return bytes(data)


WHOLE = make([("a.jpg", b"x" * 600), ("b.txt", b"y" * 600)])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (WHOLE[: 512 + 100], "cut short inside 'a.jpg'"),
        (WHOLE[: 3 * 512 + 600], "cut short inside 'b.txt'"),
        (WHOLE[: 3 * 512], "having no end mark"),
        (WHOLE[: 3 * 512 + 100], "having no end mark"),
        (WHOLE[: 6 * 512], "having no end mark"),
        (b"", "having no end mark"),
        (damaged_header(), r"header at byte 1,536 cannot be read \(bad checksum\)"),
        (b"PK\x03\x04" * 200, "is not a tar"),
        (b"\x1f\x8b" * 400, "is compressed"),
        (WHOLE + WHOLE, "joined by cat"),
    ],
    ids=["in a", "in b", "boundary", "in a header", "no end blocks", "empty", "checksum", "zip", "gzip", "cat"],
)
def test_damaged_tars_are_refused(data, reason):
    with pytest.raises(DataError, match=reason):
        scan(data)


def test_one_end_block_is_enough_and_an_empty_tar_is_a_tar():
    assert scan(WHOLE[: 7 * 512]) == oracle(WHOLE)
    assert scan(bytes(10240)) == scan(bytes(512)) == []


def test_a_tar_that_shrinks_while_it_is_read():
    data = make([("a.jpg", b"x" * 60000), ("b.jpg", b"x")])
    with pytest.raises(DataError, match="became shorter"):
        list(tar.scan(read_of(data[:5000]), len(data), 4096))
