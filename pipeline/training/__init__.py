"""One training loop, its evaluation and its metrics."""
