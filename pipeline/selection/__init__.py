"""Which connections a task may change: GPS (arXiv 2312.10136)."""
