"""latentstore: a precomputed-latent store for origin identification.

The data side: encode images once into a Zarr store, read them back at the speed of the disk, match.
The mathematics lives in :mod:`solvers`, the commands in :mod:`cli`; this package imports neither.
"""

from latentstore._version import __version__

__all__ = ["__version__"]
