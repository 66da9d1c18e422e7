"""Ray's cluster: what it has, how to reach it, what to wait for."""
