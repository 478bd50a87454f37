"""The version, written once: the build backend, the command line and checkpoints read it here."""

__version__ = "0.1.0"
