import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.launch import ROOT
from torchrec_amort import AmortizedHistoryArch
from torchrec_amort.ops import native
from torchrec_amort.serving.native_encoder import NativeEncoder, why_not_native

needs_build = pytest.mark.skipif(
    why_not_native(AmortizedHistoryArch(8), torch.float32) is not None, reason="no native build for this processor"
)
DIM, HEADS = 8, 2
LENGTHS, NUM_CANDIDATES = [5, 0, 3], [1, 2, 3]


def encoder(layers: int = 2) -> dict[str, Any]:
    torch.manual_seed(0)
    of = NativeEncoder(AmortizedHistoryArch(DIM, layers, HEADS, history_attention="causal"))
    return {"encoder": of.weights(), "num_heads": HEADS, "epsilon": of.epsilon}


def rows(count: int) -> dict[str, Any]:
    """Two tables, of one some rows by their ids, of the other all."""
    return {"tables": [torch.randn(11, DIM), torch.randn(count, DIM)], "ids": [torch.randint(11, (count,)), None]}


def encode_history() -> dict[str, Any]:
    return {**encoder(), "is_causal": False, **rows(8), "lengths": torch.tensor(LENGTHS), "beside_pytorch": False}


def states() -> dict[str, Any]:
    """One of two requests, and one of the last request among three."""
    keys, values = torch.ops.torchrec_amort.encode_history(**encode_history())
    lengths = torch.tensor(LENGTHS)
    return {"keys": [keys, keys], "values": [values, values], "starts": [0, 5], "lengths": [lengths[:2], lengths[2:]]}


def extend_history() -> dict[str, Any]:
    keys, values = torch.ops.torchrec_amort.encode_history(**encode_history())
    lengths, past = torch.tensor([2, 0]), torch.tensor([3, 1])
    state = {"past": past, "keys": keys, "values": values, "start": 1}
    return {**encoder(), **rows(2), "lengths": lengths, **state, "beside_pytorch": True}


def score_candidates() -> dict[str, Any]:
    items, ids = torch.randn(11, DIM), torch.randint(11, (6,))
    candidates = {"items": items, "ids": ids, "num_candidates": torch.tensor(NUM_CANDIDATES)}
    return {**encoder(), **states(), **candidates, "beside_pytorch": False}


def with_inputs(call: dict[str, Any], inputs: Tensor) -> dict[str, Any]:
    return call | {"tables": [inputs, *call["tables"]], "ids": [None, *call["ids"]]}


def dot_request() -> dict[str, Any]:
    # Vectors: the dense one, and two slots; three pairs of them.
    layers = [torch.randn(6, 4), torch.randn(DIM, 6), torch.randn(DIM), torch.randn(10, DIM + 4)]
    biases = {"dense_bias": torch.randn(6), "over_bias": torch.randn(10)}
    return {"layers": layers, "num_dense_layers": 2, **biases, "dim": DIM, **with_inputs(rows(3), torch.randn(3, 3))}


def dot_candidates() -> dict[str, Any]:
    # Three vectors: the dense one, and two slots; each with two of the request, and three pairs of them.
    dense = [torch.randn(6, 2), torch.randn(DIM, 6), torch.randn(DIM)]
    return {
        "layers": [*dense, torch.randn(10, DIM + 3 * 2 + 4), torch.randn(4, 10), torch.randn(4)],
        "num_dense_layers": 2,
        "num_tasks": 3,
        "dense_term": torch.randn(3, 6),
        "first_term": torch.randn(3, 10),
        "vectors": torch.randn(3, 2, DIM),
        **with_inputs(rows(6), torch.randn(6, 1)),
        "num_candidates": torch.tensor(NUM_CANDIDATES),
    }


def dot_history_candidates() -> dict[str, Any]:
    # One vector more, of the encoder.
    call = dot_candidates() | encoder() | states()
    call["layers"][3] = torch.randn(10, DIM + 4 * 2 + 6)
    call["tables"].append(torch.randn(11, DIM))
    call["ids"].append(torch.randint(11, (6,)))
    return call


def cross_candidates() -> dict[str, Any]:
    # Three vectors, as above; two cross layers of rank 4.
    call = {name: value for name, value in dot_candidates().items() if not name.endswith(("_term", "vectors"))}
    of_layer = [torch.randn(4, 3 * DIM), torch.randn(3 * DIM, 4), torch.randn(3 * DIM)]
    call["layers"] = [*call["layers"][:3], *of_layer, *of_layer, torch.randn(10, 3 * DIM), *call["layers"][4:]]
    shapes = [(6,), (4,), (4,), (4, 4), (10,), (10, 8)]
    return call | {"num_cross_layers": 2, "terms": [torch.randn(3, *shape) for shape in shapes]}


def cross_history_candidates() -> dict[str, Any]:
    # The last of the three vectors is the encoder's.
    return cross_candidates() | encoder() | states()


def fold() -> dict[str, Any]:
    return {"matrix": torch.randn(6, 5), "rows": torch.randn(3, 5), "factors": torch.randn(5, 4)}


CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    call.__name__: call
    for call in (
        encode_history,
        extend_history,
        score_candidates,
        dot_request,
        dot_candidates,
        dot_history_candidates,
        cross_candidates,
        cross_history_candidates,
        fold,
    )
}


def operator(name: str) -> Any:
    return getattr(torch.ops.torchrec_amort, name).default


@needs_build
@pytest.mark.parametrize("name", CALLS)
def test_operators_are_what_their_schemas_say(name: str) -> None:
    torch.library.opcheck(operator(name), (), CALLS[name]())


def test_every_operator_on_tensors_is_checked() -> None:
    source = Path(native.__file__).with_name("operators.cpp").read_text()
    assert re.findall(r'def\(\s*"(\w+)\(Tensor', source) == list(CALLS)


def strided(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


@needs_build
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("score_candidates", {"items": torch.ones(11, DIM).double()}, "items: a table of Double"),
        ("score_candidates", {"items": torch.ones(11, DIM).bfloat16()}, "items: a table of BFloat16"),
        ("score_candidates", {"items": torch.ones(DIM, 11).T}, r"items: a table of Float, strides \[1, 11\]"),
        ("score_candidates", {"items": torch.ones(11, 4)}, r"items: 6 rows of a table \[11, 4\], not 6 rows of 8"),
        ("score_candidates", {"ids": torch.zeros(5).long()}, r"items: 5 rows of a table \[11, 8\], not 6 rows of 8"),
        ("score_candidates", {"ids": torch.zeros(6).int()}, r"items: ids is of strides \[1\], Int, on cpu; .* reads"),
        ("score_candidates", {"ids": strided(torch.zeros(6).long())}, r"items: ids is of strides \[2\], Long"),
        ("score_candidates", {"ids": torch.full((6,), 11)}, "items: id 11 is no row of a table of 11"),
        ("score_candidates", {"ids": torch.full((6,), -1)}, "items: id -1 is no row"),
        ("score_candidates", {"num_candidates": torch.tensor([6])}, "state is of 3 requests, the candidates of 1"),
        ("score_candidates", {"num_candidates": torch.tensor([7, -1, 0])}, "num_candidates has -1"),
        ("score_candidates", {"num_candidates": torch.ones(3)}, r"num_candidates is \[3\], Float, on cpu"),
        ("score_candidates", {"starts": [0, 6]}, "a state of 8 events has none from 6 to 9"),
        ("score_candidates", {"starts": [0]}, "states have 2 keys, 2 values, 1 starts and 2 lengths"),
        ("score_candidates", {"num_heads": 4}, "state is of 2 layers, 2 heads, .* 8, but the encoder has 2, 4, 8"),
        (
            "score_candidates",
            encoder(3) if native.load_library() else {},
            "state is of 2 layers.*but the encoder has 3",
        ),
        ("score_candidates", {"num_heads": 3}, "2 layers of dimension 8, width 16 and 3 heads"),
        ("encode_history", {"lengths": torch.tensor([4])}, r"events 0: 8 rows of a table \[11, 8\], not 4 rows of 8"),
        ("encode_history", {"ids": [None]}, "events have 2 tables, and 1 ids"),
        ("encode_history", {"encoder": []}, "encoder has 0 tensors, but native code reads 8"),
        ("extend_history", {"past": torch.tensor([9, 0])}, "a state of 8 events has none from 1 to 12"),
        ("extend_history", {"past": torch.tensor([1])}, "lengths are of 2 requests, past of 1"),
        ("extend_history", {"values": torch.ones(2, DIM, 8)}, r"values are \[2, 8, 8\], but with keys of 8 events"),
        (
            "extend_history",
            {"keys": torch.ones(2, 2, 8, 4).bfloat16()},
            "keys are of .* BFloat16.*reads contiguous Float",
        ),
        (
            "dot_request",
            {"layers": [torch.ones(6, 6)]},
            "layers are 1 tensors, .* of 2 dense layers, 0 cross layers and",
        ),
        ("dot_request", {"num_dense_layers": 0, "layers": [torch.ones(4, 6)]}, "vectors make 1 features, but .* has 6"),
        ("dot_request", {"over_bias": torch.ones(8)}, "tasks are 8, but the last layer has 10"),
        ("dot_request", {"dense_bias": torch.ones(5)}, r"dense_bias is \[5\], but native code reads \[6\]"),
        ("dot_request", {"dim": 6}, "vectors make 9 features, but the first layer after the interaction has 12"),
        ("dot_candidates", {"vectors": torch.ones(3, DIM)}, r"vectors are \[3, 8\], not \[requests, vectors, dim\]"),
        ("dot_candidates", {"tables": []}, "tables are 0, not dense inputs, slots, and items"),
        ("dot_candidates", {"ids": []}, "rows have 3 tables, and 0 ids"),
        ("dot_candidates", {"first_term": torch.ones(2, 10)}, r"first_term is \[2, 10\], but .* reads \[3, 10\]"),
        ("dot_candidates", {"num_candidates": torch.tensor([5])}, r"dense inputs is \[6, 1\], but .* reads \[5, 1\]"),
        ("dot_candidates", {"layers": [torch.ones(6, 3)] * 6}, r"layers 0 is \[6, 3\], not of even numbers"),
        (
            "dot_history_candidates",
            {"num_heads": 4},
            "state is of 2 layers, 2 heads, .* 8, but the encoder has 2, 4, 8",
        ),
        (
            "dot_history_candidates",
            {"num_candidates": torch.tensor([6])},
            "state is of 3 requests, the candidates of 1",
        ),
        ("cross_candidates", {"num_cross_layers": 0}, "cross layers are 0, and there is one at least"),
        ("cross_candidates", {"num_cross_layers": 5}, "layers are 12 tensors, .* 2 dense layers, 5 cross layers and"),
        (
            "cross_candidates",
            {"tables": [torch.ones(6, 1)] * 5, "ids": [None] * 5},
            "5 vectors are crossed, but cross layer 0 goes from 24 down to 4 and up to 24, and the first one from 24",
        ),
        ("cross_candidates", {"tables": [torch.ones(6, 1)], "ids": [None]}, "dense layer has 8 outputs, but .* 24"),
        ("cross_candidates", {"terms": [torch.ones(3, 6)] * 5}, "terms are 5 tensors, but of 2 cross layers .* 6"),
        ("cross_candidates", {"terms": [torch.ones(3, 6)] * 6}, r"terms 1 is \[3, 6\], but native code reads \[3, 4\]"),
        ("cross_candidates", {"num_tasks": 2}, "tasks are 2, but the last layer has 4"),
        ("cross_candidates", {"num_candidates": torch.tensor([5])}, r"dense inputs is \[6, 1\], but .* reads \[5, 1\]"),
        ("cross_history_candidates", {"num_candidates": torch.tensor([6])}, "state is of 3 requests, .* of 1"),
        ("fold", {"rows": torch.ones(3, 4)}, r"rows is \[3, 4\], but native code reads \[3, 5\]"),
        ("fold", {"factors": torch.ones(4)}, r"factors are .* and \[4\], not .* \[size, columns\]"),
        ("fold", {"matrix": torch.ones(6, 5).double()}, "matrix is of .* Double"),
        ("cross_history_candidates", {"num_heads": 4}, "state is of 2 layers, 2 heads, .* encoder has 2, 4, 8"),
    ],
)
def test_what_operators_cannot_read_is_refused(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        operator(name)(**CALLS[name]() | change)


@needs_build
def test_what_is_refused_leaves_a_state_as_it_was() -> None:
    call = extend_history()
    before = call["keys"].clone(), call["values"].clone()
    with pytest.raises(ValueError, match="id 11"):
        operator("extend_history")(**call | {"ids": [torch.tensor([0, 11]), None]})
    assert torch.equal(call["keys"], before[0])
    assert torch.equal(call["values"], before[1])


@needs_build
def test_another_device_has_no_operators() -> None:
    with pytest.raises(NotImplementedError, match="torchrec_amort::score_candidates.* backend"):
        operator("score_candidates")(**score_candidates() | {"items": torch.ones(11, DIM).to_mkldnn()})


def test_a_build_for_another_torch_is_refused(tmp_path: Path) -> None:
    assert native.load_library(tmp_path / "empty") is None
    other = tmp_path / "_native_torch2.0.1.so"
    other.touch()
    message = (
        f"{re.escape(str(other))}: built for another torch than this one, {re.escape(torch.__version__)}: build it"
    )
    with pytest.raises(RuntimeError, match=message):
        native.load_library(tmp_path)


def test_no_scorer_is_made_with_such_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_native_torch2.0.1.so").touch()
    own = native.load_library
    monkeypatch.setattr(native, "load_library", lambda: own(tmp_path))
    with pytest.raises(RuntimeError, match="build it again"):
        NativeEncoder(AmortizedHistoryArch(8))


@needs_build
@pytest.mark.parametrize("capability", ["avx2", "avx512", "default"])
def test_a_capability_that_is_asked_for_is_obeyed(capability: str) -> None:
    """A lesser processor's kernels compute the same; without kernels PyTorch serves, and bfloat16 needs new ones."""
    here = torch.backends.cpu.get_cpu_capability().lower()
    if capability == "avx512" and not here.startswith("avx512"):
        pytest.skip("this processor has no AVX-512")
    code = """
import torch
from torchrec.sparse.jagged_tensor import JaggedTensor
from torchrec_amort import AmortizedHistoryArch
from torchrec_amort.serving.native_encoder import NativeEncoder, why_not_native

torch.manual_seed(0)
arch = AmortizedHistoryArch(32, 3, 2, history_attention="causal").eval()
history, candidates = (
    JaggedTensor(torch.randn(sum(sizes), 32), lengths=torch.tensor(sizes)) for sizes in ([45, 0, 130], [35, 1, 17])
)
print(why_not_native(arch, torch.float32), why_not_native(arch, torch.bfloat16) is None)
if why_not_native(arch, torch.float32) is None:
    with torch.inference_mode():
        vectors = NativeEncoder(arch)(history, candidates)
        torch.testing.assert_close(vectors, arch(history, candidates), rtol=0, atol=1e-5)
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reason, _, has_bfloat16 = done.stdout.splitlines()[-1].rpartition(" ")
    assert ("no build for this processor" in reason) == (capability == "default")
    assert has_bfloat16 == "False" or capability == "avx512"


@pytest.mark.skipif(not (shutil.which("c++") and shutil.which("nm")), reason="no C++ compiler")
@pytest.mark.parametrize("kind", ["avx2", "avx512"])
def test_kernels_have_nothing_that_the_linker_may_take_for_another_processor(kind: str, tmp_path: Path) -> None:
    # Nothing is inlined: each function that may be shared is emitted.
    march = {"avx2": "-march=x86-64-v3", "avx512": "-march=x86-64-v4"}[kind]
    source, compiled = ROOT / "torchrec_amort" / "ops" / "kernels.cpp", tmp_path / "kernels.o"
    subprocess.run(["c++", "-O0", "-std=gnu++20", march, f"-DKERNELS={kind}", "-c", source, "-o", compiled], check=True)
    # Capital letters are of global symbols, of which the linker keeps one; U are those of others.
    symbols = subprocess.run(["nm", "-C", compiled], check=True, capture_output=True, text=True).stdout
    shared = re.findall(r"^[0-9a-f]+ +([A-TV-Zuvw]) (.*)$", symbols, re.MULTILINE)
    assert shared == [("D", f"torchrec_amort::{kind}::kernels")]
