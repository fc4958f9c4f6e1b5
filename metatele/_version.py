"""Version of the package, apart so that nothing below has to import the front door."""

__version__ = "0.2.0"
