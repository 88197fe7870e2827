"""sidestep: a service mesh data plane without sidecars."""

__version__ = "0.1.0"
