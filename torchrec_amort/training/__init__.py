"""Sharding plan, optimizers, loop, checkpoint, metrics."""
