"""The mathematics: tensors and jagged tensors, no files, no process groups."""
