"""Model files: which form a file has, and what is in it, without running anybody's pickle."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from resq_deploy.checkpoint import Checkpoint, is_checkpoint
from resq_deploy.errors import ModelError
from resq_deploy.export import onnx_source, pt2
from resq_deploy.export.graph import quiet

Form = Literal["checkpoint", "state dict", "TorchScript", "exported", "pickle", "ONNX", "Q/DQ"]

ONNX = ".onnx"
_WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every key
_NESTS = ("state_dict", "model_state_dict", "model", "net")
_HARMLESS = ("torch", "collections", "numpy", "_codecs")  # modules that plain checkpoints name


def read(file: Path, trust_pickle: bool) -> tuple[Form, Any]:
    """What a file holds: a Checkpoint, a state dict {name: Tensor}, a ScriptModule, an nn.Module, or a ModelProto.

    Raises ModelError for a file that is missing, damaged or no model, and for one whose reading would
    run code that came with it, unless `trust_pickle`.
    """
    if not file.exists():
        raise ModelError(f"{file} does not exist", "give the path of a model file")
    if not file.is_file():
        raise ModelError(f"{file} is not a file", "give the path of a model file")
    if file.suffix == ONNX:
        model = onnx_source.load(file)
        return ("Q/DQ" if onnx_source.is_quantized(model) else "ONNX"), model
    with quiet():
        try:
            members = _members(file)
        except OSError as error:
            raise ModelError(f"{file} cannot be read: {error.strerror}") from error
        if any(name.endswith("/constants.pkl") for name in members):
            return "TorchScript", _torchscript(file)
        if any(name.endswith(("models/model.json", "archive_version")) for name in members):
            return "exported", _exported(file, trust_pickle)
        return _pickled(file, trust_pickle)


def path_of(model: Any) -> Path:
    """The file that a caller means. Raises ModelError for a network in memory."""
    if not isinstance(model, str | os.PathLike):
        raise ModelError(
            f"a {type(model).__name__} in memory is no model file",
            "save it first: torch.export.save(torch.export.export(network, (images,)), 'model.pt2')",
        )
    return Path(model)


def is_quantized(file: Path) -> bool:
    """Whether a file is an ONNX graph that has codes already. Raises ModelError for one that cannot be read."""
    return file.suffix == ONNX and file.exists() and read(file, False)[0] == "Q/DQ"


def other_type(network: nn.Module) -> str:
    """Type and name of the first floating parameter that is not float32; an empty text if there is none."""
    for name, parameter in network.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            return f"{str(parameter.dtype).removeprefix('torch.')} ({name})"
    return ""


def in_float32(network: nn.Module) -> nn.Module:
    """The network itself, its parameters and buffers float32 where its parameters were not."""
    return network.float() if other_type(network) else network


def _members(file: Path) -> list[str]:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.namelist()
    except zipfile.BadZipFile:
        return []


def _damaged(file: Path) -> ModelError:
    return ModelError(
        f"{file} is truncated, or not a model file",
        "save it again: torch.save(model.state_dict(), PATH), torch.jit.save or torch.export.save",
    )


def _torchscript(file: Path) -> Any:
    """A TorchScript archive: its code runs in TorchScript's own interpreter, which has no Python."""
    try:
        load: Any = torch.jit.load
        return load(str(file), map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise _damaged(file) from error


def _exported(file: Path, trust_pickle: bool) -> nn.Module:
    try:
        found = "" if trust_pickle else pt2.danger(file)
        if not found:
            program = torch.export.load(io.BytesIO(file.read_bytes()))
            return program.module()
    except Exception as error:  # torch.export raises many kinds, none of them documented
        raise _damaged(file) from error
    raise _untrusted(file, found)


def _untrusted(file: Path, what: str) -> ModelError:
    return ModelError(
        f"{file} holds {what} and reading it would run its author's code",
        "save a state_dict, a TorchScript archive or a .pt2 instead; or add --trust-pickle if you made it yourself",
    )


def _pickled(file: Path, trust_pickle: bool) -> tuple[Form, Any]:
    try:
        body = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle may raise anything on bytes that are not its own
        foreign = _foreign(file)
        if not foreign:
            raise _damaged(file) from error
        if not trust_pickle:
            raise _untrusted(file, f"a pickled object ({foreign})") from error
        body = _trusted(file)
    if isinstance(body, nn.Module):
        return "pickle", body.eval()
    if is_checkpoint(body):
        return "checkpoint", Checkpoint.parse(body, str(file))
    weights = _state_dict(body)
    if not weights:
        raise ModelError(
            f"{file} holds no network and no weights, but a {type(body).__name__}",
            "save model.state_dict()",
        )
    return "state dict", weights


def _trusted(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as error:
        script = "__main__" in str(error)  # a class of the script that saved it is in no module
        cure = "save model.state_dict(), or TorchScript" if script else "set PYTHONPATH to it"
        raise ModelError(f"{file} needs code that cannot be imported: {error}", cure) from error
    except Exception as error:  # the author's code may raise anything
        raise _damaged(file) from error


def _foreign(file: Path) -> str:
    """The first class or function in a pickle that plain tensors do not need; nothing is executed."""
    for data in _pickles(file):
        strings: list[str] = []
        try:
            for opcode, argument, _ in pickletools.genops(data):
                if opcode.name == "GLOBAL":
                    strings = str(argument).split(" ")
                if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL") and len(strings) > 1:
                    module, name = strings[-2:]
                    if module.partition(".")[0] not in _HARMLESS or module.startswith("torch.nn"):
                        return f"{module}.{name}"
                if isinstance(argument, str):
                    strings.append(argument)
        except (ValueError, IndexError, EOFError, pickle.UnpicklingError):
            continue
    return ""


def _pickles(file: Path) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    yield archive.read(name)
    except zipfile.BadZipFile:
        data = file.read_bytes()
        if data[:1] == b"\x80":
            yield from _streams(data)


def _streams(data: bytes) -> Iterator[bytes]:
    """The pickles that follow each other in a file of torch's old format."""
    stream = io.BytesIO(data)
    for _ in range(4):
        start = stream.tell()
        yield data[start:]
        try:
            for _ in pickletools.genops(stream):
                pass
        except (ValueError, IndexError, EOFError):
            return


def _state_dict(body: object) -> dict[str, Tensor]:
    """Tensors by name, out of a state dict or a training checkpoint that contains one."""
    if not isinstance(body, Mapping):
        return {}
    nested = next((body[key] for key in _NESTS if isinstance(body.get(key), Mapping)), body)
    tensors = {str(k): v for k, v in nested.items() if isinstance(v, Tensor)}
    for prefix in _WRAPPERS:
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors
