"""What is trained beside the frozen backbone: connections, biases, norms, the SMoA bank and the head."""
