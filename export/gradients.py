"""Whether the twin can stand in for a network, asked before work begins: stage III and white-box attacks need it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import torch

from resq_deploy.console import Reporter
from resq_deploy.errors import AttackError, ModelError
from resq_deploy.export import graph
from resq_deploy.export.heap import give_back
from resq_deploy.export.twin import Twin

_IMAGES = 2


def obstacle(model: onnx.ModelProto, shape: Sequence[int]) -> str | None:
    """Why there are no gradients of a network to be had, in one line that names the operator; None where there are.

    `shape`: (C, H, W) of its input. Two images go forward, against ONNX Runtime, and backward: some operators
    are refused for an attribute, which only shows when they run.
    """
    images = graph.noise(shape, _IMAGES)
    try:
        x = torch.from_numpy(images).requires_grad_()
        logits = Twin(model).eval()(x)
        torch.autograd.grad(logits.sum(), x)
    except ModelError as error:
        return error.message
    except Exception as error:  # torch raises many kinds, none of them documented
        first = str(error).strip().partition("\n")[0][:160]
        return f"the differentiable copy fails: {first or type(error).__name__}"
    finally:
        give_back()
    rounds = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    expected = graph.run(model, images, optimize=not rounds)
    apart = graph.apart(expected, logits.detach().numpy())
    if not apart <= (graph.STEP if rounds else graph.PARITY):
        return f"the differentiable copy differs from ONNX Runtime by {apart:.3g}"
    return None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What gradients are for. `named`: the flags by which attacks that need them were asked for.

    `attacks`, `adjust`: whether any are to be crafted and stage III is to run, by name or by default.
    """

    named: Sequence[str]
    attacks: bool
    adjust: bool


def settle(
    model: onnx.ModelProto, shape: Sequence[int], wanted: Wanted, reporter: Reporter
) -> str | None:
    """What `obstacle` says, after a warning of what an export without gradients leaves out.

    Raises AttackError for an obstacle to what was named.
    """
    why = obstacle(model, shape) if wanted.attacks or wanted.adjust else None
    if why is not None and wanted.named:
        raise AttackError(
            f"{wanted.named[0]} needs gradients: {why}",
            "leave it out; resq-validate --attack square,hopskipjump needs none",
        )
    if why is not None:
        lost = [
            "stage III is left out, so this is plain INT8 and bit flips cost more"
        ] * wanted.adjust
        lost += ["no adversarial inputs are stored"] * wanted.attacks
        reporter.warn(
            f"{why}: {'; '.join(lost)}. resq-validate --attack square,hopskipjump needs no gradients"
        )
    return why
