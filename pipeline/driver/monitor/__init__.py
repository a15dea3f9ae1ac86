"""Monitoring of a running batch: event log, state of every task, and Ray metrics."""
