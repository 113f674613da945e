"""A run's model as other programs load it, measured: the adapter (adapter.py), or the whole (model.py)."""
