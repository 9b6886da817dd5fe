"""MODEL.pt -> a network that takes pixels, without running anybody's pickle.

checkpoint    of resq-harden: carries its architecture, shape, classes and preprocessing
state dict    tensors by name; needs an architecture to put them in
TorchScript   torch.jit.save
exported      torch.export.save, .pt2
pickle        a pickled module: loading it runs its author's code, so only if it is trusted
"""

from __future__ import annotations

import io
import logging
import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor, nn

from resq_deploy import networks
from resq_deploy.bundle import sha256_of
from resq_deploy.checkpoint import Checkpoint, is_checkpoint, load_weights
from resq_deploy.errors import ModelError
from resq_deploy.export.graph import Preprocessed

Form = Literal["checkpoint", "state dict", "TorchScript", "exported", "pickle"]
Shape = tuple[int, int, int]

_WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every key
_NESTS = ("state_dict", "model_state_dict", "model", "net")
_HARMLESS = ("torch", "collections", "numpy", "_codecs")  # modules that plain checkpoints name


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A network ready to be exported.

    `module`: float32 pixels in [0, 1], [B, C, H, W] -> logits [B, classes], preprocessing inside, eval
    mode. `classes`: names, `0`, `1`, ... where the file has none. `trained`, `metrics`: what the file
    says about its training.
    """

    module: Preprocessed
    form: Form
    arch: str
    input_shape: Shape
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sha256: str
    trained: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


def load_model(
    path: str | Path,
    *,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    input_shape: Shape | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
    trust_pickle: bool = False,
) -> LoadedModel:
    """Read a model file in any form. What is given wins over what the file says.

    `arch`, `arch_args`: needed for a state dict (see networks.build). `input_shape` (C, H, W): needed
    unless the file is a checkpoint. `mean`, `std`: preprocessing per channel, or one number for all;
    default: the file's, else none. `classes`: names; default: the file's, else as many as there are logits.
    Raises ModelError for a file that is missing, damaged or no model, for a pickled module that is not
    trusted, for weights of another architecture, and for an input shape that the network refuses.
    """
    file = Path(path)
    form, content = _read(file, trust_pickle)
    if isinstance(content, Checkpoint):
        return _of_checkpoint(file, content, input_shape, mean, std, classes)
    if input_shape is None:
        raise ModelError(
            f"{file} does not say what images it takes", "give --input-shape, for example 3x32x32"
        )
    if form == "state dict":
        network = _fill(file, content, arch, arch_args or {}, input_shape, classes)
    else:
        network = content
    mean, std = _per_channel(mean, 0.0, input_shape), _per_channel(std, 1.0, input_shape)
    module = Preprocessed(network, mean, std)
    logits = try_out(module, input_shape, None if classes is None else len(classes))
    names = tuple(classes) if classes is not None else tuple(map(str, range(logits)))
    name = arch or form.lower()
    return LoadedModel(module, form, name, input_shape, names, mean, std, sha256_of(file))


def try_out(module: nn.Module, shape: Shape, classes: int | None) -> int:
    """Run two images of a shape; how many logits come out.

    Raises ModelError where the network refuses the shape, does not give one row of finite logits per
    image, or has another number of classes.
    """
    size = "x".join(map(str, shape))
    try:
        with torch.no_grad():
            logits = module(
                torch.linspace(0, 1, 2 * shape[0] * shape[1] * shape[2]).reshape(2, *shape)
            )
    except Exception as error:  # whatever a network's forward may raise
        first = str(error).strip().partition("\n")[0][:160]
        raise ModelError(
            f"the network does not run on two images of {size}: {first}",
            "give the --input-shape it was trained with; an exported program needs a dynamic batch",
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"the network makes {found} of two images", "it must give logits, [batch, classes]"
        )
    if not torch.isfinite(logits).all():
        raise ModelError("the network makes logits that are not finite", "check the checkpoint")
    if classes is not None and logits.shape[1] != classes:
        raise ModelError(
            f"the network has {logits.shape[1]} outputs for {classes} classes",
            "choose the data it was trained on",
        )
    return int(logits.shape[1])


def _of_checkpoint(
    file: Path,
    checkpoint: Checkpoint,
    input_shape: Shape | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    classes: Sequence[str] | None,
) -> LoadedModel:
    shape = input_shape or checkpoint.input_shape
    if shape[0] != checkpoint.input_shape[0]:
        raise ModelError(
            f"{file} takes images of {checkpoint.input_shape[0]} channels, not {shape[0]}",
            "leave out --input-shape: the checkpoint knows it",
        )
    means = checkpoint.mean if mean is None else _per_channel(mean, 0.0, shape)
    stds = checkpoint.std if std is None else _per_channel(std, 1.0, shape)
    names = checkpoint.classes if classes is None else tuple(classes)
    module = Preprocessed(checkpoint.network(), means, stds)
    try_out(module, shape, len(names))
    return LoadedModel(
        module,
        "checkpoint",
        checkpoint.arch,
        shape,
        names,
        means,
        stds,
        sha256_of(file),
        {**checkpoint.trained, "arch_args": dict(checkpoint.arch_args), "seed": checkpoint.seed},
        checkpoint.metrics,
    )


def _per_channel(values: Sequence[float] | None, default: float, shape: Shape) -> tuple[float, ...]:
    given = (default,) if values is None else tuple(map(float, values))
    if len(given) not in (1, shape[0]) or (default == 1.0 and min(given) <= 0):
        raise ModelError(
            f"preprocessing {given} for {shape[0]} channels",
            "give one number per channel to --mean and --std; std must be above 0",
        )
    return given * shape[0] if len(given) == 1 else given


def _fill(
    file: Path,
    weights: Mapping[str, Tensor],
    arch: str | None,
    arch_args: Mapping[str, Any],
    shape: Shape,
    classes: Sequence[str] | None,
) -> nn.Module:
    """The network that a state dict belongs to."""
    if arch is None:
        some = ", ".join(list(weights)[:3])
        raise ModelError(
            f"{file} holds weights only ({some}, ...)",
            "name their network: --arch torchvision:resnet18, --arch resnet8, or --arch pkg.module:factory",
        )
    count = _outputs(weights) if classes is None else len(classes)
    network = networks.build(arch, input_shape=shape, classes=count, args=arch_args)
    load_weights(network, weights, arch)
    return network.eval()


def _outputs(weights: Mapping[str, Tensor]) -> int:
    """Classes of a classifier: output channels of its last layer."""
    layers = [tensor for name, tensor in weights.items() if tensor.ndim in (2, 4)]
    return int(layers[-1].shape[0]) if layers else 1


def _read(file: Path, trust_pickle: bool) -> tuple[Form, Any]:
    if not file.exists():
        raise ModelError(f"{file} does not exist", "give the path of a model file")
    if not file.is_file():
        raise ModelError(f"{file} is not a file", "give the path of a model file")
    with _quiet():
        try:
            members = _members(file)
        except OSError as error:
            raise ModelError(f"{file} cannot be read: {error.strerror}") from error
        if any(name.endswith("/constants.pkl") for name in members):
            return "TorchScript", _torchscript(file)
        if any(name.endswith(("models/model.json", "archive_version")) for name in members):
            return "exported", _exported(file, trust_pickle)
        return _pickled(file, trust_pickle)


def _members(file: Path) -> list[str]:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.namelist()
    except zipfile.BadZipFile:
        return []


def _damaged(file: Path, error: Exception) -> ModelError:
    first = str(error).strip().partition("\n")[0][:120] or type(error).__name__
    return ModelError(
        f"{file} is not a model file, or a damaged one: {first}",
        "save it again: torch.save(model.state_dict(), PATH), torch.jit.save or torch.export.save",
    )


def _torchscript(file: Path) -> nn.Module:
    """A TorchScript archive as a torch.export module; its code runs in TorchScript's own interpreter only."""
    try:
        module = torch.jit.load(str(file), map_location="cpu")
    except (RuntimeError, ValueError, OSError) as error:
        raise _damaged(file, error) from error
    return Scripted(module.eval())


class Scripted(nn.Module):
    """A TorchScript module, to be converted by graph.py once the input shape is known."""

    def __init__(self, script: Any) -> None:
        super().__init__()
        self.script = script

    def forward(self, x: Tensor) -> Tensor:
        """float32 [B, C, H, W] -> logits."""
        logits: Tensor = self.script(x)
        return logits


def _exported(file: Path, trust_pickle: bool) -> nn.Module:
    try:
        if not trust_pickle:
            _only_tensors(file)
        program = torch.export.load(io.BytesIO(file.read_bytes()))  # type: ignore[arg-type]
        return program.module()
    except ModelError:
        raise
    except Exception as error:  # torch.export raises many kinds, none of them documented
        raise _damaged(file, error) from error


def _only_tensors(file: Path) -> None:
    """Refuse an exported program with anything in it that torch.export would unpickle as an object."""
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            with archive.open(name) as member:
                magic = member.read(2)
            if magic in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
                if _is_tensors(archive.read(name)):
                    continue
                raise _untrusted(file, f"a pickled object, {name},")
            if "/constants/" in name and not Path(name).name.startswith(("tensor_", "model_")):
                raise _untrusted(file, f"a pickled object, {name},")


def _is_tensors(data: bytes) -> bool:
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # truncated, pickled, anything: not tensors
        return False
    return True


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
            raise _damaged(file, error) from error
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
        raise ModelError(
            f"{file} needs code that cannot be imported: {error}", "set PYTHONPATH to it"
        ) from error
    except Exception as error:  # the author's code may raise anything
        raise _damaged(file, error) from error


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


@contextmanager
def _quiet() -> Iterator[None]:
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with catch_warnings():
            simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
