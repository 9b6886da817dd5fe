"""Arrays from a stranger: an npz that lies, grows or runs code is refused before it costs anything."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resq_deploy.errors import BundleError
from resq_deploy.npz import read_npz, write_npz


def npy(header: str, body: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    length = len(text).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return b"\x93NUMPY" + version + length + text + body


def archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999,)}"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2**60,)}"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -4)}", b"\0" * 16),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"\x80\x04N."),
        npy("{'descr': '<U4', 'fortran_order': False, 'shape': (1,)}", b"\0" * 16),
        npy("{'descr': '<M8[s]', 'fortran_order': False, 'shape': (1,)}", b"\0" * 8),
        npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}", b"\0" * 4),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", b"\0" * 4, b"\x02\x00"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", b"\0" * 4, b"\x09\x00"),
        npy("__import__('os').system('true')"),
        npy("{'descr': '<f4'" + "[" * 90),
        b"\x93NUMPY",
        b"",
    ],
)
def test_an_array_that_lies_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(BundleError):
        read_npz(archive(tmp_path / "x.npz", x=content))


def test_a_bomb_is_refused_before_it_grows(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.npz", x=npy("{}"))
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\x01\x02") + 24  # the uncompressed size in the central directory
    content[place : place + 4] = (2**32 - 2).to_bytes(4, "little")
    path.write_bytes(bytes(content))
    with pytest.raises(BundleError):
        read_npz(path)
    with pytest.raises(BundleError, match="arrays with"):
        read_npz(archive(tmp_path / "many.npz", **{f"a{i}": b"" for i in range(65)}))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_arrays_of_one_name_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        for _ in range(2):
            file.writestr("x.npy", npy("{}"))
    with pytest.raises(BundleError, match="2 arrays with 1 names"):
        read_npz(tmp_path / "x.npz")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_npz_is_read_or_refused(tmp_path: Path, data: Any) -> None:
    path = tmp_path / "x.npz"
    write_npz(path, {"x": np.arange(12.0).reshape(3, 4), "y": np.array([1, 2, 3], dtype=np.uint8)})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    try:
        assert all(a.dtype.kind in "biuf" for a in read_npz(path).values())
    except BundleError as error:
        assert error.message  # noqa: PT017 - either outcome is right, a crash is not


def test_an_npz_of_pickles_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(BundleError):
        read_npz(archive(tmp_path / "x.npz", x=buffer.getvalue()))
