"""Trains a model once for each way to spread tables that CPUs can, on the ranks of torchrun or alone."""

import sys
from pathlib import Path

from torchrec_amort.jobs.train import train_run
from torchrec_amort.models.build import ModelConfig
from torchrec_amort.training.loop import LoopConfig
from torchrec_amort.training.processes import process_group
from torchrec_amort.training.run import TrainConfig
from torchrec_amort.training.sharding import ShardingConfig, ShardingWay, TableSharding

# Of the tables of bags, and of those of sequences, which are not told apart by a name.
SEQUENCE_TABLES = ("item", "history_action", "history_age")
WAYS: dict[str, tuple[ShardingWay, ShardingWay]] = {
    "table_wise": ("table_wise", "table_wise"),
    "row_wise": ("table_wise", "row_wise"),
    "column_wise": ("column_wise", "column_wise"),
    "table_column_wise": ("table_column_wise", "column_wise"),
    "data_parallel": ("data_parallel", "table_wise"),
}


def train_every_way(data: str, out: str) -> None:
    """Train, each in a folder of its own."""
    with process_group() as device:
        for name, (bags, sequences) in WAYS.items():
            sequence = TableSharding(ways=[sequences], min_columns=4)
            config = TrainConfig(
                data=data,
                run_folder=f"{out}/{name}",
                model=ModelConfig(embedding_dim=8, history_length=8, over_layers=[16], dense_layers=[]),
                loop=LoopConfig(epochs=1, log_every=1),
                sharding=ShardingConfig(
                    default=TableSharding(ways=[bags], min_columns=4),
                    tables=dict.fromkeys(SEQUENCE_TABLES, sequence),
                ),
                batch_size=200,
            )
            Path(config.run_folder).mkdir(parents=True, exist_ok=True)
            train_run(config, device)


if __name__ == "__main__":
    train_every_way(*sys.argv[1:])
