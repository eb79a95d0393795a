"""Everything that measures: latency, memory, quality and cost of models and of the ways to run them."""
