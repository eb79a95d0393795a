import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_amort import AmortizedHistoryArch
from torchrec_amort.bench.timing import threads
from torchrec_amort.ops.cores import usable_cores
from torchrec_amort.ops.native import load_library
from torchrec_amort.serving.native_encoder import NativeEncoder, why_not_native

needs_build = pytest.mark.skipif(
    why_not_native(AmortizedHistoryArch(8), torch.float32) is not None, reason="no native build for this processor"
)


def encoder_of(arch: AmortizedHistoryArch, beside_pytorch: bool) -> NativeEncoder:
    encoder = NativeEncoder(arch)
    return encoder.beside_pytorch() if beside_pytorch else encoder


@contextmanager
def limit(most: int) -> Iterator[None]:
    """Native code has cores for so many threads."""
    if load_library() is None:
        yield
        return
    torch.ops.torchrec_amort.limit_threads(most)
    yield
    torch.ops.torchrec_amort.limit_threads(usable_cores())


@pytest.fixture(autouse=True, scope="module")
def as_many_threads_as_asked_for() -> Iterator[None]:
    with limit(64):
        yield


def outputs(encoder: NativeEncoder, sizes: list[tuple[int, int]], seed: int) -> list[Tensor]:
    """Keys, values and vectors of requests of so many events and candidates."""
    random = torch.Generator().manual_seed(seed)
    history, candidates = (
        JaggedTensor(torch.randn(sum(lengths), 16, generator=random), lengths=torch.tensor(lengths))
        for lengths in zip(*sizes, strict=True)
    )
    state = encoder.encode_history(history)
    return [*state.keys, *state.values, encoder.score_candidates(state, candidates)]


def are_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@needs_build
@given(
    st.lists(st.tuples(st.integers(0, 150), st.integers(1, 70)), min_size=1, max_size=4),
    st.sampled_from(["full", "causal"]),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 2**20),
)
@torch.inference_mode()
def test_any_number_of_threads_computes_what_one_does(
    sizes: list[tuple[int, int]],
    attention: Literal["full", "causal"],
    num_threads: int,
    beside_pytorch: bool,
    seed: int,
) -> None:
    arch = AmortizedHistoryArch(16, 3, 2, history_attention=attention)
    with threads(1):
        expected = outputs(NativeEncoder(arch), sizes, seed)
    with threads(num_threads):
        assert are_equal(outputs(encoder_of(arch, beside_pytorch), sizes, seed), expected)


@needs_build
@torch.inference_mode()
def test_threads_of_pytorch_extend_a_history_as_one_does() -> None:
    arch = AmortizedHistoryArch(16, 3, 2, history_attention="causal")
    past, new = (JaggedTensor(torch.randn(count, 16), lengths=torch.tensor([count])) for count in (40, 100))
    states = []
    for num_threads, beside_pytorch in ((1, False), (3, True)):
        encoder = encoder_of(arch, beside_pytorch)
        with threads(num_threads):
            states.append(encoder.extend_history(encoder.encode_history(past), new))
    one, other = ([*state.keys, *state.values] for state in states)
    assert are_equal(one, other)


@needs_build
def test_callers_inside_a_parallel_region_each_do_their_work_alone() -> None:
    openmp = ctypes.CDLL(None)
    if not hasattr(openmp, "GOMP_parallel"):
        pytest.skip("PyTorch's threads are not OpenMP's")
    encoder = encoder_of(AmortizedHistoryArch(16, 3, 2), True)
    found = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def call(_: None) -> None:
        with torch.inference_mode():
            found.append(outputs(encoder, [(150, 70), (30, 40)], 0))

    with threads(3):
        call(None)
        openmp.GOMP_parallel(call, None, 3, 0)
    assert len(found) == 4
    assert all(are_equal(one, found[0]) for one in found)


@needs_build
@torch.inference_mode()
@pytest.mark.parametrize("beside_pytorch", [False, True])
def test_several_callers_at_once_compute_what_one_does(beside_pytorch: bool) -> None:
    encoder = encoder_of(AmortizedHistoryArch(16, 3, 2), beside_pytorch)
    sizes = [(150, 70), (30, 40)]
    with threads(1):
        expected = {seed: outputs(encoder, sizes, seed) for seed in range(6)}
    wrong: list[int] = []
    start = threading.Barrier(len(expected))

    def call(seed: int) -> None:
        start.wait()
        with torch.inference_mode():
            for _ in range(20):
                if not are_equal(outputs(encoder, sizes, seed), expected[seed]):
                    wrong.append(seed)

    with threads(3):
        callers = [threading.Thread(target=call, args=(seed,)) for seed in expected]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert not wrong


@needs_build
@torch.inference_mode()
def test_a_forked_child_has_threads_of_its_own() -> None:
    encoder = NativeEncoder(AmortizedHistoryArch(16, 3, 2))
    with threads(3):
        expected = outputs(encoder, [(150, 70)], 0)
        child = os.fork()
        if child == 0:
            # Without its own threads it waits for those of its parent, until the alarm ends it.
            signal.alarm(20)
            os._exit(0 if are_equal(outputs(encoder, [(150, 70)], 0), expected) else 1)
        _, status = os.waitpid(child, 0)
        assert status == 0
        assert are_equal(outputs(encoder, [(150, 70)], 0), expected)


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/", {}, None),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "100000 100000"}, 1),
        ("0::/", {"cpu.max": "110000 100000"}, 2),
        ("0::/", {"cpu.max": "5000 100000"}, 1),
        # The narrowest of those above counts, and where the group itself is not to be seen, those that are.
        ("0::/a/b", {"a/b/cpu.max": "300000 100000", "a/cpu.max": "200000 100000", "cpu.max": "max 100000"}, 2),
        ("0::/docker/1234", {"cpu.max": "200000 100000"}, 2),
        (
            "4:cpu,cpuacct:/x",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "-1", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
            None,
        ),
        ("4:memory:/x\n1:cpu:/x", {"cpu/x/cpu.cfs_quota_us": "150000", "cpu/x/cpu.cfs_period_us": "100000"}, 2),
        ("1:cpu:/\n0::/", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "50000", "cpu.max": "max 1"}, 1),
    ],
)
def test_a_quota_limits_the_cores_that_are_used(
    groups: str, files: dict[str, str], quota: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(3)))
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups + "\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert usable_cores(tmp_path) == (3 if quota is None else quota)


@needs_build
def test_native_code_takes_no_more_threads_than_there_are_cores_for() -> None:
    with limit(2):
        with threads(5):
            assert torch.ops.torchrec_amort.num_threads() == 2
        with threads(1):
            assert torch.ops.torchrec_amort.num_threads() == 1
