"""What byte products of this CPU do: on x86 without VNNI they saturate, and a file's answers are not what it says."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from resq_deploy.runtime.segments import open_session, session_options


@lru_cache(maxsize=1)
def saturates() -> bool:
    """Whether ONNX Runtime's U8 x S8 products saturate in 16 bits here (AVX2 without VNNI: 255 * 127 * 2).

    Its S8 x S8 products are the same kernels with shifted codes. Stock sessions then compute other sums than the file
    says, where two neighbouring products are large; what runs it node by node, in float, does not.
    """
    a, b = np.full((2, 64), 255, np.uint8), np.full((64, 16), 127, np.int8)
    info = [("a", TensorProto.UINT8), ("y", TensorProto.INT32)]
    x, y = (helper.make_tensor_value_info(name, kind, None) for name, kind in info)
    node = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    graph = helper.make_graph([node], "probe", [x], [y], [numpy_helper.from_array(b, "b")])
    versions = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=8)
    session = open_session(model.SerializeToString(), session_options(1))
    return bool(np.any(session.run(None, {"a": a})[0] != 255 * 127 * 64))
