"""Modules put together with TorchRec into models."""
