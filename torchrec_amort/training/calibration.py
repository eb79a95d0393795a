"""How often what was predicted came true, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torchrec_amort.files import new_file


def draw_calibration(path: Path, curves: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Draw the observed rate against the predicted one, a curve for each task.

    Args:
        path: of the picture, a PNG file.
        curves: of `EvaluateResult.calibration`.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - of the extra `report`

    figure = Figure(figsize=(5, 5), layout="constrained")
    panel = figure.subplots()
    for task, bins in curves.items():
        panel.plot([one["predicted"] for one in bins], [one["observed"] for one in bins], marker=".", label=task)
    panel.axline((0, 0), slope=1, color="gray", linewidth=0.8, linestyle="--")
    panel.set_xlabel("predicted rate")
    panel.set_ylabel("observed rate")
    panel.grid(alpha=0.3)
    panel.legend()
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=110)
