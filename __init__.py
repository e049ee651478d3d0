"""speccert: certified robustness of neural networks from proved spectral norms.

Import the parts by name, e.g. ``from speccert.certify import certified_radii``; this module imports
nothing, so that ``certify --help`` answers at once.
"""

__version__ = "0.1.0"
