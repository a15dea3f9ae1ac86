"""The products of connections, as compiled code where there is a compiler."""
