"""Training and evaluation on prepared data folders: where what reads data and what trains meet."""
