"""Figures and tables drawn from what a batch left behind."""
