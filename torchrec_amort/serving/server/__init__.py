"""A server of scores over the Open Inference Protocol."""
