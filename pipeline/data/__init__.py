"""From what people have to shards, and from shards to batches."""
