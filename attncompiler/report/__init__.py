"""Reports: what a model is and what runs where, for people."""
