"""Serving: the scorer, the cache of histories, export."""
