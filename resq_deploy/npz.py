"""npz files: written so that their bytes depend on the arrays only, read so that a hostile one does no harm."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy.errors import BundleError

_NPZ_LIMIT = 4 * 2**30  # bytes that the arrays of one npz may claim together
_NPZ_MEMBERS = 64


def write_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """An npz whose bytes depend on nothing but the arrays (no clock, no pickle)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(arrays):
            buffer = io.BytesIO()
            np.lib.format.write_array(
                buffer, np.ascontiguousarray(arrays[name]), allow_pickle=False
            )
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, buffer.getvalue(), compresslevel=6)


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of an npz, without pickles; sizes are checked before memory is taken. Raises BundleError."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_members(members)
            return {i.filename.removesuffix(".npy"): _read_array(archive, i) for i in members}
    except (
        OSError,
        ValueError,
        EOFError,
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        NotImplementedError,
    ) as error:
        raise BundleError(f"{path} cannot be read: {error}", "export the model again") from error
    except (
        Exception
    ) as error:  # zlib.error, struct.error, SyntaxError from a header: all say the same
        raise BundleError(
            f"{path} is damaged ({type(error).__name__})", "export the model again"
        ) from error


def _check_members(members: list[zipfile.ZipInfo]) -> None:
    names = {member.filename for member in members}
    if len(names) != len(members) or len(members) > _NPZ_MEMBERS:
        raise ValueError(f"{len(members)} arrays with {len(names)} names")
    claimed = sum(member.file_size for member in members)
    if claimed > _NPZ_LIMIT:
        raise ValueError(f"its arrays claim {claimed} bytes")


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    """One array of numbers. Only npy version 1.0, whose header is at most 64 KiB, is read."""
    with archive.open(info) as file:
        if (version := np.lib.format.read_magic(file)) != (1, 0):
            raise ValueError(f"npy version {version}")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        claimed = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if dtype.kind not in "biuf" or min(shape, default=0) < 0:
            raise ValueError(f"array {info.filename} holds {dtype}, not numbers")
        if claimed > info.file_size:
            raise ValueError(
                f"array {info.filename} claims {claimed} bytes, the file holds {info.file_size}"
            )
    with archive.open(info) as file:
        return np.lib.format.read_array(file, allow_pickle=False)
