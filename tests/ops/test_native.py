import ctypes
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_amort import AmortizedHistoryArch
from torchrec_amort.ops import native
from torchrec_amort.ops.native import EmbeddingRows
from torchrec_amort.serving.native_encoder import NativeEncoder, _NativeState, why_not_native

needs_build = pytest.mark.skipif(
    why_not_native(AmortizedHistoryArch(8), torch.float32) is not None, reason="no native build for this processor"
)
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no compiler")
LAYOUT = [(ctypes.sizeof(one), getattr(one, one._fields_[-1][0]).offset) for one in native.STRUCTS]


def stub(folder: Path, version: int | None, layout: Sequence[tuple[int, int]] = LAYOUT) -> str:
    """A build that says that it is of a version and layout, and has no functions."""
    rows = ", ".join(f"{{{size}, {last}}}" for size, last in layout)
    lines = ["#include <stdint.h>", f"const int64_t torchrec_amort_layout[][2] = {{{rows}}};"]
    if version is not None:
        lines.append(f"const int64_t torchrec_amort_version = {version};")
    (folder / "stub.c").write_text("\n".join(lines))
    built = folder / f"stub_{version}_{layout[0][0]}.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", built, folder / "stub.c"], check=True)
    return str(built)


@needs_compiler
def test_a_build_of_another_version_or_layout_is_refused(tmp_path: Path) -> None:
    size, last = LAYOUT[0]
    version = native.VERSION
    for path, message in (
        (stub(tmp_path, None), f"native code of version 0, but Python reads version {version}"),
        (stub(tmp_path, version + 1), f"native code of version {version + 1}, but Python reads version {version}"),
        (
            stub(tmp_path, version, [(size + 8, last + 8), *LAYOUT[1:]]),
            f"a LayerStruct of {size + 8} bytes, its last field at {last + 8}, but Python one of {size}, at {last}",
        ),
    ):
        with pytest.raises(RuntimeError, match=rf"^{re.escape(path)}: .*{message}: build it again: pip install -e ."):
            native.refuse_other_build(ctypes.CDLL(path), path)
    same = stub(tmp_path, version)
    native.refuse_other_build(ctypes.CDLL(same), same)


@needs_build
@needs_compiler
def test_no_scorer_is_made_with_another_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stub(tmp_path, native.VERSION + 1)
    monkeypatch.setattr(native, "find_spec", lambda name: type("Spec", (), {"origin": path}))
    native._library.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="build it again"):
            NativeEncoder(AmortizedHistoryArch(8))
    finally:
        native._library.cache_clear()


def test_structures_have_the_fields_of_native_cpp() -> None:
    source = Path(native.__file__).with_name("native.cpp").read_text()
    listed = re.findall(r"sizeof\((\w+)\), offsetof", source)
    assert [f"{name}Struct" for name in listed] == [struct.__name__ for struct in native.STRUCTS]
    for name, struct in zip(listed, native.STRUCTS, strict=True):
        (body,) = re.findall(rf"^struct {name} {{\n(.*?)^}};", source, re.MULTILINE | re.DOTALL)
        declarations = [re.sub(r"^\s*(const )?\w+", "", line) for line in body.split(";") if line.strip()]
        fields = [re.sub(r"[\s*]", "", field) for line in declarations for field in line.split(",")]
        assert fields == [field[0] for field in struct._fields_]


@needs_build
def test_what_native_code_cannot_read_is_refused() -> None:
    encoder = NativeEncoder(AmortizedHistoryArch(8, 2, 2))
    history = JaggedTensor(torch.randn(5, 8), lengths=torch.tensor([5]))
    state = encoder.encode_history(history)
    assert isinstance(state, _NativeState)
    (of_state,) = state.histories()
    ids = torch.zeros(6, dtype=torch.int64)
    table = torch.randn(9, 8)
    for items, message in (
        (EmbeddingRows(table.double(), ids), "items: a table of torch.float64"),
        (EmbeddingRows(table.bfloat16(), ids), "items: a table of torch.bfloat16"),
        (EmbeddingRows(torch.randn(8, 9).T, ids), r"items: a table of torch.float32, strides \(1, 9\)"),
        (EmbeddingRows(torch.randn(9, 4), ids), r"items: 6 rows of a table \[9, 4\], not 6 rows of 8"),
        (EmbeddingRows(table, ids[:5]), r"items: 5 rows of a table \[9, 8\], not 6 rows of 8"),
        (
            EmbeddingRows(table, ids.int()),
            "items: ids is contiguous, torch.int32, on cpu; native code reads contiguous",
        ),
        (EmbeddingRows(table, torch.zeros(12, dtype=torch.int64)[::2]), r"items: ids is of strides \(2,\)"),
        (EmbeddingRows(table.to("meta"), ids), "items: a table of .* on meta"),
        (None, "items are None"),
    ):
        with pytest.raises(ValueError, match=message):
            native.score(encoder.struct, None, native.Candidates(items), [6], [of_state], [], torch.float32)
    candidates = native.Candidates(EmbeddingRows(table, ids))
    with pytest.raises(ValueError, match="histories are 1, but native code reads 2"):
        native.score(encoder.struct, None, candidates, [3, 3], [of_state], [], torch.float32)
    with pytest.raises(ValueError, match=r"events: 4 rows of a table \[4, 8\], not 5 rows of 8"):
        native.encode(encoder.struct, [EmbeddingRows(torch.randn(4, 8))], state.histories([5]), torch.float32)
    other = NativeEncoder(AmortizedHistoryArch(8, 3, 2))
    with pytest.raises(ValueError, match="state is of 2 layers, 2 heads, dimension 8, but the encoder has 3, 2, 8"):
        other.score_candidates(state, JaggedTensor(torch.randn(1, 8), lengths=torch.tensor([1])))
