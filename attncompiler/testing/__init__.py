"""What proves a kernel: the error budget, the runs and the laws that the conformance suite holds every kernel to."""
