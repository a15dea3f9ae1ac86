"""Which connections are selected: ranked, the top K of them, and those that need no data."""
