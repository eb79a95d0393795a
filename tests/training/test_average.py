from pathlib import Path

import pytest
import torch
from torch import nn

from tests.launch import torchrun
from tests.training.test_training import arguments, quality, weights
from torchrec_amort.apps import evaluate, train
from torchrec_amort.training.average import UPDATE_EVERY, TableDecay, WeightAverage


def test_the_average_follows_the_weights_by_the_decay() -> None:
    linear = nn.Linear(1, 1, bias=False)
    linear.register_buffer("ids", torch.tensor([3]))
    nn.init.zeros_(linear.weight)
    average = WeightAverage(linear, decay=0.9)
    nn.init.ones_(linear.weight)
    linear.get_buffer("ids").fill_(2**60 + 1)
    expected = 0.0
    for step in range(1, 300):
        average.update(step)
        if step % UPDATE_EVERY == 0:
            updates = step // UPDATE_EVERY
            decay = min(0.9**UPDATE_EVERY, updates / (updates + 10))
            expected = decay * expected + 1 - decay
        assert float(average.weights["weight"]) == pytest.approx(expected, abs=1e-6)
    assert float(average.weights["weight"]) > 0.99
    assert int(average.weights["ids"]) == 2**60 + 1


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_a_decay_that_is_no_share_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=f"average_decay is {decay}"):
        WeightAverage(nn.Linear(1, 1), decay)


def test_tables_shrink_by_the_decay_and_nothing_else_does() -> None:
    model: nn.Module = nn.ModuleDict({"table": nn.Embedding(3, 2), "dense": nn.Linear(2, 2)})
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    decay = TableDecay(model, ["table.weight"], decay=0.01)
    for step in range(1, 2 * UPDATE_EVERY + 3):
        decay.update(step)
    after = model.state_dict()
    torch.testing.assert_close(after["table.weight"], before["table.weight"] * 0.99 ** (2 * UPDATE_EVERY))
    assert torch.equal(after["dense.weight"], before["dense.weight"])
    with pytest.raises(ValueError, match="table_weight_decay is 1"):
        TableDecay(model, ["table.weight"], decay=1.0)


def test_training_shrinks_the_rows_that_nobody_reads(data_folder: Path, tmp_path: Path) -> None:
    runs = {decay: tmp_path / f"decay-{decay}" for decay in (0.0, 0.01)}
    for decay, run in runs.items():
        train.main(arguments(data_folder, run, f"--optimizer.table_weight_decay={decay}"))
    kept, shrunk = (weights(data_folder, run) for run in runs.values())
    steps = 25 // UPDATE_EVERY * UPDATE_EVERY
    for name in (name for name in kept if "embedding" in name):
        assert shrunk[name].norm() < kept[name].norm(), name
    # Most octaves of an age occur in no history of this data.
    name = next(name for name in kept if "history_age" in name)
    torch.testing.assert_close(shrunk[name][50:], kept[name][50:] * 0.99**steps)


def test_evaluation_takes_the_average_which_survives_a_resume_and_other_ranks(
    data_folder: Path, tmp_path: Path
) -> None:
    averaged = "--loop.average_decay=0.9"
    through, plain, resumed = (tmp_path / name for name in ("through", "plain", "resumed"))
    train.main(arguments(data_folder, through, averaged, "--loop.epochs=2"))
    train.main(arguments(data_folder, plain, "--loop.epochs=2"))
    train.main(arguments(data_folder, resumed, averaged))
    train.main(arguments(data_folder, resumed, averaged, "--loop.epochs=2", "--resume=true"))
    expected, last = weights(data_folder, through), weights(data_folder, plain)
    for name, value in weights(data_folder, resumed).items():
        assert torch.equal(value, expected[name]), name
    moved = [name for name, value in expected.items() if not torch.equal(value, last[name])]
    assert any("embedding" in name for name in moved) and any("over_arch" in name for name in moved)
    evaluate.main(["--run_folder", str(through)])
    torchrun(2, "evaluate", "--run_folder", str(resumed))
    one, two = quality(through)["tasks"]["liked"], quality(resumed)["tasks"]["liked"]
    assert two == pytest.approx(one, rel=1e-3)
