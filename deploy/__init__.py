"""Composition root: the `introvert` command, the demo and the cluster files."""
