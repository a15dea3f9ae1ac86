"""The gradient of selected connections, with a fused GPU kernel where one can be compiled."""
