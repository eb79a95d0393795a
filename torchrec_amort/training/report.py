"""What people watch while a model trains: on the progress line, in TensorBoard and in a file."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.metrics.metrics_config import RecTaskInfo
from torchrec.metrics.ne import NEMetric
from tqdm import tqdm

from torchrec_amort.files import write_text
from torchrec_amort.training.processes import is_first, sum_over_ranks

METRICS_FILE = "metrics.jsonl"


class Report:
    """Loss, NE and speed since the last report. All ranks call its methods together.

    Args:
        run: folder for `metrics.jsonl` and TensorBoard events.
        tasks: names of the T labels.
        batch_size: requests in a global batch.
        device: of this rank.
        targets: places of tasks that have no NE, as their labels are any number.
    """

    def __init__(
        self, run: Path, tasks: tuple[str, ...], batch_size: int, device: torch.device, targets: tuple[int, ...] = ()
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - of the extra `train`

        self._tasks = {task: t for t, task in enumerate(tasks) if t not in targets}
        self._device, self._file = device, run / METRICS_FILE
        self._tensorboard = SummaryWriter(str(run / "tensorboard")) if is_first() else None
        self._ne = NEMetric(
            world_size=dist.get_world_size(),
            my_rank=dist.get_rank(),
            batch_size=batch_size,
            # Only the whole time between two reports is read, but a window must hold a batch.
            window_size=batch_size * dist.get_world_size(),
            tasks=[RecTaskInfo(name=task, label_name=task, prediction_name=task) for task in self._tasks],
            compute_on_all_ranks=True,
        ).to(device)
        self.candidates = 0
        self._restart()

    def forget_after(self, total_steps: int) -> None:
        """Drop what was reported of steps that will be made anew, from an earlier checkpoint on."""
        if not is_first():
            return
        lines = self._file.read_text().splitlines(keepends=True) if self._file.exists() else []
        write_text(self._file, "".join(line for line in lines if json.loads(line)["step"] <= total_steps))

    def _restart(self) -> None:
        self._ne.reset()
        self._loss = torch.zeros((), dtype=torch.float64, device=self._device)
        self._steps, self._waited = 0, 0.0
        self._since, self._candidates_before = time.perf_counter(), self.candidates

    def add(self, loss: Tensor, logits_CT: Tensor, labels_CT: Tensor, waited: float) -> None:
        """Take in a step.

        Args:
            loss: of the global batch.
            logits_CT: of this rank's candidates.
            labels_CT: theirs.
            waited: seconds that this rank waited for its batch.
        """
        self._loss += loss
        self._steps += 1
        self._waited += waited
        self.candidates += labels_CT.shape[0]
        predictions = torch.sigmoid(logits_CT.double())
        self._ne.update(
            predictions={task: predictions[:, t] for task, t in self._tasks.items()},
            labels={task: labels_CT[:, t] for task, t in self._tasks.items()},
            weights={task: torch.ones_like(labels_CT[:, t]) for task, t in self._tasks.items()},
        )

    def state(self) -> dict[str, Tensor]:
        """What was taken in since the last report, of all ranks together."""
        sums = {f"ne/{name}": sum_over_ranks(value) for name, value in self._ne.state_dict().items()}
        # Each rank has the same mean losses.
        return {**sums, "loss": self._loss.clone(), "steps": torch.tensor(self._steps)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state, saved by any number of ranks."""
        self._loss.copy_(state["loss"])
        self._steps = int(state["steps"])
        share = float(is_first())
        self._ne.load_state_dict({name: state[f"ne/{name}"] * share for name in self._ne.state_dict()})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time within the context is no time of training."""
        started = time.perf_counter()
        yield
        self._since += time.perf_counter() - started

    def write(self, total_steps: int, bar: tqdm[Any], validation: Mapping[str, float] | None = None) -> float:
        """Report, and start anew.

        Args:
            total_steps: made in all.
            bar: the line of progress.
            validation: what a validation after these steps has found.

        Returns:
            float: the mean loss.

        Raises:
            FloatingPointError: it is not finite.
        """
        seconds = time.perf_counter() - self._since
        mine = torch.tensor([self.candidates - self._candidates_before, self._waited], dtype=torch.float64)
        candidates, waited = sum_over_ranks(mine.to(self._device)).tolist()
        record = {
            "step": total_steps,
            "loss": float(self._loss) / self._steps,
            "candidates_per_second": candidates / seconds,
            "waited_for_data": waited / dist.get_world_size() / seconds,
        }
        for name, value in self._ne.compute().items():
            task, metric = name.split("-", 1)[1].split("|")
            if metric == "lifetime_ne":
                record[f"ne/{task}"] = float(value)
        record |= validation or {}
        if not math.isfinite(record["loss"]):
            raise FloatingPointError(
                f"step {total_steps}: the loss is {record['loss']}: lower the learning rates, or look at the data"
            )
        if self._tensorboard is not None:
            for name, value in record.items():
                self._tensorboard.add_scalar(name, value, total_steps)
            with self._file.open("a") as file:
                file.write(json.dumps(record) + "\n")
        shown = {"loss": f"{record['loss']:.4f}", "cand/s": f"{record['candidates_per_second']:.0f}"}
        bar.set_postfix(
            shown | {k: f"{v:.4f}" for k, v in record.items() if k.startswith(("ne/", "validation/"))}, refresh=False
        )
        self._restart()
        return record["loss"]

    def close(self) -> None:
        """Write what TensorBoard has not written yet."""
        if self._tensorboard is not None:
            self._tensorboard.close()
