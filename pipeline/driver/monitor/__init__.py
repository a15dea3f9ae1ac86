"""What a running batch tells: a log of events, the state of every task, metrics of Ray."""
