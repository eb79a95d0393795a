"""`torchrec-amort evaluate`: quality of a trained model on a split."""

from __future__ import annotations

from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import record

from torchrec_amort.apps.command import parse, run_command
from torchrec_amort.jobs.evaluate import EvaluateConfig, evaluate_run
from torchrec_amort.training.processes import process_group


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; it leaves `evaluate-SPLIT.json` in the run's folder.

    Args:
        args: the command line; the process' own if None.

    Example::

        main(["--run_folder", "runs/first", "--split", "validation"])
    """
    config = parse(EvaluateConfig, "evaluate", args)
    run_command(lambda: _evaluate(config), "train")


@record
def _evaluate(config: EvaluateConfig) -> None:
    with process_group() as device:
        evaluate_run(config, device)


if __name__ == "__main__":
    main()
