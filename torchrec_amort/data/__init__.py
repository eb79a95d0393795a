"""From logs to request-level Parquet to RequestBatch."""
