"""What an ordinary ONNX Runtime session answers on this machine, beside the run that is validated.

An application opens model.int8.onnx with ONNX Runtime's defaults, and then its fusions and this CPU's kernels decide.
On x86 without VNNI two neighbouring byte products saturate in 16 bits (cpu.py): answers can differ from what the file
says, and from machine to machine. Running it on the device tells how often; where products do not saturate, this says
whether those of the file would elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from resq_deploy.bundle import Bundle, Sample
from resq_deploy.console import Reporter
from resq_deploy.metrics import top1
from resq_deploy.onnx_file import read_onnx
from resq_deploy.report.model import Figure
from resq_deploy.runtime import evidence
from resq_deploy.runtime.cpu import saturates
from resq_deploy.saturation import in_16_bits
from resq_deploy.statistics import wilson

PRECISE = "session.x64quantprecision"  # microsoft/onnxruntime#12088: signed weights run as unsigned
_CLOSE = 0.99  # below, answers differ by more than values next to a rounding boundary
_BATCH = 64


def beside(
    bundle: Bundle,
    sample: Sample,
    answers: NDArray[np.int64],
    confidence: float,
    reporter: Reporter,
) -> tuple[dict[str, Figure], tuple[str, ...]]:
    """Run a bundle's INT8 file as an application would: how often it gives the same top-1, and warnings.

    `answers`: those of the run that is validated, int64 [N]. No figure where ONNX Runtime refuses the file.
    """
    try:
        found = _answers(bundle, sample, reporter)
    except Exception as error:  # ONNX Runtime raises many kinds
        first = str(error).strip().partition("\n")[0][:160]
        return {}, (f"An ordinary ONNX Runtime session does not run the file: {first}",)
    same = int((found == answers).sum())
    share = wilson(same, len(answers), confidence)
    figures = {evidence.STOCK: evidence.figure(share)}
    saturated = saturates() and bundle.manifest.quantization.saturates is not False
    if same == len(answers) or not (saturated or share.mean < _CLOSE):
        return figures, ()
    right, own = (float((v == sample.labels).mean()) for v in (found, answers))
    said = (
        f"An ordinary ONNX Runtime session on this machine gives another answer on {1 - share.mean:.2%} of the"
        f" images (accuracy {right:.2%}, validated {own:.2%})"
    )
    if not saturated:
        return figures, (f"{said}: its fusions compute otherwise.",)
    cured = _cured(bundle, sample, answers, reporter)
    return figures, (
        f"{said}: byte products of this CPU saturate (x86 without VNNI).{cured}"
        " With --overflow-fix resq-export writes codes that never do.",
    )


def unseen(bundle: Bundle) -> tuple[str, ...]:
    """What ordinary sessions on x86 without VNNI could answer otherwise, and no run here shows."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    with TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        try:
            ort.InferenceSession(str(bundle.int8), options, providers=["CPUExecutionProvider"])
            kernels = in_16_bits(read_onnx(options.optimized_model_filepath))
        except Exception:  # what cannot be run has been warned of
            return ()
    if not kernels:
        return ()
    where = "this CPU" if saturates() else "x86 without VNNI"
    faulty = (
        f"Faults in ordinary ONNX Runtime sessions on {where}: with a flipped weight, sums of byte products can"
        " saturate in 16 bits; campaigns add them exactly.",
    )
    found = [name for name, could in kernels.items() if could]
    if saturates() or not found:
        return faulty
    return (
        "Ordinary ONNX Runtime sessions on x86 without VNNI: byte products add up in 16 bits there, and can saturate in"
        f" {len(found)} layers. Validate there too (agreement@stock), set {PRECISE}=1 or export with --overflow-fix.",
    )


def _cured(bundle: Bundle, sample: Sample, answers: NDArray[np.int64], reporter: Reporter) -> str:
    """What the option for exact products would change; nothing where the session refuses the file with it."""
    try:
        found = _answers(bundle, sample, reporter, precise=True)
    except Exception:  # ONNX Runtime raises many kinds
        return ""
    apart = float((found != answers).mean())
    return f" With the session option {PRECISE}=1 it differs on {apart:.2%}."


def _answers(
    bundle: Bundle, sample: Sample, reporter: Reporter, *, precise: bool = False
) -> NDArray[np.int64]:
    """Top-1 by a session with ONNX Runtime's defaults, int64 [N]."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails raises
    if precise:
        options.add_session_config_entry(PRECISE, "1")
    session = ort.InferenceSession(str(bundle.int8), options, providers=["CPUExecutionProvider"])
    name, parts = session.get_inputs()[0].name, []
    with reporter.task("an ordinary session", len(sample), "images") as task:
        for start in range(0, len(sample), _BATCH):
            images = sample.images[start : start + _BATCH]
            parts.append(top1(session.run(None, {name: images})[0]))
            task.advance(len(images))
    found: NDArray[np.int64] = np.concatenate(parts)
    return found
