"""A bundle from a stranger: nothing in it may be changed unseen, lead outside, or take what it likes of memory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from resq_deploy import signing
from resq_deploy.bundle import Bundle, BundleWriter, is_inside, sha256_of
from resq_deploy.errors import BundleError, IntegrityError, ResqError
from resq_deploy.npz import write_npz
from resq_deploy.onnx_file import read_onnx
from tests.test_bundle import graph, manifest

PARTS = (
    "manifest.json",
    "model.int8.onnx",
    "model.fp32.onnx",
    "engines/sm86.plan",
    "engines/sm86.weights.json",
    "eval.npz",
    "attacks/pgd.npz",
    "manifest.sig",
)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A signed bundle with every kind of file."""
    images = np.linspace(0, 1, 48, dtype=np.float32).reshape(3, 1, 4, 4)
    with BundleWriter(tmp_path / "m.resq") as writer:
        (writer.dir / "model.int8.onnx").write_bytes(graph("int8"))
        (writer.dir / "model.fp32.onnx").write_bytes(graph("fp32"))
        (writer.dir / "engines").mkdir()
        (writer.dir / "engines" / "sm86.plan").write_bytes(b"ftrt" + bytes(range(256)))
        (writer.dir / "engines" / "sm86.weights.json").write_text("{}")
        writer.save_npz("eval.npz", x=images, y=np.array([0, 1, 0]))
        writer.save_npz("attacks/pgd.npz", x=images[:2], y=np.array([0, 1]), index=np.array([0, 2]))
        path = writer.finish(manifest()).path
    signing.generate_key(tmp_path / "key")
    signing.sign_bundle(path, tmp_path / "key")
    return path


def relist(path: Path, name: str) -> None:
    """What an attacker without the key does: change a file, and the manifest with it."""
    raw = json.loads((path / "manifest.json").read_bytes())
    file = path / name
    raw["files"][name] = {"sha256": sha256_of(file), "size": file.stat().st_size}
    (path / "manifest.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("how", ["flip", "cut", "grow", "empty", "remove"])
def test_a_tampered_file_is_refused(bundle: Path, name: str, how: str) -> None:
    path = bundle / name
    content = path.read_bytes()
    middle = len(content) // 2
    if how == "remove":
        path.unlink()
    else:
        path.write_bytes(
            {
                "flip": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
                "cut": content[:-1],
                "grow": content + b"\n",
                "empty": b"",
            }[how]
        )
    with pytest.raises(BundleError):
        Bundle.open(bundle, key=bundle.parent / "key.pub")


@pytest.mark.parametrize("name", [n for n in PARTS if not n.startswith("manifest")])
def test_a_file_changed_together_with_the_manifest_fails_the_signature(
    bundle: Path, name: str
) -> None:
    path = bundle / name
    path.write_bytes(graph("evil") if name.endswith(".onnx") else path.read_bytes() + b"\n")
    relist(bundle, name)
    Bundle.open(bundle)
    with pytest.raises(IntegrityError, match="was not signed with"):
        Bundle.open(bundle, key=bundle.parent / "key.pub")


@pytest.mark.parametrize("name", [n for n in PARTS if n != "manifest.sig"])
def test_a_link_instead_of_a_file_is_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    os.rename(bundle / name, tmp_path / "moved")
    (bundle / name).symlink_to(tmp_path / "moved")
    with pytest.raises(BundleError):
        Bundle.open(bundle)


def test_a_linked_folder_is_refused(bundle: Path, tmp_path: Path) -> None:
    os.rename(bundle / "attacks", tmp_path / "outside")
    (bundle / "attacks").symlink_to(tmp_path / "outside")
    with pytest.raises(IntegrityError, match="is a link"):
        Bundle.open(bundle)
    with pytest.raises(IntegrityError, match="is a link"):
        Bundle.open(bundle, verify=False).attack_sample("pgd")


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_what_is_no_plain_file_is_refused(bundle: Path, kind: str) -> None:
    (bundle / "eval.npz").unlink()
    if kind == "fifo":
        os.mkfifo(bundle / "eval.npz")
    else:
        (bundle / "eval.npz").mkdir()
    with pytest.raises(IntegrityError):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/hostname",
        "a/../../secret",
        "./eval.npz",
        "engines//sm86.plan",
        "eval.npz/",
        "..",
        ".",
        "",
        "C:\\x",
        "a\\b",
        "nul\0",
        "x" * 5000,
        "x/" * 2000 + "x",
    ],
)
def test_names_of_a_manifest_stay_inside(bundle: Path, name: str) -> None:
    (bundle.parent / "secret").write_text("secret")
    raw = json.loads((bundle / "manifest.json").read_bytes())
    raw["files"][name] = {"sha256": sha256_of(bundle.parent / "secret"), "size": 6}
    (bundle / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle)
    assert len(caught.value.message) < 12_000


@given(st.text(alphabet="ab./\\:\0\u00e9", max_size=12))
@example("a/b")
def test_a_name_that_is_inside_stays_under_the_root(name: str) -> None:
    if is_inside(name):
        root = "/bundle"
        assert os.path.normpath(os.path.join(root, name)) == f"{root}/{name}"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 10**6, "not JSON"),
        (b'{"schema_version": 1, "schema_version": 1}', "not JSON"),
        (b'{"schema_version": NaN}', "not JSON"),
        (b'{"schema_version": 1e999}', "not JSON"),
        (b'{"schema_version": "\\ud800"}', "not JSON"),
        (b'{"schema_version": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"schema_version": 2}', "schema version 2"),
        (b'{"schema_version": true}', "name"),
        (b"[]", "schema version None"),
        (b'{"schema_version": 1}', "name"),
        (b" " * (32 * 2**20 + 1), "too large"),
    ],
)
def test_what_is_no_manifest_is_refused(bundle: Path, content: bytes, says: str) -> None:
    (bundle / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=says):
        Bundle.open(bundle)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_in_a_manifest_is_read_or_refused(bundle: Path, data: Any) -> None:
    path = bundle / "manifest.json"
    good = path.read_bytes()
    raw = json.loads(good)
    node: Any = raw
    while isinstance(node, dict) and node:
        key = data.draw(st.sampled_from(sorted(node)))
        if not isinstance(node[key], dict) or data.draw(st.booleans()):
            node[key] = data.draw(JSON)
            break
        node = node[key]
    path.write_text(json.dumps(raw))
    try:
        opened = Bundle.open(bundle)
        opened.eval_sample()
        opened.attack_sample("pgd")
    except ResqError as error:
        assert error.message  # noqa: PT017 - either outcome is right, a crash is not
    finally:
        path.write_bytes(good)


def external(model: onnx.ModelProto, location: str) -> onnx.ModelProto:
    tensor = model.graph.initializer.add(name="w", dims=[4], data_type=TensorProto.FLOAT)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return model


def everywhere() -> list[onnx.ModelProto]:
    """A tensor with external data in every place where ONNX can keep one, and an operator that loads a file."""
    empty = external(onnx.ModelProto(), "../secret").graph
    tensor = empty.initializer[0]
    body = helper.make_graph([], "body", [], [], initializer=[tensor])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=tensor),
        helper.make_node("If", ["c"], ["y"], then_branch=body),
        helper.make_node("X", [], ["x"], many=[tensor]),
        helper.make_node("EPContext", [], ["z"], domain="com.microsoft", ep_cache_context="../p"),
    ]
    sparse = onnx.SparseTensorProto(values=tensor)
    function = helper.make_function("d", "F", [], ["c"], nodes[:1], [helper.make_opsetid("", 17)])
    training = onnx.TrainingInfoProto(initialization=empty)
    return [
        onnx.ModelProto(graph=empty),
        *(onnx.ModelProto(graph=onnx.GraphProto(node=[node])) for node in nodes),
        onnx.ModelProto(graph=onnx.GraphProto(sparse_initializer=[sparse])),
        onnx.ModelProto(functions=[function]),
        onnx.ModelProto(training_info=[training]),
    ]


@pytest.mark.parametrize("index", range(8))
def test_a_graph_that_leads_to_another_file_is_refused(bundle: Path, index: int) -> None:
    models = everywhere()
    assert len(models) == 8
    (bundle / "model.int8.onnx").write_bytes(models[index].SerializeToString())
    relist(bundle, "model.int8.onnx")
    with pytest.raises(IntegrityError, match="refers to another file"):
        Bundle.open(bundle)


def test_an_external_location_without_its_flag_is_refused(tmp_path: Path) -> None:
    model = external(onnx.ModelProto(), "/etc/hostname")
    model.graph.initializer[0].data_location = TensorProto.DEFAULT
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(IntegrityError, match="tensor 'w'"):
        read_onnx(tmp_path / "m.onnx")


def test_a_node_without_an_output_is_refused(tmp_path: Path) -> None:
    node = onnx.NodeProto(op_type="DequantizeLinear", name="dq", input=["w", "s", "z"])
    model = onnx.ModelProto(graph=onnx.GraphProto(node=[node]))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(IntegrityError, match="node 'dq' without an output"):
        read_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("content", [b"\x08", b"not a graph at all", b"\xff" * 100])
def test_what_is_no_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(IntegrityError, match="not an ONNX file"):
        read_onnx(tmp_path / "m.onnx")
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_onnx(tmp_path / "none.onnx")


@pytest.mark.parametrize(
    ("kind", "dims", "raw"),
    [
        (TensorProto.FLOAT, [2**40], b""),
        (TensorProto.INT8, [4], b"123"),
        (TensorProto.INT8, [4], b"12345"),
        (TensorProto.INT8, [-1, -4], b"1234"),
        (TensorProto.FLOAT, [-1], b""),
        (33, [4], b"1234"),
        (0, [4], b"1234"),
        (TensorProto.STRING, [1], b""),
    ],
)
def test_a_tensor_that_lies_about_its_size_is_refused(
    tmp_path: Path, kind: Any, dims: list[int], raw: bytes
) -> None:
    tensor = onnx.TensorProto(name="w", dims=dims, data_type=kind)
    if raw:
        tensor.raw_data = raw
    model = onnx.ModelProto(graph=onnx.GraphProto(initializer=[tensor]))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(IntegrityError, match="not what its shape says"):
        read_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "arrays",
    [
        {"x": np.zeros((3, 1, 4, 4), np.float32)},
        {"x": np.zeros((3, 1, 4, 4), np.float32), "y": np.array([0.0, 1.0, np.nan])},
        {"x": np.full((3, 1, 4, 4), 1e300), "y": np.zeros(3, int)},
        {"x": np.full((3, 1, 4, 4), np.nan), "y": np.zeros(3, int)},
        {"x": np.zeros((3, 1, 4, 4)), "y": np.array([0, 0, 2])},
        {"x": np.zeros((3, 1, 4, 4)), "y": np.zeros((3, 1), int)},
        {"x": np.zeros((3, 1, 4, 4)), "y": np.full(3, 2**64 - 1, np.uint64)},
        {"x": np.zeros((3, 1, 4, 4)), "y": np.zeros(3, int), "index": np.array([0, 1, -1])},
        {"x": np.zeros((3, 1, 4, 4)), "y": np.zeros(3, int), "index": np.zeros(2, int)},
        {"x": np.zeros((0, 1, 4, 4)), "y": np.zeros(0, int)},
        {"x": np.zeros((3, 3, 4, 4)), "y": np.zeros(3, int)},
        {"x": np.zeros(()), "y": np.zeros((), int)},
    ],
)
def test_a_sample_that_does_not_fit_is_refused(bundle: Path, arrays: dict[str, Any]) -> None:
    write_npz(bundle / "eval.npz", arrays)
    relist(bundle, "eval.npz")
    with pytest.raises(BundleError):
        Bundle.open(bundle).eval_sample()


def test_reading_changes_nothing(bundle: Path) -> None:
    def state() -> dict[str, str]:
        root = bundle.parent
        return {str(p.relative_to(root)): sha256_of(p) for p in root.rglob("*") if p.is_file()}

    before = state()
    opened = Bundle.open(bundle, key=bundle.parent / "key.pub")
    opened.eval_sample()
    opened.attack_sample("pgd")
    assert state() == before
