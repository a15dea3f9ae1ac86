"""A Ray Tune study over accuracy and bytes."""
