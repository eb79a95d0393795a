"""From raw logs to requests: one plan of SQL, run by an engine, and what becomes of its rows."""
