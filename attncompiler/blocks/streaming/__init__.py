"""What streams through a GPU, in Triton: every tensor is read once and written once, and little is computed between."""
