"""The commands: a thin layer that joins :mod:`latentstore` and :mod:`solvers`."""
